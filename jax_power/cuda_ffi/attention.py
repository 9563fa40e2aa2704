"""The attention form on Hopper: glue between XLA and the kernels in `csrc/power/attention_*`."""

from __future__ import annotations

from jax import Array

from bridge import spec
from jax_power.cuda_ffi import library


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
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Array, None, None]:
    """y `[b, t, h_q, e]` in the dtype of v, and norm `[b, t, h_q]` float32: the normaliser of the scaled row for `backward`."""
    y, norm = library.run(
        "attention_quadratic_forward", call, {"q": q, "k": k, "v": v, "log_g": log_g},
        {"y": ((call.b, call.t, call.h_q, call.e), str(v.dtype)), "norm": ((call.b, call.t, call.h_q), "float32")},
    )  # fmt: skip
    return y, norm, None, None


def backward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None,
    z0: Array | None, y: Array, norm: Array, dy: Array, ds: Array | None, dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, None, None]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v, and dlog_g in float32. Every sum has one order: two runs give equal bits."""
    dq, dk, dv, dlog_g = library.run(
        "attention_quadratic_backward", call,
        {"q": q, "k": k, "v": v, "log_g": log_g, "y": y, "norm": norm, "dy": dy},
        {"dq": library.like(q), "dk": library.like(k), "dv": library.like(v), "dlog_g": library.like(log_g)},
    )  # fmt: skip
    return dq, dk, dv, dlog_g, None, None
