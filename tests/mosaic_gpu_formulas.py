"""What each Pallas kernel of the chunked form computes, in plain JAX: stand-ins where there is no GPU.

With them in the kernels' places, everything around the kernels (scaling, gates, scans, layouts, gradients of gates and states)
runs on a CPU. They are written from the kernels' docstrings, in float32, a chunk at a time over whole matrices.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from jax import Array, lax

from jax_power.mosaic_gpu import chunked_bwd, chunked_fwd, chunked_prepare

BLOCK = 16


def stage(x: Array, factor: Array, weight: Array | None = None) -> tuple[Array, ...]:
    b, t, h, n = x.shape
    turned = jnp.transpose(x, (0, 2, 3, 1)).reshape(b * h, n, t).astype(jnp.float32)
    turned = turned * factor[:, None]
    return tuple(y.astype(jnp.float16) for y in ((turned,) if weight is None else (turned, turned * weight[:, None])))


def moments(x: Array, weight: Array, *, chunk: int, group: int) -> Array:
    left = (_f32(x) * weight[:, None]).astype(jnp.float16).astype(jnp.float32)
    left, right = (y.reshape(x.shape[0] // group, group, x.shape[1], -1, chunk) for y in (left, _f32(x)))
    return _sum("hganc,hgjnc->hnaj", left, right)


def scan(
    x: Array, decay: Array, bound: Array, first: tuple[Array, Array] | None, walk: Array, largest: Array
) -> tuple[Array, Array, Array]:
    order = walk[0] + walk[1] * np.arange(x.shape[1])
    start = (jnp.zeros_like(x[:, 0]), jnp.zeros((x.shape[0], 2))) if first is None else first

    def step(carry: tuple[Array, Array], now: tuple[Array, ...]) -> tuple[Any, Any]:
        (sums, bounds), (added, across, more) = carry, now
        factors = jnp.where(bounds > 0, largest / jnp.where(bounds > 0, bounds, 1.0), 1.0)
        before = (sums * factors[:, 1, None, None]).astype(jnp.float16), factors
        return (sums * across[:, None, None] + added, bounds * across[:, None] + more[:, None]), before

    (last, _), (before, factors) = lax.scan(step, start, tuple(jnp.moveaxis(y, 1, 0)[order] for y in (x, decay, bound)))
    before, factors = (jnp.moveaxis(jnp.zeros_like(y).at[order].set(y), 0, 1) for y in (before, factors))
    return before, last, factors


def update(
    weighted: Array, x: Array, y: Array, decay: Array, factor: Array, first: Any, walk: Array, *,
    chunk_tiles: int, group: int, want_last: bool,
) -> tuple[Array, tuple[Array, ...] | None]:  # fmt: skip
    h, chunks = decay.shape
    w, x, y = (_f32(z).reshape(h, group, z.shape[1], chunks, 64 * chunk_tiles) for z in (weighted, x, y))
    blocks, order = range(0, x.shape[2], BLOCK), walk[0] + walk[1] * np.arange(chunks)
    last, states = [], []
    for n, b in enumerate(blocks):
        added = _sum("hgant,hgjnt,hgent->nhaje", w[:, :, b : b + BLOCK], x[:, :, b:], y)
        start = jnp.zeros_like(added[0]) if first is None else jnp.swapaxes(first[n], 2, 3)

        def step(state: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
            across, scale, addend = now
            return state * across[:, None, None, None] + addend, (state * scale[:, None, None, None]).astype(jnp.float16)

        end, before = lax.scan(step, start, (decay.T[order], factor.T[order], added[order]))
        states.append(jnp.zeros_like(before).at[order].set(before))
        last.append(jnp.swapaxes(end, 2, 3))
    return jnp.swapaxes(_whole(states), 0, 1), tuple(last) if want_last else None


def query(
    z: Any, q: Array, keys: Any, gates: Any, states: Any, moments: Any, state_row: Any, moment_row: Any, finish: Array, *,
    normalize: bool, first_chunk_has_state: bool, out_dtype: Any,
) -> tuple[Array, Array]:  # fmt: skip
    q, k, v = _chunks(z, q), _of_group(z, _chunks(z, keys.k)), _of_group(z, _chunks(z, keys.v))
    p = _sum("hnct,hncs->hnts", q, k) ** 2 * _decay(z, gates) * 2.0**z.score_exponent
    num, den = _sum("hnts,hnes->hnet", p, v), p.sum(-1)
    if states is not None:
        reached = 1.0 if first_chunk_has_state else (np.arange(z.chunks) > 0)[None, :, None]
        state = _of_group(z, _f32(states))
        through = _sum("hnat,hnjt,hnaje->hnet", q, q, state)
        num = num + through * (_of_group(z, _chunks(z, state_row)) * reached)[:, :, None]
        through = _sum("hnat,hnjt,hnaj->hnt", q, q, _of_group(z, _f32(moments)))
        den = den + through * _of_group(z, _chunks(z, moment_row)) * reached
    if normalize:
        factor = jnp.where(den > 0, finish[:, None, None] / jnp.where(den > 0, den, 1.0), 0.0)
    else:
        factor = _chunks(z, finish)
    return _tokens_first(z, num * factor[:, :, None], z.h_q, out_dtype), den.reshape(z.q_heads, -1)


def gradient_q(
    z: Any, q: Array, dy: Array, keys: Any, gates: Any, rows: Any, states: Any, moments: Any, *,
    normalize: bool, first_chunk_has_state: bool, ds_scale: float, out_dtype: Any,
) -> tuple[Array, Array, Array]:  # fmt: skip
    q, dy, k, v = _chunks(z, q), _chunks(z, dy), _of_group(z, _chunks(z, keys.k)), _of_group(z, _chunks(z, keys.v))
    h, mean, of_state, of_moment, of_mass, finish = (_chunks(z, x) for x in rows)
    dq, part, mass = jnp.zeros_like(q), jnp.zeros_like(mean), jnp.zeros_like(mean)
    if states is not None:
        reached = 1.0 if first_chunk_has_state else (np.arange(z.chunks) > 0)[None, :, None]
        qm = _sum("hnat,hnaj->hnjt", q, _of_group(z, _f32(moments)))
        state = _of_group(z, _f32(states))
        dq = _sum("hnat,hnet,hnaje->hnjt", q, dy, state) * of_state[:, :, None] - qm * (of_moment * mean)[:, :, None]
        dq = dq * (reached if first_chunk_has_state else reached[..., None])
        part, mass = (q * dq).sum(2), (q * qm).sum(2) * of_mass * reached
    s = _sum("hnct,hncs->hnts", q, k) * _decay(z, gates)
    ds = 2.0 * s * h[..., None] * (_sum("hnet,hnes->hnts", dy, v) - mean[..., None])
    dq = dq + _sum("hnts,hncs->hnct", ds, k)
    exact = mean + (q * dq).sum(2) * 0.5 / ds_scale
    part = part * 0.5 / ds_scale - (exact - mean) * mass * normalize
    dq = _tokens_first(z, dq * finish[:, :, None], z.h_q, out_dtype)
    return dq, exact.reshape(z.q_heads, -1), part.reshape(z.q_heads, -1)


def gradient_kv(
    z: Any, q: Array, dy: Array, keys: Any, gates: Any, rows: Any, columns: Any, states: Any, moments: Any, finish: Array, *,
    last_chunk_has_state: bool, p_scale: float, ds_scale: float, out_dtype: Any,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    q, dy, k, v = _chunks(z, q), _chunks(z, dy), _chunks(z, keys.k), _chunks(z, keys.v)
    h, _, mean = (_chunks(z, x) for x in columns)
    dk, dv = jnp.zeros_like(k), jnp.zeros_like(v)
    if states is not None:
        state = _f32(states)
        reached = np.ones(z.chunks) if last_chunk_has_state else (np.arange(z.chunks) < z.chunks - 1)
        dk_state, dk_moment, dv_state = (_chunks(z, x)[:, :, None] * reached[None, :, None, None] for x in rows)
        dk = _sum("hnat,hnet,hnaje->hnjt", k, v, state) * dk_state + _sum("hnat,hnaj->hnjt", k, _f32(moments)) * dk_moment
        dv = _sum("hnat,hnjt,hnaje->hnet", k, k, state) * dv_state
    part = 0.5 * (k * dk).sum(2)
    keys_of, values_of = _of_group(z, k), _of_group(z, v)
    s = _sum("hnct,hncs->hnts", q, keys_of)
    x = s * _decay(z, gates) * h[..., None] * p_scale
    ds = x * (_sum("hnet,hnes->hnts", dy, values_of) - mean[..., None]) * (2.0 * ds_scale / p_scale)
    dk = dk + _group_sum(z, _sum("hnts,hnct->hncs", ds, q))
    dv = dv + _group_sum(z, _sum("hnts,hnet->hnes", x * s, dy))
    whole = 0.5 * (k * dk).sum(2)
    dk, dv = (_tokens_first(z, y * f[:, None, None, None], z.h_kv, out_dtype) for y, f in zip((dk, dv), finish, strict=True))
    return dk, dv, whole.reshape(z.heads, -1), part.reshape(z.heads, -1)


def use(patch: pytest.MonkeyPatch) -> None:
    """Put the formulas in the kernels' places."""
    patch.setattr(chunked_prepare, "stage", stage)
    patch.setattr(chunked_prepare, "scan", scan)
    for module in (chunked_fwd, chunked_bwd):
        patch.setattr(module, "stage", stage)
        patch.setattr(module, "moments_of", moments)
        patch.setattr(module, "update", update)
    patch.setattr(chunked_fwd, "query", query)
    patch.setattr(chunked_bwd, "gradient_q", gradient_q)
    patch.setattr(chunked_bwd, "gradient_kv", gradient_kv)


def _f32(x: Any) -> Array:
    return jnp.asarray(x).astype(jnp.float32)


def _sum(indices: str, *arrays: Array) -> Array:
    return jnp.einsum(indices, *arrays, precision=lax.Precision.HIGHEST)


def _chunks(z: Any, x: Array) -> Array:
    """[h, t] → [h, chunks, c], [h, n, t] → [h, chunks, n, c]."""
    x = _f32(x).reshape(*x.shape[:-1], z.chunks, z.chunk)
    return x if x.ndim == 3 else jnp.moveaxis(x, 1, 2)


def _of_group(z: Any, x: Array) -> Array:
    return jnp.repeat(x, z.group, axis=0)


def _group_sum(z: Any, x: Array) -> Array:
    return x.reshape(z.heads, z.group, *x.shape[1:]).sum(1)


def _decay(z: Any, gates: Any) -> Array:
    """2^(sum of the gates after j up to i) for j ≤ i in the chunk, [query head, chunk, i, j]."""
    prefix = _of_group(z, _chunks(z, gates.chunk_prefix))
    return jnp.where(np.tri(z.chunk, dtype=bool), jnp.exp2(jnp.minimum(prefix[..., :, None] - prefix[..., None, :], 0.0)), 0.0)


def _whole(states: Any) -> Array:
    """Blocks [chunks, h, 16, d − 16 b, e] as symmetric matrices [chunks, h, a, j, e]."""
    d = BLOCK * len(states)
    upper = jnp.concatenate([jnp.pad(s, ((0, 0),) * 3 + ((d - s.shape[3], 0), (0, 0))) for s in states], 2)
    block = np.arange(d) // BLOCK
    return jnp.where((block[:, None] <= block)[..., None], upper, jnp.swapaxes(upper, 2, 3))


def _tokens_first(z: Any, x: Array, heads: int, dtype: Any) -> Array:
    """[b · h, chunks, n, c] → [b, t, h, n]."""
    x = jnp.transpose(x.reshape(z.b, heads, *x.shape[1:]), (0, 2, 4, 1, 3))
    return x.reshape(z.b, z.tokens, heads, -1).astype(dtype)
