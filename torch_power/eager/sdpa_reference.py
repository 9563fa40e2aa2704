"""Scaled dot-product attention by its formula, with all t · s weights in memory: what the other implementations must
equal."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge import spec_sdpa
from bridge.spec_sdpa import SdpaCall
from torch_power.eager import dropout
from torch_power.layout import rows_like


def supports(call: SdpaCall, device: str) -> str | None:
    """Any call on any device."""
    return None


def forward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `torch_power.eager.sdpa.forward`."""
    scores = _scores(call, q, k, bias, mask)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - _finite(lse))
    out = (weights * _gains(call, seed, weights)) @ _per_query_head(call, v)
    return rows_like(q, call.e, out.dtype).copy_(out), lse


def backward(
    call: SdpaCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """As `torch_power.eager.sdpa.backward`."""
    q_wide, k_wide, v_wide, dout = (
        q.to(lse.dtype),
        _per_query_head(call, k),
        _per_query_head(call, v),
        dout.to(lse.dtype),
    )
    weights = torch.exp(_scores(call, q, k, bias, mask) - _finite(lse))
    gains = _gains(call, seed, weights)
    dweights = (dout @ v_wide.mT) * gains
    dscores = weights * (dweights - (dout * out).sum(-1, keepdim=True))
    dq = call.scale * dscores @ k_wide
    dk = call.scale * dscores.mT @ q_wide
    dv = (weights * gains).mT @ dout
    dk, dv = (x.unflatten(1, (call.h_kv, call.group)).sum(2) if call.group != 1 else x for x in (dk, dv))
    dbias = dscores.sum_to_size(bias.shape).to(bias.dtype) if call.bias_grad else None
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dbias


def _scores(call: SdpaCall, q: Tensor, k: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """scale · q kᵀ + bias `[b, h_q, t, s]`, −∞ where a key is hidden."""
    scores = (q.to(getattr(torch, call.compute_dtype)) * call.scale) @ _per_query_head(call, k).mT
    if bias is not None:
        scores = scores + bias
    if mask is not None:
        scores = scores.masked_fill(mask.logical_not(), -torch.inf)
    ahead = torch.arange(call.s, device=q.device) - torch.arange(call.t, device=q.device)[:, None]
    if call.causal:
        scores = scores.masked_fill(ahead > 0, -torch.inf)
    if call.window is not None:
        scores = scores.masked_fill((ahead < -call.window[0]) | (ahead > call.window[1]), -torch.inf)
    return scores


def _per_query_head(call: SdpaCall, x: Tensor) -> Tensor:
    return x.to(getattr(torch, call.compute_dtype)).repeat_interleave(call.group, 1)


def _finite(lse: Tensor) -> Tensor:
    """The log-sum-exp `[..., 1]`, +∞ in rows that saw no key, so that their weights are 0."""
    return torch.where(lse == -torch.inf, torch.inf, lse)[..., None]


def _gains(call: SdpaCall, seed: Tensor | None, weights: Tensor) -> Tensor | float:
    if seed is None:
        return 1.0
    kept = dropout.keep(seed, slice(0, call.h_q), slice(0, call.t), slice(0, call.s), call.dropout_p)
    return kept.to(weights.dtype) * spec_sdpa.dropout_gain(call.dropout_p)
