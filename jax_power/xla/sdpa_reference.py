"""Scaled dot-product attention by its formula, with all t · s weights in memory: what the others must equal."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall


def supports(call: SdpaCall, device: str) -> str | None:
    """Any call on any device, but dropout, which JAX's function has not."""
    return "dropout_p > 0 is not implemented" if call.dropout_p > 0 else None


def forward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
) -> tuple[Array, Array]:
    """As `jax_power.xla.sdpa.forward`."""
    wide = jnp.dtype(call.compute_dtype)
    q = q.astype(wide) * call.scale
    k, v = (jnp.repeat(x.astype(wide), call.group, 2) for x in (k, v))
    scores = jnp.einsum("bthd,bshd->bhts", q, k, precision=lax.Precision.HIGHEST)
    if bias is not None:
        scores += bias.astype(wide)
    visible = _visible(call, mask, query_lengths, key_lengths)
    top = jnp.where(visible, scores, -jnp.inf).max(-1, keepdims=True, initial=-jnp.inf)
    # Hidden keys keep a finite exponent, so that differentiating through it gives them 0 and not 0 · ∞.
    reference = lax.stop_gradient(jnp.where(top == -jnp.inf, 0.0, top))
    weights = jnp.where(visible, jnp.exp(jnp.where(visible, scores - reference, 0.0)), 0.0)
    total = weights.sum(-1, keepdims=True)
    weights /= jnp.where(total == 0, 1.0, total)
    lse = lax.stop_gradient(reference + jnp.log(total))[..., 0]
    return jnp.einsum("bhts,bshe->bthe", weights, v, precision=lax.Precision.HIGHEST), lse


def backward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """As `jax_power.xla.sdpa.backward`, by JAX's own differentiation of the formula."""

    def output(q, k, v, bias):
        return forward(call, q, k, v, bias, mask, query_lengths, key_lengths)[0]

    wide = (None if x is None else x.astype(out.dtype) for x in (q, k, v, bias))
    dq, dk, dv, dbias = jax.vjp(output, *wide)[1](dout.astype(out.dtype))
    return dq, dk, dv, dbias if call.bias_grad else None


def _visible(call: SdpaCall, mask: Array | None, query_lengths: Array | None, key_lengths: Array | None) -> Array:
    """Whether query i sees key j: bool, broadcastable to `[b, h_q, t, s]`."""
    i, j = jnp.arange(call.t)[:, None], jnp.arange(call.s)
    visible = jnp.ones((1, 1, call.t, call.s), bool)
    if call.causal:
        visible &= j <= i
    if call.window is not None:
        visible &= (i - call.window[0] <= j) & (j <= i + call.window[1])
    if query_lengths is not None:
        visible &= i < query_lengths[:, None, None, None]
    if key_lengths is not None:
        visible &= j < key_lengths[:, None, None, None]
    return visible if mask is None else visible & mask
