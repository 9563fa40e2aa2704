"""Backward of the chunked form: scaling, the order of the kernels, and the gates' gradient (twin:
csrc/power/chunked_backward.cuh).

With L the loss, D = dy^ = dy · 2^δ (per key-value head; without normaliser also times den_i · ∂y/∂num_i, a row's own factor,
so that the formulas below serve both), ΔD_i = <D_i, y^_i> (0 without normaliser) and everything in units of 2^−(δ + ν):
    q~_i = q^_i 2^(C − l_i),  4^l_i ≈ den_i / 2^PS    rescaled so that each row's normaliser is about one: float16 then holds P
    / den and its
    h_i  = 4^(l_i − C) 2^PS / den_i                   derivative for every row, however many keys it saw
    P_ij / den_i = s~² γ h_i,   ds~_ij = 2 s~ γ h_i (<D_i, v^_j> − ΔD_i),   dq~_i = Σ_j ds~ k^_j,  dk^_j = Σ_i ds~ q~_i,  dv^_j
    = Σ_i P/den D_i
and through the state, with w_i = 2^(chunk_prefix_i) h_i:  dS = Σ w_i ψ(q~_i) D_i,  dM = −Σ w_i ΔD_i q~_i q~_iᵀ.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bridge import spec
from jax_power.mosaic_gpu import chunked_prepare as prepare
from jax_power.mosaic_gpu import tiles
from jax_power.mosaic_gpu.chunked_fwd import Saved, States
from jax_power.mosaic_gpu.chunked_gradient_kv import KeyRows, QueryColumns, gradient_kv
from jax_power.mosaic_gpu.chunked_gradient_q import QueryRows, gradient_q
from jax_power.mosaic_gpu.chunked_prepare import Gates, Keys, Sizes
from jax_power.mosaic_gpu.chunked_stage import moments as moments_of
from jax_power.mosaic_gpu.chunked_stage import stage
from jax_power.mosaic_gpu.chunked_update import TILE, update, walk_of

# C above; factors 2^x on ds~, on P / den and on the weights of the state gradient that centre them in float16's range: at
# t = 65536 without gates P / den is 2^−16 and ds~ 2^−11. What a state gradient carries beside its unit: w is kept times 2^(2C
# + W_SHIFT).
Q_SHIFT, DS_SHIFT, P_SHIFT, W_SHIFT = 4, 6, 10, 8
STATE_GRADIENT_SHIFT = 2 * Q_SHIFT + W_SHIFT
# A gate below this lets nothing through that a float16 sum would show: its own gradient is 0, and sums start again behind it.
CUT = -18.0


class Rows(NamedTuple):
    """Per query head: q~, w 2^STATE_GRADIENT_SHIFT q~ and D transposed, float16 `[b · h_q, feature, t]`; float32 `[b · h_q,
    t]` factors.

    Fields:
      weight: w 2^STATE_GRADIENT_SHIFT.
      q_factor: from q to q~.
      h: h above.
      delta: <dy, y>, unscaled.
      bound: what the token adds to the state gradient's bound.
      dy_exponent: δ, `[h_kv]`.
    """

    q: Array
    weighted: Array
    dy: Array
    weight: Array
    q_factor: Array
    h: Array
    delta: Array
    bound: Array
    dy_exponent: Array


def floor_log2(x: Array) -> Array:
    return (lax.bitcast_convert_type(x, jnp.int32) >> 23) - 127


def prepare_rows(call: spec.PowerCall, z: Sizes, q: Array, y: Array, saved: Saved, dy: Array, gates: Gates, keys: Keys) -> Rows:
    den, factor, power = saved.norm, saved.q_factor, z.score_exponent
    seen = den > 0
    safe = jnp.where(seen, den, 1.0)
    delta = (dy.astype(jnp.float32) * y.astype(jnp.float32)).sum(-1)
    dy_factor = seen.astype(jnp.float32)
    if not call.normalize:
        of_k = prepare.power_of_two(-2 * keys.k_exponent - power).reshape(z.b, 1, z.h_kv) * call.scale**2
        dy_factor = den * jnp.repeat(of_k, z.group, axis=2) / factor**2
    largest = (jnp.max(jnp.abs(dy), axis=-1).astype(jnp.float32) * jnp.abs(dy_factor))[..., None]
    dy_exponent = prepare.head_exponent(largest, z.h_kv, tiles.DY_RANGE)
    of_dy = jnp.repeat(prepare.power_of_two(dy_exponent).reshape(z.b, 1, z.h_kv), z.group, axis=2)
    level = jnp.where(seen, jnp.maximum((floor_log2(safe) - power) >> 1, Q_SHIFT - 12), 0)
    h = jnp.where(seen, prepare.power_of_two(2 * (level - Q_SHIFT) + power) / safe, 0.0)
    q_factor = factor * prepare.power_of_two(Q_SHIFT - level)
    inverse = jnp.where(seen, 2.0 ** (power + STATE_GRADIENT_SHIFT) / safe, 0.0)
    h, delta, q_factor, level, inverse, dy_factor = (
        prepare.rows_of(z, x) for x in (h, delta, q_factor, level, inverse, dy_factor * of_dy)
    )
    decay = jnp.exp2(jnp.repeat(gates.chunk_prefix, z.group, axis=0))
    # w q~² < 2^15, or the update's float16 features overflow: reached only by rows nearly orthogonal to all they remember.
    most = prepare.power_of_two(15 - 2 * (tiles.Q_RANGE + Q_SHIFT - level))
    weight = jnp.minimum(decay * h * 2.0**STATE_GRADIENT_SHIFT, most)
    staged, weighted = stage(prepare.fill_up(z, q, z.padded), q_factor, weight)
    (dy,) = stage(prepare.fill_up(z, dy, z.padded), dy_factor)
    return Rows(staged, weighted, dy, weight, q_factor, h, delta, decay * inverse, dy_exponent)


class StateGradient(NamedTuple):
    """dS and dM behind every chunk, float16, what undoes their units `[h, chunks]`, and behind the first chunk's start."""

    states: Array
    moments: Array
    state_unit: Array
    moment_unit: Array
    first: tuple[Array, ...] | None
    first_moments: Array


def multiplicity(z: Sizes) -> np.ndarray:
    """Rows of the public state that moments (a, j) and (j, a) share: 1 inside a tile's own block, else 2. `[d, d]`."""
    tile = np.arange(z.padded) // 8
    return np.where(tile[:, None] == tile, 1.0, 2.0).astype(np.float32)


def update_gradient(
    z: Sizes, rows: Rows, mean: Array, gates: Gates, keys: Keys, ds: Array | None, dz: Array | None, *, want_first: bool
) -> StateGradient:
    """The state gradient behind every chunk from queries, taken last to first; ds and dz arrive behind the last."""
    bits = 2 * tiles.Q_RANGE + tiles.DY_RANGE + 1, 2 * tiles.Q_RANGE + 7
    bound = rows.bound.reshape(z.heads, z.group, z.chunks, z.chunk).sum((1, 3))
    last_s = last_z = largest = None
    if ds is not None and dz is not None:
        exponent = rows.dy_exponent - 2 * keys.k_exponent + STATE_GRADIENT_SHIFT
        last_s = prepare.to_square(z, ds.reshape(z.heads, -1, z.e)) / multiplicity(z)[..., None]
        last_s = last_s * prepare.power_of_two(exponent)[:, None, None, None]
        last_z = prepare.to_square(z, dz.reshape(z.heads, -1, 1))[..., 0] / multiplicity(z)
        last_z = last_z * prepare.power_of_two(exponent + keys.v_exponent)[:, None, None]
        largest = jnp.max(jnp.abs(last_s), (1, 2, 3)), jnp.max(jnp.abs(last_z), (1, 2))
    x = moments_of(rows.q, rows.weight * -mean, chunk=z.chunk, group=z.group)
    scanned = prepare.scan_moments(gates.chunk_sum, x, bound, last_z, largest, bits, reverse=True)
    start = None if last_s is None else prepare.to_blocks(z, last_s)
    states, first = update(
        rows.weighted, rows.q, rows.dy, jnp.exp2(gates.chunk_sum), scanned.state_factor, start,
        walk_of(gates.chunk_sum, reverse=True), chunk_tiles=z.chunk_tiles, group=z.group, want_last=want_first,
    )  # fmt: skip
    units = 1.0 / scanned.state_factor, 1.0 / scanned.moment_factor
    return StateGradient(states, scanned.moments, *units, first, scanned.last)


def backward(
    call: spec.PowerCall,
    q: Array,
    k: Array,
    v: Array,
    log_g: Array | None,
    s0: Array | None,
    z0: Array | None,
    y: Array,
    saved: Saved,
    dy: Array,
    ds: Array | None,
    dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:
    """Gradients of q, k, v, log_g, s0, z0 (None where the argument is None), from what `forward` returned."""
    z = prepare.sizes_of(call)
    keys, gates, before = jax.tree.map(lambda x: x.reshape(z.heads, *x.shape[2:]), (saved.keys, saved.gates, saved.states))
    rows = prepare_rows(call, z, q, y, saved, dy, gates, keys)
    exponent = jnp.repeat(rows.dy_exponent + keys.v_exponent, z.group)[:, None]
    mean = rows.delta * prepare.power_of_two(exponent) if call.normalize else jnp.zeros_like(rows.delta)
    zero = jnp.zeros_like(mean)
    h = rows.h * 2.0**DS_SHIFT
    finish = rows.q_factor * prepare.power_of_two(-exponent) * 2.0**-DS_SHIFT
    query_rows = QueryRows(h, mean, zero, zero, zero, finish)
    if before is not None:
        reach = jnp.exp2(jnp.repeat(gates.chunk_prefix, z.group, axis=0))
        of_state, of_moment = (
            reach * jnp.repeat(jnp.repeat(unit, z.chunk, axis=1), z.group, axis=0)
            for unit in (before.state_unit, before.moment_unit)
        )
        query_rows = QueryRows(h, mean, 2.0 * h * of_state, 2.0 * h * of_moment, rows.h * of_moment, finish)
    held: Any = (None, None) if before is None else (before.states, before.moments)
    dq, mean, row_state = gradient_q(
        z, rows.q, rows.dy, keys, gates, query_rows, *held,
        normalize=call.normalize, first_chunk_has_state=s0 is not None, ds_scale=2.0**DS_SHIFT, out_dtype=q.dtype,
    )  # fmt: skip
    row = mean  # without normaliser: the row's own part of the gates' gradient
    mean = mean if call.normalize else zero

    behind = None
    if z.chunks > 1 or ds is not None or s0 is not None:
        behind = update_gradient(z, rows, mean, gates, keys, ds, dz, want_first=s0 is not None)
    key_rows = KeyRows(*(jnp.zeros_like(gates.chunk_decay),) * 3)
    of_behind: dict[str, Any] = {"states": None, "moments": None}  # an initial state's gradient alone comes behind no key
    if behind is not None and (z.chunks > 1 or ds is not None):
        of_behind = {"states": behind.states, "moments": behind.moments}
    if behind is not None:
        of_state, of_moment = (
            gates.chunk_decay * jnp.repeat(unit, z.chunk, axis=1) * 2.0**-STATE_GRADIENT_SHIFT
            for unit in (behind.state_unit, behind.moment_unit)
        )
        key_rows = KeyRows(of_state * 2.0 ** (DS_SHIFT + 1), of_moment * 2.0 ** (DS_SHIFT + 1), of_state * 2.0**P_SHIFT)
    columns = QueryColumns(rows.h, rows.h * jnp.exp2(jnp.repeat(gates.tile_prefix, z.group, axis=0)), mean)
    unit = prepare.power_of_two(-rows.dy_exponent - keys.v_exponent) * 2.0**-DS_SHIFT
    of_k, of_v = unit * prepare.power_of_two(keys.k_exponent), prepare.power_of_two(-rows.dy_exponent) * 2.0**-P_SHIFT
    dk, dv, column, column_state = gradient_kv(
        z, rows.q, rows.dy, keys, gates, key_rows, columns, **of_behind, finish=jnp.stack((of_k, of_v)),
        last_chunk_has_state=ds is not None, p_scale=2.0**P_SHIFT, ds_scale=2.0**DS_SHIFT, out_dtype=k.dtype,
    )  # fmt: skip
    dq, dk, dv = dq[:, : z.t, :, : z.d], dk[:, : z.t, :, : z.d], dv[:, : z.t, :, : z.e]

    ds0 = dz0 = None
    if s0 is not None and behind is not None:
        ds0, dz0 = first_gradient(z, keys, rows, gates, behind, ds, dz)
    if log_g is None:
        return dq, dk, dv, None, ds0, dz0
    row_unit = prepare.power_of_two(-exponent)
    parts = GateParts(column * unit[:, None], column_state * unit[:, None], row * row_unit, row_state * row_unit)
    start = jnp.zeros(z.heads) if s0 is None or ds0 is None else _state_product(z, s0, z0, ds0, dz0)
    starts = start[:, None]
    if before is not None and behind is not None and z.chunks > tiles.UNANCHORED:
        anchors = anchor_products(before, behind) * prepare.power_of_two(-rows.dy_exponent - keys.v_exponent)[:, None]
        starts = jnp.concatenate((starts, anchors), 1)
    dlog_g = gate_gradient(call, z, log_g, parts, starts, closed=ds is None)
    return dq, dk, dv, dlog_g, ds0, dz0


def first_gradient(
    z: Sizes, keys: Keys, rows: Rows, gates: Gates, behind: StateGradient, ds: Array | None, dz: Array | None
) -> tuple[Array, Array]:
    """The gradient of the initial state, public. Of a gradient that arrived, moments kept the half symmetric inside a
    tile's own block.
    """
    exponent = 2 * keys.k_exponent - rows.dy_exponent - STATE_GRADIENT_SHIFT
    counts = prepare.from_square(z, jnp.asarray(multiplicity(z))[None, :, :, None])
    assert behind.first is not None
    s = prepare.from_blocks(z, behind.first) * counts * prepare.power_of_two(exponent)[:, None, None]
    moments = prepare.from_square(z, behind.first_moments[..., None]) * counts
    moments = moments[..., 0] * prepare.power_of_two(exponent - keys.v_exponent)[:, None]
    if ds is not None and dz is not None:
        across = jnp.exp2(gates.chunk_sum.sum(1))[:, None]
        ds, dz = ds.reshape(s.shape), dz.reshape(moments.shape)
        s = s + across[..., None] * (ds - prepare.from_square(z, prepare.to_square(z, ds)))
        moments = moments + across * (dz - prepare.from_square(z, prepare.to_square(z, dz[..., None]))[..., 0])
    return s.reshape(z.b, z.h_kv, -1, z.e), moments.reshape(z.b, z.h_kv, -1)


def _state_product(z: Sizes, s0: Array, z0: Any, ds0: Array, dz0: Any) -> Array:
    return (s0 * ds0).sum((2, 3)).reshape(z.heads) + (z0 * dz0).sum(2).reshape(z.heads)


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------


class GateParts(NamedTuple):
    """½ <k_j, dk_j>, all of it and through the state, `[h, t]`; the row's part, all (without normaliser) and through the
    state, `[b · h_q, t]`.
    """

    column: Array
    column_state: Array
    row: Array
    row_state: Array


def anchor_products(before: States, behind: StateGradient) -> Array:
    """<S, dS> + <M, dM> at the start of every `tiles.ANCHOR`-th chunk but the first, `[h, anchors]`: what the gates' gradient
    is there, without a sum over tokens.
    """

    def product(x: Array, unit: Array, dx: Array, dx_unit: Array) -> Array:
        ahead, back = slice(tiles.ANCHOR, None, tiles.ANCHOR), slice(tiles.ANCHOR - 1, -1, tiles.ANCHOR)
        inner = (x[:, ahead].astype(jnp.float32) * dx[:, back].astype(jnp.float32)).sum(tuple(range(2, x.ndim)))
        return inner * unit[:, ahead] * dx_unit[:, back]

    of_states = product(before.states, before.state_unit, behind.states, behind.state_unit)
    of_moments = product(before.moments, before.moment_unit, behind.moments, behind.moment_unit)
    return (of_states + of_moments) * 2.0**-STATE_GRADIENT_SHIFT


def gate_gradient(call: spec.PowerCall, z: Sizes, log_g: Array, parts: GateParts, starts: Array, *, closed: bool) -> Array:
    """dlog_g_l = <ds0, s0> + <dz0, z0> + Σ_{j < l} (½ <k_j, dk_j> − row part of j): what tokens before l gave to later rows,
    less what their own rows took. With the normaliser the row part, <dnum, num> + dden · den, is 0. `starts` is the sum as
    known at the first chunk and at every `tiles.ANCHOR`-th after it, `[h, segments]`.

    Summed over all of t, rounding errors would grow with √t. So chunk ends come from the parts through the state alone, to
    which pairs inside a chunk add nothing; the last of them is 0 when no gradient arrives behind it (`closed`), and what
    misses 0, or the start of the next segment, is spread over the segment's chunks. Between two chunk ends the full terms are
    summed, and what misses the second end is spread over the chunk. Gates that cut (mixed with weak ones, where sums over a
    chunk would drown the few pairs behind each) start the sum anew at 0.
    """

    def grouped(x: Array) -> Array:
        return x.reshape(z.heads, z.group, z.tokens).sum(1)

    inside = np.arange(z.tokens) < z.t
    terms = parts.column - (0.0 if call.normalize else grouped(parts.row))
    state_terms = parts.column_state - grouped(parts.row_state)
    terms, state_terms = (jnp.where(inside, x, 0.0).reshape(z.heads, z.chunks, z.chunk) for x in (terms, state_terms))
    cuts = prepare.rows_of(z, log_g).reshape(z.heads, z.chunks, z.chunk_tiles, TILE) < CUT

    of_chunk = state_terms.sum(2)
    segments = starts.shape[1]
    length = z.chunks if segments == 1 else tiles.ANCHOR
    of_segment = jnp.pad(of_chunk, ((0, 0), (0, segments * length - z.chunks))).reshape(z.heads, segments, length)
    upto = jnp.cumsum(of_segment, 2)
    ends = starts + upto[..., -1]
    known = jnp.concatenate((starts[:, 1:], 0.0 * ends[:, -1:] if closed else ends[:, -1:]), 1)
    counts = np.minimum(z.chunks - np.arange(segments) * length, length)
    correction = ((known - ends) / counts)[..., None]
    before = starts[..., None] + upto - of_segment + correction * np.arange(length)
    before, correction = (x.reshape(z.heads, -1)[:, : z.chunks] for x in (before, jnp.broadcast_to(correction, upto.shape)))
    lengths = np.clip(z.t - np.arange(z.chunks) * z.chunk, 1, z.chunk)
    missing = (of_chunk + correction - terms.sum(2)) / lengths
    missing = jnp.where(cuts.any((2, 3)), 0.0, missing)
    terms = jnp.where(inside.reshape(z.chunks, z.chunk), terms + missing[..., None], 0.0)

    # Segmented sums, tiles first: the sum that gate l sees is of the terms before l since the last cut at or before l.
    terms = terms.reshape(z.heads, z.chunks, z.chunk_tiles, TILE)
    count = jnp.cumsum(cuts.astype(jnp.int32), 3)
    same = (count[..., :, None] == count[..., None, :]) & np.tri(TILE, k=-1, dtype=bool)
    within = jnp.where(same, terms[..., None, :], 0.0).sum(-1)
    tile_end = jnp.where(count == count[..., -1:], terms, 0.0).sum(-1)
    tile_cuts = cuts.any(3)
    tile_count = jnp.cumsum(tile_cuts.astype(jnp.int32), 2)
    reached = (tile_count - tile_cuts)[..., :, None]  # cuts before the tile
    same = (reached == tile_count[..., None, :]) & np.tri(z.chunk_tiles, k=-1, dtype=bool)
    at_tile = jnp.where(same, tile_end[..., None, :], 0.0).sum(-1) + jnp.where(reached[..., 0] == 0, before[..., None], 0.0)
    sums = within + jnp.where(count == 0, at_tile[..., None], 0.0)
    return jnp.moveaxis(sums.reshape(z.b, z.h_kv, z.tokens)[..., : z.t], 1, 2)
