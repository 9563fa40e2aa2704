"""Runs Mosaic GPU kernels in JAX's interpreter: warpgroups as threads, and who may read and write which memory when.

The interpreter has no products with a left operand in registers and no accumulator that starts from a value. `Interpreted` puts
the first through shared memory of the warpgroup's own, where they are the products that it has, and adds the second afterwards
or as a product of its own. So what is tested is the algorithm, its masks, tails, scaling and barriers; not the instructions,
which `tests/gpu` runs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest
from jax import lax

from jax_power.mosaic_gpu import compat, power_bwd, tiles


class Interpreted:
    """Stands in for `compat.kernel`, `plgpu.wgmma`, `pl.run_state` and `power_bwd.start` while kernels are interpreted."""

    def __init__(self, dtype: Any):
        self.dtype = dtype
        self.wgmma = plgpu.wgmma

    def kernel(self, body: Callable[..., None], *, scratch_types: Any = (), **options: Any) -> Callable[..., Any]:
        consumers = options.get("num_threads", 2) - 1
        own = plgpu.SMEM((consumers, 2, 128, 128), self.dtype)

        def with_own_memory(*refs: Any) -> None:
            *refs, own = refs
            self.memory = own.at[lax.axis_index("warpgroup") if "num_threads" in options else 0]
            body(*refs)

        interpret = compat.interpret_params(detect_races=True)
        return plgpu.kernel(with_own_memory, scratch_types=(*scratch_types, own), interpret=interpret, **options)

    def multiply(self, acc: Any, a: Any, b: Any) -> None:
        """`plgpu.wgmma`, with a in registers too."""
        if not isinstance(a, jax.Array):
            return self.wgmma(acc, a, b)
        tile = self.memory.at[0, pl.ds(0, a.shape[0]), pl.ds(0, a.shape[1])]
        tile[...] = a
        plgpu.commit_smem()
        self.wgmma(acc, tile, b)
        plgpu.wgmma_wait(0)

    def run_state(self, body: Callable[..., None]) -> Callable[..., Any]:
        """`pl.run_state` with accumulators that start from values: added at the end."""

        def run(values: Any) -> Any:
            leaves, structure = jax.tree.flatten(values)

            def from_zero(*accs: Any) -> list[Any]:
                body(structure.unflatten(accs))
                return [acc[...] for acc in accs]

            sums = pl.run_scoped(from_zero, *(plgpu.WGMMAAccumulatorRef(x.shape, jnp.float32) for x in leaves))
            return structure.unflatten([x + y for x, y in zip(leaves, sums, strict=True)])

        return run

    def start(self, acc: Any, value: jax.Array) -> None:
        """Adds `value` as identity · value, in as many pieces of this dtype as float32 has digits."""
        rows = pl.ds(0, tiles.ROWS)
        identity, tile = self.memory.at[0, rows, rows], self.memory.at[1, rows, pl.ds(0, value.shape[1])]
        row, column = (lax.broadcasted_iota(jnp.int32, (tiles.ROWS, tiles.ROWS), axis) for axis in (0, 1))
        identity[...] = jnp.where(row == column, 1.0, 0.0).astype(self.dtype)
        for _ in range(3):
            piece = value.astype(self.dtype)
            value = value - piece.astype(jnp.float32)
            tile[...] = piece
            plgpu.commit_smem()
            self.wgmma(acc, identity, tile)
            plgpu.wgmma_wait(0)


@contextlib.contextmanager
def interpreted(dtype: Any) -> Iterator[pytest.MonkeyPatch]:
    """Kernels traced inside are interpreted; `dtype` is that of their products' operands."""
    stand_in = Interpreted(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compat, "kernel", stand_in.kernel)
        patch.setattr(plgpu, "wgmma", stand_in.multiply)
        patch.setattr(pl, "run_state", stand_in.run_state)
        patch.setattr(plgpu.WGMMAAccumulatorRef, "init", staticmethod(lambda value: value))
        patch.setattr(power_bwd, "start", stand_in.start)
        yield patch
