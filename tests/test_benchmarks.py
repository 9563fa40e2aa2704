"""The benchmarks: float64 checks at any length, a runner that refuses wrong results and takes turns, result files, plots."""

from __future__ import annotations

import functools
import json
import os

import numpy as np
import pytest

pytest.importorskip("absl.flags")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import exact, plot, registry, run
from bridge import cases, oracle, oracle_sdpa

SHAPE = registry.Shape(t=24, h_q=4, h_kv=2, d=8, e=8)


def inputs():
    arrays = SHAPE.make()
    rows = exact.sampled_rows(SHAPE.t)[::3]
    return arrays | {"dy": exact.keep_rows(arrays["dy"], rows)}, rows


@pytest.mark.parametrize("deg", [2, 4])
@pytest.mark.parametrize("gates", [False, True])
def test_exact_power_is_the_oracle(deg, gates):
    arrays, rows = inputs()
    gate = {"log_g": arrays.pop("log_g")}
    arrays |= gate if gates else {}
    found = exact.power(arrays, rows, deg=deg)
    qkvg = [arrays.get(name) for name in ("q", "k", "v", "log_g")]
    want = oracle.power_grads(*qkvg, dy=arrays["dy"], deg=deg)._asdict()
    want = {name: x for name, x in want.items() if x is not None} | {"y": oracle.power(*qkvg, deg=deg).y[:, rows]}
    assert set(found) == set(want)
    for name, x in want.items():
        assert cases.relative_error(found[name], x) < 1e-13, name


def test_exact_sdpa_is_the_oracle():
    arrays, rows = inputs()
    found = exact.sdpa(arrays, rows)
    qkv = [arrays[name] for name in ("q", "k", "v")]
    want = oracle_sdpa.sdpa_grads(*qkv, dy=arrays["dy"], causal=True)._asdict()
    want |= {"y": oracle_sdpa.sdpa(*qkv, causal=True).y[:, rows]}
    for name, x in found.items():
        assert cases.relative_error(x, want[name]) < 1e-13, name


def test_sampled_rows_are_spread():
    for t in (2, 3, 40, 1000):
        rows = exact.sampled_rows(t)
        assert (rows[0], rows[-1]) == (1, t - 1)  # the first row's gradient is rounding alone
        assert len(rows) == min(t - 1, exact.ROWS) == len(set(rows))


# ---------------------------------------------------------------------------------------------------------------------
# The runner, with contestants in NumPy
# ---------------------------------------------------------------------------------------------------------------------


class Pretender(registry.Contestant):
    """A contestant that answers with the oracle's results, one of them multiplied by a factor, and counts its calls."""

    def prepare(self, shape, arrays, device):
        wrong, factor, calls = self.function(shape)

        def both(dy):
            calls.append(self.name)
            qkvg = [arrays[name] for name in ("q", "k", "v", "log_g")]
            found = {"y": oracle.power(*qkvg).y} | oracle.power_grads(*qkvg, dy=dy)._asdict()
            return {name: x * (factor if name == wrong else 1.0) for name, x in found.items() if x is not None}

        return registry.Ready({"both": both, "forward": both}, lambda dy: dy, lambda result: None, lambda x: x)


def pretender(name, calls, wrong="", factor=1.0, slack=1.0):
    return Pretender(name, "numpy", "power", lambda shape: (wrong, factor, calls), slack=slack)


def compare(entrants, rounds=2):
    return run.compare(entrants, registry.Shape(t=6, h_q=1, h_kv=1, d=8, e=8), "both", "cpu", rounds, 0.0)


@pytest.mark.parametrize("tensor", ["y", "dq", "dk", "dv", "dlog_g"])
def test_a_wrong_contestant_has_no_time(tensor):
    calls = []
    right, wrong = compare([pretender("right", calls), pretender("wrong", calls, tensor, 1.0 + 1e-4)])
    assert right["status"] == "timed" and right["seconds"] > 0
    assert wrong["status"] == "wrong" and "seconds" not in wrong
    assert tensor in wrong["reason"] and "0.0001" in wrong["reason"]
    assert calls.count("wrong") == 1  # it was checked, and never called again


def test_slack_is_for_peers():
    error = 1.0 + 3 * cases.bounds("float32", "portable")["y"]
    calls = []
    own, peer = compare([pretender("own", calls, "y", error), pretender("peer", calls, "y", error, slack=4.0)])
    assert (own["status"], peer["status"]) == ("wrong", "timed")


def test_contestants_take_turns():
    calls = []
    rows = compare([pretender("a", calls), pretender("b", calls)], rounds=3)
    assert calls[-6:] == ["a", "b"] * 3
    assert all(len(row["samples"]) == 3 for row in rows)
    assert all(row["low"] <= row["seconds"] <= row["high"] for row in rows)


@pytest.mark.parametrize(
    "error,status",
    [(NotImplementedError("no such degree"), "not served"), (RuntimeError("illegal\naddress"), "failed")],
)
def test_a_contestant_that_raises_stops_nobody(error, status):
    class Raises(registry.Contestant):
        def prepare(self, shape, arrays, device):
            raise error

    raises = Raises("raises", "numpy", "power", lambda shape: None)
    first, second = compare([raises, pretender("right", [])])
    assert (first["status"], second["status"]) == (status, "timed")
    assert str(error).split()[0] in first["reason"] and "\n" not in first["reason"]


def test_short_calls_are_repeated():
    seen = []

    def watch(repeats):
        seen.append(repeats)
        return 0.001

    samples = run.interleave({"short": watch}, 2, 0.01)
    assert seen == [1, 1, 10, 10]
    assert samples == {"short": [0.001, 0.001]}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

ARGUMENTS = ["run", "--t=4,8", "--h=2", "--d=8", "--rounds=2", "--least=0"]


@pytest.fixture
def everyone(monkeypatch):
    monkeypatch.setattr(registry, "contestants", lambda device: (pretender("one", []), pretender("two", [])))
    monkeypatch.setattr(registry, "device_names", lambda device: {"numpy": "abacus"})


def test_result_file_and_plot(everyone, tmp_path, capsys):
    out = tmp_path / "result.json"
    assert run.main([*ARGUMENTS, "--base=one", f"--out={out}"]) == 0
    assert "against one" in capsys.readouterr().out
    result = json.loads(out.read_text())
    about = {"schema", "argv", "commit", "time", "device", "environment", "compilation_cache", "base"}
    assert set(result) == about | {"rows"} and result["compilation_cache"] is ("JAX_COMPILATION_CACHE_DIR" in os.environ)
    assert result["base"] == "one" and result["device"] == {"kind": "cpu", "names": {"numpy": "abacus"}}
    assert result["environment"]["versions"]["numpy"] == np.__version__
    assert [(row["contestant"], row["t"]) for row in result["rows"]] == [("one", 4), ("two", 4), ("one", 8), ("two", 8)]
    for row in result["rows"]:
        assert {"framework", "operation", "pass", "b", "h_q", "h_kv", "d", "e", "deg", "dtype", "gates"} <= set(row)
        assert row["first_seconds"] > 0 and "kernel_seconds" not in row
        assert row["status"] == "timed" and row["samples"] and set(row["errors"]) == {"y", "dq", "dk", "dv", "dlog_g"}
    assert list(tmp_path.iterdir()) == [out]

    for suffix in (".svg", ".png"):
        figure = tmp_path / f"figure{suffix}"
        assert plot.main(["plot", str(out), f"--out={figure}"]) == 0
        assert figure.stat().st_size > 1000
    assert "one" in (tmp_path / "figure.svg").read_text()


def test_someone_wrong_fails_the_command(monkeypatch, capsys):
    monkeypatch.setattr(registry, "contestants", lambda device: (pretender("off", [], "dk", 2.0),))
    assert run.main(ARGUMENTS) == 1
    assert "off wrong: dk" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argument,told",
    [
        ("--t=many", "whole numbers"),
        ("--t=1", "at least 2"),
        ("--contestants=nobody*", "'nobody*'"),
        ("--base=three", "'three'"),
        ("--deg=3", "even"),
        ("--h_kv=3", "not a multiple"),
        ("--dtype=int8", "dtype"),
        ("--pass=backward", "pass"),
        ("--device=tpu", "device"),
        ("--out=/proc/nowhere/all.json", "--out"),
        ("--out=/proc", "--out"),
        ("--colour=red", "colour"),
        ("stray", "'stray'"),
    ],
)
def test_bad_command(everyone, capsys, argument, told):
    assert run.main([*ARGUMENTS, argument]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("benchmarks: ") and told in error


@pytest.mark.parametrize("text", [None, "{", "{}", '{"rows": []}'])
def test_plot_of_no_result(tmp_path, capsys, text):
    file = tmp_path / "result.json"
    if text is not None:
        file.write_text(text)
    assert plot.main(["plot", str(file)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and error.startswith("plot: ")


# ---------------------------------------------------------------------------------------------------------------------
# The registry
# ---------------------------------------------------------------------------------------------------------------------


def test_everyone_is_here():
    names = {contestant.name for contestant in registry.contestants("cpu")}
    if any(name.startswith("torch_power/") for name in names):
        assert {"torch_power/auto", "torch_power/eager/chunked", "torch_power/eager/sdpa", "torch/sdpa"} <= names
    if any(name.startswith("jax_power/") for name in names):
        assert {"jax_power/auto", "jax_power/xla/attention", "jax_power/xla/sdpa", "jax/sdpa-xla"} <= names
    assert names and not any("cudnn" in name or "flash" in name or "retention" in name for name in names)


def test_select():
    everyone = [pretender(name, []) for name in ("a/x", "a/y", "b/x")]
    chosen = functools.partial(registry.select, everyone)
    assert [x.name for x in chosen([])] == ["a/x", "a/y", "b/x"]
    assert [x.name for x in chosen(["b/x", "a/*"])] == ["a/x", "a/y", "b/x"]
    assert [x.name for x in chosen(["*/x"])] == ["a/x", "b/x"]
    with pytest.raises(ValueError, match="'c/'"):
        chosen(["c/"])


@pytest.mark.parametrize("name", ["torch_power/eager/attention", "torch/sdpa", "jax/sdpa-xla", "torch_power/eager/sdpa"])
def test_contestants_are_right(name):
    entrants = [x for x in registry.contestants("cpu") if x.name == name]
    if not entrants:
        pytest.skip(f"{name}: its framework is not installed")
    shape = registry.Shape(t=9, h_q=2, h_kv=1, d=8, e=8)
    (row,) = run.compare(entrants, shape, "both", "cpu", 1, 0.0)
    assert row["status"] == "timed", row["reason"]
    assert set(row["errors"]) == {"y", "dq", "dk", "dv"} | ({"dlog_g"} if row["operation"] == "power" else set())
