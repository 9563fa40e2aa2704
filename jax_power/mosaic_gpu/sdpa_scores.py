"""What all SDPA kernels share about scores: which tiles a call needs, what is hidden in them, and what is added to them."""

from __future__ import annotations

import dataclasses
import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import compat

# Layouts in registers: an accumulator of wgmma, one number for each of its rows, one for each of its columns.
WGMMA, ROW, COL = plgpu.Layout.WGMMA, plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)
Accumulator = plgpu.WGMMAAccumulatorRef
# exp(x) = exp2(x · log2 e): the kernels keep scores in base 2, which is what the hardware computes.
LOG2_E = math.log2(math.e)
# Heads whose blocks run side by side: the keys and values of 8 heads of 16384 · 64 numbers take 34 MB of a 50 MB cache.
HEAD_GROUP = 8


class Item(NamedTuple):
    """What a thread block works on."""

    batch: Any
    head: Any
    block: Any


def item(index: Any, batch: int, heads: int, blocks: int, *, last_first: bool) -> Item:
    """The item with number `index`: groups of heads in turn, in each the blocks in order, longest first.

    Blocks that run at the same time then read the keys of few heads, which stay in the level-2 cache, and the short rows of
    a causal mask fill the gaps at a group's end. `last_first`: the last block is the longest.
    """
    group = head_group(batch * heads)
    within = lax.rem(index, jnp.int32(group * blocks))
    head = lax.div(index, jnp.int32(group * blocks)) * group + lax.rem(within, jnp.int32(group))
    block = lax.div(within, jnp.int32(group))
    return Item(lax.div(head, jnp.int32(heads)), lax.rem(head, jnp.int32(heads)), blocks - 1 - block if last_first else block)


def head_group(heads: int) -> int:
    """How many heads form a group: the largest number up to HEAD_GROUP that divides theirs."""
    return next(n for n in range(min(HEAD_GROUP, heads), 0, -1) if heads % n == 0)


@dataclasses.dataclass(frozen=True)
class Extra:
    """A bias, or a mask as 0 and −∞, as the kernels add it to the scores, in float32 or 16 bits.

    kind "tile": `[b, h_q, t, s]`, loaded by TMA with the other operands; "row": `[b, h_q, t]`, one number a query; "col":
    `[b, h_q, s]`, one a key. The first two axes may have size 1. Kernels that compute Sᵀ take the transposed ones.
    """

    kind: str
    array: Array

    def transposed(self) -> Extra:
        """The same for scores with keys along the first axis."""
        if self.kind == "tile":
            return Extra("tile", padded(self.array.swapaxes(2, 3), (2, 8), (3, 64)))
        return Extra({"row": "col", "col": "row"}[self.kind], self.array)


def padded(x: Array, *steps: tuple[int, int]) -> Array:
    """x with zeros behind its end: for each (axis, step), up to a multiple of `step`."""
    missing = [0] * x.ndim
    for axis, step in steps:
        missing[axis] = -x.shape[axis] % step
    return jnp.pad(x, [(0, n) for n in missing]) if any(missing) else x


class Extras:
    """The additive operands inside a kernel: their references in device memory, and in shared memory those of kind "tile"."""

    def __init__(self, extras: Sequence[Extra], gmem: Sequence[Any]):
        self._operands = list(zip(extras, gmem, strict=True))

    @staticmethod
    def tiles(extras: Sequence[Extra], stages: int, rows: int, cols: int) -> list[Any]:
        """What a ring of `stages` tiles takes of shared memory."""
        return [plgpu.SMEM((stages, rows, cols), x.array.dtype) for x in extras if x.kind == "tile"]

    def copies(self, batch: Any, head: Any, rows: Any, cols: Any, smem: Sequence[Any]) -> list[tuple[Any, Any]]:
        """The tiles at `rows` and `cols` in device memory, each with its ring of tiles in shared memory."""
        tiled = [x for x in self._operands if x[0].kind == "tile"]
        return [(gmem.at[*_of_head(x, batch, head), rows, cols], ring) for (x, gmem), ring in zip(tiled, smem, strict=True)]

    def rows(self, batch: Any, head: Any, rows: Any) -> list[Array]:
        """The numbers of kind "row" of a warpgroup's rows."""
        found = [(x, gmem) for x, gmem in self._operands if x.kind == "row"]
        return [compat.load(gmem.at[*_of_head(x, batch, head), rows], ROW, optimized=False) for x, gmem in found]

    def add(self, s: Array, batch: Any, head: Any, rows: list[Array], cols: Any, smem: Sequence[Any]) -> Array:
        """Scores in base 2 plus the extras; `rows` from `rows()`, `smem` the warpgroup's part of each tile."""
        tiled, rowed = iter(smem), iter(rows)
        for x, gmem in self._operands:
            if x.kind == "tile":
                part = compat.load(next(tiled), WGMMA).astype(jnp.float32)
            elif x.kind == "row":
                part = lax.broadcast_in_dim(next(rowed).astype(jnp.float32), s.shape, [0])
            else:
                part = compat.load(gmem.at[*_of_head(x, batch, head), cols], COL, optimized=False)
                part = lax.broadcast_in_dim(part.astype(jnp.float32), s.shape, [1])
            s = s + part * LOG2_E
        return s


def _of_head(x: Extra, batch: Any, head: Any) -> tuple[Any, Any]:
    """Index of the first two axes, of which those of size 1 serve all."""
    return batch if x.array.shape[0] != 1 else 0, head if x.array.shape[1] != 1 else 0


class Blocks(NamedTuple):
    """Blocks `first` … `last − 1` hold something to see; from `full_first` to `full_last − 1` there is nothing to hide."""

    first: Any
    full_first: Any
    full_last: Any
    last: Any


@dataclasses.dataclass(frozen=True)
class Visible:
    """Query i sees key j if j < keys, i < queries and i − left ≤ j ≤ i + right; None: no such bound.

    `queries` and `keys` are numbers, or scalars that a kernel has read from the lengths of its batch element. Additive
    masks are not in here: they hide keys by −∞ in every tile.
    """

    queries: Any
    keys: Any
    left: int | None
    right: int | None
    counts_keys: bool

    @classmethod
    def of(cls, call: SdpaCall, batch: Any, lengths: Sequence[Any], width: int) -> Visible:
        """For one batch element, whose lengths are read, and tiles of `width` keys, the last of which may be too long."""
        queries: Any = call.t
        keys: Any = call.s
        if call.query_lengths:
            queries = jnp.clip(lengths[0][batch], 0, call.t)
        if call.key_lengths:
            keys = jnp.clip(lengths[-1][batch], 0, call.s)
        limit = call.t + call.s  # farther is no bound, and fits 32 bits
        left, right = (None, None) if call.window is None else (min(max(n, -limit), limit) for n in call.window)
        if call.causal:
            right = 0 if right is None else min(right, 0)
        return cls(queries, keys, left, right, call.key_lengths or call.s % width > 0)

    def key_blocks(self, row: Any, rows: int, width: int) -> Blocks:
        """Blocks of `width` keys for the queries `row` … `row + rows − 1`."""
        found = _blocks(row, rows, self.left, self.right, self.keys, width)
        return _none_beyond(found, row, self.queries)

    def query_blocks(self, col: Any, cols: int, width: int) -> Blocks:
        """Blocks of `width` queries for the keys `col` … `col + cols − 1`."""
        found = _blocks(col, cols, self.right, self.left, self.queries, width)
        return _none_beyond(found, col, self.keys)

    def mask(self, row: Any, col: Any, shape: tuple[int, ...], *, keys_first: bool = False) -> Array | None:
        """What of the tile at (row, col) is seen; `keys_first`: keys along the first axis. None: all of it.

        Numbers of columns are compared with one bound a row: a comparison of a difference of both would keep the difference,
        32 registers, through the loop.
        """

        def columns():
            return plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=WGMMA)

        def rows(shift):
            numbers = plgpu.broadcasted_iota(jnp.int32, shape[:1], 0, layout=ROW)
            return lax.broadcast_in_dim(numbers + shift, shape, [0])

        seen = []
        if self.counts_keys:
            seen.append((rows(0) if keys_first else columns()) < self.keys - col)
        # j − i ≤ right and j − i ≥ −left, j and i counted from the tile's corner.
        if self.right is not None:
            shift = row - col + self.right
            seen.append(columns() >= rows(-shift) if keys_first else columns() <= rows(shift))
        if self.left is not None:
            shift = row - col - self.left
            seen.append(columns() <= rows(-shift) if keys_first else columns() >= rows(shift))
        return functools.reduce(operator.and_, seen) if seen else None


def _blocks(start: Any, size: int, before: int | None, after: int | None, count: Any, width: int) -> Blocks:
    """Blocks of y < count for x in start … start + size − 1, each of which sees x − before … x + after."""
    lowest = 0 if before is None else jnp.maximum(start - before, 0)
    lowest_of_last = 0 if before is None else jnp.maximum(start + size - 1 - before, 0)
    end = count if after is None else jnp.clip(start + size + after, 0, count)
    end_of_first = count if after is None else jnp.clip(start + 1 + after, 0, count)
    first, full_first, full_last, last = (
        _div(x, width) for x in (lowest, lowest_of_last + width - 1, end_of_first, end + width - 1)
    )
    last = jnp.maximum(first, last)
    full_first = jnp.minimum(full_first, last)
    return Blocks(first, full_first, jnp.clip(full_last, full_first, last), last)


def _none_beyond(blocks: Blocks, start: Any, count: Any) -> Blocks:
    """No blocks for a tile that starts at or behind the end."""
    return Blocks(*(jnp.where(start < count, x, blocks.first) for x in blocks))


def _div(x: Any, n: int) -> Array:
    return lax.div(jnp.asarray(x, jnp.int32), jnp.int32(n))


def walk(step: Any, skip: Any, carry: Any, blocks: Blocks, own: Blocks, masks: tuple[bool, bool]) -> Any:
    """`carry` after `step(i, carry, masked=…)` on the blocks that the warpgroup's rows see, and `skip(i)` on the others.

    `blocks` are those of the thread block, `own` those of the warpgroup; `masks`, whether the blocks before and behind the full
    ones need a mask.
    """
    first = jnp.clip(own.first, blocks.first, blocks.last)
    last = jnp.clip(own.last, first, blocks.last)
    full_first = jnp.clip(own.full_first, first, last) if masks[0] else first
    full_last = jnp.clip(own.full_last, full_first, last) if masks[1] else last
    if masks[0]:
        pl.loop(blocks.first, first)(skip)
        carry = lax.fori_loop(first, full_first, functools.partial(step, masked=True), carry)
    carry = lax.fori_loop(full_first, full_last, functools.partial(step, masked=False), carry)
    if masks[1]:
        carry = lax.fori_loop(full_last, last, functools.partial(step, masked=True), carry)
    pl.loop(last, blocks.last)(skip)
    return carry
