"""Scaled dot-product attention for PyTorch: signature, meaning, argument checks and the choice of an implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, overload

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.attention.bias import CausalBias, CausalVariant

from bridge import spec_sdpa
from torch_power import ops_sdpa
from torch_power.calls import Signature, autocast_anywhere, remembered, signatures, transforms_active
from torch_power.choice import CHOICE, autocast_available
from torch_power.layout import heads_last


@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: Literal[False] = False,
) -> Tensor: ...
@overload
def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: Literal[True],
) -> tuple[Tensor, Tensor]: ...
def scaled_dot_product_attention(
    query: Float[Tensor, "*b h_q t d"],
    key: Float[Tensor, "*b h_kv s d"],
    value: Float[Tensor, "*b h_kv s e"],
    attn_mask: Bool[Tensor, "..."] | Float[Tensor, "..."] | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    *,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: str | Sequence[str] | None = None,
    return_residual: bool = False,
) -> Float[Tensor, "*b h_q t e"] | tuple[Float[Tensor, "*b h_q t e"], Float[Tensor, "*b h_q t"]]:
    """Softmax attention with the arguments and the meaning of `torch.nn.functional.scaled_dot_product_attention`.

        S_ij = scale · <q_i, k_j> + bias_ij,        P_i· = softmax over the keys that i may see,        y_i = Σ_j P_ij
        v_j

    Every implementation but "reference" works in blocks and keeps memory linear in t and s, forward and backward (Dao
    et al., "FlashAttention", 2022): the backward pass gets q, k, v, y and the log-sum-exp of each row, and makes P
    again.

    Args:
      query: two axes or more. Leading axes of the operands broadcast; the head axis may be absent.
      key: `[..., s, d]`.
      value: `[..., s, e]`, e ≠ d allowed.
      attn_mask: bool, False hides a key, or floating (float32 or query's dtype) and added to the scores. Any shape that
        broadcasts to the scores' `[..., h_q, t, s]`. A floating one has a gradient. Or a `CausalBias` of
        `torch.nn.attention.bias`.
      dropout_p: probability that a weight P_ij is set to 0; those kept are divided by 1 − p. Applied whenever it is
        above 0. Its bits come from PyTorch's generator (one seed for each batch element) and are made again, not kept,
        for the backward pass.
      is_causal: query i sees keys 0 … i, whatever t and s are. Not together with `attn_mask`.
      scale: any number, 0 and negatives too; 1/sqrt(d) for None.
      enable_gqa: query head i reads key head `i // (h_q // h_kv)`, and values likewise.
      local_window_size: (left, right), or one number for both: query i sees keys i − left … i + right. Causality from
        the lower right is (t, s − t).
      implementation: name of one, or several in order of preference; None for the fastest that supports the call, or
        for what `torch_power.implementation` has set.
      return_residual: also return the log-sum-exp of every row of scores, without a gradient.
    Returns:
      y in the dtype of the operands; with `return_residual`, also lse `[..., h_q, t]`, float32 (float64 for float64). A
      query that sees no key has y = 0 and gradient 0, and lse −∞.
    Raises:
      RuntimeError, TypeError, IndexError: as PyTorch's function, for arguments that it refuses.
      ValueError: `local_window_size` is no integer or pair of them; `implementation` is not a name in this operation's
        table.
      NotImplementedError: an implementation asked for lacks something this call needs, or the dtype is not floating.
    """
    spec_sdpa.check_torch_kinds(Tensor, query, key, value, attn_mask, is_causal, enable_gqa)
    dropout_p = spec_sdpa.check_torch_number(Tensor, "dropout_p", dropout_p)
    if scale is not None:
        scale = spec_sdpa.check_torch_number(Tensor, "scale", scale)
    window = None if local_window_size is None else spec_sdpa.check_window(local_window_size)
    if isinstance(attn_mask, CausalBias):
        window = _causal_window(attn_mask, query, key, is_causal, window)
        attn_mask = None
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    bias_grad = attn_mask is not None and attn_mask.requires_grad
    asked = CHOICE.in_force() if implementation is None else implementation
    options = dropout_p, is_causal, window, scale, enable_gqa, bias_grad, asked
    plan = _plan(*signatures(query, key, value, attn_mask), *options)

    q, k, v = query, key, value
    if not plan.whole:
        q, k, v = (_four_axes(x, plan.batch, h) for x, h in zip((q, k, v), plan.heads, strict=True))
    bias = mask = None
    if attn_mask is not None:
        operand = attn_mask.expand(plan.mask or ()).flatten(0, -4)
        bias, mask = (None, operand) if attn_mask.dtype == torch.bool else (operand, None)
    seed = torch.randint(2**63 - 1, (q.shape[0],), device=q.device) if dropout_p > 0 else None
    training = (q.requires_grad or k.requires_grad or v.requires_grad or bias_grad) and torch.is_grad_enabled()
    call = plan.call
    run_options = call.causal, call.window, call.scale, dropout_p, plan.implementation
    if training and not return_residual and not transforms_active():
        out = ops_sdpa.SdpaRecorded.apply(q, k, v, bias, mask, seed, run_options)
    else:
        run = ops_sdpa.Sdpa.apply if training or transforms_active() else ops_sdpa.Sdpa.forward
        out, lse, _ = run(q, k, v, bias, mask, seed, *run_options, training)
    out = out if out.dtype == value.dtype else out.to(value.dtype)
    out = out if len(plan.leading) == 2 else out.reshape(*plan.leading, *out.shape[2:])
    # As PyTorch's function does, keep queries stored [b, t, h, d] in that order: heads then merge without a copy.
    out = out if out.is_contiguous() or query.ndim == 4 and heads_last(query) else out.contiguous()
    return (out, lse.reshape(*plan.leading, lse.shape[2])) if return_residual else out


def _causal_window(
    bias: CausalBias, query: Tensor, key: Tensor, is_causal: bool, window: tuple[int, int] | None
) -> tuple[int, int]:
    """The window that `bias` and `window` leave together."""
    if is_causal:
        raise ValueError("CausalBias should not be used with causal=True")
    t, s = bias.seq_len_q, bias.seq_len_kv
    if (t, s) != (query.shape[-2], key.shape[-2]):
        raise RuntimeError(f"attn_mask: a CausalBias of {t} queries and {s} keys, for {query.shape[-2]} and {key.shape[-2]}")
    left, right = (t, s) if window is None else window
    return left, min(right, s - t if bias.variant == CausalVariant.LOWER_RIGHT else 0)


def _autocast(*arrays: Any) -> tuple[Any, ...]:
    """Under `torch.autocast`, floating tensors but float64 in the autocast dtype, as for PyTorch's own function."""
    if not autocast_anywhere():
        return arrays
    device = arrays[0].device.type
    if not autocast_available(device) or not torch.is_autocast_enabled(device):
        return arrays
    dtype = torch.get_autocast_dtype(device)
    kept = [x is None or not x.is_floating_point() or x.dtype == torch.float64 for x in arrays]
    return tuple([x if keep else x.to(dtype) for x, keep in zip(arrays, kept, strict=True)])


class _Plan(NamedTuple):
    """What the signature of a call decides: who serves it, and how its operands become four axes.

    Axes before the heads are made equal (`batch`) and merged into one; heads of q, k and v are left as few as the broadcast
    allows, since every implementation lets several query heads read one key-value head. `whole`: q, k and v have four axes as
    they are, as nearly always; views that change nothing cost 3 µs each. `mask` is the mask's shape before that merge, axes
    of size 1 where it broadcasts; `leading` are the result's axes before time.
    """

    call: spec_sdpa.SdpaCall
    implementation: str
    batch: tuple[int, ...]
    heads: tuple[int, int, int]
    whole: bool
    mask: tuple[int, ...] | None
    leading: tuple[int, ...]


@remembered
def _plan(
    query: Any, key: Any, value: Any, attn_mask: Any, dropout_p: float, is_causal: bool, window: tuple[int, int] | None,
    scale: float | None, enable_gqa: bool, bias_grad: bool, asked: str | Sequence[str] | None,
) -> _Plan:  # fmt: skip
    """Check the call and choose who serves it; of the operands, only shape, dtype and device are looked at."""
    spec_sdpa.check_torch(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)
    shapes = [(1,) * (3 - len(x.shape)) + tuple(x.shape) for x in (query, key, value)]
    batch = spec_sdpa.broadcast_shapes(spec_sdpa.broadcast_shapes(shapes[0][:-3], shapes[1][:-3]), shapes[2][:-3])
    h_q, h_k, h_v = (shape[-3] for shape in shapes)
    if enable_gqa:
        h_kv = h_k if h_k == h_v else math.lcm(h_k, h_v)
    else:
        h_q = next((h for h in (h_q, h_k, h_v) if h != 1), 1)
        h_kv = 1 if h_k == h_v == 1 and h_q > 0 else h_q
    ranks = max(len(x.shape) for x in (query, key, value))
    leading = (*batch, h_q)[-(ranks - 2) :] if ranks > 2 else ()

    mask = None
    if attn_mask is not None:
        mask = (1,) * (max(ranks, 4) - len(attn_mask.shape)) + tuple(attn_mask.shape)
        if ranks > 4 and math.prod(mask[:-3]) != 1:
            mask = (*batch, *mask[-3:])
    q, k, v = (
        Signature((math.prod(batch), h, *shape[-2:]), query.dtype, query.device)
        for h, shape in zip((h_q, h_kv, h_kv), shapes, strict=True)
    )
    operand = None if mask is None else Signature((math.prod(mask[:-3]), *mask[-3:]), attn_mask.dtype, attn_mask.device)
    bias, mask_operand = (None, operand) if operand is None or operand.dtype == torch.bool else (operand, None)
    causal, window = spec_sdpa.plain_band(is_causal, window, query.shape[-2], key.shape[-2])
    call = ops_sdpa.make_call(
        q, k, v, bias, mask_operand, causal=causal, window=window, dropout_p=dropout_p,
        bias_grad=bias is not None and bias_grad, scale=spec_sdpa.default_scale(query.shape[-1]) if scale is None else scale,
    )  # fmt: skip
    name = CHOICE.choose("scaled_dot_product_attention", call, asked, query.device.type)
    whole = all(tuple(x.shape) == four.shape for x, four in zip((query, key, value), (q, k, v), strict=True))
    return _Plan(call, name, batch, (h_q, h_kv, h_kv), whole, mask, leading)


def _four_axes(x: Tensor, batch: tuple[int, ...], heads: int) -> Tensor:
    """An operand as `[b, heads, length, size]`."""
    shape = (math.prod(batch), heads, *x.shape[-2:])
    x = x if x.ndim > 2 else x.unsqueeze(0)
    # Only grouped-query calls whose keys and values differ in heads, both more than one, have anything to repeat.
    x = x if x.shape[-3] in (1, heads) else x.repeat_interleave(heads // x.shape[-3], -3)
    return x.expand(*batch, heads, *x.shape[-2:]).reshape(shape)
