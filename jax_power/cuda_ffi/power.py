"""Power attention on Hopper GPUs: the CUDA kernels behind the interface every implementation has.

The attention form is `jax_power.cuda_ffi.attention`; here is the chunked form (degree 2); the choice between them is
`bridge.hopper.plan`.
Arithmetic is float16 products with float32 sums on operands scaled by powers of two (csrc/power/chunked_layout.cuh), so
bfloat16 inputs lose nothing on the way in.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from bridge import hopper, spec
from jax_power.cuda_ffi import attention, library

# Whether the chunked form's states are kept from the forward to the backward pass: 2·D·e bytes a chunk and head (at b = 1,
# t = 65536, h = 8, d = 64: 217 MB). False: the backward pass works them out again, to the same bits.
KEEP_STATES = True


class Normaliser(NamedTuple):
    """What the chunked backward pass takes from the forward pass.

    rows: the row normaliser, `[b, t, h_q]` float32.
    saved: the states before each chunk and what they were measured by, opaque bytes `[b, …]` of this very batch; or None.
    """

    rows: Array
    saved: Array | None


plan = hopper.plan


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    if hopper.in_attention_form(call):
        return attention.supports(call, device)
    return hopper.chunked_lacks(call, device) or library.missing()


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Any, Array | None, Array | None]:
    """y `[b, t, h_q, e]` in the dtype of v, what `backward` takes as norm, and the final state (None unless asked for).

    A call with a state, and one of form 'recurrent', is served by the chunked kernels whatever the form: the sums are the same.
    norm is `Normaliser`, with the chunks' states, which this pass has in device memory anyway.
    """
    if hopper.in_attention_form(call):
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
    if hopper.in_attention_form(call):
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
