"""Power attention as PyTorch operators: schemas, fakes, vmap and autograd around the table of implementations.

Two raw operators, forward and backward, take the implementation's name, so that `torch.compile` and `torch.export` see one
node whatever runs inside. They know no autograd (an operator with `register_autograd`, or a `custom_op`, fails under
`torch.func`): `PowerAttention` ties them together for backward, `torch.func`, vmap and compilation.

A raw operator cannot return None: where a result is absent, it returns a tensor of shape [0].
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bridge import spec
from torch_power import cpp, cuda, eager
from torch_power.calls import Function, native, operator, remembered, signatures, without_autocast, without_zeros

# Best first: the first that supports a call serves it unless one is named.
POWER: dict[str, spec.Implementation] = {
    "cuda": spec.Implementation(
        cuda.power.forward, cuda.power.backward, cuda.power.supports, cuda.power.plan, False, cuda.power.saved_bytes
    ),  # fmt: skip
    "cpp": spec.Implementation(cpp.power.forward, cpp.power.backward, cpp.power.supports, cpp.power.plan),
    "eager": spec.Implementation(eager.power.forward, eager.power.backward, eager.power.supports),
}


@remembered
def _checked(
    q: Any, k: Any, v: Any, log_g: Any, state: Any, deg: Any, scale: Any, causal: Any, normalize: Any, form: Any,
    chunk_size: Any, return_state: Any,
) -> spec.PowerCall:  # fmt: skip
    return spec.check_power(
        q, k, v, log_g, deg=deg, scale=scale, causal=causal, normalize=normalize, form=form, chunk_size=chunk_size,
        initial_state=state, return_state=return_state,
    )  # fmt: skip


def check(q: Any, k: Any, v: Any, log_g: Any, state: Any, *options: Any) -> spec.PowerCall:
    """`spec.check_power` of the arguments deg, scale, causal, normalize, form, chunk_size and return_state, in this order."""
    state = signatures(*state) if isinstance(state, tuple) else state
    return _checked(*signatures(q, k, v, log_g), state, *options)


def _call(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s0: Tensor | None, z0: Tensor | None, options: Sequence[Any]
) -> tuple[spec.PowerCall, spec.Implementation]:
    """Rebuild the checked call from an operator's arguments (already checked, so this raises nothing)."""
    *numbers, implementation, _ = options
    return check(q, k, v, log_g, None if s0 is None else (s0, z0), *numbers), POWER[implementation]


def _present(x: Tensor | None, like: Tensor) -> Tensor:
    return like.new_empty(0) if x is None else x


def _buffer(saved: Tensor) -> dict[str, Tensor]:
    return {"saved": saved} if saved.numel() else {}


@operator("power_attention")
def power_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    deg: int,
    scale: float,
    causal: bool,
    normalize: bool,
    form: str,
    chunk_size: int,
    return_state: bool,
    implementation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y, norm, saved, s, z of a checked call; saved has shape [0] unless `save`, s and z unless `return_state`."""
    options = deg, scale, causal, normalize, form, chunk_size, return_state, implementation, save
    call, chosen = _call(q, k, v, log_g, s0, z0, options)
    saved = q.new_empty(chosen.saved_bytes(call) if save else 0, dtype=torch.uint8)
    with without_autocast(q.device):
        y, norm, s, z = chosen.forward(call, q, k, v, log_g, s0, z0, **_buffer(saved))
    return y, norm, saved, _present(s, norm), _present(z, norm)


def _fake(q, k, v, log_g, s0, z0, *options):
    # No size depends on the chunk length, which is symbolic where t is.
    call, chosen = _call(q, k, v, log_g, s0, z0, (*options[:5], 1, *options[6:]))
    wide = getattr(torch, call.compute_dtype)
    y = q.new_empty(call.b, call.t, call.h_q, call.e, dtype=wide if chosen.wide_output else v.dtype)
    norm = q.new_empty(call.b, call.t, call.h_q, dtype=wide)
    saved = q.new_empty(chosen.saved_bytes(call) if options[-1] else 0, dtype=torch.uint8)
    if not call.return_state:
        return y, norm, saved, norm.new_empty(0), norm.new_empty(0)
    return y, norm, saved, norm.new_empty(call.b, call.h_kv, call.rows, call.e), norm.new_empty(call.b, call.h_kv, call.rows)


@operator("power_attention_backward")
def power_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    y: Tensor,
    norm: Tensor,
    saved: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    dz: Tensor | None,
    deg: int,
    scale: float,
    causal: bool,
    normalize: bool,
    form: str,
    chunk_size: int,
    return_state: bool,
    implementation: str,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, dlog_g, ds0, dz0 of a checked call; those of absent arguments have shape [0]."""
    options = deg, scale, causal, normalize, form, chunk_size, return_state, implementation, save
    call, chosen = _call(q, k, v, log_g, s0, z0, options)
    with without_autocast(q.device):
        dq, dk, dv, *optional = chosen.backward(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz, **_buffer(saved))
    return dq, dk, dv, *(_present(x, norm) for x in optional)


def _fake_backward(q, k, v, log_g, s0, z0, y, norm, saved, dy, ds, dz, *options):
    def like(x: Tensor | None) -> Tensor:
        return norm.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)

    return tuple(like(x) for x in (q, k, v, log_g, s0, z0))


def _fold_batch(operator: Any) -> Callable[..., Any]:
    """vmap by folding the mapped axis into the batch, where every implementation is already parallel.

    The buffer `saved` is of the folded call and has no mapped axis. A gradient that is mapped although its forward pass was not
    has none that fits.
    """

    def rule(info, in_dims, *args):
        def fold(x, axis):
            if not isinstance(x, Tensor):
                return x
            if x.dtype == torch.uint8:
                return x if any(axis is not None for axis in in_dims[:6]) else x[:0]
            x = x.unsqueeze(0).expand(info.batch_size, *x.shape) if axis is None else x.movedim(axis, 0)
            return x.flatten(0, 1)

        outputs = operator(*map(fold, args, in_dims))
        batch = args[0].shape[0 if in_dims[0] is None else (1 if in_dims[0] == 0 else 0)]
        unfolded = tuple(x if x.ndim == 1 else x.unflatten(0, (info.batch_size, batch)) for x in outputs)
        return unfolded, tuple(None if x.ndim == 1 else 0 for x in outputs)

    return rule


torch.library.register_fake("torch_power::power_attention", _fake)
torch.library.register_fake("torch_power::power_attention_backward", _fake_backward)
torch.library.register_vmap("torch_power::power_attention", _fold_batch(power_attention))
torch.library.register_vmap("torch_power::power_attention_backward", _fold_batch(power_attention_backward))

# Implementations with raw operators of their own, in C++: nothing in Python between autograd and the kernels.
FORWARD = {"cuda": native("power_attention_cuda", power_attention, _fake, _fold_batch)}
BACKWARD = {"cuda": native("power_attention_gradient_cuda", power_attention_backward, _fake_backward, _fold_batch)}


class PowerAttentionBackward(Function):
    """The gradient, which has no gradient of its own."""

    @staticmethod
    def forward(*args):
        return BACKWARD.get(args[-2], power_attention_backward)(*args)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError("power_attention: second derivatives are not implemented; use jax_power, or first ones")


class PowerAttention(Function):
    """Autograd of the two raw operators. y comes in the precision it was computed in; the caller rounds it to v's dtype."""

    # Every argument by name: torch.compile counts them to tell this signature from one that takes a context.
    @staticmethod
    def forward(
        q, k, v, log_g, s0, z0, deg, scale, causal, normalize, form, chunk_size, return_state, implementation, save
    ):  # fmt: skip
        save = save and cuda.power.KEEP_STATES
        return FORWARD.get(implementation, power_attention)(
            q, k, v, log_g, s0, z0, deg, scale, causal, normalize, form, chunk_size, return_state, implementation, save
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.options, ctx.return_state = inputs[6:], inputs[12]
        y, norm, saved, s, z = output
        ctx.mark_non_differentiable(norm, saved, *(() if ctx.return_state else (s, z)))
        ctx.save_for_backward(*inputs[:6], y, norm, saved)
        without_zeros(ctx)

    @staticmethod
    def backward(ctx, dy, _norm, _saved, ds, dz):
        arrays = ctx.saved_tensors
        dy = torch.zeros_like(arrays[6]) if dy is None else dy
        if ctx.return_state and (ds is None) != (dz is None):  # one part of the state is used: zeros for the other
            ds = dz.new_zeros(*dz.shape, arrays[2].shape[-1]) if ds is None else ds
            dz = ds.new_zeros(ds.shape[:-1]) if dz is None else dz
        dstate = (ds, dz) if ctx.return_state else (None, None)
        # Without a graph (`create_graph`, torch.func) there is no second derivative to refuse. torch.compile has none, and
        # cannot trace a Function inside another's backward.
        twice = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        differentiate = PowerAttentionBackward.apply if twice else PowerAttentionBackward.forward
        grads = differentiate(*arrays, dy, *dstate, *ctx.options)
        present = (None if x is None else dx for x, dx in zip(arrays[:6], grads, strict=True))
        return *present, *[None] * len(ctx.options)
