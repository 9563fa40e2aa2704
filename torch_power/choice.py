"""The tables of implementations of this package, and the one place that chooses from them."""

from __future__ import annotations

import torch

from bridge import spec
from torch_power import ops, ops_sdpa


class _Choice(spec.Choice):
    """`spec.Choice`, whose block `torch.compile` reads once, while tracing (it cannot trace a context variable)."""

    def in_force(self) -> tuple[str, ...] | None:
        return _in_force()


CHOICE = _Choice({"power_attention": ops.POWER, "scaled_dot_product_attention": ops_sdpa.SDPA})


@torch.compiler.assume_constant_result
def _in_force() -> tuple[str, ...] | None:
    return spec.Choice.in_force(CHOICE)


@torch.compiler.assume_constant_result  # torch.compile of torch 2.11 cannot trace the question
def autocast_available(device: str) -> bool:
    """Whether `torch.autocast` exists for devices of this type."""
    return torch.amp.is_autocast_available(device)


implementation = CHOICE.implementation
