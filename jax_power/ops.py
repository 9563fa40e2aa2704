"""Power attention as a differentiable JAX function: `custom_vjp` around the table of implementations."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from bridge import spec
from jax_power import cuda_ffi, mosaic_gpu, xla
from jax_power.platforms import Plan, Plans, fold_batch, run, run_and_save, run_with_saved

# Best first: the first that supports a call serves it unless one is named.
POWER: dict[str, spec.Implementation] = {
    "cuda_ffi": spec.Implementation(
        fold_batch(cuda_ffi.power.forward), fold_batch(cuda_ffi.power.backward), cuda_ffi.power.supports, cuda_ffi.power.plan,
        wide_output=False,
    ),
    "mosaic_gpu": spec.Implementation(
        fold_batch(mosaic_gpu.power.forward), fold_batch(mosaic_gpu.power.backward), mosaic_gpu.power.supports,
        mosaic_gpu.power.plan, wide_output=False,
    ),
    "xla": spec.Implementation(xla.power.forward, xla.power.backward, xla.power.supports),
}  # fmt: skip

Arguments = tuple[Array | None, ...]


class Saved(NamedTuple):
    """What an implementation keeps for its backward pass: y if it is wider than the result, and the row normaliser."""

    wide_y: Array | None
    norm: Any


class Residuals(NamedTuple):
    """What the backward pass needs: q, k, v, log_g, s0, z0, and of the forward pass y, once, and what it saved."""

    arguments: Arguments
    results: tuple[Array | None]
    saved: Saved

    @staticmethod
    def of(arguments: Arguments, results: tuple[Array | None, ...], saved: Saved) -> Residuals:
        return Residuals(arguments, (results[0] if saved.wide_y is None else None,), saved)


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
    results, saved = (_attend_and_save if _portable(plans) else _attend_and_save_once)(plans, *arguments)
    return results, Residuals.of(arguments, results, saved)


def _backward(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Array | None, ...]:
    return (_gradients if _portable(plans) else _gradients_once)(plans, residuals, grads)


power_attention.defvjp(_forward, _backward)


def _attend_and_save(plans: Plans, *arguments: Array | None) -> tuple[Any, Saved]:
    return run_and_save(plans, _attend, *arguments)


def _gradients(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Array | None, ...]:
    def differentiate(plan: Plan, kept: tuple[Any, Saved], arguments: Arguments, grads: Any) -> tuple[Array | None, ...]:
        (y, *_), saved = kept
        y = y if saved.wide_y is None else saved.wide_y
        return POWER[plan.implementation].backward(plan.call, *arguments, y, saved.norm, *grads)

    arguments, *kept = residuals
    return run_with_saved(plans, differentiate, _attend, tuple(kept), arguments, grads)


# ---------------------------------------------------------------------------------------------------------------------
# Second derivatives
# ---------------------------------------------------------------------------------------------------------------------

# The portable implementation's passes are JAX, which can differentiate them again. Kernels cannot be differentiated: the
# derivative of their forward pass is their backward pass, and that of the backward pass is the portable implementation's, equal
# to rounding, if it was among those to choose from.
_attend_and_save_once = jax.custom_vjp(_attend_and_save, nondiff_argnums=(0,))
_gradients_once = jax.custom_vjp(_gradients, nondiff_argnums=(0,))


def _portable(plans: Plans) -> bool:
    return plans.here.implementation == "xla" and plans.elsewhere is None


def _attend_and_save_forward(plans: Plans, *arguments: Array | None) -> tuple[tuple[Any, Saved], Residuals]:
    results, saved = _attend_and_save_once(plans, *arguments)
    return (results, saved), Residuals.of(arguments, results, saved)


def _attend_and_save_backward(plans: Plans, residuals: Residuals, grads: tuple[Any, Saved]) -> tuple[Array | None, ...]:
    return _gradients_once(plans, residuals, grads[0])  # what is saved has no gradient: `_gradients_once` gives it none


def _gradients_forward(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Any, Any]:
    return _gradients_once(plans, residuals, grads), (residuals, grads)


def _gradients_backward(plans: Plans, kept: tuple[Residuals, Any], cotangents: Any) -> tuple[Residuals, Any]:
    plan = next((plan for plan in (plans.here, plans.elsewhere) if plan is not None and plan.implementation == "xla"), None)
    if plan is None:
        raise NotImplementedError(
            f"power_attention: second derivatives are not implemented by implementation={plans.here.implementation!r}; "
            "implementation='xla' would work"
        )
    alone = Plans(plan, None, plans.here_is_cuda)
    residuals, grads = kept

    def gradients(arguments: Arguments, grads: Any) -> tuple[Array | None, ...]:
        return _gradients(alone, _forward(alone, *arguments)[1], grads)

    arguments, grads = jax.vjp(gradients, residuals.arguments, grads)[1](cotangents)
    return Residuals(arguments, *jax.tree.map(jnp.zeros_like, residuals[1:])), grads


_attend_and_save_once.defvjp(_attend_and_save_forward, _attend_and_save_backward)
_gradients_once.defvjp(_gradients_forward, _gradients_backward)
