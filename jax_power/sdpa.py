"""Scaled dot-product attention for JAX: signature, meaning, argument checks and the choice of an implementation."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any, Literal, overload

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int32

from bridge import spec, spec_sdpa
from bridge.spec_sdpa import SdpaCall
from jax_power import ops_sdpa, platforms
from jax_power.choice import CHOICE

# The score that JAX's function gives a hidden key, and so the log-sum-exp of a row of nothing else.
HIDDEN_SCORE = -0.7 * float(jnp.finfo(jnp.float32).max)


@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: Literal[False] = False,
) -> Array: ...
@overload
def dot_product_attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: ArrayLike | None = None,
    key_value_seq_lengths: ArrayLike | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: Literal[True],
) -> tuple[Array, Array]: ...
def dot_product_attention(  # type: ignore[misc]  # shapes are of arrays; anything that becomes one is taken
    query: Float[Array, "*b t h_q d"],
    key: Float[Array, "*b s h_kv d"],
    value: Float[Array, "*b s h_kv e"],
    bias: Float[Array, "..."] | None = None,
    mask: Bool[Array, "..."] | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Int32[Array, " b"] | None = None,
    key_value_seq_lengths: Int32[Array, " b"] | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Float[Array, "*b t h_q e"] | tuple[Float[Array, "*b t h_q e"], Float[Array, "*b t h_q"]]:
    """Softmax attention with the arguments and the meaning of `jax.nn.dot_product_attention`.

        S_ij = scale · <q_i, k_j> + bias_ij,        P_i· = softmax over the keys that i may see,        y_i = Σ_j P_ij
        v_j

    Every implementation but "reference" works in blocks and keeps memory linear in t and s, forward and backward (Dao
    et al., "FlashAttention", 2022): the backward pass gets q, k, v, y and the log-sum-exp of each row, and makes P
    again.

    Args:
      query: `[b, t, h_q, d]`, or without the batch axis, which then is absent from key and value too. Head i reads
        key-value head `i // (h_q // h_kv)`.
      key: `[b, s, h_kv, d]`.
      value: `[b, s, h_kv, e]`; e ≠ d is allowed here, though not by JAX's function.
      bias: added to the scores. At most four axes that broadcast to `[b, h_q, t, s]`. It has a gradient.
      mask: bool, False hides a key. Axes as for `bias`.
      scale: any number, 0 and negatives too; 1/sqrt(d) for None. A traced one is differentiable, and costs float32
        operands.
      is_causal: query i sees keys 0 … i, whatever t and s are.
      query_seq_lengths: queries from here on give 0.
      key_value_seq_lengths: keys from here on are hidden.
      local_window_size: (left, right), or one number for both: query i sees keys i − left … i + right.
      implementation: name of one, or several in order of preference; None for the fastest that supports the call, or
        for what `jax_power.implementation` has set.
      return_residual: also return the log-sum-exp of every row of scores, without a gradient.
    Returns:
      y in the dtype of the operands; with `return_residual`, also lse `[b, t, h_q]` in that dtype. A query that sees no
      key has, as with JAX's function, the mean of all values for y, and a large negative lse, −0.7 times float32's
      maximum.
    Raises:
      ValueError: as JAX's function, for arguments that it refuses; or `implementation` is not a name in this
        operation's table.
      NotImplementedError: an implementation asked for lacks something this call needs.
    """
    query = jnp.asarray(query)
    batch = query.shape[:-3]
    query, key, value = (_four_axes(x) for x in (query, key, value))
    bias, mask = (None if x is None else _four_axes(x) for x in (bias, mask))
    lengths = [None if x is None else jnp.asarray(x) for x in (query_seq_lengths, key_value_seq_lengths)]
    spec_sdpa.check_jax(query, key, value, bias, mask, *lengths)
    window = spec_sdpa.check_window(local_window_size)

    dtype = value.dtype
    if scale is None:
        scale = spec_sdpa.default_scale(query.shape[-1])
    elif not isinstance(scale, numbers.Real):
        wide = jnp.promote_types(dtype, jnp.float32)
        query, key, value = query.astype(wide) * jnp.asarray(scale, wide), key.astype(wide), value.astype(wide)
        scale = 1.0
    b, t, h_q, d = query.shape
    call = SdpaCall(
        b=b, t=t, s=key.shape[1], h_q=h_q, h_kv=key.shape[2], d=d, e=value.shape[3], scale=float(scale),
        dtype=spec.dtype_name(query), causal=bool(is_causal), window=window,
        bias=None if bias is None else bias.shape, mask=None if mask is None else mask.shape,
        query_lengths=lengths[0] is not None, key_lengths=lengths[1] is not None,
    )  # fmt: skip
    plans = CHOICE.plans("dot_product_attention", call, implementation)
    operands = platforms.vary_alike(ops_sdpa.Operands(query, key, value, bias, mask, *lengths))

    out, lse = ops_sdpa.attention(plans, operands)
    out = out.astype(dtype).reshape(*batch, *out.shape[1:])
    if not return_residual:
        return out
    lse = lax.stop_gradient(jnp.where(lse == -jnp.inf, HIDDEN_SCORE, lse)).swapaxes(1, 2)
    return out, lse.astype(dtype).reshape(*batch, *lse.shape[1:])


def _four_axes(x: Any) -> Array:
    """An array of at most four axes with axes of size 1 put before them."""
    x = jnp.asarray(x)
    return jnp.expand_dims(x, tuple(range(4 - x.ndim))) if x.ndim < 4 else x
