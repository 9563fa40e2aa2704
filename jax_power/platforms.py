"""One program for every platform: how a fused implementation and the portable one serve the same call.

JAX decides late where a program runs: after tracing, and for an exported one on another machine. So a choice that was left
open (`implementation=None`, or several names) is made once for NVIDIA GPUs and once for everything else, by asking each
implementation's `supports(call, platform)`; where the answers differ, both are staged under `lax.platform_dependent`, of which
only the branches for the platforms asked for are lowered. To add a fused implementation, add its line to the table of `ops.py`:

    "mosaic_gpu": spec.Implementation(fold_batch(forward), fold_batch(backward), supports, plan, wide_output=False)

with `supports` giving a reason for every platform but "cuda", and for a GPU that is `not_hopper`. A call that no fused
implementation serves is one plain call.

What a forward pass saves for its backward pass differs between implementations, but the branches of a conditional return the
same shapes. Kept is what the implementation `here`, on the default backend, saves; lowered for another platform, the backward
pass runs its own forward pass again.

Under `vmap`, `fold_batch` makes a mapped axis part of the batch, where kernels are parallel already.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax


class Plan(NamedTuple):
    """An implementation's name, and the checked call with what was left open (its form) as suits that implementation."""

    implementation: str
    call: Any


class Plans(NamedTuple):
    """Who serves a call. Hashable.

    Fields:
      here: on the default backend.
      elsewhere: on CUDA if the default backend is another one, on all others if it is CUDA; None where this is the same plan,
        or where nobody that was asked for can.
      here_is_cuda: which of the two cases it is.
    """

    here: Plan
    elsewhere: Plan | None
    here_is_cuda: bool


def backend() -> str:
    """The default backend by the names that programs are lowered for: "cpu", "cuda", "rocm", "tpu"."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


@functools.cache
def not_hopper() -> str | None:
    """Why the GPU here cannot run kernels for Hopper; None if it can, or if none is here (but can be lowered for)."""
    try:
        capability = jax.devices("cuda")[0].compute_capability
    except RuntimeError:
        return None
    return None if capability == "9.0" else f"compute capability {capability}: the kernels run on a Hopper GPU (9.0)"


def run(plans: Plans, compute: Callable[..., Any], *operands: Any) -> Any:
    """`compute(plan, *operands)` with the plan for the platform that the program is lowered for."""
    return _select(plans, *(functools.partial(compute, plan) for plan in (plans.here, plans.elsewhere)), *operands)


def run_and_save(plans: Plans, compute: Callable[..., tuple[Any, Any]], *operands: Any) -> tuple[Any, Any]:
    """As `run`, for `compute` that returns outputs and what to save for `run_with_saved`."""

    def elsewhere(*operands: Any) -> tuple[Any, Any]:
        _, saved = jax.eval_shape(functools.partial(compute, plans.here), *operands)
        outputs, _ = compute(plans.elsewhere, *operands)
        return outputs, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), saved)

    return _select(plans, functools.partial(compute, plans.here), elsewhere, *operands)


def run_with_saved(
    plans: Plans,
    compute: Callable[..., Any],
    forward: Callable[..., tuple[Any, Any]],
    saved: Any,
    operands: tuple[Any, ...],
    *rest: Any,
) -> Any:
    """`compute(plan, saved, operands, *rest)`, where `saved` is what `run_and_save(plans, forward, *operands)` saved."""

    def elsewhere(_: Any, operands: tuple[Any, ...], *rest: Any) -> Any:
        return compute(plans.elsewhere, forward(plans.elsewhere, *operands)[1], operands, *rest)

    return _select(plans, functools.partial(compute, plans.here), elsewhere, saved, operands, *rest)


def _select(plans: Plans, here: Callable[..., Any], elsewhere: Callable[..., Any], *operands: Any) -> Any:
    axes, operands = _varying_axes(operands), vary_alike(operands)

    def typed(branch: Callable[..., Any]) -> Callable[..., Any]:
        # JAX takes what a kernel returns for equal on all devices of a mesh; it varies as its operands do.
        return lambda *operands: _vary(branch(*operands), axes)

    if plans.elsewhere is None:
        return typed(here)(*operands)
    cuda, other = map(typed, (here, elsewhere) if plans.here_is_cuda else (elsewhere, here))
    return lax.platform_dependent(*operands, cuda=cuda, default=other)


def vary_alike(arrays: Any) -> Any:
    """The arrays, all varying over the same mesh axes, as `shard_map` asks of a custom call's operands.

    The gradient of one that varied over fewer is a sum over the others.
    """
    return _vary(arrays, _varying_axes(arrays))


def _varying_axes(arrays: Any) -> frozenset[str]:
    """The mesh axes of `shard_map` over which any of the arrays varies; none outside of it."""
    return frozenset[str]().union(*(jax.typeof(x).manual_axis_type.varying for x in jax.tree.leaves(arrays)))


def _vary(arrays: Any, axes: frozenset[str]) -> Any:
    def cast(x: Array) -> Array:
        missing = tuple(axes - jax.typeof(x).manual_axis_type.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(cast, arrays)


def fold_batch(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function(call, *arrays)` with a rule for `vmap`: the mapped axis becomes part of the batch, `call.b`.

    Every array, those returned too, has the batch first. An operand that is not mapped is repeated.
    """

    @functools.partial(jax.jit, static_argnums=0)
    @functools.wraps(function)
    def folding(call: Any, *arrays: Any) -> Any:
        @jax.custom_batching.custom_vmap
        def one(*arrays: Any) -> Any:
            return function(call, *arrays)

        @one.def_vmap
        def many(size: int, mapped: Any, *arrays: Any) -> tuple[Any, Any]:
            def fold(x: Array, is_mapped: bool) -> Array:
                x = x if is_mapped else jnp.broadcast_to(x, (size, *x.shape))
                return x.reshape(size * call.b, *x.shape[2:])

            folded = map(functools.partial(jax.tree.map, fold), arrays, mapped)
            results = folding(dataclasses.replace(call, b=size * call.b), *folded)
            results = jax.tree.map(lambda x: x.reshape(size, call.b, *x.shape[1:]), results)
            return results, jax.tree.map(lambda _: True, results)

        return one(*arrays)

    return folding
