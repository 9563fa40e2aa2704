"""Scaled dot-product attention on Hopper: glue between the raw interface and the kernels in `csrc/sdpa`."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from bridge.spec_sdpa import SdpaCall
from torch_power.cuda import library

LARGEST_HEAD = 256


def supports(call: SdpaCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    if not device.startswith("cuda"):
        return f"device {device}: the kernels run on a Hopper GPU; move the arrays there"
    if call.dtype not in ("bfloat16", "float16"):
        return f"dtype {call.dtype}: the kernels take bfloat16 and float16"
    for name, size in (("d", call.d), ("e", call.e)):
        if not 8 <= size <= LARGEST_HEAD or size % 8:
            return f"head size {name}={size}: the kernels take multiples of 8 up to {LARGEST_HEAD}"
    if call.h_q == 0 or call.h_kv == 0:
        return f"h_q={call.h_q}, h_kv={call.h_kv}: at least 1 of each is needed"
    if call.query_lengths or call.key_lengths:
        return "sequence lengths are not served; a mask says the same"
    if call.bias_grad and call.b * call.h_q > 65535:
        return f"b·h_q={call.b * call.h_q}: the kernel of the mask's gradient takes at most 65535 heads in all"
    return library.missing()


def forward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:  # fmt: skip
    """out `[b, h_q, t, e]` in the dtype of v, stored as q is, every row's log-sum-exp `[b, h_q, t]` in float32, and, if asked
    for, eight more digits of out, bytes stored like it.

    Arrays that the copy engine cannot address (a last axis that is not contiguous, strides that are not multiples of 16 bytes)
    are copied once.
    """
    out, lse, rest = library.operator("sdpa_forward")(q, k, v, bias, mask, seed, *_options(call), residual)
    return out, lse, rest if residual else None


def backward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None,
    out: Tensor, lse: Tensor, dout: Tensor, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:  # fmt: skip
    """Gradients of q, k, v and, if `call.bias_grad`, of bias, in the dtypes of those arguments.

    Every sum has one order: two runs give equal bits.
    """
    arrays = q, k, v, bias, mask, seed, out, lse, residual, dout
    dq, dk, dv, dbias = library.operator("sdpa_backward")(*arrays, *_options(call), call.bias_grad)
    return dq, dk, dv, dbias if call.bias_grad else None


def _options(call: SdpaCall) -> tuple[int, Any, float, float]:
    return int(call.causal), call.window, call.scale, call.dropout_p
