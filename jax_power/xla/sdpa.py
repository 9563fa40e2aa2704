"""Scaled dot-product attention in XLA operations, block by block: memory linear in t, forward and backward.

A tile of scores is a block of queries by `KEY_ROWS` keys. The forward pass keeps a running maximum m, sum l and
weighted sum of values for each query (online softmax: Milakov & Gimelshein 2018; Dao et al., "FlashAttention", 2022),
and hands on only the output and the log-sum-exp L = m + log l. The backward pass makes each tile of weights P = exp(S −
L) again:

    dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP − δ),  δ = rowsum(dO ∘ O)      dQ = scale · dS K      dK = scale · dSᵀ
    Q

A query that sees no key has L = −∞, output 0 and no gradient.

A length that is no multiple of the block is not padded: the last block starts early, so that it ends with the sequence,
and what it shares with the block before is stored twice or masked out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from bridge.spec_sdpa import SdpaCall

# Keys of a tile, and scores held at once over all heads: 2^20 float32 are 4 MB, half of the level-3 cache of two CPU
# cores.
KEY_ROWS = 512
TILE_SCORES = 2**20
# Queries of a tile, so many that the tile holds `TILE_SCORES`, within these limits: fewer leave matrix products too
# thin, more make the causal diagonal, where half the work is thrown away, too wide.
QUERY_ROWS = (64, 512)


def supports(call: SdpaCall, device: str) -> str | None:
    """Any call on any device, but dropout, which JAX's function has not."""
    return "dropout_p > 0 is not implemented" if call.dropout_p > 0 else None


def forward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
) -> tuple[Array, Array]:
    """Attention of checked operands.

    Args:
      q: `[b, t, h_q, d]`; k: `[b, s, h_kv, d]`; v: `[b, s, h_kv, e]`.
      bias: added to the scores; mask: bool, False hides a key. Both `[b, h_q, t, s]`, each axis the full size or 1.
      query_lengths, key_lengths: int32 `[b]`: queries and keys from there on are hidden.
    Returns:
      out `[b, t, h_q, e]` and the log-sum-exp of each row `[b, h_q, t]`, in the compute dtype.
    """
    tiles = _Tiles.of(call)
    wide = jnp.dtype(call.compute_dtype)
    if call.b * call.h_q * call.t == 0 or call.s == 0:
        out = jnp.zeros((call.b, call.t, call.h_q, call.e), wide)
        return out, jnp.full((call.b, call.h_q, call.t), -jnp.inf, wide)
    q, k, v = _grouped(call, q), _grouped_keys(k), _grouped_keys(v)
    hidden = functools.partial(_hidden, call, tiles, mask, query_lengths, key_lengths)

    def attend_rows(n, carry):
        out, lse = carry
        row = tiles.row_start(n)
        q_rows = _rows(q, row, tiles.rows).astype(wide) * call.scale

        def attend_tile(m, carry):
            top, total, values = carry
            col = tiles.col_start(m)
            scores = _product("nrd,ncd->nrc", q_rows, _rows(k, col, tiles.cols).astype(wide))
            scores = _with_bias(call, tiles, scores, bias, row, col)
            scores = jnp.where(hidden(row, col, m * tiles.cols), -jnp.inf, scores.reshape(tiles.per_head)).reshape(
                scores.shape
            )
            new_top = jnp.maximum(top, scores.max(-1, keepdims=True))
            # A row that has seen no key yet has top −∞; any finite reference leaves its weights exp(−∞) = 0.
            reference = jnp.where(new_top == -jnp.inf, 0.0, new_top)
            weights = jnp.exp(scores - reference)
            shrink = jnp.exp(top - reference)
            total = total * shrink + weights.sum(-1, keepdims=True)
            values = values * shrink + _product("nrc,nce->nre", weights, _rows(v, col, tiles.cols).astype(wide))
            return new_top, total, values

        top = jnp.full_like(q_rows, -jnp.inf, shape=(*q_rows.shape[:2], 1))
        empty = top, jnp.zeros_like(top), jnp.zeros_like(q_rows, shape=(*q_rows.shape[:2], call.e))
        top, total, values = lax.fori_loop(*tiles.seen_from(row), attend_tile, empty)
        out = _store_rows(out, values / jnp.where(total == 0, 1.0, total), row)
        return out, _store_rows(lse, top + jnp.log(total), row)

    n = call.b * call.h_kv
    # Made like q, not anew: inside `shard_map`, what a loop carries must vary over the mesh as what is stored in it does.
    empty = tuple(jnp.zeros_like(q, wide, shape=(n, call.group, call.t, columns)) for columns in (call.e, 1))
    out, lse = lax.fori_loop(0, tiles.row_blocks, attend_rows, empty)
    return _ungrouped(call, out), lse.reshape(call.b, call.h_q, call.t)


def backward(
    call: SdpaCall,
    q: Array,
    k: Array,
    v: Array,
    bias: Array | None,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    out: Array,
    lse: Array,
    dout: Array,
) -> tuple[Array, Array, Array, Array | None]:
    """Gradients dq, dk, dv of Σ out·dout, and dbias if `call.bias_grad`, else None; in the compute dtype."""
    tiles = _Tiles.of(call)
    wide = lse.dtype
    if call.b * call.h_q * call.t == 0 or call.s == 0:
        dq, dk, dv = (jnp.zeros(x.shape, wide) for x in (q, k, v))
        return dq, dk, dv, jnp.zeros(bias.shape, wide) if call.bias_grad else None
    delta = _grouped(call, (dout.astype(wide) * out).sum(-1, keepdims=True))
    q, k, v, dout = _grouped(call, q), _grouped_keys(k), _grouped_keys(v), _grouped(call, dout)
    # exp(S − L) of a row that saw no key must be 0, not exp(−∞ + ∞).
    lse = jnp.where(lse == -jnp.inf, jnp.inf, lse).reshape(*q.shape[:3], 1)
    hidden = functools.partial(_hidden, call, tiles, mask, query_lengths, key_lengths)

    def differentiate_cols(m, carry):
        dq, dk, dv, dbias = carry
        col = tiles.col_start(m)
        k_cols, v_cols = _rows(k, col, tiles.cols).astype(wide), _rows(v, col, tiles.cols).astype(wide)

        def differentiate_tile(n, carry):
            dq, dk_cols, dv_cols, dbias = carry
            row = tiles.row_start(n)
            q_rows = _rows(q, row, tiles.rows).astype(wide) * call.scale
            dout_rows = _rows(dout, row, tiles.rows).astype(wide)
            scores = _product("nrd,ncd->nrc", q_rows, k_cols)
            scores = _with_bias(call, tiles, scores, bias, row, col) - _rows(lse, row, tiles.rows)
            unseen = hidden(row, col, m * tiles.cols, n * tiles.rows)
            weights = jnp.where(unseen, 0.0, jnp.exp(scores).reshape(tiles.per_head)).reshape(scores.shape)
            dweights = _product("nre,nce->nrc", dout_rows, v_cols)
            dscores = weights * (dweights - _rows(delta, row, tiles.rows))
            if dbias is not None:
                dbias = _add_to_bias(dbias, dscores.reshape(tiles.per_head), row, col)
            dq = _store_rows(dq, _rows(dq, row, tiles.rows) + _product("nrc,ncd->nrd", dscores, k_cols), row)
            dk_cols += _product("nrc,nrd->ncd", dscores, q_rows)
            dv_cols += _product("nrc,nre->nce", weights, dout_rows)
            return dq, dk_cols, dv_cols, dbias

        start = dq, jnp.zeros_like(k_cols), jnp.zeros_like(v_cols), dbias
        dq, dk_cols, dv_cols, dbias = lax.fori_loop(*tiles.seeing(m), differentiate_tile, start)
        return dq, _add_cols(dk, dk_cols, col), _add_cols(dv, dv_cols, col), dbias

    start = *(jnp.zeros_like(x, wide) for x in (q, k, v)), jnp.zeros_like(bias, wide) if call.bias_grad else None
    dq, dk, dv, dbias = lax.fori_loop(0, tiles.col_blocks, differentiate_cols, start)
    dk, dv = (x.reshape(call.b, call.h_kv, *x.shape[2:]).swapaxes(1, 2) for x in (dk, dv))
    return _ungrouped(call, dq * call.scale), dk, dv, dbias


@dataclasses.dataclass(frozen=True)
class _Tiles:
    """How scores `[t, s]` are cut: `rows` by `cols` a tile, `row_blocks` by `col_blocks` of them, the last ones
    overlapping."""

    call: SdpaCall
    rows: int
    cols: int

    @classmethod
    def of(cls, call: SdpaCall) -> _Tiles:
        cols = max(1, min(call.s, KEY_ROWS))
        rows = min(max(TILE_SCORES // (cols * max(1, call.b * call.h_q)), QUERY_ROWS[0]), QUERY_ROWS[1])
        return cls(call, max(1, min(call.t, rows)), cols)

    @property
    def row_blocks(self) -> int:
        return -(-self.call.t // self.rows)

    @property
    def col_blocks(self) -> int:
        return -(-self.call.s // self.cols)

    @property
    def per_head(self) -> tuple[int, ...]:
        """Shape of a tile of all heads, `[b, h_q, rows, cols]`."""
        return self.call.b, self.call.h_q, self.rows, self.cols

    def row_start(self, n: Any) -> Any:
        """First query of row block n."""
        return jnp.minimum(n * self.rows, self.call.t - self.rows)

    def col_start(self, m: Any) -> Any:
        """First key of column block m."""
        return jnp.minimum(m * self.cols, self.call.s - self.cols)

    def seen_from(self, row: Any) -> tuple[Any, Any]:
        """Range of column blocks with a key that some query of the block starting at `row` may see."""
        first: Any = 0
        last: Any = self.col_blocks
        if self.call.causal:
            last = jnp.minimum(last, (row + self.rows - 1) // self.cols + 1)
        if self.call.window is not None:
            left, right = self.call.window
            first = jnp.maximum(first, (row - left) // self.cols)
            last = jnp.minimum(last, (row + self.rows - 1 + right) // self.cols + 1)
        return first, last

    def seeing(self, m: Any) -> tuple[Any, Any]:
        """Range of row blocks with a query that may see some key of column block m."""
        first: Any = 0
        last: Any = self.row_blocks
        if self.call.causal:
            first = m * self.cols // self.rows
        if self.call.window is not None:
            left, right = self.call.window
            first = jnp.maximum(first, (m * self.cols - right) // self.rows)
            last = jnp.minimum(last, ((m + 1) * self.cols - 1 + left) // self.rows + 1)
        return first, last


def _hidden(
    call: SdpaCall,
    tiles: _Tiles,
    mask: Array | None,
    query_lengths: Array | None,
    key_lengths: Array | None,
    row: Any,
    col: Any,
    new_col: Any,
    new_row: Any = None,
) -> Array:
    """What the tile at (row, col) must leave out, bool, broadcastable to `[b, h_q, rows, cols]`.

    That is what the call hides, and keys before `new_col` and queries before `new_row`, which an earlier tile has had.
    """
    i = row + lax.broadcasted_iota(jnp.int32, (1, 1, tiles.rows, tiles.cols), 2)
    j = col + lax.broadcasted_iota(jnp.int32, (1, 1, tiles.rows, tiles.cols), 3)
    hidden = jnp.zeros(i.shape, bool)
    if call.s % tiles.cols:
        hidden |= j < new_col
    if new_row is not None and call.t % tiles.rows:
        hidden |= i < new_row
    if call.causal:
        hidden |= j > i
    if call.window is not None:
        hidden |= (j < i - call.window[0]) | (j > i + call.window[1])
    if query_lengths is not None:
        hidden |= i >= query_lengths[:, None, None, None]
    if key_lengths is not None:
        hidden |= j >= key_lengths[:, None, None, None]
    if mask is not None:
        hidden |= ~_operand_tile(tiles, mask, row, col)
    return hidden


def _with_bias(call: SdpaCall, tiles: _Tiles, scores: Array, bias: Array | None, row: Any, col: Any) -> Array:
    """Scores `[n, group · rows, cols]` plus the bias."""
    if bias is None:
        return scores
    part = _operand_tile(tiles, bias, row, col).astype(scores.dtype)
    return (scores.reshape(tiles.per_head) + part).reshape(scores.shape)


def _operand_tile(tiles: _Tiles, x: Array, row: Any, col: Any) -> Array:
    """The part of a bias or mask that broadcasts to the tile `[b, h_q, rows, cols]` at (row, col)."""
    for axis, start, size in ((2, row, tiles.rows), (3, col, tiles.cols)):
        if x.shape[axis] != 1:
            x = lax.dynamic_slice_in_dim(x, start, size, axis)
    return x


def _add_to_bias(dbias: Array, dscores: Array, row: Any, col: Any) -> Array:
    """Add a tile of score gradients `[b, h_q, rows, cols]` to the bias gradient, summed over the bias's axes of size
    1."""
    repeated = tuple(axis for axis, n in enumerate(dbias.shape) if n == 1)
    part = dscores.sum(repeated, keepdims=True)
    at = (0, 0, row if dbias.shape[2] != 1 else 0, col if dbias.shape[3] != 1 else 0)
    return lax.dynamic_update_slice(dbias, lax.dynamic_slice(dbias, at, part.shape) + part, at)


def _grouped(call: SdpaCall, x: Array) -> Array:
    """`[b, t, h_q, n]` as `[b · h_kv, group, t, n]`: the query heads of a key-value head together."""
    return x.swapaxes(1, 2).reshape(call.b * call.h_kv, call.group, call.t, x.shape[-1])


def _grouped_keys(x: Array) -> Array:
    """`[b, s, h_kv, n]` as `[b · h_kv, 1, s, n]`."""
    b, s, h_kv, n = x.shape
    return x.swapaxes(1, 2).reshape(b * h_kv, 1, s, n)


def _ungrouped(call: SdpaCall, x: Array) -> Array:
    """`[b · h_kv, group, t, n]` as `[b, t, h_q, n]`."""
    return x.reshape(call.b, call.h_q, call.t, x.shape[-1]).swapaxes(1, 2)


def _rows(x: Array, start: Any, size: int) -> Array:
    """`[n, group · size, ·]`: positions `start` … `start + size − 1` of x `[n, group, length, ·]`."""
    part = lax.dynamic_slice_in_dim(x, start, size, 2)
    return part.reshape(x.shape[0], x.shape[1] * size, x.shape[3])


def _store_rows(x: Array, rows: Array, start: Any) -> Array:
    """x `[n, group, length, ·]` with `rows` `[n, group · size, ·]` written at `start`."""
    part = rows.reshape(x.shape[0], x.shape[1], rows.shape[1] // x.shape[1], x.shape[3])
    return lax.dynamic_update_slice_in_dim(x, part, start, 2)


def _add_cols(x: Array, cols: Array, start: Any) -> Array:
    """x `[n, 1, s, ·]` with `cols` `[n, size, ·]` added at `start`."""
    return _store_rows(x, _rows(x, start, cols.shape[1]) + cols, start)


def _product(equation: str, a: Array, b: Array) -> Array:
    """A matrix product in full precision (no TF32)."""
    return jnp.einsum(equation, a, b, precision=lax.Precision.HIGHEST)
