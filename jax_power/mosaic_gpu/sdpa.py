"""Scaled dot-product attention by Pallas kernels for Hopper GPUs: what they support, and the arrays they take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power import platforms
from jax_power.mosaic_gpu import sdpa_bias, sdpa_bwd, sdpa_fwd, sdpa_tiles
from jax_power.mosaic_gpu.sdpa_scores import LOG2_E, Extra, padded

# TMA takes sequences in units of 8 (the rows of a swizzled tile) and head sizes in units of 64 (its 128 bytes).
LENGTH_STEP, HEAD_STEP = 8, 64
# Numbers of each query or key that kernels read without TMA's bounds: up to the least common multiple of all tiles' rows.
VECTOR_STEP = 384
# The tile table's last row.
MAX_HEAD = 256


def supports(call: SdpaCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    if device != "cuda":
        return f"device {device}: the kernels run on a Hopper GPU; move the arrays there"
    if (reason := platforms.not_hopper()) is not None:
        return reason
    if call.dtype not in ("float16", "bfloat16"):
        return f"dtype {call.dtype}: the kernels take bfloat16 and float16"
    for name, size in (("d", call.d), ("e", call.e)):
        if not 1 <= size <= MAX_HEAD:
            return f"head size {name}={size}: the kernels take 1 to {MAX_HEAD}"
    return "dropout_p > 0 is not implemented" if call.dropout_p > 0 else None


@functools.partial(jax.jit, static_argnums=0, static_argnames="residual")  # outside of a program, traced only once
def forward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    *,
    residual: bool = False,
) -> tuple[Array, ...]:
    """Output `[b, t, h_q, e]` in the operands' dtype and log-sum-exp `[b, h_q, t]` in float32, of checked operands.

    With `residual`, also what rounding the output left over, as `backward` takes it.
    """
    if call.b * call.h_q * call.t == 0 or call.s == 0:
        out = jnp.zeros((call.b, call.t, call.h_q, call.e), q.dtype)
        lse = jnp.full((call.b, call.h_q, call.t), -jnp.inf, jnp.float32)
        return (out, lse, out) if residual else (out, lse)
    call, _, q = _positive(call, q)
    q, k, v = (_for_tma(x) for x in (q, k, v))
    lengths = [x for x in (query_lengths, key_lengths) if x is not None]
    extras = _extras(call, bias, mask)
    tiles = sdpa_tiles.forward(q.shape[3], v.shape[3], _score_tiles(extras))
    out, lse, *rest = sdpa_fwd.forward(call, tiles, q, k, v, extras, lengths, residual=residual)
    out, *rest = (x[:, : call.t, :, : call.e] for x in (out, *rest))
    return out, lse[..., : call.t], *rest


@functools.partial(jax.jit, static_argnums=0)
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
    residual: Array | None = None,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients dq, dk, dv of Σ out·dout in the operands' dtype, and dbias if `call.bias_grad`, else None.

    δ = dout·out is too coarse from a rounded out where softmax is concentrated: bfloat16 q and k of standard deviation 8 have
    errors of 7e-3 in dq and dk without the residual.
    """
    if call.b * call.h_q * call.t == 0 or call.s == 0:
        dq, dk, dv = (jnp.zeros(x.shape, x.dtype) for x in (q, k, v))
        return dq, dk, dv, None if bias is None or not call.bias_grad else jnp.zeros(bias.shape, bias.dtype)
    call, sign, q = _positive(call, q)
    exact = out.astype(jnp.float32)
    if residual is not None:
        exact += residual.astype(jnp.float32) / sdpa_fwd.residual_scale(residual.dtype)
    # A kernel of its own: fused with what follows, XLA sums each row in one thread, seven times slower than memory allows.
    delta = lax.optimization_barrier((dout.astype(jnp.float32) * exact).sum(-1)).swapaxes(1, 2)
    # The weights of a row that saw no key are exp(S − ∞), not exp(S + ∞).
    lse = jnp.where(lse == -jnp.inf, -jnp.inf, -LOG2_E * lse)
    behind = [(0, 0), (0, 0), (0, -call.t % VECTOR_STEP)]
    stats = jnp.stack([jnp.pad(lse, behind, constant_values=-jnp.inf), jnp.pad(-delta, behind)], 2)
    lengths = [x for x in (query_lengths, key_lengths) if x is not None]
    q, k, v, dout = (_for_tma(x) for x in (q, k, v, dout))
    operands = sdpa_bwd.Operands(q, k, v, dout, stats, _extras(call, bias, mask), lengths)
    of_keys = operands._replace(extras=[x.transposed() for x in operands.extras])

    kind = operands.extras[0].kind if call.bias is not None and call.bias_grad else ""
    sizes = operands.q.shape[3], operands.v.shape[3]
    score_tiles = _score_tiles(operands.extras)
    dq, *row_sums = sdpa_bwd.gradient_q(call, sdpa_tiles.gradient_q(*sizes, score_tiles), operands, sums=kind == "row")
    tiles = sdpa_tiles.gradient_kv(*sizes, score_tiles)
    if sdpa_tiles.one_pass(*sizes):
        dk, dv, *col_sums = sdpa_bwd.gradient_kv(call, tiles, of_keys, wanted="kv", sums=kind == "col")
    else:
        dk, *col_sums = sdpa_bwd.gradient_kv(call, tiles, of_keys, wanted="k", sums=kind == "col")
        (dv,) = sdpa_bwd.gradient_kv(call, tiles, of_keys, wanted="v", sums=False)
    dbias = None
    if kind == "tile":
        dbias = sdpa_bias.gradient_bias(call, sdpa_tiles.gradient_bias(*sizes), operands)[:, :, : call.t, : call.s]
    elif kind == "row":
        dbias = _summed(row_sums[0][:, :, : call.t, None], call.bias)
    elif kind == "col":
        dbias = _summed(col_sums[0][:, :, None, : call.s], call.bias)
    dq = dq[:, : call.t, :, : call.d]
    return dq if sign > 0 else dq * sign, dk[:, : call.s, :, : call.d], dv[:, : call.s, :, : call.e], dbias


def _positive(call: SdpaCall, q: Array) -> tuple[SdpaCall, int, Array]:
    """The same scores with a positive scale, as the kernels need it: q takes the sign (0 for scale 0), exactly."""
    sign = (call.scale > 0) - (call.scale < 0)
    if sign > 0:
        return call, sign, q
    return dataclasses.replace(call, scale=abs(call.scale) or 1.0), sign, q * sign


def _for_tma(x: Array) -> Array:
    """`[b, length, h, size]` with both sizes as TMA takes them."""
    return padded(x, (1, LENGTH_STEP), (3, HEAD_STEP))


def _extras(call: SdpaCall, bias: Array | None, mask: Array | None) -> list[Extra]:
    """The bias and the mask as at most two additive operands, the bias first; one if they have the same shape."""
    found = []
    if bias is not None:
        found.append(bias if bias.dtype in (jnp.float16, jnp.bfloat16, jnp.float32) else bias.astype(jnp.float32))
    if mask is not None and bias is not None and bias.shape == mask.shape:
        found = [jnp.where(mask, found[0], -jnp.inf)]
    elif mask is not None:
        found.append(jnp.where(mask, 0.0, -jnp.inf).astype(call.dtype))
    return [_extra(call, x) for x in found]


def _extra(call: SdpaCall, x: Array) -> Extra:
    """`[b, h_q, t, s]`, each axis the full size or 1, as the kernels take it."""
    if x.shape[2] == 1:
        return Extra("col", padded(jnp.broadcast_to(x, (*x.shape[:3], call.s))[:, :, 0], (2, VECTOR_STEP)))
    if x.shape[3] == 1:
        return Extra("row", padded(x[..., 0], (2, VECTOR_STEP)))
    return Extra("tile", padded(x, (2, LENGTH_STEP), (3, HEAD_STEP)))


def _score_tiles(extras: Sequence[Extra]) -> int:
    """How many operands a kernel loads a tile of scores of."""
    return sum(x.kind == "tile" for x in extras)


def _summed(x: Array, shape: tuple[int, ...] | None) -> Array:
    """x summed over the axes that have size 1 in `shape`."""
    return x.sum(tuple(axis for axis, n in enumerate(shape or ()) if n == 1), keepdims=True)
