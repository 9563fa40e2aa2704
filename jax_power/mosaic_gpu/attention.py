"""The attention form on Hopper: glue between the interface every implementation has and the Pallas kernels."""

from __future__ import annotations

import jax.numpy as jnp
from jax import Array

from bridge import hopper, spec
from jax_power import platforms
from jax_power.mosaic_gpu import power_bwd, power_fwd
from jax_power.mosaic_gpu.attention_common import fill_up, head_scale, measure_ranges, sum_gates


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels of the attention form cannot serve `call`: the argument, and what would work."""
    return hopper.attention_lacks(call, device, largest=128, padded=True) or platforms.not_hopper()


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Array, None, None]:
    """y `[b, t, h_q, e]` in the dtype of v, and norm `[b, t, h_q]` float32: the scaled row's normaliser, for `backward`."""
    if 0 in (*q.shape, *k.shape, *v.shape) or (call.normalize and call.scale == 0):
        return jnp.zeros((*q.shape[:3], call.e), v.dtype), jnp.zeros(q.shape[:3], jnp.float32), None, None
    gates = None if log_g is None else sum_gates(log_g, call.deg)
    scale = head_scale(k, call.deg) if k.dtype == jnp.float16 else None
    y, norm = power_fwd.attend(call, fill_up(q), fill_up(k), fill_up(v), gates, scale)
    return y[:, : call.t, :, : call.e], jnp.moveaxis(norm[:, :, : call.t], 1, 2), None, None


def backward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None,
    z0: Array | None, y: Array, norm: Array, dy: Array, ds: Array | None, dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, None, None]:  # fmt: skip
    """dq, dk, dv in the dtypes of q, k, v, and dlog_g in float32. Every sum has one order: two runs give equal bits."""
    if 0 in (*q.shape, *k.shape, *v.shape) or call.scale == 0:
        dlog_g = None if log_g is None else jnp.zeros_like(log_g)
        return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), dlog_g, None, None
    dy = dy.astype(v.dtype)
    gates = None if log_g is None else sum_gates(log_g, call.deg)
    ranges = measure_ranges(call, q, k, v, dy) if k.dtype == jnp.float16 else None
    q_, k_, v_, y_, dy_ = (fill_up(x) for x in (q, k, v, y, dy))
    norm = jnp.pad(jnp.moveaxis(norm, 1, 2), ((0, 0), (0, 0), (0, -call.t % power_bwd.BLOCK)))
    dq, queries = power_bwd.differentiate_queries(call, q_, k_, v_, y_, norm, dy_, gates, ranges)
    dk, dv, column_sum = power_bwd.differentiate_keys(call, q_, k_, v_, dy_, queries, gates, ranges)
    dlog_g = None if queries.row_sum is None or column_sum is None else _sum_gate_gradient(call, queries.row_sum, column_sum)
    return dq[:, : call.t, :, : call.d], dk[:, : call.t_kv, :, : call.d], dv[:, : call.t_kv, :, : call.e], dlog_g, None, None


def _sum_gate_gradient(call: spec.PowerCall, row_sum: Array, column_sum: Array) -> Array:
    """dlog_g_m = Σ_{i ≥ m} (Σ_h row_sum_hi − column_sum_i), h over the query heads that read a key-value head."""
    rows = row_sum.reshape(call.b, call.h_kv, call.group, -1)[..., : call.t].sum(2)
    difference = jnp.moveaxis(rows - column_sum[..., : call.t], 1, 2)
    return jnp.flip(jnp.cumsum(jnp.flip(difference, 1), 1), 1)
