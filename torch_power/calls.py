"""What makes a call cheap on the host: checks worked out once for each signature, operators and autograd without detours."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

from torch_power import _library

# Signatures remembered by each function: a server meets as many lengths and batch sizes. An entry takes about a kilobyte.
SIGNATURES = 1024

R = TypeVar("R")


class Signature(NamedTuple):
    """What the checks ask of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def signatures(*arguments: Any) -> tuple[Any, ...]:
    """The arguments with a `Signature` in place of every tensor. torch.compile traces the checks of the tensors themselves."""
    if torch.compiler.is_compiling():
        return arguments
    return tuple([Signature(x.shape, x.dtype, x.device) if isinstance(x, Tensor) else x for x in arguments])


def remembered(function: Callable[..., R]) -> Callable[..., R]:
    """`function`, a pure one of positional arguments, worked out once for equal arguments of equal types.

    Arguments that have no hash (symbolic sizes, lists) are worked out each time, and errors are raised each time.
    torch.compile traces `function` itself.
    """
    cached = functools.lru_cache(maxsize=SIGNATURES, typed=True)(function)

    @functools.wraps(function)
    def call(*arguments: Any) -> R:
        if not torch.compiler.is_compiling():
            try:
                return cached(*arguments)
            except TypeError:  # no hash; or an error of the function's own, raised again below
                pass
        return function(*arguments)

    call.cache_clear, call.cache_info = cached.cache_clear, cached.cache_info  # type: ignore[attr-defined]
    return call


def operator(name: str) -> Callable[[Callable[..., Any]], Any]:
    """Register a function as the operator torch_power::`name`, for every device, and return the operator.

    Not `torch.library.custom_op`, whose checks of each call cost 11 µs.
    """

    def register(function: Callable[..., Any]) -> Any:
        qualified = f"torch_power::{name}"
        torch.library.define(qualified, torch.library.infer_schema(function, mutates_args=()))
        torch.library.impl(qualified, "CompositeExplicitAutograd", function)
        return getattr(torch.ops.torch_power, name).default

    return register


def native(name: str, raw: Any, fake: Callable[..., Any], vmap: Callable[..., Any]) -> Any:
    """The operator torch_power::`name` of the compiled library, which stands in for `raw`; `raw` itself where there is none.

    It has the schema of `raw`, the same fake and the same rule under vmap.
    """
    if _library.missing() is not None or not hasattr(torch.ops.torch_power, name):
        return raw
    torch.library.register_fake(f"torch_power::{name}", fake)
    operator = getattr(torch.ops.torch_power, name).default
    torch.library.register_vmap(f"torch_power::{name}", vmap(operator))
    return operator


def transforms_active() -> bool:
    """Whether something beside reverse mode may look at an autograd.Function: torch.compile, torch.func or forward mode."""
    if torch.compiler.is_compiling():
        return True
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def autocast_anywhere() -> bool:
    """Whether `torch.autocast` may be on for some device: one question where that for a device takes three."""
    return torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A block in which tensor operations keep the dtypes they are given."""
    if torch.is_autocast_enabled(device.type):
        return torch.autocast(device.type, enabled=False)
    return contextlib.nullcontext()


def without_zeros(ctx: Any) -> None:
    """Have the gradient of a result that nobody differentiated be None, not a tensor of zeros.

    The engine would make such tensors for the results kept for the backward pass: one more `saved` (207 MiB at t = 65536, 8
    heads of 64), filled at each call. torch.compile has no such method, and drops zeros that nobody reads.
    """
    if not torch.compiler.is_compiling():
        ctx.set_materialize_grads(False)


class Function(torch.autograd.Function):
    """An autograd.Function with `setup_context`, positional arguments and no defaults."""

    generate_vmap_rule = True

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """As the base class, less its reading of `forward`'s signature, by `inspect`, at each call: 40 µs of 57.

        Under `torch.func` it stays; torch.compile traces `forward` and never comes here.
        """
        if torch._C._are_functorch_transforms_active():
            return super().apply(*arguments)
        alive = [torch._C._functorch.unwrap_if_dead(x) if isinstance(x, Tensor) else x for x in arguments]
        return super(torch.autograd.Function, cls).apply(*alive)  # type: ignore[misc]
