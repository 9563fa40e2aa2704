"""PyTorch's own attention on a GPU with our kernel behind its flash attention: same results, ours does the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn import attention
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_power
from torch_power import dropin, ops_sdpa

pytestmark = pytest.mark.skipif("cuda" not in ops_sdpa.SDPA, reason="this build has no softmax kernel for GPUs")

BOUND = {torch.bfloat16: 5e-3, torch.float16: 8e-4}  # relative L2; those of PyTorch's own kernel lie just below


@pytest.fixture
def served(monkeypatch):
    """Counts the calls that our kernel serves, forward and backward."""
    calls = {"forward": 0, "backward": 0}
    ours = ops_sdpa.SDPA["cuda"]

    def counting(name):
        def function(*args, **kwargs):
            calls[name] += 1
            return getattr(ours, name)(*args, **kwargs)

        return function

    monkeypatch.setitem(ops_sdpa.SDPA, "cuda", ours._replace(**{name: counting(name) for name in calls}))
    yield calls
    torch_power.uninstall_sdpa()


def operands(*shapes, dtype=torch.bfloat16):
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(*shape, generator=generator, device="cuda").to(dtype).requires_grad_() for shape in shapes]


def with_gradients(function, *arrays):
    y = function(*arrays)
    dy = torch.randn(y.shape, generator=torch.Generator("cuda").manual_seed(1), device="cuda").to(y.dtype)
    return y, *torch.autograd.grad(y, arrays, dy)


def assert_close(got, want, bound):
    for name, x, y in zip(("y", "dq", "dk", "dv"), got, want, strict=True):
        error = ((x.double() - y.double()).norm() / y.double().norm()).item()
        assert error <= bound, f"{name}: {error:.2e} > {bound:.2e}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"scale": 0.3}, {"is_causal": True, "enable_gqa": True}],
    ids=lambda x: "-".join(x) or "plain",
)
@pytest.mark.parametrize("d", [40, 64, 128])
def test_same_as_without(served, dtype, options, d):
    h_kv = 2 if "enable_gqa" in options else 4
    arrays = operands((2, 4, 333, d), (2, h_kv, 333, d), (2, h_kv, 333, d), dtype=dtype)

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, **options)

    with sdpa_kernel(SDPBackend.MATH):
        exact = with_gradients(function, *(x.detach().double().requires_grad_() for x in arrays))
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        own = with_gradients(function, *arrays)
        assert served == {"forward": 0, "backward": 0}
        with torch_power.installed_sdpa():
            assert attention.current_flash_attention_impl() == dropin.NAME
            got = with_gradients(function, *arrays)
    assert served == {"forward": 1, "backward": 1}
    assert attention.current_flash_attention_impl() is None
    assert_close(got, exact, BOUND[dtype])
    for x, y in zip(got, own, strict=True):
        assert (x.dtype, x.shape, x.stride()) == (y.dtype, y.shape, y.stride())


def test_default_choice(served):
    """Without `sdpa_kernel`, ours runs wherever PyTorch chooses its flash attention, and its own choice is not changed."""
    q, k, v = operands(*[(1, 2, 64, 64)] * 3)
    before = torch._fused_sdp_choice(q, k, v)
    with torch_power.installed_sdpa():
        assert torch._fused_sdp_choice(q, k, v) == before
        F.scaled_dot_product_attention(q, k, v)
    assert served["forward"] == (before == SDPBackend.FLASH_ATTENTION.value)


@pytest.mark.parametrize(
    "options", [{"dropout_p": 0.5}, {"attn_mask": "mask"}, {"dtype": torch.float32}], ids=lambda x: next(iter(x))
)
def test_what_is_not_served_goes_to_pytorch(served, options):
    q, k, v = operands(*[(2, 3, 64, 64)] * 3, dtype=options.pop("dtype", torch.bfloat16))
    if "attn_mask" in options:
        options["attn_mask"] = torch.ones(64, 64, dtype=torch.bool, device="cuda").tril()

    def function(q, k, v):
        torch.manual_seed(7)
        return F.scaled_dot_product_attention(q, k, v, **options)

    want = function(q, k, v)
    with torch_power.installed_sdpa():
        got = function(q, k, v)
    assert served == {"forward": 0, "backward": 0}
    torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_either_kernel_continues_the_other(served):
    arrays = operands(*[(1, 2, 200, 64)] * 3)
    dy = torch.randn(1, 2, 200, 64, device="cuda").bfloat16()
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = torch.autograd.grad(F.scaled_dot_product_attention(*arrays), arrays, dy)
        y = F.scaled_dot_product_attention(*arrays)
        with torch_power.installed_sdpa():
            mixed = torch.autograd.grad(y, arrays, dy)
            y = F.scaled_dot_product_attention(*arrays)
        back = torch.autograd.grad(y, arrays, dy)
    assert served == {"forward": 1, "backward": 1}
    for grads in (mixed, back):
        assert_close((y, *grads), (y, *want), BOUND[torch.bfloat16])


def test_modules(served):
    torch.manual_seed(0)
    with torch.device("cuda"):
        heads = torch.nn.MultiheadAttention(128, 2, batch_first=True, dtype=torch.bfloat16)
        layer = torch.nn.TransformerEncoderLayer(128, 2, 64, dropout=0.0, batch_first=True, dtype=torch.bfloat16)
        x = torch.randn(2, 77, 128, dtype=torch.bfloat16)
    for module in (lambda x: heads(x, x, x, need_weights=False)[0], layer):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            want, before = module(x), served["forward"]
            with torch_power.installed_sdpa():
                got = module(x)
        assert served["forward"] == before + 1
        torch.testing.assert_close(got, want, rtol=2e-2, atol=2e-2)


def test_compile(served):
    arrays = operands(*[(2, 3, 128, 64)] * 3)

    def function(q, k, v):
        return F.scaled_dot_product_attention(2 * q, k, v, is_causal=True)

    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = with_gradients(function, *arrays)
        with torch_power.installed_sdpa():
            got = with_gradients(compiled, *arrays)
    assert served == {"forward": 1, "backward": 1}
    assert_close(got, want, BOUND[torch.bfloat16])
