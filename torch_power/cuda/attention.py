"""The attention form on Hopper: glue between the raw interface and the kernels in `csrc/power/attention_*`."""

from __future__ import annotations

from torch import Tensor

from bridge import hopper, spec
from torch_power.cuda import library


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels of the attention form cannot serve `call`: the argument, and what would work."""
    return hopper.attention_lacks(call, device) or library.missing()


def forward(
    call: spec.PowerCall, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, None, None]:
    """y `[b, t, h_q, e]` in the dtype of v, and norm `[b, t, h_q]` float32: the normaliser of the scaled row, for `backward`.

    Arrays that the copy engine cannot address (a last axis that is not contiguous, strides that are not multiples of 16 bytes)
    are copied once.
    """
    options = library.options(call, "attention")
    y, norm, *_ = library.operator("power_forward")(q, k, v, log_g, None, None, None, *options, False)
    return y, norm, None, None


def backward(
    call: spec.PowerCall, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s0: Tensor | None,
    z0: Tensor | None, y: Tensor, norm: Tensor, dy: Tensor, ds: Tensor | None, dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, None, None]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v, and dlog_g in float32. Every sum has one order: two runs give equal bits."""
    arrays = q, k, v, log_g, None, None, y, norm, None, dy, None, None
    dq, dk, dv, dlog_g, *_ = library.operator("power_backward")(*arrays, *library.options(call, "attention"))
    return dq, dk, dv, None if log_g is None else dlog_g, None, None
