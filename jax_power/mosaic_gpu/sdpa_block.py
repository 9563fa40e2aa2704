"""What a thread block of every SDPA kernel is made of: its warpgroups' parts, the operands that stay, those that stream past.

The first `tiles.groups` warpgroups compute, on 64 rows each, and the last one loads for them. Shared memory is named: an
operand that stays has a tile for each computing warpgroup, one that streams has one for each stage of its ring, and barriers
are named after the ring. What a kernel asks for is added up, and refused before it is compiled if a block has less.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jax_power.mosaic_gpu import compat, sdpa_tiles
from jax_power.mosaic_gpu.attention_common import Ring
from jax_power.mosaic_gpu.tiles import ROWS, check_smem

Tiles = sdpa_tiles.Forward | sdpa_tiles.Backward
Smem = dict[str, Any]
WARPGROUP = "warpgroup"


def launch(
    body: Callable[..., None],
    tiles: Tiles,
    smem: Smem,
    *,
    grid: Mapping[str, int],
    out_type: Sequence[Any],
    operands: Sequence[Array],
) -> tuple[Array, ...]:
    """Run `body(gmem, smem)` in every block of the grid; `gmem` lists references to the operands and outputs."""
    name = body.__name__.replace("_", " ")
    arrays = {
        f"{key}.{n}": x for key, value in smem.items() for n, x in enumerate(value if isinstance(value, list) else [value])
    }
    check_smem(name, {key: (x.shape, jnp.dtype(x.dtype).itemsize) for key, x in arrays.items() if hasattr(x, "dtype")})

    def with_names(*refs: Any) -> None:
        *gmem, named = refs
        body(gmem, named)

    with_names.__name__ = body.__name__
    run = compat.kernel(
        with_names,
        out_type=tuple(out_type),
        scratch_types=(smem,),
        grid=tuple(grid.values()),
        grid_names=tuple(grid),
        num_threads=tiles.groups + 1,
        thread_name=WARPGROUP,
    )
    return run(*operands)


def staying(tiles: Tiles, dtype: Any, sizes: Mapping[str, int]) -> Smem:
    """Shared memory for 64 rows a warpgroup of operands with `sizes` columns, and the barriers `own_full` for them."""
    barriers = {"own_full": plgpu.Barrier(num_barriers=tiles.groups, num_arrivals=len(sizes))}
    return {name: plgpu.SMEM((tiles.groups, ROWS, size), dtype) for name, size in sizes.items()} | barriers


def streaming(tiles: Tiles, dtype: Any, ring: str, sizes: Mapping[str, int], *, beside: Sequence[Any] = ()) -> Smem:
    """Shared memory for a ring of tiles with `sizes` columns, and its barriers; `beside`: what else a stage is filled with."""
    barriers = Ring.barriers(ring, tiles.stages, tiles.groups, copies=len(sizes) + len(beside))
    return {name: plgpu.SMEM((tiles.stages, tiles.width, size), dtype) for name, size in sizes.items()} | barriers


def part(tiles: Tiles, load: Callable[[], None], compute: Callable[[Array], None]) -> None:
    """This warpgroup's part of the block's work: `compute(n)` for the n-th that computes, `load()` for the last."""
    group = lax.axis_index(WARPGROUP)

    def limit_registers(role: int, action: Any) -> None:
        if tiles.registers is not None:
            plgpu.set_max_registers(tiles.registers[role], action=action)

    @pl.when(group == tiles.groups)
    def _() -> None:
        limit_registers(1, "decrease")
        load()

    @pl.when(group < tiles.groups)
    def _() -> None:
        limit_registers(0, "increase")
        compute(group)


def load_own(smem: Smem, group: Array, sources: Mapping[str, Any]) -> None:
    """Start loading the warpgroup's rows of the operands that stay; `await_own` is the end of it."""
    for name, source in sources.items():
        plgpu.copy_gmem_to_smem(source, smem[name].at[group], smem["own_full"].at[group])


def await_own(smem: Smem, group: Array) -> None:
    plgpu.barrier_wait(smem["own_full"].at[group])


def fill(ring: Ring, n: Array, copies: Sequence[tuple[Any, Any]]) -> None:
    """Load the n-th tile into its stage, once that is free: pairs of a source in device memory and a ring of tiles."""
    ring.await_empty(n)
    slot = ring.slot(n)
    for source, smem in copies:
        plgpu.copy_gmem_to_smem(source, smem.at[slot], ring.full.at[slot])


def store(smem: Any, value: Array, gmem: Any) -> None:
    """Write through shared memory to device memory; `plgpu.wait_smem_to_gmem` is the end of it."""
    smem[...] = value
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(smem, gmem)
