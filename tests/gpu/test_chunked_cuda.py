"""The chunked kernels on a Hopper GPU: the case table against the float64 oracle, larger shapes against a float64 sum.

Also equal bits, CUDA graphs, poisoned workspaces, splitting a sequence, and the public function. Skipped where there is no
such GPU or no compiled library.
"""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_power  # noqa: E402
from bridge import cases, spec  # noqa: E402
from torch_power.cuda import library, power  # noqa: E402

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

TABLE = [(case, dtype) for case in cases.POWER for dtype in ("bfloat16", "float16") if "chunked" in case.forms]
GRADIENTS = ("dq", "dk", "dv", "dlog_g", "ds0", "dz0")


def to_torch(x: np.ndarray) -> torch.Tensor:
    """A NumPy array on the GPU, bfloat16 through its bits."""
    if x.dtype == cases.NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(x).cuda()


def run(case: cases.Case, arrays: dict[str, torch.Tensor], keep: bool = True) -> dict[str, torch.Tensor]:
    """Outputs and gradients of the raw implementation, by the oracle's names; `keep` hands states to the backward pass."""
    q, k, v, dy = (arrays[name] for name in ("q", "k", "v", "dy"))
    log_g, s0, z0, ds, dz = (arrays.get(name) for name in ("log_g", "s0", "z0", "ds", "dz"))
    options = {name: getattr(case, name) for name in ("deg", "scale", "causal", "normalize", "return_state")}
    call = spec.check_power(q, k, v, log_g, **options, form="chunked", initial_state=None if s0 is None else (s0, z0))
    reason = power.supports(call, "cuda")
    if reason is not None:
        pytest.skip(reason)
    saved = torch.empty(power.saved_bytes(call), dtype=torch.uint8, device="cuda") if keep else None
    y, norm, s, z = power.forward(call, q, k, v, log_g, s0, z0, saved)
    gradients = power.backward(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz, saved)
    got = {"y": y, "s": s, "z": z} | dict(zip(GRADIENTS, gradients, strict=True))
    return {name: x for name, x in got.items() if x is not None}


def random_case(t: int, dtype: str = "bfloat16", **changes) -> tuple[cases.Case, dict[str, torch.Tensor]]:
    case = cases.Case("random", t=t, **({"h_q": 2, "h_kv": 2, "d": 64, "e": 64} | changes))
    return case, {name: to_torch(x) for name, x in case.make(dtype, seed=3).items()}


def assert_equal_bits(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> None:
    for name, x in want.items():
        assert torch.equal(got[name].view(torch.uint8), x.view(torch.uint8)), name


@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=lambda x: getattr(x, "name", x))
def test_matches_oracle(case: cases.Case, dtype: str) -> None:
    arrays = case.make(dtype, seed=0)
    got = run(case, {name: to_torch(x) for name, x in arrays.items()})
    found = cases.errors({name: x.float().cpu().numpy() for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "cuda", case), f"{case.name} {dtype}")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"t": 1333, "h_q": 6, "h_kv": 2, "d": 64, "e": 64, "initial_state": True, "return_state": True},
        {"t": 1500, "d": 64, "e": 64, "gates": "mixed"},
        {"t": 900, "d": 128, "e": 128, "return_state": True},
        {"t": 700, "d": 96, "e": 64, "initial_state": True},
        {"t": 700, "d": 32, "e": 128},
        {"t": 2048, "d": 64, "e": 64, "std": 8.0, "gates": None, "h_q": 1, "h_kv": 1},
        {"t": 1100, "d": 64, "e": 64, "normalize": False, "initial_state": True},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_longer_than_a_chunk(changes: dict, dtype: str) -> None:
    case = cases.Case("long", **changes)
    arrays = case.make(dtype, seed=1)
    got = run(case, {name: to_torch(x) for name, x in arrays.items()})
    found = cases.errors({name: x.float().cpu().numpy() for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "cuda", case), f"{changes} {dtype}")


def errors_against_float64(case: cases.Case, arrays: dict[str, torch.Tensor], got: dict[str, torch.Tensor]) -> dict[str, float]:
    """Errors of y and every gradient against the chunked form in float64, which is linear in t (the oracle is not)."""
    names = [name for name in ("q", "k", "v", "log_g", "s0", "z0") if name in arrays]
    leaves = {name: arrays[name].double().requires_grad_() for name in names}
    state = torch_power.PowerState(leaves["s0"], leaves["z0"]) if case.initial_state else None
    result = torch_power.power_attention(
        leaves["q"], leaves["k"], leaves["v"], leaves["log_g"], initial_state=state, normalize=case.normalize,
        return_state=case.return_state, form="chunked", implementation="eager",
    )  # fmt: skip
    outputs = [result[0], *result[1]] if case.return_state else [result]
    upstream = [arrays[name].double() for name in ("dy", "ds", "dz")[: len(outputs)]]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream)
    want = {"y": outputs[0].detach()} | {f"d{name}": x for name, x in zip(names, gradients, strict=True)}
    return {name: float((got[name].double() - x).norm() / x.norm()) for name, x in want.items()}


# The float64 reference takes 30 s at 1048576 and 20 GB at d = 128.
VERY_LONG = [
    (262144, 64, "bfloat16"), (1048576, 64, "bfloat16"), (131072, 128, "bfloat16"),
    (131072, 64, "float16"), (65536, 128, "float16"),
]  # fmt: skip


@pytest.mark.parametrize(("t", "d", "dtype"), VERY_LONG)
def test_gates_of_a_very_long_sequence(t: int, d: int, dtype: str) -> None:
    """dlog_g is a sum over all other tokens: its rounding errors must not walk with t (8.0e-3 at 262144 where they did)."""
    case, arrays = random_case(t, dtype, h_q=1, h_kv=1, d=d, e=d)
    found = errors_against_float64(case, arrays, run(case, arrays))
    bounds = cases.bounds(dtype, "cuda", case)
    cases.assert_within(found, bounds | {"dlog_g": min(bounds["dlog_g"], 3.2e-3)}, f"t={t} d={d} {dtype}")


@pytest.mark.parametrize("keep", [True, False])
@pytest.mark.parametrize(
    "changes",
    [
        {"h_q": 4, "initial_state": True, "return_state": True},
        {"normalize": False, "return_state": True},
        {"d": 40, "e": 24},
        {"d": 128, "e": 128, "h_q": 1, "h_kv": 1},
    ],
    ids=str,
)
def test_long_sequences_against_float64_in_chunks(changes: dict, keep: bool) -> None:
    """Past several anchors of dlog_g, whose sums meet states of every kind, kept or worked out again."""
    case, arrays = random_case(50001, **changes)
    found = errors_against_float64(case, arrays, run(case, arrays, keep))
    cases.assert_within(found, cases.bounds("bfloat16", "cuda", case), f"{changes}")


def test_two_hundred_runs_give_equal_bits() -> None:
    case, arrays = random_case(2500, h_q=4, initial_state=True, return_state=True)
    want = run(case, arrays)
    for _ in range(200):
        assert_equal_bits(run(case, arrays), want)


LENDING = [{"t": 34000, "h_q": 8, "h_kv": 8}, {"b": 3, "t": 12000, "h_q": 8, "h_kv": 8}]


@pytest.mark.parametrize("changes", [{}, {"h_q": 4}, {"d": 96, "e": 64}, {"t": 2304}, {"normalize": False}, *LENDING], ids=str)
def test_saved_states_or_states_worked_out_again(changes: dict) -> None:
    """Also where nothing is padded: t a multiple of the chunk; and where, with saved states, dk and dv lend memory."""
    case, arrays = random_case(**({"t": 2500, "initial_state": True, "return_state": True} | changes))
    assert_equal_bits(run(case, arrays, keep=False), run(case, arrays))


def test_what_is_kept_between_the_passes(monkeypatch) -> None:
    """The states when a gradient will be wanted, and only then; nothing when told so; the same gradients."""
    _, arrays = random_case(1200)
    leaves = [arrays[name].requires_grad_() for name in ("q", "k", "v", "log_g")]

    def kept_and_gradients() -> tuple[int, tuple[torch.Tensor, ...]]:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        y = torch_power.power_attention(*leaves, form="chunked", implementation="cuda")
        return torch.cuda.memory_allocated() - before, torch.autograd.grad(y, leaves, arrays["dy"])

    call = spec.check_power(*leaves, deg=2, form="chunked")
    states = power.saved_bytes(call)
    with_states, want = kept_and_gradients()
    with torch.no_grad():
        before = torch.cuda.memory_allocated()
        y = torch_power.power_attention(*leaves, form="chunked", implementation="cuda")
        assert torch.cuda.memory_allocated() - before < states <= with_states
        del y
    monkeypatch.setattr(power, "KEEP_STATES", False)
    without, got = kept_and_gradients()
    assert without <= with_states - states
    assert_equal_bits(dict(enumerate(got)), dict(enumerate(want)))


def test_vmap_over_upstream_gradients() -> None:
    """A gradient mapped over dy, behind a forward pass that was not: its states do not fit the folded batch."""
    _, arrays = random_case(700)
    inputs = tuple(arrays[name] for name in ("q", "k", "v", "log_g"))

    def attend(*x: torch.Tensor) -> torch.Tensor:
        return torch_power.power_attention(*x, form="chunked", implementation="cuda")

    upstream = torch.stack([arrays["dy"], arrays["dy"].flip(1)])
    _, pull_back = torch.func.vjp(attend, *inputs)
    for name, got, *want in zip("qkvg", torch.vmap(pull_back)(upstream), *map(pull_back, upstream), strict=True):
        assert torch.equal(got, torch.stack(want)), name


def test_nothing_depends_on_what_memory_held() -> None:
    """Workspaces and outputs come from memory full of NaN, then of ones: the same bits."""
    case, arrays = random_case(1200, initial_state=True, return_state=True)
    results = []
    for value in (float("nan"), 1.0):
        for _ in range(2):
            torch.full((1 << 27,), value, device="cuda")  # freed at once: the allocator hands it out again
        results.append(run(case, arrays))
    assert_equal_bits(*results)


def test_in_a_cuda_graph() -> None:
    case, arrays = random_case(1200)
    run(case, arrays)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = run(case, arrays)
    for name in ("q", "k", "v", "dy"):
        arrays[name].copy_(torch.randn_like(arrays[name]))
    want = run(case, arrays)
    graph.replay()
    torch.cuda.synchronize()
    assert_equal_bits(got, want)


def test_any_strides() -> None:
    case, arrays = random_case(600)
    want = run(case, arrays)
    odd = dict(arrays)
    odd["q"] = arrays["q"].transpose(1, 2).contiguous().transpose(1, 2)
    odd["k"] = torch.nn.functional.pad(arrays["k"], (0, 1))[..., :-1]
    odd["v"] = arrays["v"].repeat_interleave(2, -1)[..., ::2]
    assert_equal_bits(run(case, odd), want)


def test_splitting_a_sequence() -> None:
    case, arrays = random_case(1500, return_state=True)
    q, k, v, log_g = (arrays[name] for name in ("q", "k", "v", "log_g"))
    whole, state = torch_power.power_attention(q, k, v, log_g, form="chunked", implementation="cuda", return_state=True)
    parts, carried = [], None
    for first, last in ((0, 700), (700, 701), (701, 1500)):
        x = (a[:, first:last] for a in (q, k, v, log_g))
        y, carried = torch_power.power_attention(
            *x, form="chunked", implementation="cuda", initial_state=carried, return_state=True
        )
        parts.append(y)
    y = torch.cat(parts, 1)
    assert (y - whole).float().norm() < 3e-3 * whole.float().norm()
    for got, want in zip(carried, state, strict=True):
        assert (got - want).norm() < 1e-3 * want.norm()


def test_public_function_and_autograd() -> None:
    case, arrays = random_case(700)
    leaves = [arrays[name].clone().requires_grad_() for name in ("q", "k", "v", "log_g")]
    y = torch_power.power_attention(*leaves, form="chunked", implementation="cuda")
    y.backward(arrays["dy"])
    want = run(case, arrays)
    got = {"y": y.detach()} | {f"d{name}": x.grad for name, x in zip(("q", "k", "v", "log_g"), leaves, strict=True)}
    assert_equal_bits(got, want)


def test_what_is_not_served_says_so() -> None:
    q = torch.randn(1, 16, 1, 8, device="cuda", dtype=torch.float32)
    with pytest.raises(NotImplementedError, match="float32"):
        torch_power.power_attention(q, q, q, form="chunked", implementation="cuda")
    q = q.bfloat16()
    with pytest.raises(NotImplementedError, match="deg=4"):
        torch_power.power_attention(q, q, q, deg=4, form="chunked", implementation="cuda")
