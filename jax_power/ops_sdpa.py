"""Scaled dot-product attention as a differentiable JAX function: `custom_vjp` around the table of implementations."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.custom_derivatives import SymbolicZero

from bridge import spec
from bridge.spec_sdpa import SdpaCall
from jax_power import mosaic_gpu
from jax_power.platforms import Plan, Plans, run, run_and_save, run_with_saved
from jax_power.xla import sdpa, sdpa_reference

# Best first: the first that supports a call serves it unless one is named.
SDPA: dict[str, spec.Implementation] = {
    "mosaic_gpu": spec.Implementation(
        mosaic_gpu.sdpa.forward, mosaic_gpu.sdpa.backward, mosaic_gpu.sdpa.supports, wide_output=False, residual=True
    ),
    "xla": spec.Implementation(sdpa.forward, sdpa.backward, sdpa.supports),
    "reference": spec.Implementation(sdpa_reference.forward, sdpa_reference.backward, sdpa_reference.supports),
}


class Operands(NamedTuple):
    """The arrays of a call, in the order in which implementations take them.

    q `[b, t, h_q, d]`, k `[b, s, h_kv, d]`, v `[b, s, h_kv, e]`; bias and mask `[b, h_q, t, s]`, each axis the full
    size or 1; lengths int32 `[b]`.
    """

    q: Array
    k: Array
    v: Array
    bias: Array | None
    mask: Array | None
    query_lengths: Array | None
    key_lengths: Array | None


class Saved(NamedTuple):
    """What an implementation keeps of out for its backward pass, beside the result.

    Fields:
      wide_out: out as it was computed, if that is wider than the result.
      rest: what rounding out left over, if the implementation has it. dout·out, which the backward pass needs, is too coarse
        from a rounded out where softmax is concentrated: q and k of standard deviation 8 then double the errors of dq and dk.
    """

    wide_out: Array | None
    rest: Array | None


class Residuals(NamedTuple):
    """What the backward pass needs: the operands, and of the forward pass lse and out, once, as it was computed.

    Results have no out if `saved` has it. `bias_grad` is () if the bias has a gradient, else None.
    """

    operands: Operands
    results: tuple[Array | None, Array]
    saved: Saved
    bias_grad: tuple[()] | None

    @staticmethod
    def of(operands: Operands, results: tuple[Array, Array], saved: Saved, bias_grad: tuple[()] | None) -> Residuals:
        out, lse = results
        return Residuals(operands, (out if saved.wide_out is None else None, lse), saved, bias_grad)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attention(plans: Plans, operands: Operands) -> tuple[Array, Array]:
    """out `[b, t, h_q, e]` of a checked call, in the dtype of v, and lse `[b, h_q, t]`, in the precision it was computed in.

    Implementations give 0 to a query that sees no key. Here it gets what JAX's function gives it: the mean of all
    values, as if every score were the same large negative number, but still 0 beyond a query length. lse has no
    gradient.
    """
    return run(plans, lambda plan, *operands: _attend(plan, *operands)[0], *operands)


def _attend(plan: Plan, *operands: Array | None, residual: bool = False) -> tuple[tuple[Array, Array], Saved]:
    """The results, and what to save of out; `rest` only if `residual` asks for it."""
    call, v = plan.call, operands[2]
    implementation = SDPA[plan.implementation]
    options = {"residual": True} if residual and implementation.residual else {}
    out, lse, *rest = implementation.forward(call, *operands, **options)
    takes_mean = _takes_mean(call, Operands(*operands), lse)
    if takes_mean is not None:
        mean = v.astype(jnp.promote_types(out.dtype, jnp.float32)).mean(1, keepdims=True).astype(out.dtype)
        out = jnp.where(takes_mean, jnp.repeat(mean, call.group, 2), out)
    return (out.astype(v.dtype), lse), Saved(None if out.dtype == v.dtype else out, rest[0] if rest else None)


_attend_and_keep = functools.partial(_attend, residual=True)


def _forward(plans: Plans, operands: Any) -> tuple[tuple[Array, Array], Residuals]:
    # With `symbolic_zeros`, every operand says whether it is differentiated: an unwanted bias gradient takes t · s
    # memory.
    bias_grad = () if operands.bias is not None and operands.bias.perturbed else None
    operands = Operands(*(None if x is None else x.value for x in operands))
    results, saved = (_attend_and_save if _portable(plans) else _attend_and_save_once)(plans, operands)
    return results, Residuals.of(operands, results, saved, bias_grad)


def _backward(plans: Plans, residuals: Residuals, grads: Any) -> tuple[Operands]:
    dout = grads[0]
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    return ((_gradients if _portable(plans) else _gradients_once)(plans, residuals, dout),)


attention.defvjp(_forward, _backward, symbolic_zeros=True)


def _attend_and_save(plans: Plans, operands: Operands) -> tuple[tuple[Array, Array], Saved]:
    return run_and_save(plans, _attend_and_keep, *operands)


def _gradients(plans: Plans, residuals: Residuals, dout: Array) -> Operands:
    operands, *kept, bias_grad = residuals
    differentiate = functools.partial(_differentiate, bias_grad is not None)
    return run_with_saved(plans, differentiate, _attend_and_keep, tuple(kept), operands, dout)


def _differentiate(bias_grad: bool, plan: Plan, kept: Any, operands: Operands, dout: Array) -> Operands:
    call = dataclasses.replace(plan.call, bias_grad=bias_grad)
    (out, lse), saved = kept
    out = out if saved.wide_out is None else saved.wide_out
    rest = () if saved.rest is None else (saved.rest,)
    dq, dk, dv, dbias = SDPA[plan.implementation].backward(call, *operands, out, lse, dout, *rest)
    takes_mean = _takes_mean(call, operands, lse)
    if takes_mean is not None:
        of_rows = jnp.where(takes_mean, dout, 0).sum(1, keepdims=True) / call.s
        dv += of_rows.reshape(call.b, 1, call.h_kv, call.group, call.e).sum(3)
    grads = zip((dq, dk, dv, dbias), operands[:4], strict=True)
    dq, dk, dv, dbias = (None if dx is None else dx.astype(x.dtype) for dx, x in grads)
    return Operands(dq, dk, dv, dbias, None, None, None)


def _takes_mean(call: SdpaCall, operands: Operands, lse: Array) -> Array | None:
    """Which queries see no key and count, bool `[b, t, h_q, 1]`; None where the call leaves no query without."""
    if not call.may_hide_rows or call.s == 0:
        return None
    takes_mean = (lse == -jnp.inf).swapaxes(1, 2)[..., None]
    if operands.query_lengths is not None:
        takes_mean &= jnp.arange(call.t)[:, None, None] < operands.query_lengths[:, None, None, None]
    return takes_mean


# ---------------------------------------------------------------------------------------------------------------------
# Second derivatives
# ---------------------------------------------------------------------------------------------------------------------

# The passes of the implementations below are JAX, which can differentiate them again. Kernels cannot be differentiated: the
# derivatives of both of their passes are those of the portable implementation, equal to rounding, if it was among those to
# choose from. They are rules for tangents, as xla's loops over the tiles that a causal mask leaves have no reverse mode:
# what works with xla alone (`jax.hessian`, say) works with a choice that was left open.
_PORTABLE = ("xla", "reference")

_attend_and_save_once = jax.custom_jvp(_attend_and_save, nondiff_argnums=(0,))
_gradients_once = jax.custom_jvp(_gradients, nondiff_argnums=(0,))


def _portable(plans: Plans) -> bool:
    return plans.here.implementation in _PORTABLE and plans.elsewhere is None


def _portable_alone(plans: Plans) -> Plans:
    plan = next((plan for plan in (plans.here, plans.elsewhere) if plan is not None and plan.implementation in _PORTABLE), None)
    if plan is None:
        raise NotImplementedError(
            f"dot_product_attention: second derivatives are not implemented by implementation={plans.here.implementation!r}; "
            "implementation='xla' would work"
        )
    return Plans(plan, None, plans.here_is_cuda)


@_attend_and_save_once.defjvp
def _attend_and_save_tangents(plans: Plans, primals: tuple[Operands], tangents: tuple[Operands]) -> tuple[Any, Any]:
    alone = _portable_alone(plans)
    results, saved = _attend_and_save_once(plans, *primals)
    (dout, dlse), _ = _tangents(lambda operands: _attend_and_save(alone, operands), primals[0], tangents[0])
    return (results, saved), ((dout, dlse), jax.tree.map(jnp.zeros_like, saved))  # `_gradients_tangents` needs no saved


@_gradients_once.defjvp
def _gradients_tangents(plans: Plans, primals: tuple[Any, ...], tangents: tuple[Any, ...]) -> tuple[Operands, Operands]:
    alone = _portable_alone(plans)

    def gradients(operands: Operands, dout: Array) -> Operands:
        return _gradients(alone, Residuals.of(operands, *_attend_and_save(alone, operands), primals[0].bias_grad), dout)

    moved = _tangents(gradients, primals[0].operands, tangents[0].operands, (primals[1], tangents[1]))
    return _gradients_once(plans, *primals), moved


def _tangents(function: Any, operands: Operands, moves: Operands, *more: tuple[Array, Array]) -> Any:
    """The tangents of `function(operands, …)`; a mask and lengths have none."""

    def of_floats(floats: tuple[Array | None, ...], *rest: Array) -> Any:
        return function(operands._replace(**dict(zip(Operands._fields, floats, strict=False))), *rest)

    rest, rest_moves = zip(*more, strict=True) if more else ((), ())
    return jax.jvp(of_floats, (operands[:4], *rest), (moves[:4], *rest_moves))[1]
