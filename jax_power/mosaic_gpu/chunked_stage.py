"""Staging of the chunked form in Pallas: inputs as scaled, transposed float16 operands, and the moments of every chunk.

stage     x [b, t, h, n] → (x · factor)ᵀ and, if asked for, (x · factor · weight)ᵀ, float16 [b · h, n, t]. Bound by device
          memory: in XLA conversion, transposition and the second result were passes of their own (k and v: 0.36 ms at
          t = 65536, 8 heads of 64).
moments   Σ over each chunk's tokens of (w x) xᵀ, float32: 64 × 64 products whose operands lie as `stage` left them.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jax_power.mosaic_gpu import compat
from jax_power.mosaic_gpu.chunked_update import COLUMNS, ROWS, TILE, TILED, WGMMA

# Tiles of tokens a block stages: at most 48 KiB of shared memory with two results, so that four blocks share a multiprocessor.
SPAN = 2
MOMENT_STAGES = 4


def stage(x: Array, factor: Array, weight: Array | None = None) -> tuple[Array, ...]:
    """(x · factor)ᵀ, and (x · factor · weight)ᵀ if `weight` is given.

    Args:
      x: bfloat16 or float16 `[b, t, h, n]`, t a multiple of 128, n of 64.
      factor: float32, per head `[b · h]` or per head and token `[b · h, t]`.
      weight: float32 `[b · h, t]`.
    """
    b, t, h, n = x.shape
    blocks, by_row = t // (SPAN * TILE), factor.ndim == 2
    results = 1 if weight is None else 2

    def stage_kernel(x_gmem: Any, factor_gmem: Any, *refs: Any) -> None:
        weight_gmem, *others = refs if weight is not None else (None, *refs)
        results_gmem, (x_smem, results_smem, full) = others[:results], others[results:]
        item = lax.axis_index("item")
        block, head = lax.rem(item, jnp.int32(blocks)), lax.div(item, jnp.int32(blocks))
        batch, own_head = lax.div(head, jnp.int32(h)), lax.rem(head, jnp.int32(h))

        def tokens(i: int) -> Any:
            return pl.ds((block * SPAN + i) * TILE, TILE)

        for i in range(SPAN):
            plgpu.copy_gmem_to_smem(x_gmem.at[batch, tokens(i), own_head], x_smem.at[i], full.at[i])
        for i in range(SPAN):
            of_row = compat.load(factor_gmem.at[head, tokens(i)], ROWS, optimized=False) if by_row else None
            of_weight = None if weight_gmem is None else compat.load(weight_gmem.at[head, tokens(i)], ROWS, optimized=False)
            plgpu.barrier_wait(full.at[i])
            values = compat.load(x_smem.at[i], WGMMA).astype(jnp.float32)
            values = values * (factor_gmem[head] if of_row is None else lax.broadcast_in_dim(of_row, (TILE, n), [0]))
            for m in range(results):
                if m == 1 and of_weight is not None:
                    values = values * lax.broadcast_in_dim(of_weight, (TILE, n), [0])
                turned = plgpu.layout_cast(values.astype(jnp.float16), plgpu.Layout.WGMMA_TRANSPOSED)
                results_smem.at[i, m].transpose((1, 0))[...] = turned
            plgpu.commit_smem()
            for m in range(results):
                plgpu.copy_smem_to_gmem(results_smem.at[i, m], results_gmem[m].at[head, :, tokens(i)])
        plgpu.wait_smem_to_gmem(0)

    run = compat.kernel(
        stage_kernel,
        out_type=[jax.ShapeDtypeStruct((b * h, n, t), jnp.float16) for _ in range(results)],
        scratch_types=[
            plgpu.SMEM((SPAN, TILE, n), x.dtype, transforms=TILED),
            plgpu.SMEM((SPAN, results, n, TILE), jnp.float16, transforms=TILED),
            plgpu.Barrier(num_barriers=SPAN),
        ],
        grid=(b * h * blocks,),
        grid_names=("item",),
    )
    return tuple(run(x, factor, *(() if weight is None else (weight,))))


def moments(weighted: Array, x: Array, *, chunk: int, group: int, values: Array | None = None) -> Array:
    """Σ_tokens (w x)[a] x[j] (· values) over every chunk, summed over the `group` heads of x that share a state: `[h, chunks,
    d, d]`.

    Args:
      weighted, x: float16 `[h · group, d, t]`.
      values: float32 `[h · group, t]`; None is one.
    """
    heads, d, t = x.shape
    chunks, tiles = t // chunk, group * (chunk // TILE)
    stages = min(MOMENT_STAGES, tiles)

    def moments_kernel(weighted_gmem: Any, x_gmem: Any, *refs: Any) -> None:
        values_gmem, *others = refs if values is not None else (None, *refs)
        out_gmem, weighted_smem, x_smem, values_smem, full, consumed = others
        item = lax.axis_index("item")
        own_chunk, head = lax.rem(item, jnp.int32(chunks)), lax.div(item, jnp.int32(chunks))

        def load(i: Any, slot: Any) -> None:
            source = head * group + lax.div(i, jnp.int32(chunk // TILE))
            tokens = pl.ds(own_chunk * chunk + lax.rem(i, jnp.int32(chunk // TILE)) * TILE, TILE)
            plgpu.copy_gmem_to_smem(weighted_gmem.at[source, :, tokens], weighted_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(x_gmem.at[source, :, tokens], x_smem.at[slot], full.at[slot])
            if values_gmem is not None:
                plgpu.copy_gmem_to_smem(values_gmem.at[source, tokens], values_smem.at[slot], full.at[slot])

        for i in range(stages):
            load(jnp.int32(i), i)

        def products(acc: Any) -> Array:
            @pl.loop(0, tiles)
            def _(i: Any) -> None:
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                if values_gmem is None:
                    left = weighted_smem.at[slot]
                else:
                    of_token = compat.load(values_smem.at[slot], COLUMNS).astype(jnp.float16)
                    left = compat.load(weighted_smem.at[slot], WGMMA) * lax.broadcast_in_dim(of_token, (d, TILE), [1])
                plgpu.wgmma(acc, left, x_smem.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(consumed)  # the next copy must not overtake the slowest warp's reads
                plgpu.barrier_wait(consumed)
                pl.when(i + stages < tiles)(lambda: load(i + stages, slot))

            return acc[...]

        out_gmem.at[head, own_chunk][...] = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((d, d), jnp.float32))

    run = compat.kernel(
        moments_kernel,
        out_type=jax.ShapeDtypeStruct((heads // group, chunks, d, d), jnp.float32),
        scratch_types=[
            plgpu.SMEM((stages, d, TILE), jnp.float16, transforms=TILED),
            plgpu.SMEM((stages, d, TILE), jnp.float16, transforms=TILED),
            plgpu.SMEM((stages, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2 if values is None else 3, num_barriers=stages),
            plgpu.Barrier(),
        ],
        grid=(heads // group * chunks,),
        grid_names=("item",),
    )
    return run(weighted, x, *(() if values is None else (values,)))
