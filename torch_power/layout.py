"""How results of scaled dot-product attention lie in memory: as the queries do."""

from __future__ import annotations

import torch
from torch import Tensor


def heads_last(q: Tensor) -> bool:
    """Whether q `[b, h, t, d]` is stored `[b, t, h, d]`, as projections leave it."""
    return q.stride(1) < q.stride(2)


def rows_like(q: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """A new tensor `[b, h, t, size]`, stored in the order that q is."""
    b, h, t, _ = q.shape
    if heads_last(q):
        return q.new_empty(b, t, h, size, dtype=dtype).transpose(1, 2)
    return q.new_empty(b, h, t, size, dtype=dtype)
