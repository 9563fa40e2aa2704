"""The attention form on Hopper: glue between the raw interface and the kernels in `csrc/power/attention_*`."""

from __future__ import annotations

from torch import Tensor

from bridge import spec
from torch_power.cuda import library


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels of the attention form cannot serve `call`: the argument, and what would work."""
    if not device.startswith("cuda"):
        return f"device {device}: the kernels run on a Hopper GPU; move the arrays there"
    if call.form != "attention":
        return f"form={call.form!r}: these kernels compute form='attention'"
    if len(set(call.dtypes)) > 1 or call.dtypes[0] not in ("bfloat16", "float16"):
        return f"dtypes {', '.join(call.dtypes)} of q, k, v: the kernels take bfloat16 or float16, the same for all three"
    if call.deg > 4:
        return f"deg={call.deg}: the kernels of the attention form take 1 to 4"
    for name, size in (("d", call.d), ("e", call.e)):
        if not 8 <= size <= 256 or size % 8:
            return f"head size {name}={size}: the kernels of the attention form take multiples of 8 up to 256"
        if size > 128 and call.deg == 4 and call.dtypes[0] == "float16":
            return f"head size {name}={size}: with deg=4 in float16 the kernels take up to 128; bfloat16 takes up to 256"
    if call.has_state or call.return_state:
        return "initial_state, return_state: the attention form's kernels have no state; use form='chunked'"
    return library.missing()


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
