"""The attention form on Hopper: glue between XLA and the kernels in `csrc/power/attention_*`."""

from __future__ import annotations

from jax import Array

from bridge import hopper, spec
from jax_power.cuda_ffi import library


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels of the attention form cannot serve `call`: the argument, and what would work."""
    return hopper.attention_lacks(call, device) or library.missing()


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
