"""Scaled dot-product attention by Pallas kernels for Hopper GPUs: what they support, and the arrays they take."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
from jax import Array

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import sdpa_bwd, sdpa_fwd

HEAD_STEP = 64


@dataclasses.dataclass(frozen=True)
class Extra:
    """A bias, or a mask as 0 and −∞, as the kernels add it to the scores, in float32 or 16 bits.

    kind "tile": `[b, h_q, t, s]`, loaded by TMA with the keys; "row": `[b, h_q, t]`, one number a query; "col": `[b, h_q, s]`, one
    a key. The first two axes may have size 1.
    """

    kind: str
    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype


def extras_of(call: SdpaCall, bias: Array | None, mask: Array | None) -> list[Extra]:
    """The bias and the mask as at most two additive operands; one if they have the same shape."""
    parts = []
    if bias is not None:
        parts.append(bias if bias.dtype in (jnp.float16, jnp.bfloat16, jnp.float32) else bias.astype(jnp.float32))
    if mask is not None:
        if bias is not None and bias.shape == mask.shape:
            parts = [jnp.where(mask, parts[0], -jnp.inf)]
        else:
            parts.append(jnp.where(mask, 0.0, -jnp.inf).astype(call.dtype))
    return [_extra(call, x) for x in parts]


def _extra(call: SdpaCall, x: Array) -> Extra:
    if x.shape[2] == 1:
        return Extra("col", _padded(jnp.broadcast_to(x, (*x.shape[:3], call.s))[:, :, 0], 2, 256))
    if x.shape[3] == 1:
        return Extra("row", _padded(x[..., 0], 2, 384))
    return Extra("tile", _padded(_padded(x, 3, 64), 2, 8))


def _padded(x: Array, axis: int, step: int) -> Array:
    """x with zeros behind its end along an axis, up to a multiple of `step`."""
    missing = -x.shape[axis] % step
    return jnp.pad(x, [(0, missing if n == axis else 0) for n in range(x.ndim)]) if missing else x


def forward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    tiles: Any = None,
) -> tuple[Array, Array]:
    """Output `[b, t, h_q, e]` in the operands' dtype and log-sum-exp `[b, h_q, t]` in float32."""
    if call.b * call.h_q * call.t == 0 or call.s == 0:
        out = jnp.zeros((call.b, call.t, call.h_q, call.e), q.dtype)
        return out, jnp.full((call.b, call.h_q, call.t), -jnp.inf, jnp.float32)
    tiles = sdpa_fwd.Tiles() if tiles is None else tiles
    q, k, v = (_padded(_padded(x, 3, HEAD_STEP), 1, 8) for x in (q, k, v))
    lengths = [x for x in (query_lengths, key_lengths) if x is not None]
    out, lse = sdpa_fwd.forward(call, tiles, q, k, v, extras_of(call, bias, mask), lengths)
    return out[:, : call.t, :, : call.e], lse[..., : call.t]


def _transposed(x: Extra) -> Extra:
    """The same for scores with keys along the first axis."""
    if x.kind == "tile":
        return Extra("tile", _padded(_padded(x.array.swapaxes(2, 3), 3, 64), 2, 8))
    return Extra({"row": "col", "col": "row"}[x.kind], x.array)


def backward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
    tiles: Any = None,
) -> tuple[Array, Array, Array, Array | None]:
    tiles_q, tiles_kv = (sdpa_bwd.Tiles(), sdpa_bwd.Tiles()) if tiles is None else tiles
    delta = (dout.astype(jnp.float32) * out.astype(jnp.float32)).sum(-1).swapaxes(1, 2)
    start = jnp.where(lse == -jnp.inf, -jnp.inf, lse / -call.scale)
    missing = [(0, 0), (0, 0), (0, -call.t % 384)]
    stats = jnp.stack([jnp.pad(start, missing, constant_values=-jnp.inf), jnp.pad(-delta, missing)], 2)
    q, k, v, dout = (_padded(_padded(x, 3, HEAD_STEP), 1, 8) for x in (q, k, v, dout))
    lengths = [x for x in (query_lengths, key_lengths) if x is not None]
    extras = extras_of(call, bias, mask)
    arrays = q, k, v, dout, stats
    (dq,) = sdpa_bwd.gradient_q(call, tiles_q, *arrays, extras, lengths)
    dk, dv = sdpa_bwd.gradient_kv(call, tiles_kv, *arrays, [_transposed(x) for x in extras], lengths)
    return dq[:, : call.t, :, : call.d], dk[:, : call.s, :, : call.d], dv[:, : call.s, :, : call.e], None
