"""Power attention on CPU threads: the C++ operators behind the interface every implementation has.

float32, bfloat16 and float16 are computed in float32, float64 in float64; y and norm come in that dtype. The attention
form has no state in C++: with one, the chunked form computes the same sums. The recurrent form is the recurrence for a
single token and the chunked form for more.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from bridge import spec
from torch_power import _library

_FORMS = {"attention": 0, "chunked": 1, "recurrent": 2, "auto": 3}  # PowerForm of csrc/abi.h


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why this implementation cannot serve the call."""
    del call
    if device != "cpu":
        return f"it runs on the CPU, the inputs are on {device}; implementation='cuda' or 'eager' would work"
    return _library.missing()


def plan(call: spec.PowerCall) -> spec.PowerCall:
    """Choose the form, where that was left open, by what the C++ operators spend, forward and backward together.

    Multiply-adds a token and query head: 7 products of depth 64 or so with half of t keys in the attention form, 7 with
    the state's D rows in the chunked one (both run at the same rate), which makes them equal near t = 4700 at d = e = 64,
    p = 2. The chunk length is left alone: C++ never holds more than 192 tokens of one.

    Gates can make the attention form the cheaper one at any length, since it leaves out what they made forgotten. Where the
    lengths alone speak for the chunked form, the choice stays open ("auto") until C++ has read the gates.
    """
    if not call.auto_form or call.has_state or call.return_state or call.form == "recurrent":
        return call
    if call.deg not in spec.POWER_TILE or call.d % spec.POWER_TILE[call.deg]:
        return call
    rows = spec.state_rows(call.d, call.deg)
    attention = 7 * (call.d + call.e) * call.t * call.t_kv * (0.25 if call.causal else 0.5)
    chunked = 7 * rows * (call.e + 1) * (call.t + call.t_kv) / 2
    if attention <= chunked:
        return dataclasses.replace(call, form="attention")
    return dataclasses.replace(call, form="auto" if call.has_gate else "chunked")


def forward(
    call: spec.PowerCall, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y `[b, t, h_q, e]` and norm `[b, t, h_q]` in the compute dtype, and the final state (None unless asked for)."""
    y, norm, s, z = torch.ops.torch_power.power_forward_cpp(
        *_operands(call, q, k, v, log_g, s0, z0), *_options(call), call.return_state
    )
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
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None)."""
    wide = getattr(torch, call.compute_dtype)
    arguments = (q, k, v, log_g, s0, z0)
    gradients = torch.ops.torch_power.power_backward_cpp(
        *_operands(call, *arguments), y, norm, *(x if x is None else x.to(wide) for x in (dy, ds, dz)), *_options(call)
    )
    return tuple(None if x is None else g.to(x.dtype) for x, g in zip(arguments, gradients, strict=True))


def _operands(call: spec.PowerCall, q: Tensor, k: Tensor, v: Tensor, *others: Tensor | None) -> list[Tensor | None]:
    """q, k, v in one dtype (their own when they agree, else the compute dtype), the others in the compute dtype."""
    wide = getattr(torch, call.compute_dtype)
    common = q.dtype if q.dtype == k.dtype == v.dtype else wide
    return [*(x.to(common) for x in (q, k, v)), *(x if x is None else x.to(wide) for x in others)]


def _options(call: spec.PowerCall) -> tuple[int, float, bool, bool, int, int]:
    stateful = call.has_state or call.return_state
    form = "auto" if call.auto_form else call.form  # `plan` left it open
    form = "chunked" if form in ("attention", "auto") and stateful else form
    return call.deg, call.scale, call.causal, call.normalize, _FORMS[form], call.chunk_size


if _library.missing() is None:

    @torch.library.register_fake("torch_power::power_forward_cpp")
    def _(q, k, v, log_g, s0, z0, deg, scale, causal, normalize, form, chunk_size, return_state):
        b, t, h_q, d = q.shape
        h_kv, e = v.shape[2:]
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        y, norm = q.new_empty(b, t, h_q, e, dtype=wide), q.new_empty(b, t, h_q, dtype=wide)
        if not return_state:
            return y, norm, norm.new_empty(0), norm.new_empty(0)
        rows = spec.state_rows(d, deg)
        return y, norm, norm.new_empty(b, h_kv, rows, e), norm.new_empty(b, h_kv, rows)

    @torch.library.register_fake("torch_power::power_backward_cpp")
    def _(q, k, v, log_g, s0, z0, y, norm, *_rest):
        arguments = (q, k, v, log_g, s0, z0)
        return tuple(norm.new_empty(0) if x is None else x.new_empty(x.shape) for x in arguments)
