"""Scaled dot-product attention for PyTorch: signature, meaning, argument checks and the choice of an implementation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridge import spec_sdpa
from torch_power import ops_sdpa
from torch_power.choice import CHOICE, autocast_available


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
    implementation: str | Sequence[str] | None = None,
) -> Float[Tensor, "*b h_q t e"]:
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
        broadcasts to the scores' `[..., h_q, t, s]`. A floating one has a gradient.
      dropout_p: probability that a weight P_ij is set to 0; those kept are divided by 1 − p. Applied whenever it is
        above 0. Its bits come from PyTorch's generator (one seed for each batch element) and are made again, not kept,
        for the backward pass.
      is_causal: query i sees keys 0 … i, whatever t and s are. Not together with `attn_mask`.
      scale: any number, 0 and negatives too; 1/sqrt(d) for None.
      enable_gqa: query head i reads key head `i // (h_q // h_kv)`, and values likewise.
      implementation: name of one, or several in order of preference; None for the fastest that supports the call, or
        for what `torch_power.implementation` has set.
    Returns:
      y in the dtype of the operands. A query that sees no key has y = 0, and gradient 0.
    Raises:
      RuntimeError, TypeError, IndexError: as PyTorch's function, for arguments that it refuses.
      ValueError: `implementation` is not a name in this operation's table.
      NotImplementedError: an implementation asked for lacks something this call needs, or the dtype is not floating.
    """
    spec_sdpa.check_torch_kinds(Tensor, query, key, value, attn_mask, is_causal, enable_gqa)
    dropout_p = spec_sdpa.check_torch_number(Tensor, "dropout_p", dropout_p)
    if scale is not None:
        scale = spec_sdpa.check_torch_number(Tensor, "scale", scale)
    query, key, value, attn_mask = _autocast(query, key, value, attn_mask)
    spec_sdpa.check_torch(query, key, value, attn_mask, dropout_p, is_causal, enable_gqa)

    q, k, v, leading = _four_axes(query, key, value, enable_gqa)
    bias = mask = None
    if attn_mask is not None:
        operand = _four_axes_mask(attn_mask, leading)
        bias, mask = (None, operand) if attn_mask.dtype == torch.bool else (operand, None)
    scale = spec_sdpa.default_scale(q.shape[-1]) if scale is None else scale
    bias_grad = bias is not None and bias.requires_grad
    call = ops_sdpa.make_call(q, k, v, bias, mask, causal=is_causal, scale=scale, dropout_p=dropout_p, bias_grad=bias_grad)
    name = CHOICE.choose("scaled_dot_product_attention", call, implementation, query.device.type)

    seed = torch.randint(2**63 - 1, (q.shape[0],), device=q.device) if dropout_p > 0 else None
    training = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, bias))
    out, *_ = ops_sdpa.Sdpa.apply(q, k, v, bias, mask, seed, is_causal, scale, dropout_p, name, training)
    out = out.to(value.dtype).reshape(*leading, *out.shape[2:])
    # As PyTorch's function does, keep queries stored [b, t, h, d] in that order: heads then merge without a copy.
    heads_last = query.ndim == 4 and query.stride(1) < query.stride(2)
    return out if heads_last else out.contiguous()


def _autocast(*arrays: Any) -> list[Any]:
    """Under `torch.autocast`, floating tensors but float64 in the autocast dtype, as for PyTorch's own function."""
    device = arrays[0].device.type
    if not autocast_available(device) or not torch.is_autocast_enabled(device):
        return list(arrays)
    dtype = torch.get_autocast_dtype(device)
    return [x if x is None or not x.is_floating_point() or x.dtype == torch.float64 else x.to(dtype) for x in arrays]


def _four_axes(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor, tuple[int, ...]]:
    """q, k, v as `[b, heads, length, size]`, k and v with as many heads as each other, and the result's leading axes.

    Axes before the heads are made equal and merged into one; heads are left as few as the broadcast allows, since every
    implementation lets several query heads read one key-value head.
    """
    operands = [x if x.ndim > 2 else x.unsqueeze(0) for x in (query, key, value)]
    heads = [x.shape[-3] for x in operands]
    batch = spec_sdpa.broadcast_shapes(
        spec_sdpa.broadcast_shapes(operands[0].shape[:-3], operands[1].shape[:-3]), operands[2].shape[:-3]
    )
    h_q = heads[0] if enable_gqa else next((h for h in heads if h != 1), 1)
    if enable_gqa:
        h_kv = heads[1] if heads[1] == heads[2] else math.lcm(heads[1], heads[2])
    else:
        h_kv = 1 if heads[1:] == [1, 1] and h_q > 0 else h_q
    wanted = (h_q, h_kv, h_kv)
    # Only grouped-query calls whose keys and values differ in heads, both more than one, have anything to repeat.
    operands = [
        x if x.shape[-3] in (1, h) else x.repeat_interleave(h // x.shape[-3], -3) for x, h in zip(operands, wanted, strict=True)
    ]
    q, k, v = (
        x.expand(*batch, h, *x.shape[-2:]).reshape(math.prod(batch), h, *x.shape[-2:])
        for x, h in zip(operands, wanted, strict=True)
    )
    ranks = max(query.ndim, key.ndim, value.ndim)
    return q, k, v, (*batch, h_q)[-(ranks - 2) :] if ranks > 2 else ()


def _four_axes_mask(mask: Tensor, leading: tuple[int, ...]) -> Tensor:
    """A mask as `[b, h_q, t, s]`, axes of size 1 kept where they broadcast."""
    rank = max(len(leading), 2) + 2
    mask = mask.reshape((1,) * (rank - mask.ndim) + tuple(mask.shape))
    if rank == 4:
        return mask
    if math.prod(mask.shape[:-3]) == 1:
        return mask.flatten(0, -4)
    return mask.expand(*leading[:-1], *mask.shape[-3:]).flatten(0, -4)
