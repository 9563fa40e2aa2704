"""Power attention on Hopper GPUs: the CUDA kernels behind the interface every implementation has.

The attention form is `jax_power.cuda_ffi.attention`; here are the chunked form (degree 2) and the choice between them.
Arithmetic is float16 products with float32 sums on operands scaled by powers of two (csrc/power/chunked_layout.cuh), so
bfloat16 inputs lose nothing on the way in.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bridge import spec
from jax_power.cuda_ffi import attention, library

# Tokens from which the chunked form is faster, by the head size that kernels pad to: one H100, forward and backward together,
# nanoseconds a token and head (benchmarks/results/gpu_power_h100.json and gpu_attention_h100.json).
CROSSING = {
    64: 9_200,  # chunked 8.4 at t = 8192 and 7.4 at 65536, attention 7.8 at 8192 and 16.1 at 16384
    128: 17_000,  # chunked 29.9 at t = 16384 and 33.6 at 65536, attention 30.0 at 16384
}


# Whether the chunked form's states are kept from the forward to the backward pass: 2·D·e bytes a chunk and head (at b = 1,
# t = 65536, h = 8, d = 64: 164 MB). False: the backward pass works them out again, to the same bits.
KEEP_STATES = True


class Normaliser(NamedTuple):
    """What the chunked backward pass takes from the forward pass.

    rows: the row normaliser, `[b, t, h_q]` float32.
    saved: the states before each chunk and what they were measured by, opaque bytes `[b, …]` of this very batch; or None.
    """

    rows: Array
    saved: Array | None


def plan(call: spec.PowerCall) -> spec.PowerCall:
    """Replace a form that was left open by the one that is faster here, forward and backward together.

    What the chunked kernels lack (other degrees, no mask, heads of more than 128) is left to the attention form.
    """
    if not call.auto_form or call.has_state or call.return_state:
        return call
    if call.deg != 2 or not call.causal or call.d % 8 or max(call.d, call.e) > 128:
        return dataclasses.replace(call, form="attention")
    crossing = CROSSING[64 if max(call.d, call.e) <= 64 else 128]
    return dataclasses.replace(call, form="attention" if call.t < crossing else "chunked")


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    if call.form == "attention" and not (call.has_state or call.return_state):
        return attention.supports(call, device)
    if not device.startswith("cuda"):
        return f"device {device}: the kernels run on a Hopper GPU; move the arrays there"
    if call.deg != 2:
        return f"deg={call.deg}: the chunked kernels take 2; form='attention' without a state takes 1 to 4"
    if not call.causal:
        return "causal=False: the chunked kernels are causal; use form='attention'"
    if len(set(call.dtypes)) > 1 or call.dtypes[0] not in ("bfloat16", "float16"):
        return f"dtypes {', '.join(call.dtypes)} of q, k, v: the kernels take bfloat16 or float16, the same for all three"
    for name, size in (("d", call.d), ("e", call.e)):
        if not 8 <= size <= 128 or size % 8:
            return f"head size {name}={size}: the chunked kernels take multiples of 8 up to 128"
    if call.b * call.h_q > 65535:
        return f"b·h_q={call.b * call.h_q}: the chunked kernels take at most 65535 heads in all"
    return library.missing()


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Any, Array | None, Array | None]:
    """y `[b, t, h_q, e]` in the dtype of v, what `backward` takes as norm, and the final state (None unless asked for).

    A call with a state, and one of form 'recurrent', is served by the chunked kernels whatever the form: the sums are the same.
    norm is `Normaliser`, with the chunks' states, which this pass has in device memory anyway.
    """
    if call.form == "attention" and not (call.has_state or call.return_state):
        return attention.forward(call, q, k, v, log_g, s0, z0)
    outputs: dict[str, Any] = {
        "y": ((call.b, call.t, call.h_q, call.e), str(v.dtype)), "norm": ((call.b, call.t, call.h_q), "float32")
    }  # fmt: skip
    state = {"s": ((call.b, call.h_kv, call.rows, call.e), "float32"), "z": ((call.b, call.h_kv, call.rows), "float32")}
    if _empty(call):
        y, rows = (jnp.zeros(*x) for x in outputs.values())
        s, z = (jnp.zeros(*x) if x0 is None else x0 for x, x0 in zip(state.values(), (s0, z0), strict=True))
        return (y, Normaliser(rows, None), s, z) if call.return_state else (y, Normaliser(rows, None), None, None)
    operands = {"q": _scaled(call, q), "k": k, "v": v, "log_g": log_g, "s0": s0, "z0": z0}
    outputs |= state if call.return_state else {"s": None, "z": None}
    outputs["saved"] = ((call.b, -(-library.saved_bytes(call) // call.b)), "uint8") if KEEP_STATES else None
    y, rows, s, z, saved = library.run("chunked_forward", call, operands, outputs)
    return y, Normaliser(rows, saved), s, z


def backward(
    call: spec.PowerCall,
    q: Array,
    k: Array,
    v: Array,
    log_g: Array | None,
    s0: Array | None,
    z0: Array | None,
    y: Array,
    norm: Any,
    dy: Array,
    ds: Array | None,
    dz: Array | None,
) -> tuple[Array | None, ...]:
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None).

    States that the forward pass did not keep are worked out again, to the same bits. Every sum has one order: two runs give
    equal bits.
    """
    if call.form == "attention" and not (call.has_state or call.return_state):
        return attention.backward(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz)
    arguments = {"dq": q, "dk": k, "dv": v, "dlog_g": log_g, "ds0": s0, "dz0": z0}
    if _empty(call):
        upstream = (None, None, None, None, ds, dz)
        return tuple(
            None if x is None else jnp.zeros_like(x) if dx is None else dx
            for x, dx in zip(arguments.values(), upstream, strict=True)
        )
    operands = {"q": _scaled(call, q), "k": k, "v": v, "log_g": log_g, "y": y, "norm": norm.rows, "dy": dy}
    operands |= {"s0": s0, "z0": z0, "ds": ds, "dz": dz, "saved": norm.saved}
    return tuple(library.run("chunked_backward", call, operands, {name: library.like(x) for name, x in arguments.items()}))


def _empty(call: spec.PowerCall) -> bool:
    return 0 in (call.b, call.t, call.h_q, call.d, call.e)


def _scaled(call: spec.PowerCall, q: Array) -> Array:
    """q, or zeros for scale = 0, which a normalised row would otherwise not notice."""
    return q if call.scale else jnp.zeros_like(q)
