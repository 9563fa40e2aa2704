"""The expansion φ and what surrounds it: exact row scaling, sums of gates that lose no digits.

    φ_p(x) = concatenation over tile tuples I_1 ≤ … ≤ I_p of x[I_1] ⊗ … ⊗ x[I_p],     <multiplicity · φ(q), φ(k)> = <q, k>^p
"""

from __future__ import annotations

import functools
import math

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Bool, Float

from bridge import spec

# dtype → (bits of the significand without the leading one, exponent bias, integer dtype of the same width).
_FLOAT_LAYOUT = {"float32": (23, 127, jnp.int32), "float64": (52, 1023, jnp.int64)}

# float32 products in float32: on a GPU the default is TF32, three digits.
einsum = functools.partial(jnp.einsum, precision=lax.Precision.HIGHEST)
matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


def sympow(x: Float[Array, "... d"], deg: int) -> Float[Array, "... D"]:
    """φ_p(x), D = `state_size(d, e, deg).rows`: block n is the outer product of the tiles in `spec.tile_tuples(d, deg)[n]`.

    Raises:
      ValueError: `deg` has no state layout, or d is not a multiple of its tile side.
    """
    tiles = _tiles(x, deg)
    index = spec.tile_tuples(x.shape[-1], deg)
    blocks = tiles[..., index[:, 0], :]
    for slot in range(1, deg):
        blocks = _flatten(blocks[..., :, None] * tiles[..., index[:, slot], None, :], 2)
    return _flatten(blocks, 2)


def sympow_transposed_jacobian(x: Float[Array, "... d"], dphi: Float[Array, "... D"], deg: int) -> Float[Array, "... d"]:
    """Σ_r dφ_r ∂φ_r/∂x: the gradient that reaches x through φ(x).

    In every block, each factor in turn receives the block contracted with all the others; the sum over the blocks that a
    tile occurs in is a product with a 0/1 matrix, whose order of summation is fixed (a scatter's is not).
    """
    # One axis for all tokens and few more, contracted as dot products: on CPUs, XLA 0.10.2 crashes in the sum of a product of
    # seven axes, and takes 20 times as long for one of five (80 ms against 4 for a chunk of 256 in 4 heads, d = 64).
    tiles = _tiles(x.reshape(math.prod(x.shape[:-1]), x.shape[-1]), deg)
    (tokens, count, tile), index = tiles.shape, spec.tile_tuples(x.shape[-1], deg)
    occurs, dtiles = np.eye(count)[index], jnp.zeros_like(tiles)
    for slot in range(deg):
        block = dphi.reshape(tokens, len(index), tile**deg)
        for other in reversed(range(deg)):
            if other != slot:
                inner = tile if slot > other else 1
                block = block.reshape(tokens, len(index), tile**other, tile, inner)
                block = einsum("Nnatb,Nnt->Nnab", block, tiles[:, index[:, other]])
        block = block.reshape(tokens, len(index), tile)
        dtiles += einsum("Nnt,nm->Nmt", block, occurs[:, slot].astype(x.dtype))
    return dtiles.reshape(x.shape)


def row_scale(q: Float[Array, "... d"], scale: float, normalize: bool) -> tuple[Float[Array, "... 1"], Float[Array, "... 1"]]:
    """Two factors whose product turns query rows into those that the sum is computed with.

    Without the normaliser that is `scale`. With it, any factor cancels, so each row gets the power of two that brings |q|
    to at most 1: then scores are at most |k|, whatever the size of q, and scaling q by a power of two changes no bit.
    A power of two may be too large or small for its dtype, its two halves are not. `scale` = 0 stays 0.
    """
    one = jnp.ones_like(q[..., :1])
    if not normalize or scale == 0:
        return scale * one, one
    bits, bias, integer = _FLOAT_LAYOUT[q.dtype.name]
    largest = lax.stop_gradient(jnp.abs(q).max(-1, keepdims=True))
    exponent = jnp.frexp(largest)[1].astype(integer) + math.ceil(math.log2(q.shape[-1]) / 2)
    half = exponent // 2
    first, second = (lax.bitcast_convert_type((bias - part) << bits, q.dtype) for part in (half, exponent - half))
    return first, second


def sum_gates(log_g: Float[Array, "... t"]) -> tuple[Float[Array, "... t"], Float[Array, "... t"]]:
    """Running sum G of `log_g` as a pair (high, low) with twice the digits of its dtype.

    A difference G_i − G_j of plain sums has lost the digits of the smaller number: with −50 a token, 1e-4 after some hundred
    tokens. In a pair it keeps them. Prefix sums by doubling, each addition with its rounding error (Knuth's TwoSum).
    """
    t, front = log_g.shape[-1], [(0, 0)] * (log_g.ndim - 1)

    def double(n: Array, pair: tuple[Array, Array]) -> tuple[Array, Array]:
        earlier = (jnp.pad(x, [*front, (t, 0)]) for x in pair)
        return _add_pairs(*pair, *(lax.dynamic_slice_in_dim(x, t - (1 << n), t, -1) for x in earlier))

    return lax.fori_loop(0, max(t - 1, 0).bit_length(), double, (log_g, jnp.zeros_like(log_g)))


def _add_pairs(a_high: Array, a_low: Array, b_high: Array, b_low: Array) -> tuple[Array, Array]:
    total = a_high + b_high
    b_part = total - a_high
    error = (a_high - (total - b_part)) + (b_high - b_part) + (a_low + b_low)
    high = total + error
    return high, error - (high - total)


def decay_between(
    later: tuple[Float[Array, "..."], ...],
    earlier: tuple[Float[Array, "..."], ...],
    mask: Bool[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, "..."]:
    """exp(G_later − G_earlier) of two sums of gates given as pairs, 0 where `mask` is false; at most 1 when gates forget."""
    exponent = (later[0] - earlier[0]) + (later[1] - earlier[1])
    return jnp.exp(exponent if mask is None else jnp.where(mask, exponent, -jnp.inf))


def _tiles(x: Array, deg: int) -> Array:
    tile = spec.check_head_size(x.shape[-1], deg)
    return x.reshape(*x.shape[:-1], x.shape[-1] // tile, tile)


def _flatten(x: Array, axes: int) -> Array:
    """Merge the last `axes` axes."""
    return x.reshape(*x.shape[:-axes], math.prod(x.shape[-axes:]))


