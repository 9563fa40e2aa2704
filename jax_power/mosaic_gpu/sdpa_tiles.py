"""The tile table of the SDPA kernels: what every kernel's shapes come from, and why each number is what it is.

Sizes d and e are the padded ones. Shared memory bounds most rows: a block has 227 KiB. A tile of scores that is loaded, for a
bias (up to 4 bytes) and a mask (2 bytes), takes as much as the operands' own tiles, so calls with one have rows of their own.
"""

from __future__ import annotations

from typing import NamedTuple

# Registers of a consumer's and of the loading warpgroup's threads: all 65536 of a multiprocessor, given out in steps of 8.
TWO_CONSUMERS, THREE_CONSUMERS = (240, 24), (160, 32)


class Forward(NamedTuple):
    """`groups` consumer warpgroups of 64 queries against `stages` tiles of `width` keys; `ping_pong`: two take turns.

    `slots` of 2: the next item's queries arrive under this one's products. `apart`: results leave through memory of their own,
    not through the slot of their queries.
    """

    groups: int
    width: int
    stages: int
    registers: tuple[int, int] | None
    ping_pong: bool
    slots: int
    apart: bool


class Backward(NamedTuple):
    """`groups` consumer warpgroups of 64 rows against `stages` tiles of `width` of the other side.

    One stage: a tile's last products are waited for before the next is loaded.
    """

    groups: int
    width: int
    stages: int
    registers: tuple[int, int] | None


def forward(d: int, e: int, score_tiles: int) -> Forward:
    """The forward kernel's row; `score_tiles`: how many extras are tiles."""
    size = max(d, e)
    if size <= 64 and not score_tiles:
        # Exponentials are half of the work here, and three warpgroups fill each other's gaps: 475 TFLOP/s (causal, t = 16384)
        # against 424 for two in ping-pong.
        return Forward(3, 128, 4, THREE_CONSUMERS, ping_pong=False, slots=2, apart=True)
    if size <= 128:
        # 128 keys halve the reads of Q a key; with tiles of scores they would not fit.
        width, slots = (64, 1) if score_tiles else (128, 2)
        return Forward(2, width, 2, TWO_CONSUMERS, ping_pong=True, slots=slots, apart=d != e)
    # Results apart leave no room for a second stage either.
    return Forward(2, 64, 1 if score_tiles or d != e else 2, TWO_CONSUMERS, ping_pong=True, slots=1, apart=d != e)


def gradient_q(d: int, e: int, score_tiles: int) -> Backward:
    """dq's row: S, dP and dQ are 32 + 32 + d/2 registers."""
    size = max(d, e)
    if size <= 64 and not score_tiles:
        # Three warpgroups 655 and 718 TFLOP/s (t = 2048 full, 16384 causal), two with 128 keys 615 and 681.
        return Backward(3, 64, 4, THREE_CONSUMERS)
    if size <= 128 and not score_tiles:
        return Backward(2, 64, 3, TWO_CONSUMERS)  # two stages: 546 and 685 TFLOP/s for 626 and 734
    return _backward(size, score_tiles)


def gradient_kv(d: int, e: int, score_tiles: int) -> Backward:
    """dk and dv's row: S, dP, dK and dV are 32 + 32 + d/2 + e/2 registers; past 128 columns each has a pass of its own.

    S is there before dP starts. With both in flight, 500 TFLOP/s for 577 at d = 64; at d = 128 ptxas serialises all (C7512).
    """
    return _backward(max(d, e), score_tiles)


def gradient_bias(d: int, e: int) -> Backward:
    """The bias gradient's row: everything is loaded for every tile, and the tile itself has to be stored from somewhere."""
    if max(d, e) <= 128:
        return Backward(2, 64, 1, TWO_CONSUMERS)
    return Backward(1, 64, 1, None)


def _backward(size: int, score_tiles: int) -> Backward:
    if size <= 64:
        return Backward(2, 64, 2 if score_tiles else 4, TWO_CONSUMERS)
    if size <= 128:
        return Backward(2, 64, 1 if score_tiles else 2, TWO_CONSUMERS)
    # The operands that stay take 64 KiB a warpgroup, a stage of the others as much.
    return Backward(1, 64, 1, None) if score_tiles else Backward(2, 64, 1, TWO_CONSUMERS)


def one_pass(d: int, e: int) -> bool:
    """Whether dk and dv fit the registers together."""
    return max(d, e) <= 128
