"""Which thread block of the forward kernel of scaled dot-product attention works on what, and in which order.

A multiprocessor holds one block, which lives as long as the kernel: what begins and ends an item, the way to its first tile and
its result's way out, then runs beside the products of others. Items are dealt here, before the kernel is compiled, the way the
hardware deals blocks: in order, each to whoever is done first.
"""

from __future__ import annotations

import functools
import heapq

import jax
import numpy as np

from bridge.spec_sdpa import SdpaCall

# Multiprocessors of an H100 or H200 (SXM), for programs that are lowered where no GPU is.
MULTIPROCESSORS = 132
# What an item costs beside its tiles, in tiles.
ITEM_COST = 1.0


@functools.cache
def multiprocessors() -> int:
    try:
        return int(jax.devices("cuda")[0].core_count)
    except RuntimeError:
        return MULTIPROCESSORS


def costs(call: SdpaCall, rows: int, width: int) -> np.ndarray:
    """For every block of `rows` queries, how many tiles of `width` keys it sees, whatever the lengths."""
    first = np.arange(0, call.t, rows)
    left, right = (None, None) if call.window is None else call.window
    if call.causal:
        right = 0 if right is None else min(right, 0)
    begin = np.zeros_like(first) if left is None else np.clip(first - left, 0, call.s)
    end = np.full_like(first, call.s) if right is None else np.clip(np.minimum(first + rows, call.t) + right, 0, call.s)
    return np.maximum(-(-end // width) - begin // width, 0) + ITEM_COST


def deal(cost: np.ndarray, blocks: int) -> np.ndarray:
    """Items in order, each to the block that is done first: `[blocks, 1 + n]`, how many a block has, and their numbers."""
    hands: list[list[int]] = [[] for _ in range(blocks)]
    if (cost == cost[0]).all():
        hands = [list(range(n, len(cost), blocks)) for n in range(blocks)]
    else:
        done = [(0.0, n) for n in range(blocks)]
        for number, more in enumerate(cost.tolist()):
            time, n = done[0]
            hands[n].append(number)
            heapq.heapreplace(done, (time + more, n))
    table = np.zeros((blocks, 2 + max(map(len, hands))), np.int32)
    for n, hand in enumerate(hands):
        table[n, : 1 + len(hand)] = [len(hand), *hand]
    return table
