"""What the tests of `torch_power.scaled_dot_product_attention` share."""

from __future__ import annotations

import pytest
import torch

from bridge import spec_sdpa
from torch_power import ops_sdpa

PLAIN_CALL = spec_sdpa.SdpaCall(b=1, t=5, s=5, h_q=1, h_kv=1, d=8, e=8, scale=0.3, dtype="float32")
# Those that can run here: a compiled one may not be built, or want another device.
IMPLEMENTATIONS = tuple(name for name, entry in ops_sdpa.SDPA.items() if entry.supports(PLAIN_CALL, "cpu") is None)


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Operands here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, dtype=torch.float64, grad=False):
    return torch.randn(*shape, dtype=dtype).requires_grad_(grad)


def results(function, operands, dy):
    """The output, and the gradient of every operand that wants one (0 where the output does not depend on it)."""
    y = function()
    wanted = [x for x in operands if x is not None and x.requires_grad]
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    return [y, *(torch.zeros_like(x) if dx is None else dx for x, dx in zip(wanted, grads, strict=True))]
