"""The benchmarks: float64 checks at any length, a runner that refuses wrong results and takes turns, result files, plots."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import pathlib
import shutil
import subprocess

import numpy as np
import pytest

pytest.importorskip("absl.flags")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")

from benchmarks import exact, plot, registry, run, table
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
# The GPU benchmarks: what they check and conclude, without a GPU
# ---------------------------------------------------------------------------------------------------------------------

RESULTS = pathlib.Path(__file__).resolve().parent.parent / "benchmarks" / "results"


@pytest.fixture
def torch():
    return pytest.importorskip("torch")


def gpu_case(torch, deg, gates, wrong=""):
    """A contestant in float64 by autograd, one of whose tensors can be wrong by 1 %, and its inputs."""
    from benchmarks import gpu

    def spoil(x, name):
        if name == wrong == "y":
            return x + 0.01 * x.detach()
        if f"d{name}" == wrong:
            x.register_hook(lambda dx: 1.01 * dx)
        return x

    def attend(q, k, v, log_g):
        b, t, h, _ = q.shape
        q, k, v = (spoil(x * 1.0, name).double() for x, name in zip((q, k, v), "qkv", strict=True))
        sums = spoil(log_g * 1.0, "log_g").double().cumsum(1) if gates else torch.zeros(b, t, h).double()
        decay = sums.transpose(1, 2)[..., :, None] - sums.transpose(1, 2)[..., None, :]
        score = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
        weight = torch.exp(score) if deg is None else score**deg
        weight = (weight * decay.clamp(max=0).exp()).tril()
        y = torch.einsum("bhij,bjhd->bihd", weight / weight.sum(-1, keepdim=True), v)
        return spoil(y, "y")

    weight = gpu.softmax_weight if deg is None else gpu.power_weight(deg)
    contestant = gpu.Contestant(attend, weight)
    return contestant, gpu.make(contestant, 2, 40, 3, 8, gates=gates, device="cpu")


@pytest.mark.parametrize("deg,gates", [(2, True), (4, False), (None, False)])
def test_gpu_checks_every_tensor(torch, deg, gates):
    from benchmarks import gpu

    contestant, x = gpu_case(torch, deg, gates)
    found = gpu.errors(contestant, x)
    # Gradients arrive in bfloat16, y and log_g's do not.
    assert set(found) == {"y", "dq", "dk", "dv"} | ({"dlog_g"} if gates else set())
    assert all(error < (2.5e-3 if name in ("dq", "dk", "dv") else 1e-6) for name, error in found.items()), found
    assert gpu.breach(contestant, found) is None


@pytest.mark.parametrize("wrong", ["y", "dq", "dk", "dv", "dlog_g"])
def test_gpu_finds_what_is_wrong(torch, wrong):
    from benchmarks import gpu

    contestant, x = gpu_case(torch, 2, True, wrong)
    found = gpu.errors(contestant, x)
    assert found[wrong] == pytest.approx(0.01, rel=0.2)  # and a rounding
    told = gpu.breach(contestant, found)
    assert told is not None and told.startswith(f"{wrong}: error ")
    assert gpu.breach(contestant._replace(ours=False), {wrong: 6e-3, "y": 0.0}) is None  # others may have four times the bound


def gpu_row(contestant, t, both, d=64, **more):
    row = {"contestant": contestant, "b": 1, "t": t, "h": 8, "d": d, "forward_ms": both / 4, "both_ms": both, "peak_mib": 900.0}
    return row | {"forward_graph_ms": both / 5, "both_graph_ms": both / 2} | more


def test_gpu_power_summary(torch):
    from benchmarks import gpu_power

    rows = [gpu_row("power", 65536, 4.0), gpu_row("cudnn", 65536, 40.0), gpu_row("power", 1048576, 70.4)]
    rows += [gpu_row("retention", 65536, 20.0), gpu_row("flash", 65536, 50.0, forward_ms=None)]
    against, memory, growth = gpu_power.summary(rows)
    ratios = against["times_faster_than"]
    assert ratios == {"cudnn_forward": 10.0, "cudnn_both": 10.0, "retention_forward": 5.0, "retention_both": 5.0}
    assert memory == {"d": 64, "t": 65536, "peak_mib": 900.0}
    assert growth["time_a_token_relative_to_flagship"] == pytest.approx({"forward": 1.1, "both": 1.1})


def test_gpu_power_covers_what_is_asked(torch):
    from benchmarks import gpu_power

    def lengths(name, d):
        return [t for t in sorted(gpu_power.LENGTHS) if gpu_power.takes_part(name, t, d)]

    everything = [2**n for n in range(9, 19)]
    assert lengths("cudnn", 64) == lengths("flash", 128) == lengths("power", 128) == everything
    assert lengths("power", 64) == [*everything, 1048576]
    chunked, attention = (gpu_power.operations(name, 1, 65536, 64)[1] for name in ("power chunked", "power attention"))
    assert (
        chunked == gpu_power.operations("power", 1, 65536, 64)[1] < attention
    )  # 36 products of 64 rows against 65536 / 2 keys


def test_gpu_power_counts_the_chunks_that_kernels_take(torch, tmp_path):
    """Against csrc/power/tiles.h, compiled for the host."""
    from benchmarks import gpu_power

    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tiles = pathlib.Path(gpu_power.__file__).parent.parent / "torch_power/csrc/power/tiles.h"
    source, library = tmp_path / "tiles.cpp", tmp_path / "tiles.so"
    call = 'extern "C" int length(long long t, int d) { return power::chunk_length(t, d, d, false); }'
    source.write_text(f'#include "{tiles}"\n{call}\n')
    subprocess.run([compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    length = ctypes.CDLL(str(library)).length
    length.argtypes = [ctypes.c_longlong, ctypes.c_int]
    for t in (1, 256, 257, 1024, 1025, 16383, 16384, 1048576):
        for d in (64, 128):
            assert gpu_power.chunk_length("power chunked", t, d) == length(t, d)
    assert gpu_power.chunk_length("retention", 65536, 64) == 1024


def test_gpu_sdpa_says_why_a_bar_is_missed(torch):
    from benchmarks import gpu_sdpa

    mine, peer = gpu_row("torch_power", 2048, 4.0, reason=None), gpu_row("cudnn", 2048, 3.0)
    forward, backward = sorted(gpu_sdpa.judge(mine, {"cudnn": peer}), key=lambda judged: judged["pass"] != "forward")
    assert (forward["ratio"], forward["bar"], forward["reached"]) == (0.75, 1.0, False)
    assert backward["pass"] == "backward" and backward["kernels_ratio"] == pytest.approx(0.75)
    profile = {
        "torch_power": [{"name": "void power::backward_kv<__nv_bfloat16, 64>(Shape)", "ms": 1.2}],
        "cudnn": [{"name": "flash_bprop", "ms": 1.0}],
    }
    told = gpu_sdpa.why(forward, mine, profile)
    assert "backward_kv 1.200" in told and "flash_bprop 1.000" in told
    quick = mine | {"forward_graph_ms": 0.5, "both_graph_ms": 2.0}
    judged = next(x for x in gpu_sdpa.judge(quick, {"cudnn": peer}) if x["pass"] == "forward")
    assert gpu_sdpa.why(judged, quick, {}).startswith("the host: 1.000 ms as called, 0.500 ms of kernels")
    refused = gpu_row("torch_power", 2048, 4.0, forward_ms=None, both_ms=None, reason="dq: error 1.0e-01")
    assert {gpu_sdpa.why(x, refused, {}) for x in gpu_sdpa.judge(refused, {"cudnn": peer})} == {"not timed: dq: error 1.0e-01"}


def test_commit_of_a_copied_tree(monkeypatch):
    monkeypatch.setenv("POWER_COMMIT", "0123abc")
    assert run.commit() == "0123abc"


def test_plot_of_gpu_results(tmp_path, capsys):
    def written(name, rows):
        file = tmp_path / name
        file.write_text(json.dumps({"about": {"device": "abacus"}, "rows": rows}))
        return file

    sides = {"causal": False, "s": 77}
    rows = [gpu_row(name, t, t / 1e3) for name in ("power", "cudnn") for t in (512, 4096)] + [
        gpu_row("power", 99, 1.0, **sides)
    ]
    lengths = written("lengths.json", rows)
    bars = written("bars.json", [gpu_row("naive", 64, 2.0, workload="cross", compiled=x, **sides) for x in (False, True)])
    for file, told in ((lengths, "microseconds a token"), (bars, "cross-attention: 64 queries, 77 keys")):
        assert plot.main(["plot", str(file)]) == 0
        drawn = file.with_suffix(".svg").read_text()
        assert told in drawn and ">99<" not in drawn and plot.digest([file]) in drawn
        first = file.with_suffix(".svg").read_bytes()
        assert plot.main(["plot", str(file)]) == 0 and file.with_suffix(".svg").read_bytes() == first
    capsys.readouterr()
    assert plot.main(["plot", str(lengths), str(bars)]) == 2
    assert "one file of a GPU benchmark" in capsys.readouterr().err


@pytest.mark.parametrize("figure", sorted(RESULTS.glob("*.svg")), ids=lambda figure: figure.stem)
def test_committed_figures_are_of_the_committed_results(figure, tmp_path):
    source = figure.with_suffix(".json")
    assert plot.digest([source]) in figure.read_text(), f"{figure.name} is older than {source.name}: python -m benchmarks.plot"
    assert plot.main(["plot", str(source), f"--out={tmp_path / figure.name}"]) == 0
    assert (tmp_path / figure.name).stat().st_size > figure.stat().st_size / 2


def test_tables_of_gpu_results(torch):
    from benchmarks import gpu_sdpa

    about = {"device": "abacus", "torch": "2", "cuda": "13", "commit": "0123456789abcdef"}

    def lines(*rows):
        return table.markdown({"about": about, "rows": rows}).splitlines()

    text = lines(gpu_row("cudnn", 512, 40.0), gpu_row("power", 512, 4.0), gpu_row("power", 4096, 8.0, both_graph_ms=None))
    assert text[0].startswith("abacus, torch 2, CUDA 13, commit 0123456789ab.")
    assert text[2] == "| d | t | power: forward | power: both | cudnn: forward | cudnn: both |"
    assert text[4] == "| 64 | 512 | 1.00 (0.800) | 4.00 (2.00) | 10.00 (8.00) | 40.00 (20.00) |"
    assert text[5] == "| 64 | 4096 | 2.00 (1.60) | 8.00 |  |  |"

    sides = {"s": 512, "causal": True, "reason": None}
    mine, peer = gpu_row("torch_power", 512, 4.0, **sides), gpu_row("cudnn", 512, 3.9, **sides)
    mine["bars"] = [x | {"why": "of the weather"} for x in gpu_sdpa.judge(mine, {"cudnn": peer})]
    text = lines(mine, peer)
    assert text[4] == "| 64 | 512 | causal | forward | 1.00 (0.800) | 0.975 (0.780) | 0.97 | cudnn (bar 1.0): of the weather |"
    assert text[5] == "| 64 | 512 | causal | backward | 3.00 (1.20) | 2.92 (1.17) | 0.97 |  |"

    text = lines(*(gpu_row("naive", 64, 2.0 + x, workload="cross", compiled=x, s=77) for x in (False, True)))
    assert text[4] == "| cross | naive | 0.500 (0.400) | 2.00 (1.00) | 0.750 (0.600) | 3.00 (1.50) | 900 |"


@pytest.mark.parametrize("text", sorted(RESULTS.glob("*.md")), ids=lambda text: text.stem)
def test_committed_tables_are_of_the_committed_results(text):
    assert text.read_text() == table.markdown(json.loads(text.with_suffix(".json").read_text()))


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
