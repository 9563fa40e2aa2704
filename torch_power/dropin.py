"""Unmodified code on our kernels: `F.scaled_dot_product_attention`, and every module that calls it, served by this package.

PyTorch's function chooses a backend and calls an operator of its own; on CPUs, wherever its flash attention applies, that is
`aten::_scaled_dot_product_flash_attention_for_cpu`. Installing puts our kernel behind that operator, at PyTorch's own
registration point. So `torch.nn.attention.sdpa_kernel` is obeyed, and autograd and `torch.compile` see what they saw before.
A call that our kernel cannot serve goes to the kernel that was there. On GPUs nothing is replaced:
`torch_power.scaled_dot_product_attention` is how to call the kernels there.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from bridge import spec_sdpa
from torch_power import _library, ops_sdpa
from torch_power.cpp import sdpa as kernel

FORWARD = "aten::_scaled_dot_product_flash_attention_for_cpu"
BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"

_lock = threading.Lock()
_installed: torch.library.Library | None = None


def install_sdpa() -> None:
    """Let `F.scaled_dot_product_attention` run this package's kernels where they apply. A second call changes nothing.

    Raises:
      NotImplementedError: the compiled library is missing (the message says how to build it).
    """
    global _installed
    reason = _library.missing()
    if reason is not None:
        raise NotImplementedError(f"install_sdpa: {reason}")
    with _lock:
        if _installed is not None:
            return
        library = torch.library.Library("aten", "IMPL")
        # The kernels in force now, asked for before they are replaced: later, their names lead to ours.
        forward, backward = (torch.library.get_kernel(name, "CPU") for name in (FORWARD, BACKWARD))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            library.impl(FORWARD.removeprefix("aten::"), _forward_or(forward), "CPU", with_keyset=True)
            library.impl(BACKWARD.removeprefix("aten::"), _backward_or(backward), "CPU", with_keyset=True)
        _installed = library


def uninstall_sdpa() -> None:
    """Undo `install_sdpa`: PyTorch's own kernels are back. Without an installation, nothing happens."""
    global _installed
    with _lock:
        if _installed is not None:
            _installed._destroy()
            _installed = None


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
        if not _serves(query, key, value, dropout_p, is_causal, attn_mask, scale):
            return other.call_boxed(keys, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)
        call, operands = _call(query, key, value, is_causal, attn_mask, scale)
        out, lse = kernel.forward(call, *operands)
        # Strides as the operator promises them: those of query, and log-sum-exp stored [b, t, h].
        return torch.empty_like(query).copy_(out), lse.transpose(1, 2).contiguous().transpose(1, 2)

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
        if not _serves(query, key, value, dropout_p, is_causal, attn_mask, scale):
            arguments = grad_out, query, key, value, out, logsumexp, dropout_p, is_causal
            return other.call_boxed(keys, *arguments, attn_mask=attn_mask, scale=scale)
        call, operands = _call(query, key, value, is_causal, attn_mask, scale)
        wide = out.to(getattr(torch, call.compute_dtype))
        dq, dk, dv, _ = kernel.backward(call, *operands, wide, logsumexp.contiguous(), grad_out)
        return dq, dk, dv

    return backward


def _serves(
    query: Tensor, key: Tensor, value: Tensor, dropout_p: float, is_causal: bool, attn_mask: Tensor | None, scale: Any
) -> bool:
    """Whether our kernel takes the call. The operator draws no dropout, so one that asks for it is PyTorch's to answer."""
    if dropout_p != 0.0 or 0 in query.shape or 0 in key.shape or not query.dtype == key.dtype == value.dtype:
        return False
    call, _ = _call(query, key, value, is_causal, attn_mask, scale)
    return kernel.supports(call, query.device.type) is None


def _call(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask: Tensor | None, scale: float | None
) -> tuple[spec_sdpa.SdpaCall, tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]]:
    """The operator's arguments as our kernel takes them."""
    bias = mask = None
    if attn_mask is not None:
        operand = attn_mask.reshape((1,) * (4 - attn_mask.ndim) + tuple(attn_mask.shape))
        bias, mask = (None, operand) if attn_mask.dtype == torch.bool else (operand, None)
    call = ops_sdpa.make_call(
        query, key, value, bias, mask, causal=is_causal, dropout_p=0.0, bias_grad=False,
        scale=spec_sdpa.default_scale(query.shape[-1]) if scale is None else scale,
    )  # fmt: skip
    return call, (query, key, value, bias, mask, None)
