"""Dropout's random bits as a function of (seed, head, query, key), so that the backward pass makes them again.

Philox 4×32 with 7 rounds (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011; 7 is the fewest that pass
every test there): the counter is (key // 4, query, head, 0), the key is the seed's two halves, and word `key % 4` of
the result belongs to that key. Whoever computes attention, in tiles of whatever shape, draws the same bits from the
same seed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.spec_sdpa import PHILOX_MULTIPLIERS, PHILOX_ROUNDS, PHILOX_STEPS, dropout_threshold

LOW_WORD = 0xFFFFFFFF


def keep(seed: Tensor, heads: slice, rows: slice, cols: slice, dropout_p: float) -> Tensor:
    """Which weights are kept: bool `[n, heads, rows, cols]` for seeds int64 `[n]`. `cols` must start at a multiple of
    4."""
    words = torch.stack(_philox(seed, heads, rows, slice(cols.start // 4, -(-cols.stop // 4))), dim=-1)
    return words.flatten(-2)[..., : cols.stop - cols.start] >= dropout_threshold(dropout_p)


def _philox(seed: Tensor, heads: slice, rows: slice, quads: slice) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four words of 32 random bits, in int64 `[n, heads, rows, quads]`, for every head, query and four keys."""

    def indices(span: slice, trailing_axes: int) -> Tensor:
        return torch.arange(span.start, span.stop, device=seed.device).view(-1, *[1] * trailing_axes)

    words = indices(quads, 0), indices(rows, 1), indices(heads, 2), torch.zeros_like(seed[:1])
    keys = [(half & LOW_WORD).view(-1, 1, 1, 1) for half in (seed, seed >> 32)]
    for _ in range(PHILOX_ROUNDS):
        # The product of two 32-bit words may pass 2^63; int64 then wraps, which leaves its 64 bits right.
        first, second = words[0] * PHILOX_MULTIPLIERS[0], words[2] * PHILOX_MULTIPLIERS[1]
        words = (
            ((second >> 32) & LOW_WORD) ^ words[1] ^ keys[0],
            second & LOW_WORD,
            ((first >> 32) & LOW_WORD) ^ words[3] ^ keys[1],
            first & LOW_WORD,
        )
        keys = [(key + step) & LOW_WORD for key, step in zip(keys, PHILOX_STEPS, strict=True)]
    return torch.broadcast_tensors(*words)
