"""The tile table of the Pallas kernels: what every kernel's shapes come from, and why each number is what it is.

The twin of `torch_power/csrc/power/tiles.h` and of the tables at the head of its attention kernels. A kernel asks for its row
before anything is traced, and `check_smem` raises if what it allocates cannot fit, before the compiler is started.
"""

from __future__ import annotations

import math
from typing import NamedTuple

# Rows of a warpgroup's tile: the M of wgmma.
ROWS = 64
# Tokens whose gates are summed from the same start; also keys of a forward tile, so a tile of keys has one block of gates.
GATE_BLOCK = 128
# Shared memory a block may use on Hopper, less 1 KiB that the driver keeps and 1 KiB for alignment and barriers.
SMEM_BYTES = 227 * 1024 - 2048


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


def check_smem(kernel: str, arrays: dict[str, tuple[tuple[int, ...], int]]) -> None:
    """Raise unless arrays, name → (shape, bytes an element), fit the shared memory of one block."""
    sizes = {name: -(-math.prod(shape) * size // 1024) * 1024 for name, (shape, size) in arrays.items()}
    if sum(sizes.values()) > SMEM_BYTES:
        raise NotImplementedError(f"{kernel}: {sizes} bytes of shared memory, and a Hopper block has {SMEM_BYTES} in all")
