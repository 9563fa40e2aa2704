"""The agreement run: exit statuses, one line for every bad command or file, the report's files, and that it sees a breach."""

from __future__ import annotations

import contextlib
import json
import os
import re

import ml_dtypes
import numpy as np
import pytest

pytest.importorskip("absl.flags")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("safetensors.numpy")

import safetensors.numpy

from bridge import cases, cases_sdpa, growth, inputs, measure, oracle, report, spec, twins, twins_sdpa, validate, workers

# ---------------------------------------------------------------------------------------------------------------------
# A package in NumPy: the oracle behind the twins' interface, so that the run can be tested without either framework
# ---------------------------------------------------------------------------------------------------------------------


class NumpyTwin:
    """Answers every call with the oracle's results; `spoil` changes them as a broken implementation would."""

    framework = "numpy"

    def __init__(self, name, spoil=lambda implementation, results: results):
        self.name, self.spoil = name, spoil

    def implementations(self, operation):
        return ("plain", "fused") if operation == "power_attention" else ("plain",)

    def scope(self, dtype):
        return contextlib.nullcontext()

    def numpy(self, x):
        return x

    def prepare_power(self, arrays, options, implementation, device="cpu"):
        if implementation == "fused" and options["deg"] != 2:
            raise NotImplementedError("deg=4: this one has deg=2 only")
        options = {name: x for name, x in options.items() if name not in ("form", "chunk_size", "return_state")}

        def both():
            qkvg = [arrays.get(name) for name in ("q", "k", "v", "log_g")]
            found = {"y": oracle.power(*qkvg, **options).y}
            found |= oracle.power_grads(*qkvg, dy=arrays["dy"], **options)._asdict()
            found = {name: x.astype(np.float32) for name, x in found.items() if x is not None}
            return self.spoil(implementation, found)

        return twins.Prepared(both, both, dict(arrays), lambda: None)


class InProcess(workers.Workshop):
    """A workshop whose processes are this one."""

    def call(self, twin, function, *arguments):
        return function(*arguments)


@pytest.fixture
def pretend(monkeypatch, tmp_path, request):
    """Make the run meet two NumPy packages in this process; returns the command with its report in `tmp_path`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(workers, "Workshop", InProcess)
    monkeypatch.setattr(measure, "BUDGET", 0.0)  # one call each
    if "html" not in request.node.name:
        monkeypatch.setattr(report, "_image", lambda draw, data: "")  # plots take a second each

    def install(spoil=lambda implementation, results: results):
        pair = NumpyTwin("jax_power"), NumpyTwin("torch_power", spoil)
        monkeypatch.setattr(twins, "present", lambda: pair)
        monkeypatch.setattr(measure, "_twin", {twin.name: twin for twin in pair}.__getitem__)
        monkeypatch.setattr(
            measure,
            "describe",
            lambda twin, device: {
                "implementations": {"power": ("plain", "fused"), "sdpa": ()},
                "device": "abacus",
            },
        )
        return lambda *arguments: validate.main(["validate", *arguments])

    return install


CASES = "--cases=gates,gqa,degree_4"


def test_all_holds(pretend, capsys, tmp_path):
    assert pretend()(CASES, "--dtype=float32") == 0
    out = capsys.readouterr().out.splitlines()
    assert out[-1] == os.path.join("out", "validate", "report.html")
    assert any(line.startswith("All hold: ") and "not served" in line for line in out)
    assert sorted(path.name for path in (tmp_path / "out/validate").iterdir()) == ["report.html", "report.json"]


def test_report_json(pretend, tmp_path):
    assert pretend()(CASES, "--dtype=float32", "--lengths=16,32", "--out=here") == 0
    found = json.loads((tmp_path / "here/report.json").read_text())
    assert set(found) == {
        "schema", "verdict", "inputs", "device", "environment", "memory_method", "rows", "growth", "notes", "seconds",
    }  # fmt: skip
    assert found["verdict"]["holds"] is True and found["verdict"]["worst"] is None
    assert found["device"] == {"kind": "cpu", "names": {"jax_power": "abacus", "torch_power": "abacus"}}
    assert found["environment"]["versions"]["numpy"] == np.__version__
    assert len(found["rows"]) == 3 * 3 * 2 * 2  # cases × forms × packages × implementations
    for row in found["rows"]:
        if row["case"] == "degree_4" and row["implementation"] == "fused":
            assert row["status"] == "not served" and "deg=4" in row["reason"] and not row["tensors"]
            continue
        assert row["status"] == "holds" and row["repeatable"] is None
        assert set(row["tensors"]) == {"y", "dq", "dk", "dv", "dlog_g"}
        for tensor in row["tensors"].values():
            assert 0 <= tensor["error"] <= tensor["bound"]
            assert tensor["difference"] == 0.0
        assert row["seconds"] > 0 and len(row["all_seconds"]) >= 1 and row["peak_bytes"] >= 0
    assert {(row["t"], row["form"]) for row in found["growth"]["measured"]} == {
        (t, form) for t in (16, 32) for form in ("attention", "chunked")
    }
    for entry in found["growth"]["summary"]:
        assert entry["t"] == 32 and entry["speedup"] > 0 and entry["time_growth"] > 0
    assert found["notes"] == []


def test_report_html_is_self_contained(pretend, tmp_path):
    assert pretend()(CASES, "--dtype=float32", "--lengths=16,32", "--out=here") == 0
    page = (tmp_path / "here/report.html").read_text()
    sources = re.findall(r"(?:src|href)\s*=\s*['\"]([^'\"]*)", page)
    assert len(sources) == 2 and all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert not re.search(r"https?://|<script|<link|@import|url\(", page)
    for row in ("gates", "gqa", "degree_4", "jax_power/plain", "torch_power/fused", "not served"):
        assert row in page


def spoiled(tensor, change):
    def spoil(implementation, results):
        return results | {tensor: change(results[tensor])} if implementation == "fused" else results

    return spoil


@pytest.mark.parametrize("tensor", ["y", "dq", "dk", "dv", "dlog_g"])
def test_a_wrong_tensor_is_a_breach(pretend, capsys, tmp_path, tensor):
    bound = cases.bounds("float32", "fused")[tensor]
    assert pretend(spoiled(tensor, lambda x: x * (1 + 3 * bound)))("--cases=gates", "--dtype=float32") == 1
    streams = capsys.readouterr()
    assert streams.out.splitlines()[-1].endswith("report.html")
    worst = streams.err.splitlines()[-1]
    assert worst.startswith("validate: does not hold, worst: gates float32 ") and "torch_power/fused" in worst
    assert f" {tensor}: " in worst and re.search(r"> bound .* \((2\.9|3\.|3)", worst)
    rows = json.loads((tmp_path / "out/validate/report.json").read_text())["rows"]
    broken = {(row["twin"], row["implementation"]) for row in rows if row["status"] == "breach"}
    # Its own error, and both of the other package's differences from it.
    assert ("torch_power", "fused") in broken and ("torch_power", "plain") not in broken
    assert "breach" in (tmp_path / "out/validate/report.html").read_text()


def test_packages_must_agree_with_each_other(pretend, capsys):
    """Both within the bound of the oracle, on opposite sides of it: only the difference between them is too large."""
    bound = cases.bounds("float32", "plain")["y"]
    run = pretend(lambda implementation, found: found | {"y": found["y"] * np.float32(1 - 0.8 * bound)})
    other = measure._twin("jax_power")
    other.spoil = lambda implementation, found: found | {"y": found["y"] * np.float32(1 + 0.8 * bound)}
    assert run("--cases=gates", "--dtype=float32", "--implementations=plain") == 1
    assert "y: difference from plain" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change,told",
    [(lambda x: x * np.nan, "inf > bound"), (lambda x: x[:, 1:], "inf > bound"), (lambda x: None, "TypeError")],
)
def test_nonsense_is_a_breach(pretend, capsys, change, told):
    assert pretend(spoiled("dk", change))("--cases=gates", "--dtype=float32") == 1
    assert told in capsys.readouterr().err or told == "TypeError"


def test_results_that_change_between_calls_are_a_breach(pretend, capsys, monkeypatch):
    run, calls = pretend(), []
    monkeypatch.setattr(measure, "BUDGET", 0.2)

    def drift(implementation, found):
        calls.append(implementation)
        return found | {"y": found["y"] + np.float32(len(calls) * 1e-9)}

    measure._twin("torch_power").spoil = drift
    assert run("--cases=two_tokens", "--dtype=float32") == 1
    assert "different bits" in capsys.readouterr().err


def test_a_crash_is_a_failure_and_named(pretend, capsys):
    def crash(implementation, found):
        raise RuntimeError("illegal\nmemory access")

    assert pretend(crash)("--cases=gates", "--dtype=float32") == 1
    assert "RuntimeError: illegal memory access" in capsys.readouterr().err


def test_nothing_served_is_no_pass(pretend, capsys):
    assert pretend()("--cases=degree_4", "--implementations=fused") == 1
    assert "nothing was checked" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Bad commands and files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments,told",
    [
        (["--cases=gates,gqqa"], "'gqqa'|gqqa: unknown"),
        (["--cases=sdpa:dropout"], "sdpa:dropout"),
        (["--implementations=magic"], "magic"),
        (["--device=tpu"], "device"),
        (["--dtype=int8"], "int8"),
        (["--dtype=float32,f32"], "f32"),
        (["--cases=sdpa:large_scale", "--dtype=float32"], "defined for float64"),
        (["--lengths=1e3"], "lengths"),
        (["--lengths=0"], "lengths"),
        (["--out=/proc/nowhere/report"], "/proc/nowhere/report"),
        (["--colour=red"], "colour"),
        (["stray"], "stray"),
        (["--inputs=missing.npz"], "missing.npz: no such file"),
        (["--inputs=."], "safetensors or .npz"),
    ],
)
def test_bad_command(pretend, capsys, tmp_path, arguments, told):
    assert pretend()("--cases=two_tokens", *arguments) == 2 if "--inputs" not in arguments[0] else True
    if "--inputs" in arguments[0]:
        assert pretend()(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("validate: ") and error.count("\n") == 1 and re.search(told, error)
    assert not list(tmp_path.glob("**/report*"))


def qkv(t=12, h_q=2, h_kv=1, d=8, e=8, dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    shapes = {"q": (1, t, h_q, d), "k": (1, t, h_kv, d), "v": (1, t, h_kv, e)}
    arrays = {name: rng.standard_normal(shape).astype(cases.NUMPY_DTYPES[dtype]) for name, shape in shapes.items()}
    return arrays | {"log_g": -rng.random((1, t, h_kv)).astype(np.float32)}


def save(path, arrays):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        safetensors.numpy.save_file(arrays, path)
    return path


def without(name):
    return {key: x for key, x in qkv().items() if key != name}


def with_nan():
    arrays = qkv()
    arrays["k"][0, 3, 0, 2] = np.nan
    return arrays


BAD_TENSORS = {
    "no v": (without("v"), "no tensor 'v'"),
    "unknown": (qkv() | {"bias": np.zeros(3, np.float32)}, "unknown tensor 'bias'"),
    "axes": (qkv() | {"q": np.zeros((12, 2, 8), np.float32)}, "q: expected 4 axes"),
    "length": (qkv() | {"k": np.zeros((1, 11, 1, 8), np.float32)}, "k: length 11"),
    "head size": (qkv() | {"k": np.zeros((1, 12, 1, 16), np.float32)}, r"k: expected shape \[1, 12, 1, 8\]"),
    "values": (qkv() | {"v": np.zeros((1, 12, 2, 8), np.float32)}, "v: expected shape"),
    "heads": (qkv(h_q=3, h_kv=2), "h_q=3 query heads are not a multiple of h_kv=2"),
    "gate shape": (qkv() | {"log_g": np.zeros((1, 12, 2), np.float32)}, "log_g: expected shape"),
    "gate dtype": (qkv() | {"log_g": np.zeros((1, 12, 1), np.float16)}, "log_g: dtype float16"),
    "dtype": (qkv() | {"q": np.zeros((1, 12, 2, 8), np.int32)}, "q: dtype (I32|int32)"),
    "NaN": (with_nan(), "k: 1 of 96 values are NaN or infinite"),
    "infinite": (qkv() | {"log_g": np.full((1, 12, 1), -np.inf, np.float32)}, "log_g: 12 of 12 values"),
    "mixed": (qkv() | {"v": qkv(dtype="float64")["v"]}, "float32, float64; --dtype"),
}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("name", BAD_TENSORS)
def test_bad_tensors(pretend, capsys, tmp_path, name, suffix):
    arrays, told = BAD_TENSORS[name]
    path = save(tmp_path / f"bad{suffix}", arrays)
    assert pretend()(f"--inputs={path}") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"validate: {path}: ") and error.count("\n") == 1 and re.search(told, error), error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
@pytest.mark.parametrize("cut", [0, 7, 100, -1])
def test_truncated_files(pretend, capsys, tmp_path, suffix, cut):
    path = save(tmp_path / f"cut{suffix}", qkv())
    path.write_bytes(path.read_bytes()[:cut])
    assert pretend()(f"--inputs={path}") == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and f"not a whole {suffix} file" in error


def test_npz_that_lost_bfloat16(pretend, capsys, tmp_path):
    path = save(tmp_path / "lost.npz", qkv(dtype="bfloat16"))
    assert pretend()(f"--inputs={path}") == 2
    assert "use .safetensors for bfloat16" in capsys.readouterr().err


def test_objects_are_not_unpickled(pretend, capsys, tmp_path):
    path = tmp_path / "objects.npz"
    np.savez(path, q=np.array([{}], object))
    assert pretend()(f"--inputs={path}") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_file_that_may_not_be_read(pretend, capsys, tmp_path, monkeypatch):
    path = save(tmp_path / "secret.safetensors", qkv())

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    assert pretend()(f"--inputs={path}") == 2
    assert "cannot be read" in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# Good files
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_own_tensors(pretend, tmp_path, suffix):
    path = save(tmp_path / f"mine{suffix}", qkv())
    assert pretend()(f"--inputs={path}") == 0
    found = json.loads((tmp_path / "out/validate/report.json").read_text())
    assert found["inputs"]["source"] == str(path)
    assert {row["case"] for row in found["rows"]} == {"inputs"} and {row["dtype"] for row in found["rows"]} == {"float32"}
    assert {row["form"] for row in found["rows"]} == set(spec.FORMS)
    assert found["inputs"]["digests"] == {"inputs": inputs.digest(qkv())}


def test_bfloat16_is_read_as_it_was_written(tmp_path):
    arrays = qkv(dtype="bfloat16")
    path = save(tmp_path / "bf16.safetensors", arrays)
    for name, x in inputs.load(path).items():
        assert x.dtype == arrays[name].dtype and x.tobytes() == arrays[name].tobytes()
    assert inputs.load(path)["q"].dtype == ml_dtypes.bfloat16


def test_head_size_without_a_state_runs_the_sum_only(tmp_path):
    power, sdpa = inputs.given("inputs", qkv(d=13), ("float32",))
    assert power.forms == ("attention",) and sdpa.causal


# ---------------------------------------------------------------------------------------------------------------------
# Text
# ---------------------------------------------------------------------------------------------------------------------


def test_text_is_reproducible_and_gates_forget():
    arrays = inputs.from_text(inputs.text(200))
    again = inputs.from_text(inputs.text(200))
    assert {name: x.shape for name, x in arrays.items()} == {
        "q": (1, 200, 4, 64), "k": (1, 200, 2, 64), "v": (1, 200, 2, 64), "log_g": (1, 200, 2),
    }  # fmt: skip
    assert inputs.digest(arrays) == inputs.digest(again) != inputs.digest(arrays | {"q": -arrays["q"]})
    assert (arrays["log_g"] < 0).all()
    for name in ("q", "k", "v"):
        assert 0.5 < arrays[name].std() < 2


def test_text_recipe_does_not_depend_on_the_order_of_sums():
    """Every number is a multiple of 2^-38 below 2^14: sums of them are exact in float64, whoever adds them and how."""
    arrays = inputs.from_text(b"import this, then that")
    for name in ("q", "k", "v"):
        scaled = arrays[name] * 2.0**38
        assert (scaled == np.round(scaled)).all() and np.abs(arrays[name]).max() < 2**14


def test_known_text_gives_known_inputs():
    """What the recipe makes of these bytes, on any machine and with any version of NumPy."""
    arrays = inputs.from_text(b"def attention(q, k, v):\n")
    assert np.allclose(
        arrays.pop("log_g").sum(), -3.1806418779550465, rtol=1e-12
    )  # a library's log and exp may differ in a last bit
    assert inputs.digest(arrays) == "726a622e8252d3aa"


def test_rotary_positions_are_rotations():
    x = np.random.default_rng(0).standard_normal((1, 50, 2, 8))
    turned = inputs.rotate(np.broadcast_to(x[:, :1], x.shape))
    assert np.allclose(np.linalg.norm(turned, axis=-1), np.linalg.norm(x[:, :1], axis=-1), rtol=1e-5)
    scores = np.einsum("bihd,bjhd->bhij", turned, turned)
    # Of the same vector at two places, the product depends on their distance alone.
    assert np.allclose(scores[..., 3, 10], scores[..., 30, 37], atol=1e-4)


def test_sdpa_of_given_tensors_is_the_oracle_of_all_heads():
    arrays = qkv(h_q=4, h_kv=2)
    case = inputs.given("inputs", arrays, ("float32",))[1]
    made = case.make("float32")
    want = cases_sdpa.SdpaCase("all", t=12, h_q=4, h_kv=2, d=8, e=8, causal=True).exact(made, "zero")
    for name, x in case.exact(made, "zero").items():
        assert cases.relative_error(x, want[name]) < 1e-14, name


# ---------------------------------------------------------------------------------------------------------------------
# Long sequences, growth, files
# ---------------------------------------------------------------------------------------------------------------------


def test_long_references_are_proven_first(pretend, monkeypatch, tmp_path):
    monkeypatch.setattr(validate, "ORACLE_LENGTH", 10)
    monkeypatch.setattr(validate, "PROOF_LENGTH", 6)
    path = save(tmp_path / "mine.npz", qkv())
    run = pretend()
    for twin in ("jax_power", "torch_power"):
        # The reference computes in float64, where results rounded to float32 would not do.
        prepare = measure._twin(twin).prepare_power
        monkeypatch.setattr(measure._twin(twin), "prepare_power", exact_in_float64(prepare))
    assert run(f"--inputs={path}", "--cases=inputs") == 0
    (note,) = json.loads((tmp_path / "out/validate/report.json").read_text())["notes"]
    assert "t = 12 is beyond the O(t²) oracle (10)" in note and "first 6 tokens equal the oracle" in note


def exact_in_float64(prepare):
    def prepare_power(arrays, options, implementation, device="cpu"):
        if arrays["q"].dtype != np.float64:
            return prepare(arrays, options, implementation, device)

        def both():
            qkvg = [arrays[name] for name in ("q", "k", "v", "log_g")]
            return {"y": oracle.power(*qkvg).y} | {
                name: x for name, x in oracle.power_grads(*qkvg, dy=arrays["dy"])._asdict().items() if x is not None
            }

        return twins.Prepared(both, both, dict(arrays), lambda: None)

    return prepare_power


def test_a_reference_that_is_wrong_is_not_used(pretend, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(validate, "ORACLE_LENGTH", 10)
    monkeypatch.setattr(validate, "PROOF_LENGTH", 6)
    path = save(tmp_path / "mine.npz", qkv())
    assert pretend()(f"--inputs={path}", "--cases=inputs") == 1  # float32 results do not pass for float64
    error = capsys.readouterr().err
    assert error.splitlines()[-1].startswith("validate: does not hold: torch_power/eager as the reference for inputs")


def measured(form, t, seconds, peak_bytes=100):
    row = {"twin": "torch_power", "implementation": "eager", "form": form, "t": t, "status": "ran", "reason": ""}
    return row | {"seconds": seconds, "cpu_seconds": seconds, "peak_bytes": peak_bytes}


def test_growth_is_extrapolated_and_says_so():
    rows = [measured("attention", 4096, 1.0), measured("attention", 8192, 4.0)]
    rows += [measured("chunked", 16384, 4.0, 100), measured("chunked", 32768, 8.0, 210)]
    (entry,) = growth.summary(rows)
    assert entry["attention_seconds"] == 64.0 and entry["speedup"] == 8.0 and entry["extrapolated_from"] == [4096, 8192]
    assert entry["time_growth"] == 2.0 and entry["memory_growth"] == 2.1
    (line,) = report.growth_lines([entry])
    assert "extrapolated from t = 4096, 8192" in line and "8.0x faster" in line and "memory 2.10x" in line

    (entry,) = growth.summary([*rows, measured("attention", 32768, 40.0)])
    assert entry["speedup"] == 5.0 and entry["extrapolated_from"] == []
    assert "(measured)" in report.growth_lines([entry])[0]


def test_extrapolation():
    assert growth.extrapolate({100: 1.0, 200: 3.5}, 200) == 3.5
    assert growth.extrapolate({100: 2.0}, 400) == 32.0
    # 0.01 t + 0.0001 t², and one that grows faster than t²: then by t² from the longest
    assert growth.extrapolate({100: 2.0, 200: 6.0}, 400) == pytest.approx(20.0)
    assert growth.extrapolate({100: 1.0, 200: 5.0}, 400) == pytest.approx(20.0)
    assert growth.extrapolate({50: 9.0, 100: 2.0, 200: 6.0}, 400) == pytest.approx(20.0)


def test_growth_plan_measures_long_attention_only_when_told():
    pairs, lengths = [("torch_power", "eager")], (growth.ATTENTION_LENGTH, 4 * growth.ATTENTION_LENGTH)
    short = {(point.form, point.t) for point in growth.plan(pairs, lengths, full=False)}
    full = {(point.form, point.t) for point in growth.plan(pairs, lengths, full=True)}
    assert full - short == {("attention", lengths[1])}


def test_nothing_is_left_half_written(tmp_path, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(report.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        report.write_whole(tmp_path / "report.json", "{}")
    assert not list(tmp_path.iterdir())


def test_infinite_errors_are_json():
    assert report.plain({"error": np.float64("inf"), "b": [float("nan"), 1.5]}) == {"error": "inf", "b": ["inf", 1.5]}


def test_every_case_that_can_be_named_exists():
    for name in validate.known_cases():
        if "text_" not in name:
            validate._case(name)
    assert all(name in validate.known_cases() for name, _, _ in validate.SELECTION)


def test_peak_memory_sees_what_a_call_holds():
    def hold(megabytes):
        stop = measure._resident_memory()
        held = np.ones(megabytes * 2**17)
        return stop() / 2**20, held.size

    hold(1)
    assert 60 < hold(64)[0] < 80


def test_memory_of_a_jax_program():
    jax = pytest.importorskip("jax")
    x = np.ones((64, 1024), np.float32)
    compiled = jax.jit(lambda x: x @ (x.T @ x) + 1).lower(x).compile()
    assert measure.program_memory(compiled) >= x.nbytes


@pytest.mark.skipif(not twins.present(), reason="needs a framework")
def test_programs_compiled_ahead_are_those_that_are_measured(monkeypatch):
    pytest.importorskip("jax")
    problem = validate._problem(cases.BY_NAME["two_tokens"], "float32")
    arrays = problem.case.make("float32")
    served, refused = (validate._task(problem, "attention", "jax_power", name, "cpu", arrays) for name in ("xla", "mosaic_gpu"))
    measure.compile_ahead([served, refused])
    prepare = measure._prepare
    monkeypatch.setattr(measure, "_prepare", lambda *arguments: pytest.fail("compiled again"))
    outcome = measure.measure(served)
    assert outcome.status == "ran"
    want = problem.case.exact(arrays)
    assert max(cases.relative_error(outcome.results[name], x) for name, x in want.items()) < 1e-5
    monkeypatch.setattr(measure, "_prepare", prepare)
    assert measure.measure(refused).status == "not served"
    assert not measure._ready


def test_every_program_of_a_run_is_compiled_ahead():
    request = validate.parse(["validate", "--cases=gqa,sdpa:gqa", "--dtype=float16", "--lengths=64", "--device=cuda"])
    pairs = {"power": [("jax_power", "xla"), ("torch_power", "eager")], "sdpa": [("jax_power", "xla")]}
    tasks = validate.programs(request, pairs, validate.growth.plan(pairs["power"], request.lengths, full=True))
    assert [task.twin for task in tasks] == ["jax_power"] * len(tasks)
    forms = ("attention", "chunked", "recurrent")
    named = [f"gqa float16 {form} xla" for form in forms] + ["sdpa:gqa float16 attention xla"]
    assert [task.key for task in tasks] == named + [f"growth_64 {form} xla" for form in forms[:2]]


def test_end_to_end_in_processes_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    arguments = ["--cases=degree_6,sdpa:one_query", "--dtype=float32", f"--out={tmp_path}"]
    assert validate.main(["validate", *arguments]) == 0, capsys.readouterr().err
    rows = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert {row["status"] for row in rows} <= {"holds", "not served"}
    assert {(row["twin"], row["operation"]) for row in rows if row["status"] == "holds"} == {
        (twin.name, operation) for twin in twins.present() for operation in ("power", "sdpa")
    }


@pytest.mark.skipif(not twins.present(), reason="needs a framework")
@pytest.mark.parametrize("case", ["gqa", "bias", "causal"])
def test_sdpa_through_the_public_functions(case):
    case = cases_sdpa.BY_NAME[case]
    arrays = case.make("float32")
    want = {name: x for name, x in case.exact(arrays, "zero").items() if name != "lse"}
    twin = twins.present()[-1]
    got = twins_sdpa.prepare(twin, case, arrays, None).forward_backward()
    assert set(got) == set(want)
    for name, x in want.items():
        assert cases.relative_error(twin.numpy(got[name]), x) <= cases_sdpa.bounds("float32", "portable")[name], name
