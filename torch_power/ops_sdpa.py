"""Scaled dot-product attention as PyTorch operators: schemas, fakes, vmap and autograd around the table of
implementations.

Two raw operators, forward and backward, take the implementation's name, so that `torch.compile` and `torch.export` see
one node whatever runs inside. `Sdpa` ties them together for autograd and `torch.func`. Operands have four axes, head
before time: q `[b, h_q, t, d]`, k `[b, h_kv, s, d]`, v `[b, h_kv, s, e]`, bias and mask `[b, h_q, t, s]` with axes of
size 1 where they broadcast, seed `[b]` (one for each batch element, so that vmap may fold its axis into the batch and
keep every element's bits).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bridge import spec
from bridge.spec_sdpa import SdpaCall
from torch_power import cpp, cuda
from torch_power.calls import Function, native, operator, remembered, signatures, without_autocast, without_zeros
from torch_power.eager import sdpa, sdpa_reference
from torch_power.layout import rows_like

# Best first: the first that supports a call serves it unless one is named.
SDPA: dict[str, spec.Implementation] = {
    "cuda": spec.Implementation(cuda.sdpa.forward, cuda.sdpa.backward, cuda.sdpa.supports, wide_output=False, residual=True),
    "cpp": spec.Implementation(cpp.sdpa.forward, cpp.sdpa.backward, cpp.sdpa.supports),
    "eager": spec.Implementation(sdpa.forward, sdpa.backward, sdpa.supports),
    "reference": spec.Implementation(sdpa_reference.forward, sdpa_reference.backward, sdpa_reference.supports),
}


@remembered
def _call(
    q: Any, k: Any, v: Any, bias: Any, mask: Any, causal: bool, window: tuple[int, int] | None, scale: float,
    dropout_p: float, bias_grad: bool,
) -> SdpaCall:  # fmt: skip
    b, h_q, t, d = q.shape
    shapes = [None if x is None else tuple(x.shape) for x in (bias, mask)]
    return SdpaCall(
        b=b, t=t, s=k.shape[2], h_q=h_q, h_kv=k.shape[1], d=d, e=v.shape[3], scale=scale, dtype=spec.dtype_name(q),
        causal=causal, window=window, bias=shapes[0], mask=shapes[1], bias_grad=bias_grad, dropout_p=dropout_p,
    )  # fmt: skip


def make_call(
    q: Any, k: Any, v: Any, bias: Any, mask: Any, *, causal: bool, scale: float, dropout_p: float, bias_grad: bool,
    window: Sequence[int] | None = None,
) -> SdpaCall:  # fmt: skip
    """The call that checked four-dimensional operands make: tensors, or their signatures."""
    pair = None if window is None else (window[0], window[1])
    return _call(*signatures(q, k, v, bias, mask), causal, pair, scale, dropout_p, bias_grad)


@operator("sdpa")
def sdpa_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: Sequence[int] | None,
    scale: float,
    dropout_p: float,
    implementation: str,
    residual: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """out `[b, h_q, t, e]`, stored as q is (`heads_last`), the log-sum-exp of every row `[b, h_q, t]`, and eight more digits of
    out, bytes stored like it, if `residual` asks for them and the implementation has them, else a tensor of shape [0].

    dout·out, which the backward pass needs, is too coarse from a rounded out where softmax is concentrated: bfloat16 q and
    k of standard deviation 8 have errors of 7e-3 in dq and dk, and 2e-3 with the residual.
    """
    options: Any = {"causal": causal, "window": window, "scale": scale, "dropout_p": dropout_p}
    call = make_call(q, k, v, bias, mask, **options, bias_grad=False)
    with without_autocast(q.device):
        if residual and SDPA[implementation].residual:
            return SDPA[implementation].forward(call, q, k, v, bias, mask, seed, residual=True)
        out, lse, *_ = SDPA[implementation].forward(call, q, k, v, bias, mask, seed)
        return out, lse, lse.new_empty(0, dtype=torch.uint8)


def _fake(q, k, v, bias, mask, seed, causal, window, scale, dropout_p, implementation, residual=False):
    b, h_q, t, _ = q.shape
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    dtype = wide if SDPA[implementation].wide_output else v.dtype
    lse = q.new_empty(b, h_q, t, dtype=wide)
    kept = residual and SDPA[implementation].residual
    rest = rows_like(q, v.shape[3], torch.uint8) if kept else lse.new_empty(0, dtype=torch.uint8)
    return rows_like(q, v.shape[3], dtype), lse, rest


@operator("sdpa_backward")
def sdpa_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    residual: Tensor,
    dout: Tensor,
    causal: bool,
    window: Sequence[int] | None,
    scale: float,
    dropout_p: float,
    bias_grad: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and dbias, contiguous; dbias has shape [0] unless `bias_grad`."""
    options: Any = {"causal": causal, "window": window, "scale": scale, "dropout_p": dropout_p}
    call = make_call(q, k, v, bias, mask, **options, bias_grad=bias_grad)
    with without_autocast(q.device):
        extra = {} if residual.ndim == 1 else {"residual": residual}
        dq, dk, dv, dbias = SDPA[implementation].backward(call, q, k, v, bias, mask, seed, out, lse, dout, **extra)
    return dq.contiguous(), dk.contiguous(), dv.contiguous(), lse.new_empty(0) if dbias is None else dbias.contiguous()


def _fake_backward(
    q, k, v, bias, mask, seed, out, lse, residual, dout, causal, window, scale, dropout_p, bias_grad, implementation
):  # fmt: skip
    grads = (x.new_empty(x.shape) for x in (q, k, v))
    return *grads, bias.new_empty(bias.shape) if bias_grad else lse.new_empty(0)


def _fold(size: int, args: Any, in_dims: Any, *, whole_batch: frozenset[int] = frozenset()) -> list[Any]:
    """Fold the mapped axis of every tensor in `args` into its batch axis, the first.

    A bias or mask that is neither mapped nor has a batch axis keeps its batch size 1. Where its gradient is wanted (its
    index is in `whole_batch`) it is given every batch element of its own instead.
    """
    batch = args[0].shape[0] if in_dims[0] is None else args[0].movedim(in_dims[0], 0).shape[1]
    folded = list(args)
    for index, (x, axis) in enumerate(zip(args, in_dims, strict=True)):
        if not isinstance(x, Tensor):
            continue
        if axis is None and x.shape[0] == 1 and index in (3, 4) and index not in whole_batch:
            continue
        if x.shape[-1:] == (0,) and x.ndim == (1 if axis is None else 2) and index == 8:  # a residual that there is not
            folded[index] = x if axis is None else x.select(axis, 0)
            continue
        x = x.unsqueeze(0).expand(size, *x.shape) if axis is None else x.movedim(axis, 0)
        folded[index] = x.expand(size, batch, *x.shape[2:]).flatten(0, 1)
    return folded


def _fold_forward(operator: Any) -> Callable[..., Any]:
    def rule(info, in_dims, *args):
        out, lse, residual = operator(*_fold(info.batch_size, args, in_dims))
        kept = residual.ndim > 1
        parts = (x.unflatten(0, (info.batch_size, -1)) for x in (out, lse, *((residual,) if kept else ())))
        return (*parts, *(() if kept else (residual,))), (0, 0, 0 if kept else None)

    return rule


def _fold_backward(operator: Any) -> Callable[..., Any]:
    def rule(info, in_dims, *args):
        bias, bias_grad = args[3], args[14]
        dq, dk, dv, dbias = operator(*_fold(info.batch_size, args, in_dims, whole_batch=frozenset({3} if bias_grad else {})))
        dq, dk, dv = (x.unflatten(0, (info.batch_size, -1)) for x in (dq, dk, dv))
        if not bias_grad:
            return (dq, dk, dv, dbias), (0, 0, 0, None)
        dbias = dbias.unflatten(0, (info.batch_size, -1))
        shared = bias.shape[0] == 1 if in_dims[3] is None else bias.movedim(in_dims[3], 0).shape[1] == 1
        return (dq, dk, dv, dbias.sum(1, keepdim=True) if shared else dbias), (0, 0, 0, 0)

    return rule


torch.library.register_fake("torch_power::sdpa", _fake)
torch.library.register_fake("torch_power::sdpa_backward", _fake_backward)
torch.library.register_vmap("torch_power::sdpa", _fold_forward(sdpa_forward))
torch.library.register_vmap("torch_power::sdpa_backward", _fold_backward(sdpa_backward))

# Implementations with raw operators of their own, in C++: nothing in Python between autograd and the kernels.
FORWARD = {"cuda": native("sdpa_cuda", sdpa_forward, _fake, _fold_forward)}
BACKWARD = {"cuda": native("sdpa_gradient_cuda", sdpa_backward, _fake_backward, _fold_backward)}


class Sdpa(Function):
    """Autograd of the two raw operators. out comes in the precision it was computed in; the caller rounds it."""

    @staticmethod
    def forward(q, k, v, bias, mask, seed, causal, window, scale, dropout_p, implementation, residual):
        forward = FORWARD.get(implementation, sdpa_forward)
        return forward(q, k, v, bias, mask, seed, causal, window, scale, dropout_p, implementation, residual)

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arrays, ctx.causal, ctx.window, ctx.scale, ctx.dropout_p, ctx.implementation, _ = inputs
        out, lse, residual = output
        ctx.mark_non_differentiable(lse, residual)
        ctx.save_for_backward(*arrays, out, lse, residual)
        without_zeros(ctx)

    @staticmethod
    def backward(ctx, dout, *_):
        options = ctx.causal, ctx.window, ctx.scale, ctx.dropout_p, ctx.implementation
        return *_gradients(ctx, dout, options), *[None] * 8


class SdpaRecorded(Function):
    """`Sdpa` where only reverse mode looks on (`calls.transforms_active` is false): of an input or output that has no gradient
    the graph is not told. Recording costs the host a fifth less than with `Sdpa` (NOTES: what a call costs the host)."""

    @staticmethod
    def forward(ctx, q, k, v, bias, mask, seed, options):
        ctx.options = options
        forward = FORWARD.get(options[4], sdpa_forward)
        out, lse, residual = forward(q, k, v, bias, mask, seed, *options, True)
        ctx.save_for_backward(q, k, v, bias, mask, seed, out, lse, residual)
        return out

    @staticmethod
    def backward(ctx, dout):
        return *_gradients(ctx, dout, ctx.options), None, None, None


def _gradients(ctx: Any, dout: Tensor | None, options: Sequence[Any]) -> tuple[Any, ...]:
    """dq, dk, dv and dbias, or None for the last, of what `ctx` saved."""
    saved = ctx.saved_tensors  # unpacked once: checkpointing makes them again at each access
    dout = torch.zeros_like(saved[6]) if dout is None else dout
    bias_grad = saved[3] is not None and ctx.needs_input_grad[3]
    *numbers, implementation = options
    # Without a graph (`create_graph`, torch.func) there is no second derivative to refuse.
    differentiate: Any = SdpaBackward.apply if torch.is_grad_enabled() else BACKWARD.get(implementation, sdpa_backward)
    dq, dk, dv, dbias = differentiate(*saved, dout, *numbers, bias_grad, implementation)
    return dq, dk, dv, dbias if bias_grad else None


class SdpaBackward(Function):
    """The raw backward operator, wrapped because `torch.func` differentiates whatever runs inside its `grad`: it peels
    its levels off an `autograd.Function`, while it cannot enter a custom operator."""

    @staticmethod
    def forward(
        q, k, v, bias, mask, seed, out, lse, residual, dout, causal, window, scale, dropout_p, bias_grad, implementation
    ):  # fmt: skip
        return BACKWARD.get(implementation, sdpa_backward)(
            q, k, v, bias, mask, seed, out, lse, residual, dout, causal, window, scale, dropout_p, bias_grad, implementation
        )  # fmt: skip

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise NotImplementedError(
            "scaled_dot_product_attention: a second derivative is not implemented; "
            "torch.nn.functional.scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH) has one"
        )
