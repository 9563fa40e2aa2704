"""The kernels of scaled dot-product attention on a Hopper GPU against the float64 oracle and float64 sums on the GPU.

Also equal bits, other strides, poisoned outputs, empty and fully masked rows, dropout's bits. Skipped where there is no
such GPU or no compiled library.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_power  # noqa: E402
from bridge import cases, cases_sdpa, oracle_sdpa, spec_sdpa  # noqa: E402
from torch_power.cuda import library  # noqa: E402
from torch_power.cuda import sdpa as kernels  # noqa: E402
from torch_power.sdpa import scaled_dot_product_attention as attention  # noqa: E402

pytestmark = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def to_torch(x: np.ndarray) -> torch.Tensor:
    """A NumPy array on the GPU, bfloat16 through its bits."""
    if x.dtype == cases.NUMPY_DTYPES["bfloat16"]:
        return torch.from_numpy(x.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(np.ascontiguousarray(x)).cuda()


# ---------------------------------------------------------------------------------------------------------------------
# The case table, by the oracle
# ---------------------------------------------------------------------------------------------------------------------


def kernel_cases() -> list[cases_sdpa.SdpaCase]:
    """Every case of the table that the kernels serve once its head sizes are multiples of 8."""
    up = lambda n: -(-n // 8) * 8  # noqa: E731
    found = [dataclasses.replace(case, d=up(case.d), e=up(case.e), strided=False) for case in cases_sdpa.SDPA]
    return [case for case in found if case.query_lengths is None and case.key_lengths is None]


TABLE = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}") for case in kernel_cases() for dtype in DTYPES if dtype in case.dtypes
]  # fmt: skip


def run_case(case: cases_sdpa.SdpaCase, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Results of the raw interface by name, in the layout of the oracle."""
    on_gpu = {name: to_torch(x) for name, x in arrays.items()}
    q, k, v, dy = (on_gpu[name].transpose(1, 2) for name in ("q", "k", "v", "dy"))
    bias, mask, seed = (on_gpu.get(name) for name in ("bias", "mask", "seed"))
    call = spec_sdpa.SdpaCall(
        b=case.b, t=case.t, s=case.keys, h_q=case.h_q, h_kv=case.h_kv, d=case.d, e=case.e,
        scale=case.d**-0.5 if case.scale is None else case.scale, dtype=str(q.dtype).removeprefix("torch."),
        causal=case.causal, window=case.window, bias=None if bias is None else tuple(bias.shape),
        mask=None if mask is None else tuple(mask.shape), bias_grad=bias is not None, dropout_p=case.dropout_p,
    )  # fmt: skip
    assert kernels.supports(call, "cuda") is None
    out, lse, residual = kernels.forward(call, q, k, v, bias, mask, seed, residual=True)
    dq, dk, dv, dbias = kernels.backward(call, q, k, v, bias, mask, seed, out, lse, dy, residual)
    got = {name: x.transpose(1, 2) for name, x in {"y": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}.items()}
    got |= {} if dbias is None else {"dbias": dbias}
    return {name: x.double().cpu().numpy() for name, x in got.items()}


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_matches_oracle(case, dtype):
    arrays = case.make(dtype)
    got, want = run_case(case, arrays), case.exact(arrays, "zero")
    seen = np.isfinite(want["lse"])
    assert (got["lse"][~seen] == -np.inf).all()
    got["lse"], want["lse"] = np.where(seen, got["lse"], 0), np.where(seen, want["lse"], 0)
    cases.assert_within(cases.errors(got, want, case, arrays["dy"]), cases_sdpa.bounds(dtype, "cuda"), f"{case.name} {dtype}")


# ---------------------------------------------------------------------------------------------------------------------
# PyTorch's matrix: dtype × heads × causal × window × head size × lengths
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = [
    (1, 1), (1, 3), (2, 1), (3, 799), (5, 64), (64, 128), (63, 65), (65, 129), (108, 256), (113, 203), (128, 217),
    (127, 512), (192, 192), (193, 385), (256, 512), (333, 99), (512, 256), (799, 3),
    (1023, 1024), (1024, 1023), (2048, 2048), (4224, 4224),
]  # fmt: skip
HEADS = {"mha": (3, 3), "mqa": (4, 1), "gqa": (6, 2)}


WINDOWS = {"all": None, "window": (100, 40)}


def seen_keys(t: int, s: int, causal: bool, window: tuple[int, int] | None) -> torch.Tensor:
    """Which key each query sees, `[t, s]`."""
    ahead = torch.arange(s, device="cuda") - torch.arange(t, device="cuda")[:, None]
    left, right = window or (t, s)
    return (ahead >= -left) & (ahead <= (min(right, 0) if causal else right))


def reference(q, k, v, dy, seen: torch.Tensor, scale: float, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Attention and its gradients by PyTorch's own operations in `dtype`, heads repeated; rows that see nothing give 0."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    group = q.shape[1] // k.shape[1]
    wide = [leaves[0], *(x.repeat_interleave(group, 1) for x in leaves[1:])]
    any_key = seen.any(-1, keepdim=True)
    scores = (wide[0] @ wide[1].mT * scale).masked_fill(~seen & any_key, -torch.inf)
    y = torch.softmax(scores, -1).masked_fill(~any_key, 0) @ wide[2]
    return dict(zip(("y", "dq", "dk", "dv"), (y.detach(), *torch.autograd.grad(y, leaves, dy.to(dtype))), strict=True))


def distance(x: torch.Tensor, want: torch.Tensor, dy: torch.Tensor) -> float:
    """Relative L2 error; relative to dy where the exact result is 0 but for cancellation."""
    size = torch.linalg.vector_norm(want)
    small = size < 1e-6 * torch.linalg.vector_norm(dy.double())
    return (torch.linalg.vector_norm(x.double() - want) / (torch.linalg.vector_norm(dy.double()) if small else size)).item()


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("sizes", [(64, 64), (96, 96), (128, 128), (40, 96), (256, 256)], ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_matrix(dtype, heads, sizes, causal, window):
    """Within the contract's bounds, and at most twice the error of PyTorch's operations in the same precision (1e-4 where those
    are exact, as with one key)."""
    (h_q, h_kv), (d, e) = HEADS[heads], sizes
    bounds = cases_sdpa.bounds(dtype, "cuda")
    torch.manual_seed(0)
    for t, s in LENGTHS:
        if max(t, s) > 1024 and (heads != "gqa" or d == 40):
            continue
        b = 2 if t < 1000 else 1
        shapes = (b, h_q, t, d), (b, h_kv, s, d), (b, h_kv, s, e), (b, h_q, t, e)
        q, k, v, dy = (torch.randn(shape, device="cuda").to(DTYPES[dtype]) for shape in shapes)
        leaves = [x.requires_grad_() for x in (q, k, v)]
        y, lse = attention(
            *leaves, is_causal=causal, enable_gqa=True, local_window_size=WINDOWS[window], return_residual=True,
            implementation="cuda",
        )  # fmt: skip
        got = dict(zip(("y", "dq", "dk", "dv"), gradients(y, leaves, dy), strict=True))
        seen = seen_keys(t, s, causal, WINDOWS[window])
        scores = (q.double() @ k.double().repeat_interleave(h_q // h_kv, 1).mT * d**-0.5).masked_fill(~seen, -torch.inf)
        torch.testing.assert_close(lse.double(), torch.logsumexp(scores, -1), atol=1e-3, rtol=1e-3)
        del scores
        exact = reference(q, k, v, dy, seen, d**-0.5, torch.float64)
        rough = reference(q, k, v, dy, seen, d**-0.5, DTYPES[dtype])
        for name, want in exact.items():
            found, theirs = distance(got[name], want, dy), distance(rough[name], want, dy)
            assert found <= min(bounds[name], max(2 * theirs, 1e-4)), (t, s, name, found, theirs)


# ---------------------------------------------------------------------------------------------------------------------
# What else must hold
# ---------------------------------------------------------------------------------------------------------------------


def normal(*shape: int, std: float = 1.0) -> torch.Tensor:
    return (torch.randn(shape, device="cuda") * std).bfloat16()


def gradients(y: torch.Tensor, leaves: list[torch.Tensor], dy: torch.Tensor) -> list[torch.Tensor]:
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("d", [64, 128])
def test_a_thousand_runs_give_equal_bits(d):
    torch.manual_seed(1)
    q, k, v, dy = normal(1, 4, 700, d), normal(1, 2, 700, d), normal(1, 2, 700, d), normal(1, 4, 700, d)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    want = None
    for _ in range(1000):
        got = gradients(attention(*leaves, is_causal=True, enable_gqa=True, implementation="cuda"), leaves, dy)
        want = got if want is None else want
        assert all(torch.equal(x, y) for x, y in zip(got, want, strict=True))


@pytest.mark.parametrize("general", [False, True], ids=["plain", "masked"])
def test_every_output_is_written(general):
    """Memory that the allocator hands out is full of NaN; no result may keep any of it."""
    torch.manual_seed(2)
    q, k, v, dy = normal(2, 3, 333, 64), normal(2, 3, 450, 64), normal(2, 3, 450, 96), normal(2, 3, 333, 96)
    mask = torch.randn(2, 1, 333, 450, device="cuda", requires_grad=True) if general else None
    leaves = [x.requires_grad_() for x in (q, k, v)] + ([mask] if general else [])
    poison = [torch.full((2**22,), float("nan"), device="cuda") for _ in range(8)]
    del poison
    for x in gradients(attention(q, k, v, mask, implementation="cuda"), leaves, dy):
        assert torch.isfinite(x).all()


def test_large_scores_move_the_reference():
    """Scores that grow by far more than 2^20 beyond those of a row's first tile."""
    torch.manual_seed(3)
    for dtype in DTYPES.values():
        for d in (64, 128):
            q, k = (normal(1, 2, 1500, d, std=8.0).to(dtype) for _ in range(2))
            v, dy = normal(1, 2, 1500, d).to(dtype), normal(1, 2, 1500, d).to(dtype)
            leaves = [x.requires_grad_() for x in (q, k, v)]
            got = gradients(attention(*leaves, is_causal=True, implementation="cuda"), leaves, dy)
            want = reference(q, k, v, dy, seen_keys(1500, 1500, True, None), d**-0.5, torch.float64)
            bounds = cases_sdpa.bounds(str(dtype).removeprefix("torch."), "cuda")
            for (name, exact), x in zip(want.items(), got, strict=True):
                assert distance(x, exact, dy) <= bounds[name], (dtype, d, name, distance(x, exact, dy))


@pytest.mark.parametrize("d", [64, 128, 256])
def test_rows_without_keys(d):
    """Rows that a mask hides altogether give 0 and no gradient; so do rows without any keys, and keys that no row sees."""
    q, k, v, dy = normal(1, 2, 200, d), normal(1, 2, 300, d), normal(1, 2, 300, d), normal(1, 2, 200, d)
    mask = torch.rand(200, 300, device="cuda") < 0.5
    mask[5], mask[64:128], mask[:, 17], mask[:, 128:256] = False, False, False, False
    leaves = [x.requires_grad_() for x in (q, k, v)]
    y, dq, dk, dv = gradients(attention(*leaves, mask, implementation="cuda"), leaves, dy)
    assert not any(x[:, :, [5, 70]].any() for x in (y, dq)) and not any(x[:, :, [17, 200]].any() for x in (dk, dv))
    assert all(torch.isfinite(x).all() for x in (y, dq, dk, dv))
    y, dq, dk, dv = gradients(attention(q, k[:, :, :0], v[:, :, :0], implementation="cuda"), leaves, dy)
    assert not any(x.any() for x in (y, dq, dk, dv))
    y, dq, dk, dv = gradients(attention(q, k, v, is_causal=True, implementation="cuda"), leaves, dy)
    assert not dk[:, :, 200:].any() and not dv[:, :, 200:].any() and dk[:, :, :200].any()


@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_dropout_is_that_of_every_other_implementation(dropout_p, causal):
    """With v the identity, an output is a row of dropped weights: zeros are exactly where the scheme has them."""
    t, h = 64, 3
    q, k = normal(2, h, t, 64, std=0.3), normal(2, h, t, 64, std=0.3)
    v = torch.eye(t, 64, device="cuda", dtype=torch.bfloat16).expand(2, h, t, 64).contiguous()
    seed = torch.tensor([123456789, 2**62 + 17], device="cuda")
    call = spec_sdpa.SdpaCall(
        b=2, t=t, s=t, h_q=h, h_kv=h, d=64, e=64, scale=0.125, dtype="bfloat16", causal=causal, dropout_p=dropout_p
    )
    out, *_ = kernels.forward(call, q, k, v, None, None, seed)
    kept = torch.from_numpy(oracle_sdpa.dropout_gains(seed.cpu().numpy(), h, t, t, dropout_p) > 0).cuda()
    assert torch.equal(out != 0, kept.tril() if causal else kept)


MASK_SHAPES = [(2, 4, 150, 200), (1, 4, 150, 200), (2, 1, 1, 200), (1, 1, 150, 1), (1, 4, 1, 1), (1, 1, 1, 1)]


@pytest.mark.parametrize("shape", MASK_SHAPES, ids=str)
@pytest.mark.parametrize("mask_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradient_of_the_mask(shape, mask_dtype):
    """Summed over every axis that the mask is broadcast over; with one axis of keys the sum is 0 but for cancellation."""
    torch.manual_seed(5)
    q, k, v, dy = normal(2, 4, 150, 64), normal(2, 2, 200, 64), normal(2, 2, 200, 64), normal(2, 4, 150, 64)
    mask = torch.randn(shape, device="cuda").to(mask_dtype).requires_grad_()
    y = attention(q, k, v, mask, enable_gqa=True, implementation="cuda")
    (got,) = torch.autograd.grad(y, mask, dy)
    wide = [x.double() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))]
    exact_mask = mask.detach().double().requires_grad_()
    exact = torch.softmax(wide[0] @ wide[1].mT * 0.125 + exact_mask, -1) @ wide[2]
    (want,) = torch.autograd.grad(exact, exact_mask, dy.double())
    assert got.dtype == mask_dtype and distance(got, want, dy) <= cases_sdpa.bounds("bfloat16", "cuda")["dbias"]


def test_dropout_comes_from_the_generator():
    """The same seed gives the same bits, forward and backward; the next call draws others."""
    leaves = [normal(2, 3, 200, 64).requires_grad_() for _ in range(3)]
    dy = normal(2, 3, 200, 64)

    def run() -> list[torch.Tensor]:
        return gradients(attention(*leaves, dropout_p=0.3, implementation="cuda"), leaves, dy)

    torch.manual_seed(11)
    first, second = run(), run()
    torch.manual_seed(11)
    again = run()
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
    assert not any(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_bottom_right_causal():
    """A field of the raw interface, key j ≤ i + t_kv − t_q; the public function says the same by a window."""
    q, k, v = normal(1, 2, 100, 64), normal(1, 2, 170, 64), normal(1, 2, 170, 64)
    bottom_right = 2  # PowerCausal
    arrays = q, k, v, None, None, None
    out, lse, _ = torch.ops.torch_power.sdpa_forward_cuda(*arrays, bottom_right, None, 0.125, 0.0, False)
    seen = torch.ones(100, 170, device="cuda", dtype=torch.bool).tril(70)
    scores = (q.double() @ k.double().mT * 0.125).masked_fill(~seen, -torch.inf)
    assert distance(out, torch.softmax(scores, -1) @ v.double(), q) <= 3e-3
    assert torch.allclose(lse.double(), torch.logsumexp(scores, -1), atol=1e-4)
    assert torch.equal(attention(q, k, v, local_window_size=(100, 70), implementation="cuda"), out)


def test_the_first_choice_that_can_serves():
    q, k = normal(1, 2, 50, 64), normal(1, 2, 50, 64)
    with torch_power.implementation(["cpp", "cuda"]):
        assert torch.equal(attention(q, k, k), attention(q, k, k, implementation="cuda"))
    told = "'cuda' cannot serve this call: dtype float32.*'cpp' cannot serve this call: it runs on the CPU"
    with torch_power.implementation(["cuda", "cpp"]), pytest.raises(NotImplementedError, match=told):
        attention(q.float(), k.float(), k.float())


def test_arrays_that_the_copy_engine_cannot_address():
    """Tokens before heads, a sliced head size, a broadcast batch, a broadcast mask: the same bits as from contiguous arrays."""
    torch.manual_seed(6)
    q, k, v = normal(2, 3, 150, 64), normal(2, 3, 150, 64), normal(2, 3, 150, 64)
    want = attention(q, k, v, implementation="cuda")
    odd = torch.nn.functional.pad(k, (1, 2))[..., 1:-2]
    assert torch.equal(attention(q.transpose(1, 2).contiguous().transpose(1, 2), odd, v, implementation="cuda"), want)
    same = attention(q, k[:1].expand(2, -1, -1, -1), v, implementation="cuda")
    assert torch.equal(same, attention(q, k[:1].repeat(2, 1, 1, 1), v, implementation="cuda"))
    keep = torch.rand(150, 300, device="cuda")[:, ::2] < 0.5
    dense = attention(q, k, v, keep.contiguous(), implementation="cuda")
    assert torch.equal(attention(q, k, v, keep, implementation="cuda"), dense)


def test_cuda_graph_replays():
    torch.manual_seed(7)
    inputs = [normal(1, 2, 333, 64) for _ in range(4)]
    leaves = [x.requires_grad_() for x in inputs[:3]]

    def run() -> list[torch.Tensor]:
        return gradients(attention(*leaves, is_causal=True, implementation="cuda"), leaves, inputs[3])

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run()
    with torch.no_grad():
        for x in inputs:
            x.copy_(torch.randn_like(x))
    graph.replay()
    for got, want in zip(captured, run(), strict=True):
        assert torch.equal(got, want)


def test_compiled_and_eager_agree():
    q, k, v = (normal(2, 4, 200, 64).requires_grad_() for _ in range(3))
    dy = normal(2, 4, 200, 64)
    function = lambda q, k, v: attention(q, k, v, is_causal=True)  # noqa: E731
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    runs = [gradients(run(q, k, v), [q, k, v], dy) for run in (compiled, function)]
    assert all(torch.equal(got, want) for got, want in zip(*runs, strict=True))
