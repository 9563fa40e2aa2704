"""Unmodified code on our kernels: `F.scaled_dot_product_attention`, and every module that calls it, served by this package.

PyTorch's function chooses a backend and calls an operator of its own. Installing puts our kernels behind the operators of its
flash attention, at PyTorch's own registration points, so that `torch.nn.attention.sdpa_kernel` is obeyed, and autograd and
`torch.compile` see what they saw before:

- on CPUs, `aten::_scaled_dot_product_flash_attention_for_cpu`, which takes masks;
- on GPUs, `aten::_scaled_dot_product_flash_attention`, as the flash attention implementation named "torch_power"
  (`torch.nn.attention.activate_flash_attention_impl`). Calls with a mask go to another operator and stay PyTorch's.

A call that our kernel cannot serve goes to the kernel that was there.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import attention

from bridge import spec_sdpa
from torch_power import _library, ops_sdpa
from torch_power.cpp import sdpa as kernel

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
CUDA_FORWARD = "aten::_scaled_dot_product_flash_attention"
CUDA_BACKWARD = "aten::_scaled_dot_product_flash_attention_backward"
NAME = "torch_power"  # among PyTorch's flash attention implementations

_lock = threading.Lock()
_installed: _Override | None = None
_before: str | None = None  # the flash attention implementation that was active


def install_sdpa() -> None:
    """Let `F.scaled_dot_product_attention` run this package's kernels where they apply. A second call changes nothing.

    Raises:
      NotImplementedError: the compiled library is missing (the message says how to build it).
    """
    global _installed, _before
    reason = _library.missing()
    if reason is not None:
        raise NotImplementedError(f"install_sdpa: {reason}")
    with _lock:
        if _installed is not None:
            return
        _installed = _Override("CPU", {FORWARD: _forward_or, BACKWARD: _backward_or})
        if _serves_cuda():
            attention.register_flash_attention_impl(NAME, register_fn=_override_cuda)
            _before = attention.current_flash_attention_impl()
            attention.activate_flash_attention_impl(NAME)


def uninstall_sdpa() -> None:
    """Undo `install_sdpa`: PyTorch's own kernels are back. Without an installation, nothing happens."""
    global _installed
    with _lock:
        if _installed is None:
            return
        _installed.remove()
        _installed = None
        if attention.current_flash_attention_impl() == NAME:  # else somebody has activated another one since
            attention.restore_flash_attention_impl()
            if _before is not None:
                attention.activate_flash_attention_impl(_before)


@contextlib.contextmanager
def installed_sdpa() -> Iterator[None]:
    """`install_sdpa` for a block, for all threads; what was in force before is back after it, errors or not."""
    before = _installed is not None
    install_sdpa()
    try:
        yield
    finally:
        if not before:
            uninstall_sdpa()


class _Override:
    """Kernels of this package behind operators of PyTorch's, until `remove`."""

    def __init__(self, key: str, operators: dict[str, Callable[[Any], Callable[..., Any]]]):
        self._library = torch.library.Library("aten", "IMPL")
        # The kernels in force now, asked for before any is replaced: later, their names lead to ours.
        ours = {name: make(torch.library.get_kernel(name, key)) for name, make in operators.items()}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, function in ours.items():
                self._library.impl(name.removeprefix("aten::"), function, key, with_keyset=True)

    def remove(self) -> None:
        self._library._destroy()


# ---------------------------------------------------------------------------------------------------------------------
# CPUs
# ---------------------------------------------------------------------------------------------------------------------


def _forward_or(other: Any) -> Callable[..., Any]:
    """The operator's forward pass: ours if it serves the call, else the kernel `other`."""

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        call = _served(query, key, value, dropout_p, is_causal, attn_mask, scale)
        if call is None:
            return other.call_boxed(keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        out, lse = kernel.forward(call, query, key, value, *_operands(attn_mask), None)
        # Strides as the operator promises them: those of query, and log-sum-exp stored [b, t, h].
        return _laid_out_like(query, out), lse.transpose(1, 2).contiguous().transpose(1, 2)

    return forward


def _backward_or(other: Any) -> Callable[..., Any]:
    """The operator's backward pass; log-sum-exp means the same in both kernels, so either may have run forward."""

    def backward(
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        dropout_p: float,
        is_causal: bool,
        *,
        attn_mask: Tensor | None = None,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = _served(query, key, value, dropout_p, is_causal, attn_mask, scale)
        if call is None:
            arguments = grad_out, query, key, value, out, logsumexp, dropout_p, is_causal
            return other.call_boxed(keys, *arguments, attn_mask=attn_mask, scale=scale)
        wide = out.to(getattr(torch, call.compute_dtype))
        operands = query, key, value, *_operands(attn_mask), None
        dq, dk, dv, _ = kernel.backward(call, *operands, wide, logsumexp.contiguous(), grad_out)
        return dq, dk, dv

    return backward


def _served(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, attn_mask: Tensor | None, scale: Any
) -> spec_sdpa.SdpaCall | None:
    """The call, if our kernel takes it. The operator draws no dropout, so one that asks for it is PyTorch's to answer."""
    if dropout_p != 0.0 or query.numel() == 0 or key.numel() == 0 or not query.dtype == key.dtype == value.dtype:
        return None
    bias, mask = _operands(attn_mask)
    scale = spec_sdpa.default_scale(query.shape[-1]) if scale is None else scale
    call = ops_sdpa.make_call(query, key, value, bias, mask, causal=is_causal, dropout_p=0.0, bias_grad=False, scale=scale)
    supports = ops_sdpa.SDPA["cuda"].supports if query.is_cuda else kernel.supports
    return call if supports(call, query.device.type) is None else None


def _operands(attn_mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The operator's mask as a bias or a mask with four axes."""
    if attn_mask is None:
        return None, None
    operand = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))
    return (None, operand) if attn_mask.dtype == torch.bool else (operand, None)


def _laid_out_like(like: Tensor, x: Tensor) -> Tensor:
    """`x` in the dtype and strides that a new tensor like `like`, of the same shape, has."""
    if x.dtype == like.dtype and x.stride() == like.stride():  # ours has no gaps, so neither has `like`
        return x
    empty = torch.empty_like(like)
    return x if x.dtype == empty.dtype and x.stride() == empty.stride() else empty.copy_(x)


# ---------------------------------------------------------------------------------------------------------------------
# GPUs
# ---------------------------------------------------------------------------------------------------------------------


def _serves_cuda() -> bool:
    """Whether this PyTorch has the operators for GPUs, and this package kernels to put behind them."""
    return torch.backends.cuda.is_built() and "cuda" in ops_sdpa.SDPA


def _override_cuda() -> _Override:
    """What `activate_flash_attention_impl` runs; it keeps the result until another implementation is activated."""
    return _Override("CUDA", {CUDA_FORWARD: _cuda_forward_or, CUDA_BACKWARD: _cuda_backward_or})


def _cuda_forward_or(other: Any) -> Callable[..., Any]:
    """The operator's forward pass: ours if it serves the call, else the kernel `other`."""

    def forward(
        keys: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        return_debug_mask: bool = False,
        *,
        scale: float | None = None,
    ) -> tuple[Any, ...]:
        call = None if return_debug_mask else _served(query, key, value, dropout_p, is_causal, None, scale)
        if call is None:
            return other.call_boxed(keys, query, key, value, dropout_p, is_causal, return_debug_mask, scale=scale)
        out, lse, *_ = ops_sdpa.SDPA["cuda"].forward(call, query, key, value, None, None, None)
        # Without dropout there is no random state to hand on; without sequences of several lengths, no offsets.
        seed, offset = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
        return _laid_out_like(query, out), lse, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)

    return forward


def _cuda_backward_or(other: Any) -> Callable[..., Any]:
    """The operator's backward pass; log-sum-exp means the same in both kernels, so either may have run forward."""

    def backward(
        keys: Any,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        logsumexp: Tensor,
        cum_seq_q: Tensor | None,
        cum_seq_k: Tensor | None,
        max_q: int,
        max_k: int,
        dropout_p: float,
        is_causal: bool,
        philox_seed: Tensor,
        philox_offset: Tensor,
        *,
        scale: float | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        call = None if cum_seq_q is not None else _served(query, key, value, dropout_p, is_causal, None, scale)
        if call is None:
            arguments = grad_out, query, key, value, out, logsumexp, cum_seq_q, cum_seq_k, max_q, max_k
            return other.call_boxed(keys, *arguments, dropout_p, is_causal, philox_seed, philox_offset, scale=scale)
        operands = query, key, value, None, None, None
        grads = ops_sdpa.SDPA["cuda"].backward(call, *operands, out, logsumexp.contiguous(), grad_out)[:3]
        dq, dk, dv = (_laid_out_like(x, grad) for x, grad in zip((query, key, value), grads, strict=True))
        return dq, dk, dv

    return backward
