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
from jax_power.mosaic_gpu.sdpa_scores import head_group

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


def table(call: SdpaCall, rows: int, width: int) -> np.ndarray:
    """`[blocks, 2 + n]` int32: how many items a block works on, their numbers as `sdpa_scores.item` takes them, and zeros."""
    heads = call.b * call.h_q
    together = head_group(heads)
    of_group = np.repeat(costs(call, rows, width)[::-1], together)
    hands = deal(np.tile(of_group, heads // together), multiprocessors())
    numbers = np.zeros((len(hands), 2 + max(map(len, hands))), np.int32)
    for row, hand in zip(numbers, hands, strict=True):
        row[: 1 + len(hand)] = [len(hand), *hand]
    return numbers


def costs(call: SdpaCall, rows: int, width: int) -> np.ndarray:
    """What each block of `rows` queries costs, in tiles of `width` keys. Lengths, which a kernel learns later, do not count."""
    first = np.arange(0, call.t, rows)
    limit = call.t + call.s
    left, right = (limit, limit) if call.window is None else (min(max(n, -limit), limit) for n in call.window)
    if call.causal:
        right = min(right, 0)
    begin = np.maximum(first - left, 0)
    end = np.clip(first + rows + right, 0, call.s)
    return np.maximum(-(-end // width) - begin // width, 0) + ITEM_COST


def deal(costs: np.ndarray, blocks: int) -> list[list[int]]:
    """Items in order, each to the block that is done first; every block gets one, as long as there are any."""
    blocks = min(blocks, len(costs))
    if (costs == costs[0]).all():
        return [list(range(n, len(costs), blocks)) for n in range(blocks)]
    hands: list[list[int]] = [[] for _ in range(blocks)]
    done = [(0.0, n) for n in range(blocks)]
    for number, cost in enumerate(costs.tolist()):
        time, n = done[0]
        hands[n].append(number)
        heapq.heapreplace(done, (time + cost, n))
    return hands
