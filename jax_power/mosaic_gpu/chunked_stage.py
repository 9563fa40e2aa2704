"""Staging of the chunked form in Pallas: inputs as scaled, transposed float16 operands, and the moments of every chunk.

stage     x [b, t, h, n] → (x · factor)ᵀ and, if asked for, (x · factor · weight)ᵀ, float16 [b · h, n, t]. Bound by device
          memory: in XLA conversion, transposition and the second result were passes of their own (k and v: 0.36 ms at
          t = 65536, 8 heads of 64).
moments   Σ over each chunk's tokens of (w x) xᵀ, float32: 64 × 64 products whose operands lie as `stage` left them.

Both are jitted: calls of equal shapes share one kernel, which is lowered and compiled once (of the seconds that a program's
first call takes, kernels take most).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from jax_power.mosaic_gpu import compat, tiles
from jax_power.mosaic_gpu.chunked_update import COLUMNS, ROWS, TILE, TILED, WGMMA, release_loaded


@jax.jit
def stage(x: Array, factor: Array, weight: Array | None = None) -> tuple[Array, ...]:
    """(x · factor)ᵀ, and (x · factor · weight)ᵀ if `weight` is given.

    Args:
      x: bfloat16 or float16 `[b, t, h, n]`, t a multiple of 128, n of 64.
      factor, weight: float32 `[b · h, t]`.
    """
    b, t, h, n = x.shape
    span = tiles.STAGE_SPAN
    blocks = t // (span * TILE)
    results = 1 if weight is None else 2

    def stage_kernel(x_gmem: Any, factor_gmem: Any, *refs: Any) -> None:
        weight_gmem, *others = refs if weight is not None else (None, *refs)
        results_gmem, (x_smem, results_smem, full) = others[:results], others[results:]
        item = lax.axis_index("item")
        block, head = lax.rem(item, jnp.int32(blocks)), lax.div(item, jnp.int32(blocks))
        batch, own_head = lax.div(head, jnp.int32(h)), lax.rem(head, jnp.int32(h))

        def tokens(i: int) -> Any:
            return pl.ds((block * span + i) * TILE, TILE)

        for i in range(span):
            plgpu.copy_gmem_to_smem(x_gmem.at[batch, tokens(i), own_head], x_smem.at[i], full.at[i])
        for i in range(span):
            of_row = compat.load(factor_gmem.at[head, tokens(i)], ROWS, optimized=False)
            of_weight = None if weight_gmem is None else compat.load(weight_gmem.at[head, tokens(i)], ROWS, optimized=False)
            plgpu.barrier_wait(full.at[i])
            values = compat.load(x_smem.at[i], WGMMA).astype(jnp.float32) * lax.broadcast_in_dim(of_row, (TILE, n), [0])
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
            plgpu.SMEM((span, TILE, n), x.dtype, transforms=TILED),
            plgpu.SMEM((span, results, n, TILE), jnp.float16, transforms=TILED),
            plgpu.Barrier(num_barriers=span),
        ],
        grid=(b * h * blocks,),
        grid_names=("item",),
    )
    return tuple(run(x, factor, *(() if weight is None else (weight,))))


@functools.partial(jax.jit, static_argnames=("chunk", "group"))
def moments(x: Array, weight: Array, *, chunk: int, group: int) -> Array:
    """Σ_tokens (w x)[a] x[j] over every chunk, summed over the `group` heads of x that share a state: `[h, chunks, d, d]`.

    Args:
      x: float16 `[h · group, d, t]`.
      weight: float32 `[h · group, t]`; w x is rounded to float16.
    """
    heads, d, t = x.shape
    chunks, count = t // chunk, group * (chunk // TILE)
    stages = min(tiles.MOMENT_STAGES, count)

    def moments_kernel(
        x_gmem: Any, weight_gmem: Any, out_gmem: Any, x_smem: Any, weight_smem: Any, full: Any, read: Any
    ) -> None:
        item = lax.axis_index("item")
        own_chunk, head = lax.rem(item, jnp.int32(chunks)), lax.div(item, jnp.int32(chunks))

        def load(i: Any, slot: Any) -> None:
            source = head * group + lax.div(i, jnp.int32(chunk // TILE))
            tokens = pl.ds(own_chunk * chunk + lax.rem(i, jnp.int32(chunk // TILE)) * TILE, TILE)
            plgpu.copy_gmem_to_smem(x_gmem.at[source, :, tokens], x_smem.at[slot], full.at[slot])
            plgpu.copy_gmem_to_smem(weight_gmem.at[source, tokens], weight_smem.at[slot], full.at[slot])

        for i in range(stages):
            load(jnp.int32(i), i)

        def products(acc: Any) -> Array:
            @pl.loop(0, count)
            def _(i: Any) -> None:
                slot = lax.rem(i, jnp.int32(stages))
                plgpu.barrier_wait(full.at[slot])
                of_token = lax.broadcast_in_dim(compat.load(weight_smem.at[slot], COLUMNS), (d, TILE), [1])
                left = (compat.load(x_smem.at[slot], WGMMA).astype(jnp.float32) * of_token).astype(jnp.float16)
                plgpu.wgmma(acc, left, x_smem.at[slot].transpose((1, 0)))
                plgpu.wgmma_wait(0)
                release_loaded(read)  # the next copy must not overtake the slowest warp's reads
                plgpu.barrier_wait(read)
                pl.when(i + stages < count)(lambda: load(i + stages, slot))

            return acc[...]

        out_gmem.at[head, own_chunk][...] = pl.run_scoped(products, plgpu.WGMMAAccumulatorRef((d, d), jnp.float32))

    return compat.kernel(
        moments_kernel,
        out_type=jax.ShapeDtypeStruct((heads // group, chunks, d, d), jnp.float32),
        scratch_types=[
            plgpu.SMEM((stages, d, TILE), jnp.float16, transforms=TILED),
            plgpu.SMEM((stages, TILE), jnp.float32),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(),
        ],
        grid=(heads // group * chunks,),
        grid_names=("item",),
    )(x, weight)


@jax.jit
def scan(
    x: Array, decay: Array, bound: Array, first: tuple[Array, Array] | None, walk: Array, largest: Array
) -> tuple[Array, Array, Array]:
    """M ← decay · M + x chunk after chunk: M before every chunk, after all, and what brings states and M into float16's range.

    Args:
      x: float32 `[h, chunks, d, d]`.
      decay, bound: float32 `[h, chunks]`. The same scan of `bound` bounds states and moments, in units of their own.
      first: the first M `[h, d, d]`, and the bounds to start from, of states and of moments `[h, 2]`; None is zero.
      walk: the order of the chunks, as `walk_of` gives it.
      largest: what a bound of states and one of moments is brought to, float32 `[2]`.
    Returns:
      Float16 `[h, chunks, d, d]`, already multiplied by its factor; float32 `[h, d, d]`; both factors, `[h, chunks, 2]`.
    """
    h, chunks, d = x.shape[:3]
    size, together = tiles.SCAN_ENTRIES, min(tiles.SCAN_TOGETHER, chunks)
    parts, layout = d * d // size, plgpu.Layout.WG_STRIDED((size,), vec_size=8)

    def scan_kernel(x_gmem: Any, decay_gmem: Any, bound_gmem: Any, walk_gmem: Any, largest_gmem: Any, *refs: Any) -> None:
        first_gmem, (moments_gmem, last_gmem, factors_gmem) = refs[:-3], refs[-3:]
        item = lax.axis_index("item")
        part, head = lax.rem(item, jnp.int32(parts)), lax.div(item, jnp.int32(parts))
        here = pl.ds(part * size, size)
        first_chunk, stride = walk_gmem[0], walk_gmem[1]
        largest = [largest_gmem[n] for n in range(2)]

        def load(ref: Any) -> Array:
            return compat.load(ref, layout, optimized=False)

        def store_factors(chunk: Any, factors: Sequence[Array]) -> None:
            for n, factor in enumerate(factors):
                every = lax.broadcast_in_dim(factor, (TILE,), ())
                factors_gmem.at[head, chunk, n][...] = plgpu.layout_cast(every, ROWS)

        def steps(count: int, i: Any, carry: Any) -> Any:
            """`count` chunks, all loaded before any is needed."""
            sums, bounds = carry
            order = [first_chunk + (i * count + n) * stride for n in range(count)]
            loaded = [(load(x_gmem.at[head, n, here]), decay_gmem[head, n], bound_gmem[head, n]) for n in order]
            for chunk, (added, across, more) in zip(order, loaded, strict=True):
                factors = [_factor(bound, most) for bound, most in zip(bounds, largest, strict=True)]
                moments_gmem.at[head, chunk, here][...] = (sums * factors[1]).astype(jnp.float16)
                pl.when(part == 0)(functools.partial(store_factors, chunk, factors))
                sums, bounds = sums * across + added, [bound * across + more for bound in bounds]
            return sums, bounds

        carry = plgpu.layout_cast(jnp.zeros((size,), jnp.float32), layout), [jnp.float32(0.0)] * 2
        if first_gmem:  # added to zeros: JAX counts what was loaded as varying over a mesh, but not the sums of a loop
            carry = carry[0] + load(first_gmem[0].at[head, here]), [x + first_gmem[1][head, n] for n, x in enumerate(carry[1])]
        whole = chunks // together
        carry = lax.fori_loop(0, whole, functools.partial(steps, together), carry)
        if whole * together < chunks:
            carry = lax.fori_loop(whole * together, chunks, functools.partial(steps, 1), carry)
        last_gmem.at[head, here][...] = carry[0]

    moments, last, factors = compat.kernel(
        scan_kernel,
        out_type=[
            jax.ShapeDtypeStruct((h, chunks, d * d), jnp.float16),
            jax.ShapeDtypeStruct((h, d * d), jnp.float32),
            jax.ShapeDtypeStruct((h, chunks, 2, TILE), jnp.float32),
        ],
        grid=(h * parts,),
        grid_names=("item",),
    )(x.reshape(h, chunks, -1), decay, bound, walk, largest, *(() if first is None else (first[0].reshape(h, -1), first[1])))
    return moments.reshape(x.shape), last.reshape(h, d, d), factors[..., 0]


def _factor(bound: Array, largest: Array) -> Array:
    """What brings `bound` to `largest`; 1 where it is 0."""
    return jnp.where(bound > 0.0, largest / jnp.where(bound > 0.0, bound, 1.0), 1.0)
