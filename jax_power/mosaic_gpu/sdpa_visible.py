"""Which tiles of scores an attention call needs, which of them need a mask, and that mask: shared by all SDPA kernels."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall


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
    def of(cls, call: SdpaCall, queries: Any, keys: Any, width: int) -> Visible:
        """For tiles of `width` keys, which tell whether the last of them holds keys that do not exist."""
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

    def mask(self, row: Any, col: Any, shape: tuple[int, int], *, keys_first: bool = False) -> Array | None:
        """What of the tile at (row, col) is seen; `keys_first`: keys along the first axis. None: all of it."""
        keys, queries = (
            plgpu.broadcasted_iota(jnp.int32, shape, axis, layout=plgpu.Layout.WGMMA) for axis in ((0, 1) if keys_first else (1, 0))
        )
        seen = []
        if self.counts_keys:
            seen.append(keys < self.keys - col)
        if self.right is not None:
            seen.append(keys - queries <= row - col + self.right)
        if self.left is not None:
            seen.append(keys - queries >= row - col - self.left)
        if not seen:
            return None
        together = seen[0]
        for condition in seen[1:]:
            together &= condition
        return together


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
