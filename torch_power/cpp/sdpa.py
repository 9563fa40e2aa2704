"""Scaled dot-product attention on CPU threads: the C++ operators behind the interface every implementation has."""

from __future__ import annotations

import torch
from torch import Tensor

from bridge.spec_sdpa import SdpaCall
from torch_power import _library
from torch_power.layout import rows_like


def supports(call: SdpaCall, device: str) -> str | None:
    """None, or why this implementation cannot serve the call."""
    if device != "cpu":
        return f"it runs on the CPU, the inputs are on {device}; implementation='eager' would work"
    if call.window is not None or call.query_lengths or call.key_lengths:
        return "windows and sequence lengths are not served; a mask says the same"
    if call.d == 0 or call.h_q == 0 or call.h_kv == 0:
        return f"head size d={call.d}, h_q={call.h_q}, h_kv={call.h_kv}: at least 1 of each is needed"
    return _library.missing()


def forward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """out `[b, h_q, t, e]` in the compute dtype, stored as q is, and every row's log-sum-exp `[b, h_q, t]`."""
    options = call.causal, call.scale, call.dropout_p
    return torch.ops.torch_power.sdpa_forward_cpp(q, k, v, _wide(call, bias), mask, seed, *options)


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
    """Gradients of q, k, v and, if `call.bias_grad`, of bias, in the dtypes of those arguments."""
    options = call.causal, call.scale, call.dropout_p, call.bias_grad
    dq, dk, dv, dbias = torch.ops.torch_power.sdpa_backward_cpp(
        q, k, v, _wide(call, bias), mask, seed, out, lse, _wide(call, dout), *options
    )
    return dq, dk, dv, dbias.to(bias.dtype) if bias is not None and call.bias_grad else None


def _wide(call: SdpaCall, x: Tensor | None) -> Tensor | None:
    return x if x is None else x.to(getattr(torch, call.compute_dtype))


if _library.missing() is None:

    @torch.library.register_fake("torch_power::sdpa_forward_cpp")
    def _(q, k, v, *_rest):
        b, h_q, t, _ = q.shape
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        return rows_like(q, v.shape[3], wide), q.new_empty(b, h_q, t, dtype=wide)

    @torch.library.register_fake("torch_power::sdpa_backward_cpp")
    def _(q, k, v, bias, mask, seed, out, lse, dout, causal, scale, dropout_p, bias_grad):
        dbias = bias.new_empty(bias.shape) if bias_grad else lse.new_empty(0)
        return *(x.new_empty(x.shape) for x in (q, k, v)), dbias
