"""Every difference between the JAX versions that the Pallas kernels run on (0.10.2 to 0.12), and nothing else.

Kernels take `kernel`, `load` and `SEMANTICS` from here and the rest from `jax.experimental.pallas.mosaic_gpu`. What is the same
in all versions needs no entry: `plgpu.wgmma`, barriers, copies, `ref.transpose((1, 0))` for a transposed operand
(`plgpu.transpose_ref` warns from 0.11 on).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from jax_power.mosaic_gpu import tiles

# From 0.11 on `plgpu.load` takes the reference alone; before, an index is required.
_LOAD_TAKES_INDEX = jax.__version_info__ < (0, 11)
# `lax.concatenate` of register arrays lowers from 0.11 on.
CONCATENATES = jax.__version_info__ >= (0, 11)
# Named because the default changed from one thread's view (Lane) to a warpgroup's (0.11).
SEMANTICS = plgpu.LoweringSemantics.Warpgroup


def load(ref: Any, layout: Any, *, optimized: bool = True) -> jax.Array:
    """The array behind a reference to shared or device memory, in registers, laid out as `layout`.

    With optimized=False each thread loads its own elements, whatever strides they have.
    """
    index = ((),) if _LOAD_TAKES_INDEX else ()
    return plgpu.load(ref, *index, layout=layout, optimized=optimized)


def kernel(body: Callable[..., None], **options: Any) -> Callable[..., Any]:
    """`plgpu.kernel` with the lowering and the fast approximations of exp2 and division that all kernels here rely on.

    Raises:
      NotImplementedError: the shared memory among `scratch_types` is more than a block has.
    """
    scratch = [x for x in jax.tree.leaves(options.get("scratch_types", ())) if getattr(x, "memory_space", None) == plgpu.SMEM]
    tiles.check_smem(
        getattr(body, "__name__", "kernel"), {f"{n}": (x.shape, jnp.dtype(x.dtype).itemsize) for n, x in enumerate(scratch)}
    )
    params = plgpu.CompilerParams(approx_math=True, lowering_semantics=SEMANTICS)
    return plgpu.kernel(body, compiler_params=params, **options)


@functools.cache
def interpret_params(**options: Any) -> Any:
    """Parameters that make `plgpu.kernel(..., interpret=…)` run on a CPU; `detect_races=True` checks the barriers."""
    if hasattr(plgpu, "InterpretGPUParams"):
        return plgpu.InterpretGPUParams(**options)
    from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

    return InterpretGPUParams(**options)
