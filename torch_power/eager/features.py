"""The expansion φ and what surrounds it: exact row scaling, sums of gates that lose no digits.

    φ_p(x) = concatenation over tile tuples I_1 ≤ … ≤ I_p of x[I_1] ⊗ … ⊗ x[I_p],     <multiplicity · φ(q), φ(k)> = <q, k>^p
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from bridge import spec

# dtype → (bits of the significand without the leading one, exponent bias, integer dtype of the same width).
_FLOAT_LAYOUT = {torch.float32: (23, 127, torch.int32), torch.float64: (52, 1023, torch.int64)}


def sympow(x: Float[Tensor, "... d"], deg: int) -> Float[Tensor, "... D"]:
    """φ_p(x), D = `state_size(d, e, deg).rows`: block n is the outer product of the tiles in `spec.tile_tuples(d, deg)[n]`.

    Raises:
      ValueError: `deg` has no state layout, or d is not a multiple of its tile side.
    """
    tiles = _tiles(x, deg)
    index = torch.as_tensor(spec.tile_tuples(x.shape[-1], deg), device=x.device)
    blocks = tiles[..., index[:, 0], :]
    for slot in range(1, deg):
        blocks = (blocks[..., :, None] * tiles[..., index[:, slot], None, :]).flatten(-2)
    return blocks.flatten(-2)


def sympow_transposed_jacobian(x: Float[Tensor, "... d"], dphi: Float[Tensor, "... D"], deg: int) -> Float[Tensor, "... d"]:
    """Σ_r dφ_r ∂φ_r/∂x: the gradient that reaches x through φ(x).

    In every block, each factor in turn receives the block contracted with all the others; the sum over the blocks that a
    tile occurs in is a product with a 0/1 matrix, whose order of summation is fixed (a scatter's is not).
    """
    tiles = _tiles(x.flatten(0, -2), deg)
    (tokens, count, tile), tuples = tiles.shape, spec.tile_tuples(x.shape[-1], deg)
    index = torch.as_tensor(tuples, device=x.device)
    occurs = torch.nn.functional.one_hot(index.long(), count).to(x.dtype)
    dtiles = torch.zeros_like(tiles)
    for slot in range(deg):
        block = dphi.reshape(tokens, len(tuples), tile**deg)
        for other in reversed(range(deg)):
            if other != slot:
                inner = tile if slot > other else 1
                block = block.reshape(tokens, len(tuples), tile**other, tile, inner)
                block = torch.einsum("Nnatb,Nnt->Nnab", block, tiles[:, index[:, other]])
        block = block.reshape(tokens, len(tuples), tile)
        dtiles += torch.einsum("Nnt,nm->Nmt", block, occurs[:, slot])
    return dtiles.reshape(x.shape)


def row_scale(
    q: Float[Tensor, "... d"], scale: float, normalize: bool
) -> tuple[Float[Tensor, "... 1"], Float[Tensor, "... 1"]]:
    """Two factors whose product turns query rows into those that the sum is computed with.

    Without the normaliser that is `scale`. With it, any factor cancels, so each row gets the power of two that brings |q|
    to at most 1: then scores are at most |k|, whatever the size of q, and scaling q by a power of two changes no bit.
    A power of two may be too large or small for its dtype, its two halves are not. `scale` = 0 stays 0.
    """
    one = torch.ones_like(q[..., :1])
    if not normalize or scale == 0:
        return scale * one, one
    bits, bias, integer = _FLOAT_LAYOUT[q.dtype]
    largest = torch.amax(q.abs(), -1, keepdim=True)
    exponent = torch.frexp(largest).exponent.to(integer) + math.ceil(math.log2(q.shape[-1]) / 2)
    half = torch.div(exponent, 2, rounding_mode="floor")
    first, second = (((bias - part) << bits).view(q.dtype) for part in (half, exponent - half))
    return first, second


def sum_gates(log_g: Float[Tensor, "... t"]) -> tuple[Float[Tensor, "... t"], Float[Tensor, "... t"]]:
    """Running sum G of `log_g` as a pair (high, low) with twice the digits of its dtype.

    A difference G_i − G_j of plain sums has lost the digits of the smaller number: with −50 a token, 1e-4 after some hundred
    tokens. In a pair it keeps them. Prefix sums by doubling, each addition with its rounding error (Knuth's TwoSum).
    """
    high, low = log_g, torch.zeros_like(log_g)
    step = 1
    while step < log_g.shape[-1]:
        earlier_high, earlier_low = (torch.nn.functional.pad(x[..., :-step], (step, 0)) for x in (high, low))
        high, low = _add_pairs(high, low, earlier_high, earlier_low)
        step *= 2
    return high, low


def _add_pairs(a_high: Tensor, a_low: Tensor, b_high: Tensor, b_low: Tensor) -> tuple[Tensor, Tensor]:
    total = a_high + b_high
    b_part = total - a_high
    error = (a_high - (total - b_part)) + (b_high - b_part) + (a_low + b_low)
    high = total + error
    return high, error - (high - total)


def decay_between(
    later: tuple[Float[Tensor, "..."], ...],
    earlier: tuple[Float[Tensor, "..."], ...],
    mask: Bool[Tensor, "..."] | None = None,
) -> Float[Tensor, "..."]:
    """exp(G_later − G_earlier) of two sums of gates given as pairs, 0 where `mask` is false; at most 1 when gates forget."""
    exponent = (later[0] - earlier[0]) + (later[1] - earlier[1])
    return torch.exp(exponent if mask is None else exponent.masked_fill(~mask, -math.inf))


def _tiles(x: Tensor, deg: int) -> Tensor:
    tile = spec.check_head_size(x.shape[-1], deg)
    return x.unflatten(-1, (x.shape[-1] // tile, tile))
