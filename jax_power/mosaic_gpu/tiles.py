"""The tile table of the Pallas kernels: what every kernel's shapes come from, and why each number is what it is.

The twin of `torch_power/csrc/power/tiles.h` and of the tables at the head of its attention kernels. A kernel asks for its row
before anything is traced, and `check_smem` raises if what it allocates cannot fit, before the compiler is started (for the
kernels of the chunked form in `compat.kernel`).
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Rows of a warpgroup's tile: the M of wgmma.
ROWS = 64
# Tokens whose gates are summed from the same start; also keys of a forward tile, so a tile of keys has one block of gates.
GATE_BLOCK = 128
# Shared memory a block may use on Hopper, less what Mosaic takes beside the arrays: barriers and alignment, 2.6 KB where heads
# are 192 and 256 wide, which did not fit by 96 bytes.
SMEM_BYTES = 227 * 1024 - 3072


class Forward(NamedTuple):
    """Forward of the attention form: `groups` consumer warpgroups of 64 query rows, `stages` tiles of `keys` keys."""

    groups: int
    keys: int
    stages: int
    consumer_registers: int
    producer_registers: int


class Backward(NamedTuple):
    """One of the two backward kernels: `groups` consumer warpgroups of 64 rows, `stages` tiles of `width` of the other side.

    Both operands of S and dP lie in shared memory, whose bandwidth products of 64 columns take whole. Kept in registers across
    the loop they were no faster (NOTES), and with gates and grouped heads ptxas 13.0 overwrote them.
    """

    groups: int
    width: int
    stages: int
    consumer_registers: int = 240
    producer_registers: int = 24


def padded_head(size: int) -> int:
    """Head size that the kernels compute with: operands are tiles of 64 columns."""
    return 64 if size <= 64 else 128


def forward(d: int, e: int, *, gates: bool, half: bool) -> Forward:
    """Row of the table for padded head sizes d and e."""
    if d == 64 and e == 64 and not gates and not half:
        # 3 warpgroups beat 2 by 5-10 % (PROBE); 160 registers hold scores (64), sums (32) and weights (32).
        return Forward(groups=3, keys=128, stages=4, consumer_registers=160, producer_registers=32)
    # The factors of gates and float16, and sums of 128 columns (64 registers), need more than 160.
    return Forward(groups=2, keys=128, stages=4 if d + e == 128 else 2, consumer_registers=240, producer_registers=24)


def backward_q(d: int, e: int, *, gates: bool) -> Backward:
    """Row of the table for dq, for padded head sizes d and e."""
    if d == 64 and e == 64 and not gates:
        # S, dP, dQ and dS are 64 + 64 + 32 + 32 registers; wider tiles load less from shared memory.
        return Backward(groups=2, width=128, stages=4)
    # Gates need the registers of wider tiles, and so does a dQ of 128 columns; 3 stages are all of shared memory at d = 128.
    return Backward(groups=2, width=64, stages=6 if d + e == 128 else 3)


def backward_kv(d: int, e: int) -> Backward:
    """Row of the table for dk and dv, whose sums and tiles, S and dP, leave no registers for wider tiles."""
    return Backward(groups=2, width=64, stages=6 if d + e == 128 else 3)


# ---------------------------------------------------------------------------------------------------------------------
# Chunked form
# ---------------------------------------------------------------------------------------------------------------------

# Ranges of the scaled operands, as powers of two: |q^| < 2^Q_RANGE (each row on its own), |k^| < 2^K_RANGE, |v^| < 2^V_RANGE,
# |D| < 2^DY_RANGE (each per key-value head). k is put high because it enters squared: a key 2^10 smaller than the largest
# still has normal features.
Q_RANGE, K_RANGE, V_RANGE, DY_RANGE = 1, 4, 0, 0
# States are stored below 2^STATE_RANGE, half of float16's range.
STATE_RANGE = 15


class Chunked(NamedTuple):
    """A kernel of the chunked form: `groups` consumer warpgroups of 64 rows, rings of tiles from device memory.

    Fields:
      together, stages: state matrices that arrive together, and stages of their ring.
      tile_stages: stages of the ring of tiles of the other side (keys, queries), or of the only ring.
    """

    groups: int
    stages: int
    tile_stages: int
    consumer_registers: int
    producer_registers: int
    together: int = 1


def score_exponent(d: int) -> int:
    """Squared scores are at most (d · 2^(Q_RANGE + K_RANGE))²; times 2^score_exponent they fit float16 (< 2^15)."""
    return 15 - 2 * ((6 if d == 64 else 7) + Q_RANGE + K_RANGE)


def chunk_length(t: int, size: int) -> int:
    """Chunk length for heads of `size`: c well under 4·D, and states that fit memory; a multiple of the rows of every block.

    The CUDA twin's 768 (3 % less time at d = 64) is no power of two: t = 65536 would have to be filled up, which XLA does by
    copying q, k, v and y.
    """
    if t <= 256:
        return 256
    if t <= 1024:
        return 512  # more chunks: short sequences need blocks to fill the chip
    # d = 64, t = 65536, 8 heads: 268 MB of states. d = 128: D = 8704, and a state is 4.2 MB.
    return 4096 if size > 64 and t >= 16384 else 1024


# Staging: tiles of tokens a block takes, at most 48 KiB of shared memory with two results, so that four share a multiprocessor.
STAGE_SPAN = 2
# Moments: stages of the only ring.
MOMENT_STAGES = 4
# Gates' gradient: its sum over tokens errs as √t, 2.8e-3 at t = 65536 and d = 64 (bound 5e-3). Calls of more chunks than the
# first number start it anew from products of states behind every so many (the second); what is shorter saves the XLA kernels.
UNANCHORED, ANCHOR = 64, 16
# Scan: entries a block takes, eight a thread, and chunks it loads at once (device memory answers after a microsecond).
SCAN_ENTRIES, SCAN_TOGETHER = 1024, 4


def update(d: int, steps: int) -> Chunked:
    """Row of the table for the update of a state from `steps` tiles; two warpgroups take turns, so an even number of stages."""
    # 144 registers hold the sums of four features of d = 128, whose tiles leave shared memory for two stages.
    return Chunked(
        groups=2, stages=0, tile_stages=min(6 if d == 64 else 2, steps), consumer_registers=232, producer_registers=40
    )


def query(d: int) -> Chunked:
    """Row of the table for y."""
    if d == 64:
        # Four share every state tile (PROBE: 681 TFLOP/s with four, 591 with two); two matrices of up to 64 rows a stage take
        # half the steps of one.
        return Chunked(groups=4, stages=3, tile_stages=3, consumer_registers=112, producer_registers=32, together=2)
    return Chunked(groups=2, stages=2, tile_stages=2, consumer_registers=232, producer_registers=40)


def gradient(d: int) -> Chunked:
    """Row of the table for dq, and for dk and dv."""
    if d == 64:
        return Chunked(groups=2, stages=6, tile_stages=3, consumer_registers=232, producer_registers=40)
    # A head of 128 leaves shared memory for one warpgroup, which then has registers for dk, dv, S and dP (192) and more.
    return Chunked(groups=1, stages=2, tile_stages=2, consumer_registers=248, producer_registers=40)


def check_smem(kernel: str, arrays: dict[str, tuple[tuple[int, ...], int]]) -> None:
    """Raise unless arrays, name → (shape, bytes an element), fit the shared memory of one block."""
    sizes = {name: -(-math.prod(shape) * size // 1024) * 1024 for name, (shape, size) in arrays.items()}
    if sum(sizes.values()) > SMEM_BYTES:
        raise NotImplementedError(f"{kernel}: {sizes} bytes of shared memory, and a Hopper block has {SMEM_BYTES} in all")
