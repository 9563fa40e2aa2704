"""`torch_power.scaled_dot_product_attention` under autograd, torch.func, torch.compile, autocast and checkpoints."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from tests.sdpa_torch import IMPLEMENTATIONS, normal, one_thread, results  # noqa: F401
from torch_power import ops_sdpa
from torch_power.sdpa import scaled_dot_product_attention as attention


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mask", [None, (1, 2, 5, 1), (5, 6), (2, 1, 1, 6)], ids=str)
def test_gradcheck(mask, implementation):
    operands = [normal(2, h, n, size, grad=True) for h, n, size in ((2, 5, 4), (1, 6, 4), (1, 6, 3))]
    operands += [None if mask is None else normal(*mask, grad=True)]
    call = functools.partial(attention, enable_gqa=True, implementation=implementation)
    assert torch.autograd.gradcheck(call, operands, check_batched_grad=True)


def test_second_derivative_is_refused():
    q = normal(1, 2, 5, 8, grad=True)
    (dq,) = torch.autograd.grad(attention(q, q, q).sum(), q, create_graph=True)
    with pytest.raises(NotImplementedError, match="second derivative"):
        dq.sum().backward()


IN_DIMS = [(0, None, None, None), (None, 2, None, None), (None, None, 3, None), (None, None, None, 1), (1, 0, 4, 2)]


@pytest.mark.parametrize("in_dims", IN_DIMS, ids=str)
@pytest.mark.parametrize("mask", ["none", "shared", "batched", "bool"])
@pytest.mark.parametrize("differentiate", [False, True])
def test_vmap(in_dims, mask, differentiate):
    """vmap, of the function and of its gradient, equals a loop, whichever operands are mapped."""
    torch.manual_seed(0)
    if mask == "none" and in_dims == IN_DIMS[3]:
        pytest.skip("nothing is mapped")
    shapes = [(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 7), {"batched": (2, 1, 5, 6)}.get(mask, (1, 4, 5, 1))]
    operands = [
        normal(*shape) if axis is None else normal(*shape[:axis], 3, *shape[axis:])
        for shape, axis in zip(shapes, in_dims, strict=True)
    ]
    if mask == "bool":
        operands[3] = operands[3] > 0
    elif mask == "none":
        operands[3], in_dims = None, (*in_dims[:3], None)
    dy = normal(2, 4, 5, 7)

    def call(*x):
        return attention(*x, enable_gqa=True)

    argnums = (0, 1, 2) if mask in ("none", "bool") else (0, 1, 2, 3)
    function = torch.func.grad(lambda *x: (call(*x) * dy).sum(), argnums) if differentiate else call
    got = torch.vmap(function, in_dims)(*operands)
    singles = [
        function(*(x if axis is None else x.select(axis, n) for x, axis in zip(operands, in_dims, strict=True)))
        for n in range(3)
    ]
    if not differentiate:
        got, singles = (got,), [(single,) for single in singles]
    for ours, theirs in zip(got, zip(*singles, strict=True), strict=True):
        torch.testing.assert_close(ours, torch.stack(theirs), rtol=1e-10, atol=1e-12)


def test_nested_vmap():
    q, k = normal(2, 3, 1, 2, 5, 8), normal(3, 1, 2, 6, 8)
    got = torch.vmap(torch.vmap(lambda q, k: attention(q, k, k)), in_dims=(0, None))(q, k)
    torch.testing.assert_close(got, attention(q, k, k))


def test_func_transforms_inside_autograd():
    """torch.func.grad over operands that also want ordinary gradients."""
    q, k = normal(1, 2, 5, 8, grad=True), normal(1, 2, 6, 8, grad=True)
    inner = torch.func.grad(lambda x: attention(x, k, k).square().sum())(q)
    (outer,) = torch.autograd.grad(attention(q, k, k).square().sum(), q)
    torch.testing.assert_close(inner, outer)
    jacobian = torch.func.jacrev(lambda x: attention(x, k, k))(q)
    assert jacobian.shape == (1, 2, 5, 8, 1, 2, 5, 8)
    torch.testing.assert_close((2 * attention(q, k, k)[..., None, None, None, None] * jacobian).sum((0, 1, 2, 3)), outer)


COMPILED = {
    "plain": {},
    "causal": {"is_causal": True},
    "float_mask": {"attn_mask": torch.linspace(-1, 1, 30, dtype=torch.float64).view(5, 6)},
    "bool_mask": {"attn_mask": torch.arange(30).view(5, 6) % 3 > 0},
    "gqa": {"enable_gqa": True},
    "window": {"local_window_size": (2, 1)},
}


@pytest.mark.parametrize("options", COMPILED.values(), ids=COMPILED.keys())
def test_compile(options):
    """One graph without a break, forward and backward, with static and with changing lengths."""
    torch._dynamo.reset()
    h_kv = 2 if options.get("enable_gqa") else 4

    def function(q, k, v):
        return attention(q * 2, k, v, **options).sin()

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic="attn_mask" not in options)
    for s in (6,) if "attn_mask" in options else (6, 9, 13):
        operands = normal(2, 4, 5, 8, grad=True), normal(2, h_kv, s, 8, grad=True), normal(2, h_kv, s, 8, grad=True)
        dy = normal(2, 4, 5, 8)
        got = results(lambda: compiled(*operands), operands, dy)  # noqa: B023
        for ours, theirs in zip(got, results(lambda: function(*operands), operands, dy), strict=True):  # noqa: B023
            torch.testing.assert_close(ours, theirs)


def test_compile_sees_one_operator():
    torch._dynamo.reset()
    seen = []

    def backend(graph, _):
        seen.extend(node.target for node in graph.graph.nodes if "torch_power" in str(node.target))
        return graph

    q = normal(1, 2, 600, 8)
    torch.compile(lambda q: attention(q, q, q), fullgraph=True, backend=backend)(q)
    assert len(seen) == 1


@pytest.mark.parametrize("dropout_p", [0.0, 0.5])
@pytest.mark.parametrize("mask", ["none", "float", "bool"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_opcheck(implementation, mask, dropout_p):
    q, k, v = normal(2, 4, 5, 8), normal(2, 2, 6, 8).transpose(2, 3).contiguous().transpose(2, 3), normal(2, 2, 6, 7)
    bias = normal(2, 1, 5, 6) if mask == "float" else None
    keep = torch.rand(1, 4, 5, 1) < 0.7 if mask == "bool" else None
    seed = torch.tensor([3, 2**62]) if dropout_p else None
    operands, numbers = (q, k, v, bias, keep, seed), (False, None, 0.3, dropout_p)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops_sdpa.sdpa_forward, (*operands, *numbers, implementation), test_utils=tests)
    out, lse, residual = ops_sdpa.sdpa_forward(*operands, *numbers, implementation)
    backward = (*operands, out, lse, residual, torch.randn_like(out), *numbers, bias is not None, implementation)
    torch.library.opcheck(ops_sdpa.sdpa_backward, backward, test_utils=tests)


def test_autocast():
    """Under autocast the dtypes are those of PyTorch's function, and the numbers those of rounded operands."""
    q, k = normal(1, 2, 5, 8, dtype=torch.float32, grad=True), normal(1, 2, 6, 8, dtype=torch.float32)
    mask = normal(5, 6, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = attention(q, k, k, mask)
        assert y.dtype == F.scaled_dot_product_attention(q, k, k, mask).dtype == torch.bfloat16
        assert attention(q.half(), k, k).dtype == torch.bfloat16
        assert attention(q.double(), k.double(), k.double()).dtype == torch.float64
        with pytest.raises(RuntimeError, match="same dtype"):
            attention(q.double(), k, k)
    assert torch.equal(y, attention(q.bfloat16(), k.bfloat16(), k.bfloat16(), mask.bfloat16()))
    y.float().square().sum().backward()
    assert q.grad.dtype == torch.float32
    assert q.grad.abs().sum() > 0


def test_checkpoint():
    q = normal(1, 2, 5, 8, grad=True)
    dy = normal(1, 2, 5, 8)

    def drop(q):
        return attention(q, q, q, dropout_p=0.5)

    torch.manual_seed(0)
    plain = results(lambda: drop(q), (q,), dy)
    torch.manual_seed(0)
    again = results(lambda: torch.utils.checkpoint.checkpoint(drop, q, use_reentrant=False), (q,), dy)
    for ours, theirs in zip(again, plain, strict=True):
        assert torch.equal(ours, theirs)
