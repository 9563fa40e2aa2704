"""Power attention as a differentiable JAX function: `custom_vjp` around the table of implementations."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax import Array

from bridge import spec
from jax_power import cuda_ffi, xla
from jax_power.platforms import Plan, Plans, fold_batch, run, run_and_save, run_with_saved

# Best first: the first that supports a call serves it unless one is named.
POWER: dict[str, spec.Implementation] = {
    "cuda_ffi": spec.Implementation(
        fold_batch(cuda_ffi.power.forward), fold_batch(cuda_ffi.power.backward), cuda_ffi.power.supports, cuda_ffi.power.plan,
        wide_output=False,
    ),
    "xla": spec.Implementation(xla.power.forward, xla.power.backward, xla.power.supports),
}  # fmt: skip

Arguments = tuple[Array | None, ...]


class Saved(NamedTuple):
    """What an implementation keeps for its backward pass: y if it is wider than the result, and the row normaliser."""

    wide_y: Array | None
    norm: Array


class Residuals(NamedTuple):
    """What the backward pass needs: the arguments q, k, v, log_g, s0, z0, the result y, and what the forward pass saved."""

    arguments: Arguments
    y: Array
    saved: Saved


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def power_attention(
    plans: Plans,
    q: Array,
    k: Array,
    v: Array,
    log_g: Array | None,
    s0: Array | None,
    z0: Array | None,
) -> tuple[Array, Array | None, Array | None]:
    """y, s, z of a checked call: y in the dtype of v, s and z None unless it returns the state."""
    return run(plans, lambda plan, *arguments: _attend(plan, *arguments)[0], q, k, v, log_g, s0, z0)


def _attend(plan: Plan, *arguments: Array | None) -> tuple[tuple[Array, Array | None, Array | None], Saved]:
    y, norm, s, z = POWER[plan.implementation].forward(plan.call, *arguments)
    dtype = arguments[2].dtype
    return (y.astype(dtype), s, z), Saved(None if y.dtype == dtype else y, norm)


def _forward(plans: Plans, *arguments: Array | None) -> tuple[Any, Residuals]:
    results, saved = run_and_save(plans, _attend, *arguments)
    return results, Residuals(arguments, results[0], saved)


def _backward(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Array | None, ...]:
    if plans.elsewhere is None and plans.here.implementation == "xla":
        return _gradients(plans, residuals, grads)
    return _first_gradients(plans, residuals, grads)


def _gradients(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Array | None, ...]:
    def differentiate(plan: Plan, saved: Saved, arguments: Arguments, y: Array, grads: Any) -> tuple[Array | None, ...]:
        y = y if saved.wide_y is None else saved.wide_y
        return POWER[plan.implementation].backward(plan.call, *arguments, y, saved.norm, *grads)

    return run_with_saved(plans, differentiate, _attend, residuals.saved, residuals.arguments, residuals.y, grads)


# Kernels cannot be differentiated. Where the portable implementation was among those to choose from, its derivatives of the
# gradient stand in for theirs, which are equal to rounding.
_first_gradients = jax.custom_vjp(_gradients, nondiff_argnums=(0,))


def _first_gradients_forward(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Any, Any]:
    return _gradients(plans, residuals, grads), (residuals, grads)


def _first_gradients_backward(plans: Plans, kept: tuple[Residuals, Any], cotangents: Any) -> tuple[Residuals, Any]:
    portable = next((plan for plan in (plans.here, plans.elsewhere) if plan is not None and plan.implementation == "xla"), None)
    if portable is None:
        raise NotImplementedError(
            f"power_attention: second derivatives are not implemented by implementation={plans.here.implementation!r}; "
            "implementation='xla' would work"
        )
    alone = Plans(portable, None, plans.here_is_cuda)

    def gradients(arguments: Arguments, grads: Any) -> tuple[Array | None, ...]:
        results, residuals = _forward(alone, *arguments)
        return _gradients(alone, residuals, grads)

    residuals, grads = kept
    arguments, grads = jax.vjp(gradients, residuals.arguments, grads)[1](cotangents)
    zeros = jax.tree.map(jax.numpy.zeros_like, (residuals.y, residuals.saved))
    return Residuals(arguments, *zeros), grads


_first_gradients.defvjp(_first_gradients_forward, _first_gradients_backward)
power_attention.defvjp(_forward, _backward)
