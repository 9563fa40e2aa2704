"""The compiled CPU implementation, beyond the cases and laws that every implementation is held to."""

from __future__ import annotations

import ctypes
import dataclasses
import os
import subprocess
import sys

import numpy as np
import pytest

from bridge import cases, spec

torch = pytest.importorskip("torch")

import torch_power  # noqa: E402
from torch_power import _library, cpp  # noqa: E402

pytestmark = pytest.mark.skipif(_library.missing() is not None, reason=str(_library.missing()))

OPS = torch.ops.torch_power


@pytest.fixture
def threads():
    """Sets how many threads torch, and so the kernels, may use; restored afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def compute(case: cases.Case, form: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs and gradients of one case, by name."""
    inputs = {name: torch.from_numpy(x).requires_grad_(not name.startswith("dy")) for name, x in arrays.items()}
    state = (inputs["s0"], inputs["z0"]) if case.initial_state else None
    options = case.options() | {"form": form, "chunk_size": case.chunk_size, "implementation": "cpp"}
    result = torch_power.power_attention(
        inputs["q"], inputs["k"], inputs["v"], inputs.get("log_g"), initial_state=state, **options
    )
    y, *final = (result[0], *result[1]) if case.return_state else (result,)
    upstream = [inputs[name].detach() for name in ("dy", "ds", "dz")[: 1 + len(final)]]
    torch.autograd.backward((y, *final), upstream)
    found = {"y": y, **dict(zip(("s", "z"), final, strict=False))}
    found |= {f"d{name}": x.grad for name, x in inputs.items() if x.grad is not None}
    return {name: x.detach().numpy() for name, x in found.items()}


def test_chosen_on_the_cpu():
    q = torch.randn(1, 4, 2, 16)
    call = spec.check_power(q, q, q)
    assert torch_power.choice.CHOICE.choose("power_attention", call, None, "cpu") == "cpp"


def test_other_devices_are_refused():
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match="it runs on the CPU, the inputs are on cuda"):
        torch_power.choice.CHOICE.choose("power_attention", spec.check_power(q, q, q), "cpp", "cuda")


def test_missing_library_says_how_to_build(monkeypatch, tmp_path):
    monkeypatch.setattr(_library, "_FOLDER", tmp_path)
    reason = _library._load.__wrapped__()
    assert "is not installed" in reason and "pip install --no-build-isolation ." in reason
    monkeypatch.setattr(_library, "missing", lambda: reason)
    planned = torch_power.power._planned
    planned.cache_clear()
    q = torch.randn(1, 4, 2, 16)
    with pytest.raises(NotImplementedError, match="pip install --no-build-isolation"):
        torch_power.power_attention(q, q, q, implementation="cpp")
    assert torch_power.power_attention(q, q, q).shape == q.shape
    planned.cache_clear()


LONG = [
    # 37 chunks, so that two states are kept and the flow across 16 chunks is carried from each
    cases.Case("many_chunks", t=300, chunk_size=8, h_q=4, h_kv=2, initial_state=True, return_state=True),
    # blocks of 192 tokens: three of them, gates across them
    cases.Case("many_blocks", t=500, h_q=2, h_kv=1, d=24, e=40),
    cases.Case("many_blocks_mixed_decay", t=700, h_q=1, h_kv=1, gates="mixed"),
    cases.Case("one_head", t=1000, h_q=1, h_kv=1, initial_state=True, return_state=True, chunk_size=64),
    cases.Case("one_head_wide_group", t=450, h_q=5, h_kv=1, d=8, e=3, chunk_size=32),
]


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("form", ["attention", "chunked"])
@pytest.mark.parametrize("case", LONG, ids=lambda case: case.name)
def test_any_number_of_threads(case, form, count, threads):
    """More threads than heads cut time into segments (chunked) or deal key blocks to groups (attention)."""
    threads(count)
    arrays = case.make("float32")
    first, again = compute(case, form, arrays), compute(case, form, arrays)
    cases.assert_within(
        cases.errors(first, case.exact(arrays), case, arrays["dy"]), cases.bounds("float32", "cpp", case), case.name
    )
    for name, x in first.items():
        np.testing.assert_array_equal(x, again[name], err_msg=f"{name}: two runs differ")


# ---------------------------------------------------------------------------------------------------------------------
# Gates that make old keys forgotten: the attention form leaves them out, where that is less than a rounding error
# ---------------------------------------------------------------------------------------------------------------------

FORGETTING = cases.Case("forgetting", t=2200, h_q=1, h_kv=1, d=16, e=8)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_forgotten_keys_are_left_out_within_bounds(dtype):
    arrays = FORGETTING.make(dtype)
    found = compute(FORGETTING, "attention", arrays)
    errors = cases.errors(found, FORGETTING.exact(arrays), FORGETTING, arrays["dy"])
    cases.assert_within(errors, cases.bounds(dtype, "cpp", FORGETTING), dtype)
    # They really are left out: values that are not numbers show in the outputs of those alone that still read them.
    arrays["v"][:, :9] = np.nan
    y = compute(FORGETTING, "attention", arrays)["y"]
    assert np.isnan(y[:, :200]).any() and not np.isnan(y[:, 2000:]).any()


@pytest.mark.parametrize("early", [-0.05, 0.08], ids=["forgetting", "growing"])
def test_what_nothing_newer_outweighs_is_not_left_out(early):
    """Queries that see the first keys alone, however far the gates have decayed those (72 nats, or 46 after growing)."""
    case = cases.Case("blind", t=1400, h_q=1, h_kv=1, d=16, e=8)
    arrays = case.make("float32")
    arrays["k"][:, :70, :, 8:] = 0
    arrays["k"][:, 70:, :, :8] = 0
    arrays["q"][..., 8:] = 0
    arrays["log_g"][:, :300], arrays["log_g"][:, 300:] = early, -0.05
    found = compute(case, "attention", arrays)
    errors = cases.errors(found, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(errors, cases.bounds("float32", "cpp", case), case.name)


@pytest.mark.parametrize(("gate", "form"), [("mild", "attention"), (-1e-4, "chunked")])
def test_gates_decide_a_form_left_open(gate, form):
    """t = 6000 alone speaks for the chunked form at d = 64."""
    case = cases.Case("open", t=6000, h_q=1, h_kv=1, d=64, e=64)
    arrays = case.make("float32")
    if gate != "mild":
        arrays["log_g"][:] = gate
    got, named = (compute(case, name, arrays) for name in ("auto", form))
    for name, x in got.items():
        np.testing.assert_array_equal(x, named[name], err_msg=name)


def test_form_left_open_under_transformations():
    """compile, export and vmap carry the open form ("auto") through to C++."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 300, 2, 8) for _ in range(3))
    log_g = -0.3 * torch.rand(2, 300, 2)
    assert cpp.power.plan(spec.check_power(q, k, v, log_g)).form == "auto"

    def function(*arrays):
        return torch_power.power_attention(*arrays, implementation="cpp")

    want = function(q, k, v, log_g)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(q, k, v, log_g)
    module = torch.nn.Module()
    module.forward = function
    exported = torch.export.export(module, (q, k, v, log_g)).module()(q, k, v, log_g)
    mapped = torch.func.vmap(function)(*(x[:, None] for x in (q, k, v, log_g)))[:, 0]
    for got in (compiled, exported, mapped):
        assert torch.equal(got, want)


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_workspace_may_hold_anything(form):
    """Deterministic mode fills fresh memory with NaN (bytes: 255), which any read before a write would show."""
    case = cases.BY_NAME["state_to_state"] if form == "chunked" else cases.BY_NAME["gqa"]
    arrays = case.make("float32")
    clean = compute(case, form, arrays)
    torch.use_deterministic_algorithms(True)
    try:
        filled = compute(case, form, arrays)
    finally:
        torch.use_deterministic_algorithms(False)
    for name, x in clean.items():
        np.testing.assert_array_equal(x, filled[name], err_msg=name)


def test_strided_and_broadcast_inputs():
    torch.manual_seed(0)
    q = torch.randn(2, 4, 16, 50).permute(0, 3, 1, 2)
    k = torch.randn(2, 50, 1, 32)[..., ::2].expand(2, 50, 2, 16)
    v = torch.randn(50, 2, 2, 8).transpose(0, 2).transpose(1, 2)
    log_g = -torch.rand(50, 2).expand(2, 50, 2)
    strided = torch_power.power_attention(q, k, v, log_g, implementation="cpp")
    packed = torch_power.power_attention(*(x.contiguous() for x in (q, k, v, log_g)), implementation="cpp")
    assert torch.equal(strided, packed)


def test_mixed_dtypes():
    torch.manual_seed(0)
    q, k, v = torch.randn(1, 40, 2, 16).bfloat16(), torch.randn(1, 40, 2, 16), torch.randn(1, 40, 2, 16).half()
    got = torch_power.power_attention(q, k, v, implementation="cpp")
    want = torch_power.power_attention(*(x.double() for x in (q, k, v)), implementation="eager")
    assert got.dtype == torch.float16
    assert cases.relative_error(got.numpy(), want.numpy()) < 3e-4


# ---------------------------------------------------------------------------------------------------------------------
# The operators themselves
# ---------------------------------------------------------------------------------------------------------------------


def power_operands(gates: bool = True, state: bool = True) -> tuple:
    torch.manual_seed(0)
    rows = spec.state_rows(8, 2)
    q, k, v = torch.randn(2, 21, 4, 8), torch.randn(2, 21, 2, 8), torch.randn(2, 21, 2, 5)
    return (
        q, k, v, -torch.rand(2, 21, 2) if gates else None,
        torch.randn(2, 2, rows, 5) if state else None, torch.rand(2, 2, rows) if state else None,
    )  # fmt: skip


POWER_OPTIONS = (2, 0.5, True, True, 1, 8)


@pytest.mark.parametrize("gates", [False, True])
@pytest.mark.parametrize("state", [False, True])
def test_opcheck_power(gates, state):
    operands = power_operands(gates, state)
    torch.library.opcheck(OPS.power_forward_cpp, (*operands, *POWER_OPTIONS, state))
    y, norm, s, z = OPS.power_forward_cpp(*operands, *POWER_OPTIONS, state)
    upstream = torch.randn_like(y), *((torch.randn_like(s), torch.randn_like(z)) if state else (None, None))
    torch.library.opcheck(OPS.power_backward_cpp, (*operands, y, norm, *upstream, *POWER_OPTIONS))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("masked", [False, True])
def test_opcheck_sdpa(masked, dtype):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, h, 9, n, dtype=dtype) for h, n in ((4, 8), (2, 8), (2, 5)))
    bias = torch.randn(1, 4, 9, 1) if masked else None
    mask = torch.rand(2, 1, 9, 9) > 0.2 if masked else None
    seed = torch.tensor([3, 2**40 + 1]) if masked else None
    options = not masked, 0.3, 0.25 if masked else 0.0
    torch.library.opcheck(OPS.sdpa_forward_cpp, (q, k, v, bias, mask, seed, *options))
    out, lse = OPS.sdpa_forward_cpp(q, k, v, bias, mask, seed, *options)
    dout = torch.randn_like(out)
    torch.library.opcheck(OPS.sdpa_backward_cpp, (q, k, v, bias, mask, seed, out, lse, dout, *options, masked))


@pytest.mark.parametrize(
    ("index", "shape", "message"),
    [(1, (2, 20, 2, 8), "v does not go with k"), (3, (2, 21, 3), "axis 2 of log_g is 3, expected 2"),
     (4, (2, 2, 63, 5), "axis 2 of s0 is 63, expected 64"), (0, (2, 21, 4), "q has 3 axes, expected 4"),
     (0, (2, 22, 4, 8), "causal, but t=22 and t_kv=21")],
)  # fmt: skip
def test_operators_check_what_would_overrun(index, shape, message):
    operands = list(power_operands())
    operands[index] = torch.randn(shape)
    with pytest.raises(RuntimeError, match=message):
        OPS.power_forward_cpp(*operands, *POWER_OPTIONS, False)


def test_small_workspace_is_refused():
    """What a caller of abi.h gets for a workspace below the size asked for: a status and a reason, no write."""
    library = ctypes.CDLL(str(_library.kernels_path()))
    library.power_last_error.restype = ctypes.c_char_p
    assert library.power_abi_version() == 1

    class Array(ctypes.Structure):
        _fields_ = (("data", ctypes.c_void_p), ("stride", ctypes.c_int64 * 4), ("dtype", ctypes.c_int32))

    class Shape(ctypes.Structure):
        _fields_ = (
            *((name, ctypes.c_int64) for name in "b t t_kv h_q h_kv d e chunk_size".split()),
            ("scale", ctypes.c_double),
            *((name, ctypes.c_int32) for name in "deg form dtype causal normalize saved gates".split()),
        )

    shape = Shape(1, 4, 4, 1, 1, 8, 8, 4, 1.0, 2, 1, 0, 1, 1)
    numbers = (ctypes.c_float * 32)()
    filled = Array(ctypes.addressof(numbers), (ctypes.c_int64 * 4)(32, 8, 8, 1), 0)
    arrays = (Array * 19)(filled, filled, filled, *(Array() for _ in range(3)), filled, filled)
    status = library.power_attention_forward_cpu(ctypes.byref(shape), arrays, None, ctypes.c_int64(0), None)
    assert status == 3
    assert b"workspace of 0 bytes" in library.power_last_error()
    shape.d = 9
    assert library.power_attention_forward_cpu(ctypes.byref(shape), arrays, None, ctypes.c_int64(0), None) == 1
    assert b"no state layout for d=9 deg=2" in library.power_last_error()


@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_lesser_instruction_sets(isa):
    """Every variant this machine can run gives results within bounds; the choice is made once a process."""
    code = f"""
import torch
from bridge import cases
from tests import test_cpp
from torch_power import _library
assert _library.cpu_isa() in ("generic", "avx2", "avx512")[: {("generic", "avx2", "avx512").index(isa) + 1}]
for dtype in ("float32", "float64"):
    for name, form in (("state_to_state", "chunked"), ("mixed_decay", "attention"), ("degree_4", "chunked")):
        case = cases.BY_NAME[name]
        arrays = case.make(dtype)
        found = cases.errors(test_cpp.compute(case, form, arrays), case.exact(arrays), case, arrays["dy"])
        cases.assert_within(found, cases.bounds(dtype, "cpp", case), name)
"""
    environment = os.environ | {"POWER_CPU_ISA": isa}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_plan_takes_the_cheaper_form():
    def planned(t: int, **options):
        q = np.empty((1, t, 4, 64), np.float32)
        return cpp.power.plan(spec.check_power(q, q, q, **options)).form

    assert planned(1024) == "attention"
    assert planned(16384) == "chunked"
    assert planned(16384, form="attention") == "attention"
    assert planned(64, return_state=True) == "chunked"
    assert planned(16384, deg=6) == "attention"
    gates = np.zeros((1, 16384, 4), np.float32)
    assert planned(16384, log_g=gates) == "auto"  # the gates decide
    assert planned(16384, log_g=gates, return_state=True) == "chunked"


def test_call_is_not_changed_by_plan():
    call = spec.check_power(*(np.empty((1, 9, 2, 16), np.float32) for _ in range(3)))
    planned = cpp.power.plan(call)
    assert dataclasses.replace(planned, form=call.form) == call
