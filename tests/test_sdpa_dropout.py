"""Dropout of `torch_power.scaled_dot_product_attention`; that its bits are the oracle's is tested with the other cases."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from bridge import spec_sdpa
from torch_power import ops_sdpa
from torch_power.sdpa import scaled_dot_product_attention as attention

CALL = spec_sdpa.SdpaCall(b=1, t=5, s=5, h_q=1, h_kv=1, d=8, e=8, scale=0.3, dtype="float32", dropout_p=0.5)
IMPLEMENTATIONS = tuple(name for name, entry in ops_sdpa.SDPA.items() if entry.supports(CALL, "cpu") is None)


def normal(*shape, grad=False):
    return torch.randn(*shape, dtype=torch.float64).requires_grad_(grad)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_follows_the_generator(implementation):
    q, k = normal(2, 4, 40, 8), normal(2, 4, 50, 8)
    drop = functools.partial(attention, q, k, k, dropout_p=0.4, implementation=implementation)
    torch.manual_seed(1)
    first, second = drop(), drop()
    torch.manual_seed(1)
    assert torch.equal(first, drop())
    assert not torch.equal(first, second)


def test_dropout_is_unbiased():
    """The mean of many draws tends to the result without dropout, with the spread of independent weights."""
    torch.manual_seed(0)
    q, k = normal(1, 2, 6, 8), normal(1, 2, 9, 8)
    v = torch.eye(9, dtype=torch.float64).expand(1, 2, 9, 9)
    weights = attention(q, k, v)
    draws = torch.stack([attention(q, k, v, dropout_p=0.25) for _ in range(400)])
    error = (draws.mean(0) - weights) / (weights * math.sqrt(0.25 / 0.75 / 400))
    assert error.abs().max() < 5
    assert error.square().mean() == pytest.approx(1.0, abs=0.35)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_dropout_gradients(implementation):
    operands = [normal(1, 2, n, 4, grad=True) for n in (5, 6, 6)] + [normal(5, 6, grad=True)]

    def same_draw(*x):
        torch.manual_seed(3)
        return attention(*x, dropout_p=0.5, implementation=implementation)

    assert torch.autograd.gradcheck(same_draw, operands)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_dropout_under_vmap(randomness):
    q = normal(1, 2, 9, 8).expand(3, 1, 2, 9, 8)
    y = torch.vmap(lambda q: attention(q, q, q, dropout_p=0.5), randomness=randomness)(q)
    assert torch.equal(y[0], y[1]) == (randomness == "same")
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(lambda q: attention(q, q, q, dropout_p=0.5))(q)
