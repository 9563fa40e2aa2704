"""PyTorch's own attention, and modules built on it, with our kernel behind its operator: same results, ours does the work."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_power
from torch_power import _library, dropin
from torch_power.cpp import sdpa as kernel

pytestmark = pytest.mark.skipif(_library.missing() is not None, reason=f"{_library.missing()}")


@pytest.fixture
def served(monkeypatch):
    """Counts the calls that our kernel serves, forward and backward."""
    calls = {"forward": 0, "backward": 0}
    for name in calls:
        original = getattr(kernel, name)

        def counting(*args, name=name, original=original):
            calls[name] += 1
            return original(*args)

        monkeypatch.setattr(kernel, name, counting)
    yield calls
    torch_power.uninstall_sdpa()


def operands(*shape, dtype=torch.float32, requires_grad=True):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).to(dtype).requires_grad_(requires_grad) for _ in range(3)]


def with_gradients(function, *arrays):
    y = function(*arrays)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    return y, *torch.autograd.grad(y, arrays, dy)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"attn_mask": "bool"}, {"attn_mask": "float"}],
                         ids=lambda options: "-".join(map(str, options.items())))  # fmt: skip
def test_same_as_without(served, dtype, options):
    q, k, v = operands(2, 3, 37, 16, dtype=dtype)
    if options.get("attn_mask") is not None:
        mask = torch.ones(37, 37).tril(3) > 0
        options = {"attn_mask": mask if options["attn_mask"] == "bool" else torch.where(mask, 0.5, -2.0).to(dtype)}
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        want = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), q, k, v)
        assert served == {"forward": 0, "backward": 0}
        with torch_power.installed_sdpa():
            got = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **options), q, k, v)
    assert served == {"forward": 1, "backward": 1}
    # PyTorch's own kernel rounds inside; ours rounds once.
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-12, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        torch.testing.assert_close(x, y, rtol=tolerance, atol=tolerance)


def test_other_backends_are_left_alone(served):
    q, k, v = operands(2, 3, 9, 8)
    with torch_power.installed_sdpa(), sdpa_kernel(SDPBackend.MATH):
        F.scaled_dot_product_attention(q, k, v).sum().backward()
    assert served == {"forward": 0, "backward": 0}


def test_what_is_not_served_goes_to_pytorch(served, monkeypatch):
    q, k, v = operands(2, 3, 9, 8)
    want = with_gradients(F.scaled_dot_product_attention, q, k, v)
    monkeypatch.setattr(kernel, "supports", lambda call, device: "not today")
    with torch_power.installed_sdpa():
        got = with_gradients(F.scaled_dot_product_attention, q, k, v)
    assert served == {"forward": 0, "backward": 0}
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=0)


def test_either_kernel_continues_the_other(served):
    """A backward pass that finds another kernel than ran forward, since the installation changed in between."""
    q, k, v = operands(1, 2, 11, 8)
    want = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v).square().sum(), (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v)
    with torch_power.installed_sdpa():
        mixed = torch.autograd.grad(y.square().sum(), (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v)
    back = torch.autograd.grad(y.square().sum(), (q, k, v))
    assert served == {"forward": 1, "backward": 1}
    for got in (mixed, back):
        for x, expected in zip(got, want, strict=True):
            torch.testing.assert_close(x, expected)


def test_modules(served):
    torch.manual_seed(0)
    attention = torch.nn.MultiheadAttention(32, 4, batch_first=True)
    layer = torch.nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
    x = torch.randn(2, 13, 32)
    for module in (lambda x: attention(x, x, x, need_weights=False)[0], layer):
        want = module(x)
        before = served["forward"]
        with torch_power.installed_sdpa():
            got = module(x)
        assert served["forward"] == before + 1
        torch.testing.assert_close(got, want)


def test_compile(served):
    q, k, v = operands(2, 3, 17, 8)
    compiled = torch.compile(lambda q, k, v: F.scaled_dot_product_attention(2 * q, k, v), fullgraph=True, backend="aot_eager")
    want = with_gradients(lambda q, k, v: F.scaled_dot_product_attention(2 * q, k, v), q, k, v)
    with torch_power.installed_sdpa():
        got = with_gradients(compiled, q, k, v)
    assert served == {"forward": 1, "backward": 1}
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y)


def test_install_and_uninstall(served):
    q, k, v = operands(1, 1, 5, 8, requires_grad=False)
    torch_power.uninstall_sdpa()
    torch_power.install_sdpa()
    torch_power.install_sdpa()
    with torch_power.installed_sdpa():
        pass
    F.scaled_dot_product_attention(q, k, v)
    assert served["forward"] == 1
    torch_power.uninstall_sdpa()
    with pytest.raises(RuntimeError, match="inside"), torch_power.installed_sdpa():
        raise RuntimeError("inside")
    F.scaled_dot_product_attention(q, k, v)
    assert served["forward"] == 1


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(dropin._library, "missing", lambda: "not built; run `make test`")
    with pytest.raises(NotImplementedError, match="install_sdpa: not built; run `make test`"):
        torch_power.install_sdpa()
