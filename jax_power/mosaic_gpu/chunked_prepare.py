"""What the kernels of the chunked form start from, in XLA: gate sums, ranges, scaled float16 operands, chunk to chunk scans.

Inside, everything is float16 scaled by powers of two, which is exact for bfloat16 inputs (twin: csrc/power/chunked_layout.cuh):
q^ = q · 2^a (a per row), k^ = k · 2^κ, v^ = v · 2^ν (κ, ν per key-value head). Time is filled up with zeros to whole chunks,
head sizes to 64 or 128, and operands of a matrix product lie transposed, [head, feature, token]: tokens are what most products
sum over.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bridge import spec
from jax_power.mosaic_gpu import tiles
from jax_power.mosaic_gpu.chunked_stage import scan, stage
from jax_power.mosaic_gpu.chunked_update import BLOCK, TILE, walk_of

LOG2_E = 1.4426950408889634


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of a call as the kernels see it: batch and heads as one axis, time in chunks of tiles, padded head sizes."""

    b: int
    t: int
    h_q: int
    h_kv: int
    d: int
    e: int
    chunk: int

    @property
    def group(self) -> int:
        return self.h_q // self.h_kv

    @property
    def heads(self) -> int:
        return self.b * self.h_kv

    @property
    def q_heads(self) -> int:
        return self.b * self.h_q

    @property
    def chunks(self) -> int:
        return -(-self.t // self.chunk)

    @property
    def tokens(self) -> int:
        return self.chunks * self.chunk

    @property
    def chunk_tiles(self) -> int:
        return self.chunk // TILE

    @property
    def padded(self) -> int:
        """Head size of the kernels' operands, keys and values alike."""
        return tiles.padded_head(max(self.d, self.e))

    @property
    def score_exponent(self) -> int:
        return tiles.score_exponent(self.padded)


def sizes_of(call: spec.PowerCall) -> Sizes:
    return Sizes(call.b, call.t, call.h_q, call.h_kv, call.d, call.e, tiles.chunk_length(call.t, max(call.d, call.e)))


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------


class Gates(NamedTuple):
    """Sums of base-2 log gates, float32, per key-value head. None is a difference of long sums: strong decay keeps its digits.

    Fields:
      tile_prefix: `[h, t]` sum over the tile up to and with the token.
      tile_decay: `[h, t]` 2^(sum after the token to the tile's end).
      tile_total: `[h, tiles]` 2^(sum over the tile).
      chunk_prefix: `[h, t]` sum over the chunk up to and with the token.
      chunk_decay: `[h, t]` 2^(sum after the token to the chunk's end): a key's weight in the chunk's update.
      chunk_sum: `[h, chunks]`.
    """

    tile_prefix: Array
    tile_decay: Array
    tile_total: Array
    chunk_prefix: Array
    chunk_decay: Array
    chunk_sum: Array


def _partial_sums(x: Array) -> tuple[Array, Array]:
    """Sums along the last axis up to and with each entry, and after it.

    Sums of masked entries, which XLA fuses. Products with triangles would each be tuned, which takes part of the first call.
    """
    upto = np.tri(x.shape[-1], dtype=bool)
    here, after = (jnp.where(mask, x[..., None, :], 0.0).sum(-1) for mask in (upto, ~upto))
    return here, after


def sum_gates(z: Sizes, log_g: Array | None) -> Gates:
    if log_g is None:
        gates = jnp.zeros((z.heads, z.chunks, z.chunk_tiles, TILE), jnp.float32)
    else:
        gates = jnp.moveaxis(log_g, 1, 2).reshape(z.heads, z.t) * LOG2_E
        gates = jnp.pad(gates, ((0, 0), (0, z.tokens - z.t))).reshape(z.heads, z.chunks, z.chunk_tiles, TILE)
    prefix, suffix = _partial_sums(gates)
    total = prefix[..., -1]
    upto, after = _partial_sums(total)
    flat = functools.partial(jnp.reshape, shape=(z.heads, z.tokens))
    return Gates(
        flat(prefix), flat(jnp.exp2(suffix)), jnp.exp2(total).reshape(z.heads, -1), flat(prefix + (upto - total)[..., None]),
        flat(jnp.exp2(suffix + after[..., None])), upto[..., -1],
    )  # fmt: skip


class Moments(NamedTuple):
    """Moments before every chunk of a walk, float16 `[h, chunks, d, d]`, and after all, float32 `[h, d, d]`.

    Fields:
      state_factor, moment_factor: what brings the states and the moments into float16's range, `[h, chunks]`.
    """

    moments: Array
    last: Array
    state_factor: Array
    moment_factor: Array


def scan_moments(
    log_decay: Array, x: Array, bound: Array, first: Array | None, largest: tuple[Array, Array] | None,
    bits: tuple[int, int], *, reverse: bool = False,
) -> Moments:  # fmt: skip
    """Scans moments together with the bounds of states and moments.

    Args:
      x, bound: of every chunk, `[h, chunks, d, d]` and `[h, chunks]`.
      first, largest: the first moments, and the largest entries of first state and moments `[h]`; None is zero.
      bits: entries of states and of moments are below bound · 2^bits.
    """
    start = None
    if first is not None and largest is not None:
        start = first, jnp.stack([most * 2.0**-power for most, power in zip(largest, bits, strict=True)], 1)
    most = jnp.zeros_like(bound, shape=(2,)) + np.array([2.0 ** (tiles.STATE_RANGE - power) for power in bits], np.float32)
    moments, last, factors = scan(x, jnp.exp2(log_decay), bound, start, walk_of(log_decay, reverse=reverse), most)
    return Moments(moments, last, factors[..., 0], factors[..., 1])


# ---------------------------------------------------------------------------------------------------------------------
# Scaled operands
# ---------------------------------------------------------------------------------------------------------------------


def power_of_two(exponent: Array) -> Array:
    """2^exponent for an integer exponent, exact: a product of two by their bits, as one of ±200 is no float32's.

    `jnp.ldexp` forgets, in JAX 0.12, that its result varies over a mesh.
    """
    half = exponent >> 1
    first, second = ((jnp.clip(x, -126, 127) + 127) << 23 for x in (half, exponent - half))
    return lax.bitcast_convert_type(first, jnp.float32) * lax.bitcast_convert_type(second, jnp.float32)


def scaling_exponent(largest: Array, power: int) -> Array:
    """Integer x with largest · 2^x in [2^(power − 1), 2^power); 0 where `largest` is."""
    exponent = (lax.bitcast_convert_type(largest, jnp.int32) >> 23) - 127
    return jnp.where(largest == 0, 0, jnp.clip(power - 1 - exponent, -100, 100))


def head_exponent(x: Array, h_kv: int, power: int) -> Array:
    """Scaling exponent of `[b, t, h, n]`, one for the heads that belong to a key-value head: `[b · h_kv]`."""
    largest = jnp.max(jnp.abs(x), axis=(1, 3)).astype(jnp.float32)
    return scaling_exponent(largest.reshape(x.shape[0] * h_kv, -1).max(1), power)


def row_factor(x: Array) -> Array:
    """2^a that brings each row of `[…, n]` into [2^(Q_RANGE − 1), 2^Q_RANGE), `[…]`."""
    return power_of_two(scaling_exponent(jnp.max(jnp.abs(x), axis=-1).astype(jnp.float32), tiles.Q_RANGE))


def fill_up(z: Sizes, x: Array, width: int) -> Array:
    """`[b, t, h, n]` with zeros up to whole chunks and `width` features."""
    return jnp.pad(x, ((0, 0), (0, z.tokens - z.t), (0, 0), (0, width - x.shape[3])))


def rows_of(z: Sizes, x: Array) -> Array:
    """`[b, t, h]` → `[b · h, padded t]`."""
    return jnp.pad(jnp.moveaxis(x, 1, 2).reshape(-1, z.t), ((0, 0), (0, z.tokens - z.t)))


class Keys(NamedTuple):
    """k^ᵀ and v^ᵀ as float16 `[h, feature, token]`, and the exponents κ and ν `[h]`."""

    k: Array
    v: Array
    k_exponent: Array
    v_exponent: Array


def prepare_keys(z: Sizes, k: Array, v: Array, gates: Gates) -> tuple[Keys, Array]:
    """Keys and values, and (w k^)ᵀ, w being the decay to the chunk's end."""
    k_exponent, v_exponent = head_exponent(k, z.h_kv, tiles.K_RANGE), head_exponent(v, z.h_kv, tiles.V_RANGE)
    of_k, of_v = (
        jnp.broadcast_to(power_of_two(exponent)[:, None], (z.heads, z.tokens)) for exponent in (k_exponent, v_exponent)
    )
    staged, weighted = stage(fill_up(z, k, z.padded), of_k, gates.chunk_decay)
    return Keys(staged, stage(fill_up(z, v, z.padded), of_v)[0], k_exponent, v_exponent), weighted


# ---------------------------------------------------------------------------------------------------------------------
# States
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def _public_rows(d: int, padded_d: int) -> np.ndarray:
    """Row of the public state that holds x[a] x[j], `[padded_d, padded_d]`; D, a row of zeros, outside d."""
    rows = np.full((padded_d, padded_d), spec.state_rows(d, 2))
    for n, (i, j) in enumerate(spec.tile_tuples(d, 2)):
        block = n * 64 + np.arange(64).reshape(8, 8)
        rows[8 * j : 8 * j + 8, 8 * i : 8 * i + 8] = block.T
        rows[8 * i : 8 * i + 8, 8 * j : 8 * j + 8] = block
    return rows


@functools.cache
def _moment_rows(d: int, padded_d: int) -> np.ndarray:
    """The inverse: for each public row the flat index a · padded_d + j."""
    pairs = spec.tile_tuples(d, 2)
    a = 8 * pairs[:, 0, None, None] + np.arange(8)[:, None]
    j = 8 * pairs[:, 1, None, None] + np.arange(8)
    return (a * padded_d + j).reshape(-1)


def to_square(z: Sizes, s: Array) -> Array:
    """A public state `[h, D, n]` as moments of pairs of features `[h, a, j, n]`, symmetric in a and j."""
    square = jnp.pad(s, ((0, 0), (0, 1), (0, 0)))[:, _public_rows(z.d, z.padded)]
    return 0.5 * (square + jnp.swapaxes(square, 1, 2))


def from_square(z: Sizes, square: Array) -> Array:
    """The inverse of `to_square` on symmetric moments: `[h, a, j, n]` → `[h, D, n]`."""
    return square.reshape(square.shape[0], -1, square.shape[3])[:, _moment_rows(z.d, z.padded)]


def to_blocks(z: Sizes, square: Array) -> tuple[Array, ...]:
    """`[h, a, j, e]` → what `update` starts from, per block b `[h, 16, e, d − 16 b]`."""
    square = jnp.pad(square, ((0, 0), (0, 0), (0, 0), (0, z.padded - square.shape[3])))
    blocks = range(0, z.padded, BLOCK)
    return tuple(jnp.swapaxes(square[:, b : b + BLOCK, b:], 2, 3) for b in blocks)


def from_blocks(z: Sizes, blocks: tuple[Array, ...]) -> Array:
    """What `update` ends with as a public state `[h, D, e]`."""
    whole = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (z.padded - x.shape[3], 0))) for x in blocks]
    square = jnp.swapaxes(jnp.concatenate(whole, 1), 2, 3)
    return from_square(z, square)[..., : z.e]
