"""Power attention on Hopper GPUs: the CUDA kernels behind the interface every implementation has.

The attention form is `torch_power.cuda.attention`; here is the chunked form (degree 2); the choice between them is
`bridge.hopper.plan`.
Arithmetic is float16 products with float32 sums on operands scaled by powers of two (csrc/power/chunked_layout.cuh), so
bfloat16 inputs lose nothing on the way in.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bridge import hopper, spec
from torch_power.cuda import attention, library

# Whether the chunked form's states are kept from the forward to the backward pass when a gradient will be wanted: 2·D·e bytes a
# chunk and head (at b = 1, t = 65536, h = 8, d = 64: 217 MB). False: the backward pass works them out again, to the same bits.
KEEP_STATES = True


plan = hopper.plan


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    if hopper.in_attention_form(call):
        return attention.supports(call, device)
    return hopper.chunked_lacks(call, device) or library.missing()


def saved_bytes(call: spec.PowerCall) -> int:
    """Size of the buffer `saved` of forward and backward; 0 where nothing is kept."""
    if hopper.in_attention_form(call):
        return 0
    return library.saved_bytes(call) if KEEP_STATES and not _empty(call) else 0


def forward(
    call: spec.PowerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y `[b, t, h_q, e]` in the dtype of v, norm `[b, t, h_q]` float32, and the final state (None unless asked for).

    A call with a state, and one of form 'recurrent', is served by the chunked kernels whatever the form: the sums are the same.
    `saved`, `saved_bytes(call)` long, takes what the backward pass would otherwise work out again.
    """
    if hopper.in_attention_form(call):
        return attention.forward(call, q, k, v, log_g, s0, z0)
    if _empty(call):
        y, norm = v.new_empty(call.b, call.t, call.h_q, call.e), _zeros(q, call.b, call.t, call.h_q)
        if not call.return_state:
            return y, norm, None, None
        s, z = _zeros(q, call.b, call.h_kv, call.rows, call.e), _zeros(q, call.b, call.h_kv, call.rows)
        return y, norm, s if s0 is None else s.copy_(s0), z if z0 is None else z.copy_(z0)
    arrays = _scaled(call, q), k, v, log_g, _contiguous(s0), _contiguous(z0), saved
    y, norm, s, z = library.operator("power_forward")(*arrays, *library.options(call, "chunked"), call.return_state)
    return (y, norm, s, z) if call.return_state else (y, norm, None, None)


def backward(
    call: spec.PowerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    y: Tensor,
    norm: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    dz: Tensor | None,
    saved: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None).

    Without `saved`, states are worked out again. Every sum has one order: two runs, with `saved` or without, give equal bits.
    """
    if hopper.in_attention_form(call):
        return attention.backward(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz)
    arguments = q, k, v, log_g, s0, z0
    if _empty(call):
        gradients: list[Any] = [None if x is None else x.new_zeros(x.shape) for x in arguments]
        for dx, source in zip(gradients[4:], (ds, dz), strict=True):
            if dx is not None and source is not None:
                dx.copy_(source)
        return tuple(gradients)
    arrays = _scaled(call, q), k, v, log_g, _contiguous(s0), _contiguous(z0), y, norm.contiguous(), saved, dy.to(v.dtype)
    options = library.options(call, "chunked")
    found = library.operator("power_backward")(*arrays, _contiguous(ds), _contiguous(dz), *options)
    dq, dk, dv, *optional = (None if x is None else dx for x, dx in zip(arguments, found, strict=True))
    return dq, dk, dv, *optional


def _zeros(like: Tensor, *size: int) -> Tensor:
    return like.new_zeros(size, dtype=torch.float32)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _empty(call: spec.PowerCall) -> bool:
    return 0 in (call.b, call.t, call.h_q, call.d, call.e)


def _scaled(call: spec.PowerCall, q: Tensor) -> Tensor:
    """q, or zeros for scale = 0, which a normalised row would otherwise not notice."""
    return q if call.scale else torch.zeros_like(q)
