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
from jax_power.xla import sdpa, sdpa_reference

# Best first: the first that supports a call serves it unless one is named.
SDPA: dict[str, spec.Implementation] = {
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


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass. `bias_grad` is () if the bias has a gradient, else None."""

    operands: Operands
    out: Array
    lse: Array
    bias_grad: tuple[()] | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def attention(call: SdpaCall, implementation: str, operands: Operands) -> tuple[Array, Array]:
    """out `[b, t, h_q, e]` and lse `[b, h_q, t]` of a checked call, in the precision they were computed in.

    Implementations give 0 to a query that sees no key. Here it gets what JAX's function gives it: the mean of all
    values, as if every score were the same large negative number, but still 0 beyond a query length. lse has no
    gradient.
    """
    return _attend(call, implementation, operands)


def _attend(call: SdpaCall, implementation: str, operands: Operands) -> tuple[Array, Array]:
    out, lse = SDPA[implementation].forward(call, *operands)
    takes_mean = _takes_mean(call, operands, lse)
    if takes_mean is None:
        return out, lse
    mean = operands.v.astype(out.dtype).mean(1, keepdims=True)
    return jnp.where(takes_mean, jnp.repeat(mean, call.group, 2), out), lse


def _forward(call: SdpaCall, implementation: str, operands: Any) -> tuple[tuple[Array, Array], Residuals]:
    # With `symbolic_zeros`, every operand says whether it is differentiated: an unwanted bias gradient takes t · s
    # memory.
    bias_grad = () if operands.bias is not None and operands.bias.perturbed else None
    operands = Operands(*(None if x is None else x.value for x in operands))
    out, lse = _attend(call, implementation, operands)
    return (out, lse), Residuals(operands, out, lse, bias_grad)


def _backward(call: SdpaCall, implementation: str, residuals: Residuals, grads: Any) -> tuple[Operands]:
    operands, out, lse, bias_grad = residuals
    dout = grads[0]
    if isinstance(dout, SymbolicZero):
        dout = jnp.zeros(dout.shape, dout.dtype)
    call = dataclasses.replace(call, bias_grad=bias_grad is not None)
    dq, dk, dv, dbias = SDPA[implementation].backward(call, *operands, out, lse, dout)
    takes_mean = _takes_mean(call, operands, lse)
    if takes_mean is not None:
        of_rows = jnp.where(takes_mean, dout, 0).sum(1, keepdims=True) / call.s
        dv += of_rows.reshape(call.b, 1, call.h_kv, call.group, call.e).sum(3)
    grads = zip((dq, dk, dv, dbias), operands[:4], strict=True)
    dq, dk, dv, dbias = (None if dx is None else dx.astype(x.dtype) for dx, x in grads)
    return (Operands(dq, dk, dv, dbias, None, None, None),)


def _takes_mean(call: SdpaCall, operands: Operands, lse: Array) -> Array | None:
    """Which queries see no key and count, bool `[b, t, h_q, 1]`; None where the call leaves no query without."""
    if not call.may_hide_rows or call.s == 0:
        return None
    takes_mean = (lse == -jnp.inf).swapaxes(1, 2)[..., None]
    if operands.query_lengths is not None:
        takes_mean &= jnp.arange(call.t)[:, None, None] < operands.query_lengths[:, None, None, None]
    return takes_mean


attention.defvjp(_forward, _backward, symbolic_zeros=True)
