"""What the kernels of the attention form share.

All of them keep tiles of 64 rows a warpgroup in shared memory, stream tiles of the other side past them, and feed the weights
back to the matrix units from registers. Rows past the end of a sequence are filled with zeros by the copy engine and not
written by it; head sizes are filled up with zeros to 64 or 128 before.

Scale. Row i of q is multiplied by c_i, a power of two that brings its largest entry to [1, 2) (float16: a second factor, one a
head, bounds s^p by 2^15). It cancels against the normaliser or is divided out at the end, and nothing over- or underflows in
between. The contract's `scale` never enters a product: it cancels too, or is a factor scale^p at the end.

Gates. exp(G_i − G_j) is taken apart so that no large G is ever subtracted: within a block of 128 tokens as exp(g_i − g_j), g
counted from the start of the block; across blocks as exp(g_i) · exp(H_i − H_j) · exp(rest_j), where H is the sum up to the
start of i's block, respectively to the end of j's, in two floats. Everything is kept as log2, divided by p, and multiplied to s
before s is raised to the power p, so one formula serves every degree.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge import spec
from jax_power.mosaic_gpu import compat, tiles

ROW = plgpu.Layout.WGMMA.reduce(1)  # one number a row of a product, in registers
COLUMN = plgpu.Layout.WGMMA.reduce(0)  # one number a column
# Operands of products: columns in slabs of 64, each row of a slab one 128-byte swizzled line.
OPERAND = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))

# Keys and values of heads that run side by side should stay in the 50 MB L2 cache, with room for queries and results.
L2_BYTES = 32 * 2**20


# ---------------------------------------------------------------------------------------------------------------------
# Before the kernels, in XLA
# ---------------------------------------------------------------------------------------------------------------------


class Gates(NamedTuple):
    """Gates as the kernels read them, all log2 and divided by p; n blocks of 128 tokens, the last filled up with gates of 1.

    Fields:
      sum: g_i, decay from the start of its block to token i `[b, h_kv, 128 n]`.
      rest: exp(rest_j)^(1/p), from token j to the end of its block `[b, h_kv, 128 n]`.
      edges: for every block H at its start (high, low) and at its end (high, low) `[b, h_kv, 4 n]`.
    """

    sum: Array
    rest: Array
    edges: Array


def sum_gates(log_g: Array, deg: int) -> Gates:
    """Running sums of the gates `[b, t, h_kv]`, without a sum that has lost digits.

    A gate is split into a multiple of 2^-10 and a remainder: sums of the first are exact within a block, those of the second
    tiny. So are a block's whole part and its fraction, for the sums of blocks.
    """
    b, t, h = log_g.shape
    blocks = -(-t // tiles.GATE_BLOCK)
    g = jnp.pad(jnp.moveaxis(log_g * (math.log2(math.e) / deg), 1, 2), ((0, 0), (0, 0), (0, blocks * tiles.GATE_BLOCK - t)))
    coarse = jnp.round(g * 1024.0) / 1024.0
    sums = [jnp.cumsum(part.reshape(b, h, blocks, tiles.GATE_BLOCK), -1) for part in (coarse, g - coarse)]
    total = tuple(part[..., -1:] for part in sums)
    rest = jnp.exp2((total[0] - sums[0]) + (total[1] - sums[1]))
    whole = jnp.round(total[0][..., 0])
    fraction = (total[0][..., 0] - whole) + total[1][..., 0]
    end = jnp.cumsum(whole, -1), jnp.cumsum(fraction, -1)
    start = tuple(jnp.pad(part[..., :-1], ((0, 0), (0, 0), (1, 0))) for part in end)
    edges = jnp.stack((*start, *end), -1)
    return Gates((sums[0] + sums[1]).reshape(b, h, -1), rest.reshape(b, h, -1), edges.reshape(b, h, -1))


def score_bits(deg: int) -> int:
    """float16: scores are scaled to |s| <= 2^score_bits, so that s^p <= 2^15."""
    return 10 if deg == 1 else 15 // deg


def head_scale(k: Array, deg: int) -> Array:
    """float16: the power of two, one a head `[b, h_kv]`, that bounds the scores of rows of norm < 2."""
    largest = jnp.sqrt(jnp.square(k.astype(jnp.float32)).sum(-1).max(1))
    exponent = score_bits(deg) - 1 - jnp.frexp(largest)[1]
    return jnp.where(largest > 0, _power_of_two(exponent), 1.0)


class Ranges(NamedTuple):
    """float16: what keeps intermediate numbers in its range, one number a key-value head `[b, h_kv]`, in float32.

    Fields:
      scale: `head_scale`.
      v_squared: largest |v|².
      weight, dscore: powers of two that w / n and dS are multiplied by before they are rounded, for dv and dk.
    """

    scale: Array
    v_squared: Array
    weight: Array
    dscore: Array


def measure_ranges(call: spec.PowerCall, q: Array, k: Array, v: Array, dy: Array) -> Ranges:
    """`Ranges` of a backward pass.

    Normalised, w / n ≤ 1 and dS is about dp / (i · score / √d), 2^10 of it on the first rows; what outgrows 2^16 there (a row
    that sees only keys nearly orthogonal to it) is clamped. Otherwise both have plain bounds.
    """
    q_squared, k_squared, v_squared, dy_squared = (jnp.square(x.astype(jnp.float32)).sum(-1).max(1) for x in (q, k, v, dy))
    q_squared, dy_squared = (x.reshape(call.b, call.h_kv, call.group).max(-1) for x in (q_squared, dy_squared))
    # A root at a time: the product of squares could overflow.
    score, dweight = jnp.sqrt(q_squared) * jnp.sqrt(k_squared), jnp.sqrt(dy_squared) * jnp.sqrt(v_squared)
    above, dweight_above = jnp.frexp(score)[1], jnp.frexp(dweight)[1]
    if call.normalize:
        weight = jnp.full_like(above, 10)
        dscore = 10 + above - (3 if call.d <= 64 else 4) - (dweight_above + 1)
    else:
        weight, dscore = 14 - call.deg * above, 14 - (call.deg - 1) * above - dweight_above
    known = (score > 0) & (dweight > 0)
    weight, dscore = (jnp.where(known, _power_of_two(x), 1.0) for x in (weight, dscore))
    return Ranges(head_scale(k, call.deg), v_squared, weight, dscore)


def _power_of_two(exponent: Array) -> Array:
    return jnp.exp2(jnp.clip(exponent, -126, 126).astype(jnp.float32))


def fill_up(x: Array) -> Array:
    """`[b, t, h, n]` with zeros up to a head size of 64 or 128 and a multiple of 8 tokens.

    The copy engine fills tiles up with zeros at the end of a sequence, but what it can describe in rows of 8 tokens is a
    multiple of 8. Only calls with other sizes pay for the copy.
    """
    fill = (0, 0), (0, -x.shape[1] % 8), (0, 0), (0, tiles.padded_head(x.shape[-1]) - x.shape[-1])
    return jnp.pad(x, fill) if any(after for _, after in fill) else x


# ---------------------------------------------------------------------------------------------------------------------
# Inside the kernels
# ---------------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Deck:
    """The blocks of a launch: `tiles` of each head of each batch, dealt group by group of `together` heads whose keys and
    values fit the L2 cache together, within a group longest first."""

    tiles: int
    heads: int
    batches: int
    together: int
    longest_last: bool

    @classmethod
    def make(cls, count: int, heads: int, batches: int, head_bytes: int, *, longest_last: bool) -> Deck:
        fitting = max(1, L2_BYTES // max(head_bytes, 1))
        together = max(n for n in range(1, heads * batches + 1) if heads * batches % n == 0 and n <= fitting)
        return cls(count, heads, batches, together, longest_last)

    @property
    def size(self) -> int:
        return self.tiles * self.heads * self.batches

    def deal(self, index: Array) -> tuple[Array, Array, Array]:
        """Batch, head and tile of block `index`."""
        group, rest = _divide(index, self.tiles * self.together)
        row, member = _divide(rest, self.together)
        batch, head = _divide(group * self.together + member, self.heads)
        return batch, head, self.tiles - 1 - row if self.longest_last else row


def _divide(n: Array, by: int) -> tuple[Array, Array]:
    quotient = lax.div(n, jnp.int32(by))
    return quotient, n - quotient * by


def allocate(
    kernel: str, dtype: Any, operands: Mapping[str, tuple[int, ...]], vectors: Mapping[str, tuple[int, ...]]
) -> dict[str, Any]:
    """Shared memory for operands of products, in `dtype`, and for float32 vectors, by name; raises if it cannot fit."""
    tiles.check_smem(kernel, {name: (shape, 2) for name, shape in operands.items()} | {
        name: (shape, 4) for name, shape in vectors.items()
    })  # fmt: skip
    return {name: plgpu.SMEM(shape, dtype, transforms=OPERAND) for name, shape in operands.items()} | {
        name: plgpu.SMEM(shape, jnp.float32) for name, shape in vectors.items()
    }


def accumulator(columns: int) -> Any:
    """float32 sums of a product with 64 rows, for `pl.run_scoped`."""
    return plgpu.WGMMAAccumulatorRef((tiles.ROWS, columns), jnp.float32)


def start(acc: Any, value: Array) -> None:
    """Have an accumulator start from `value`, which costs no more than starting it from 0."""
    acc[...] = value


@dataclasses.dataclass(frozen=True)
class Ring:
    """Stages of shared memory that the loading warpgroup fills tile after tile, and that all others read and release."""

    full: Any
    empty: Any
    stages: int

    @staticmethod
    def barriers(name: str, stages: int, groups: int, *, copies: int) -> dict[str, Any]:
        """The barriers of a ring that `copies` copies a stage fill and `groups` warpgroups release."""
        return {
            f"{name}_full": plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
            f"{name}_empty": plgpu.Barrier(num_arrivals=groups, num_barriers=stages),
        }

    @classmethod
    def of(cls, smem: dict[str, Any], name: str, stages: int) -> Ring:
        return cls(smem[f"{name}_full"], smem[f"{name}_empty"], stages)

    def slot(self, n: Array) -> Array:
        return lax.rem(n, jnp.int32(self.stages))

    def await_empty(self, n: Array) -> None:
        @pl.when(n >= self.stages)
        def _() -> None:
            plgpu.barrier_wait(self.empty.at[self.slot(n)])

    def await_full(self, n: Array) -> None:
        plgpu.barrier_wait(self.full.at[self.slot(n)])

    def release(self, n: Array, *, loaded: bool = False) -> None:
        """Releases tile n; nothing for the tile before the first.

        If parts of it were loaded into registers, a fence comes first: the copy engine writes the next tile through another
        proxy than loads read through, and a barrier alone does not order the two. (Products read as the copy engine writes.)
        """
        if loaded:
            plgpu.commit_smem()

        @pl.when(n >= 0)
        def _() -> None:
            plgpu.barrier_arrive(self.empty.at[self.slot(n + self.stages)])

    def skip(self, n: Array) -> None:
        """Passes over a tile that only other warpgroups read. Released before it is full, it could be counted for another."""
        self.await_full(n)
        self.release(n)


class RowGates(NamedTuple):
    """The gates of a warpgroup's 64 rows, p-th roots: g_i, exp(g_i), and H at the start of their block, high and low."""

    sum: Array
    growth: Array
    start: tuple[Array, Array]

    @classmethod
    def load(cls, sum_smem: Any, edges: Any, first: Array) -> RowGates:
        gate = compat.load(sum_smem, ROW)
        block = lax.div(first, jnp.int32(tiles.GATE_BLOCK))
        return cls(gate, jnp.exp2(gate), (edges[4 * block], edges[4 * block + 1]))

    def within(self, sum_smem: Any) -> Array:
        """exp(g_i − g_j) for keys of the rows' own block; of no meaning where the key comes after the row."""
        keys = compat.load(sum_smem, COLUMN)
        return jnp.exp2(spread_rows(self.sum, keys.shape[0]) - spread_columns(keys, tiles.ROWS))

    def across(self, rest_smem: Any, edges: Any, block: Array) -> Array:
        """exp(g_i) · exp(H_i − H_j) · exp(rest_j) for keys of an earlier block."""
        between = self.growth * jnp.exp2((self.start[0] - edges[4 * block + 2]) + (self.start[1] - edges[4 * block + 3]))
        rest = compat.load(rest_smem, COLUMN)
        return spread_rows(between, rest.shape[0]) * spread_columns(rest, tiles.ROWS)


def up_to_diagonal(offset: Array | int) -> Array:
    """Whether column ≤ row + offset, in a tile of 64 × 64.

    Of rows a vector is made first: from two whole matrices the compiler keeps their difference, 32 registers.
    """
    column = plgpu.broadcasted_iota(jnp.int32, (tiles.ROWS, tiles.ROWS), 1, layout=plgpu.Layout.WGMMA)
    row = plgpu.broadcasted_iota(jnp.int32, (tiles.ROWS,), 0, layout=ROW)
    return column <= spread_rows(row + offset, tiles.ROWS)


def zero_rows() -> Array:
    return plgpu.layout_cast(jnp.zeros((tiles.ROWS,), jnp.float32), ROW)


def power(x: Array, deg: int) -> Array:
    """x^deg by multiplication."""
    if deg == 1:
        return x
    return power(x * x, deg // 2) if deg % 2 == 0 else x * power(x, deg - 1)


def spread_rows(x: Array, columns: int) -> Array:
    """One number a row, for every column."""
    return lax.broadcast_in_dim(x, (x.shape[0], columns), (0,))


def spread_columns(x: Array, rows: int) -> Array:
    """One number a column, for every row."""
    return lax.broadcast_in_dim(x, (rows, x.shape[0]), (1,))


def inverse_power_of_two(size: Array, least: int, most: int, *, squared: bool = False) -> Array:
    """2^-e for size = 2^e · [1, 2), or for its root if `squared`, -e clamped to [least, most]; size ≥ 0 in float32."""
    exponent = (lax.bitcast_convert_type(size, jnp.int32) >> 23) - 127
    exponent = exponent >> 1 if squared else exponent
    return lax.bitcast_convert_type((127 + jnp.clip(-exponent, least, most)) << 23, jnp.float32)


def scale_rows(tile: Any) -> Array:
    """Multiply every row of a tile of q in shared memory by a power of two (see "Scale" above); returns the factors.

    The factor is a normal number of q's dtype: the product is exact but for entries that become subnormal beside the largest.
    """
    x = compat.load(tile, plgpu.Layout.WGMMA)
    wide = x.astype(jnp.float32)
    if x.dtype == jnp.float16:
        factor = inverse_power_of_two((wide * wide).sum(1), -14, 15, squared=True)
    else:
        factor = inverse_power_of_two(jnp.abs(wide).max(1), -126, 126)
    tile[...] = (wide * spread_rows(factor, x.shape[1])).astype(x.dtype)
    plgpu.commit_smem()
    return factor


def packed(size_squared: Array, bits: int) -> Array:
    """The power of two that brings numbers up to a size (given squared) below 2^bits."""
    exponent = (lax.bitcast_convert_type(size_squared, jnp.int32) >> 23) - 127
    return lax.bitcast_convert_type((127 + jnp.clip(bits - (exponent >> 1), -126, 126)) << 23, jnp.float32)


def clamp(x: Array) -> Array:
    """float16: what would overflow becomes the largest finite number."""
    return jnp.clip(x, -65504.0, 65504.0)


def inverse_root(x: Array, deg: int) -> Array:
    """x^(−1/p) for an even p and x > 0, 0 for x = 0 (a row that sees nothing)."""
    root = lax.rsqrt(x)
    for _ in range(deg.bit_length() - 2):
        root = root * lax.rsqrt(root)
    return jnp.where(x == 0.0, 0.0, root)


def plain(call: spec.PowerCall) -> float:
    """scale^p, which an unnormalised sum is multiplied by."""
    return 1.0 if call.normalize else call.scale**call.deg
