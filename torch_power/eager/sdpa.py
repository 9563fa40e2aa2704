"""Scaled dot-product attention in plain tensor operations, block by block: memory linear in t, forward and backward.

A tile of scores is `QUERY_ROWS` queries by `KEY_ROWS` keys. The forward pass keeps a running maximum m, sum l and
weighted sum of values for each query (online softmax: Milakov & Gimelshein 2018; Dao et al., "FlashAttention", 2022),
and hands on only the output and the log-sum-exp L = m + log l. The backward pass makes each tile of weights P = exp(S −
L) again:

    dV = Pᵀ dO      dP = dO Vᵀ      dS = P ∘ (dP − δ),  δ = rowsum(dO ∘ O)      dQ = scale · dS K      dK = scale · dSᵀ
    Q

A query that sees no key has L = −∞, output 0 and no gradient.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from bridge import spec_sdpa
from bridge.spec_sdpa import SdpaCall
from torch_power.eager import dropout
from torch_power.layout import rows_like

# Tile of scores: the fastest of five sizes tried once with a prototype of these loops (two CPU cores, float32, d = 64,
# t = 4096, 8 heads, a busy machine). Smaller and equal-sided ones were close; 1024 × 1024, which leaves level 3, was
# clearly slower.
QUERY_ROWS, KEY_ROWS = 256, 512
# Scores held at once, over all heads of a tile: 2^20 float32 are 4 MB, half of level 3.
TILE_SCORES = 2**20


def supports(call: SdpaCall, device: str) -> str | None:
    """Any call on any device."""
    return None


def forward(
    call: SdpaCall, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, mask: Tensor | None, seed: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of checked operands.

    Args:
      q: `[b, h_q, t, d]`; k: `[b, h_kv, s, d]`; v: `[b, h_kv, s, e]`, any strides.
      bias: added to the scores; mask: bool, False hides a key. Both `[b, h_q, t, s]`, each axis the full size or 1.
      seed: int64 `[b]`, what dropout's random bits are made from; None without dropout.
    Returns:
      out `[b, h_q, t, e]` (stored as q is) and the log-sum-exp of each row `[b, h_q, t]`, in the compute
      dtype.
    """
    wide = getattr(torch, call.compute_dtype)
    out = rows_like(q, call.e, wide)
    lse = q.new_empty(call.b, call.h_q, call.t, dtype=wide)
    for heads in _head_blocks(call):
        for rows in _blocks(call.t, heads.query_rows):
            q_rows = heads.queries(q, rows).to(wide) * call.scale
            top = q_rows.new_full((*q_rows.shape[:2], 1), -torch.inf)
            total = torch.zeros_like(top)
            values = q_rows.new_zeros(*q_rows.shape[:2], call.e)
            for cols in _visible_blocks(call, rows):
                scores = torch.bmm(q_rows, heads.keys(k, cols).to(wide).mT)
                _hide(call, heads.per_head(scores), heads, rows, cols, bias, mask)
                new_top = torch.maximum(top, scores.amax(-1, keepdim=True))
                # A row that has seen no key yet has top −∞; any finite reference leaves its weights exp(−∞) = 0.
                reference = torch.where(new_top == -torch.inf, 0.0, new_top)
                weights = scores.sub_(reference).exp_()
                shrink = torch.exp(top - reference)
                total = total.mul_(shrink).add_(weights.sum(-1, keepdim=True))
                if seed is not None:
                    weights *= _dropout_gains(call, heads, rows, cols, seed, weights)
                values = values.mul_(shrink).baddbmm_(weights, heads.keys(v, cols).to(wide))
                top = new_top
            values /= torch.where(total == 0, 1.0, total)
            heads.at(out, rows).copy_(heads.per_head(values))
            heads.at(lse[..., None], rows).copy_(heads.per_head(top + total.log()))
    return out, lse


def backward(
    call: SdpaCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    seed: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients dq, dk, dv of Σ out·dout in the dtypes of q, k, v, and dbias in bias's own if `call.bias_grad`, else
    None."""
    wide = lse.dtype
    dq = torch.zeros(q.shape, dtype=wide, device=q.device)
    dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
    dbias = torch.zeros(bias.shape, dtype=wide, device=q.device) if call.bias_grad else None
    minus_delta = (dout.to(wide) * out).sum(-1, keepdim=True).neg_()
    # exp(S − L) of a row that saw no key must be 0, not exp(−∞ + ∞).
    minus_lse = torch.where(lse == -torch.inf, torch.inf, lse).neg_()[..., None]
    for heads in _head_blocks(call):
        for cols in _blocks(call.s, KEY_ROWS):
            k_cols, v_cols = heads.keys(k, cols).to(wide), heads.keys(v, cols).to(wide)
            dk_cols, dv_cols = torch.zeros_like(k_cols), torch.zeros_like(v_cols)
            for rows in _seeing_blocks(call, cols, heads.query_rows):
                q_rows = heads.queries(q, rows).to(wide) * call.scale
                dout_rows = heads.queries(dout, rows).to(wide)
                weights = torch.baddbmm(heads.queries(minus_lse, rows), q_rows, k_cols.mT)
                _hide(call, heads.per_head(weights), heads, rows, cols, bias, mask)
                weights.exp_()
                if seed is None:
                    dv_cols.baddbmm_(weights.mT, dout_rows)
                    dscores = torch.baddbmm(heads.queries(minus_delta, rows), dout_rows, v_cols.mT).mul_(weights)
                else:
                    gains = _dropout_gains(call, heads, rows, cols, seed, weights)
                    dv_cols.baddbmm_((weights * gains).mT, dout_rows)
                    dweights = torch.bmm(dout_rows, v_cols.mT).mul_(gains)
                    dscores = dweights.add_(heads.queries(minus_delta, rows)).mul_(weights)
                if dbias is not None:
                    part = heads.operand(dbias, rows, cols)
                    part += heads.per_head(dscores).sum_to_size(part.shape)
                dk_cols.baddbmm_(dscores.mT, q_rows)
                heads.at(dq, rows).add_(heads.per_head(torch.bmm(dscores, k_cols)))
            dk[heads.batch, heads.kv_heads, cols] = dk_cols.unflatten(0, (heads.batches, -1))
            dv[heads.batch, heads.kv_heads, cols] = dv_cols.unflatten(0, (heads.batches, -1))
    return (dq * call.scale).to(q.dtype), dk, dv, None if dbias is None else dbias.to(bias.dtype)


@dataclasses.dataclass(frozen=True)
class _Heads:
    """The batch elements and heads that one tile spans, and views of operands on them.

    In a tile, a key-value head and its `group` query heads are one matrix of `group · rows` queries, so keys and values
    are never repeated.
    """

    call: SdpaCall
    batch: slice
    kv_heads: slice
    query_rows: int

    @property
    def batches(self) -> int:
        return self.batch.stop - self.batch.start

    @property
    def q_heads(self) -> slice:
        return slice(self.kv_heads.start * self.call.group, self.kv_heads.stop * self.call.group)

    def at(self, x: Tensor, rows: slice) -> Tensor:
        """View `[batches, heads, rows, n]` of x `[b, h_q, t, n]`."""
        return x[self.batch, self.q_heads, rows]

    def queries(self, x: Tensor, rows: slice) -> Tensor:
        """`[batches · kv heads, group · rows, n]` of x `[b, h_q, t, n]`."""
        kv_heads = self.kv_heads.stop - self.kv_heads.start
        return self.at(x, rows).reshape(
            self.batches * kv_heads, self.call.group * (rows.stop - rows.start), x.shape[-1]
        )

    def keys(self, x: Tensor, cols: slice) -> Tensor:
        """`[batches · kv heads, cols, n]` of x `[b, h_kv, s, n]`."""
        return x[self.batch, self.kv_heads, cols].flatten(0, 1)

    def per_head(self, tile: Tensor) -> Tensor:
        """View a tile `[batches · kv heads, group · rows, n]` as `[batches, heads, rows, n]`."""
        q_heads = self.q_heads.stop - self.q_heads.start
        return tile.view(
            self.batches, q_heads, tile.shape[0] * tile.shape[1] // (self.batches * q_heads), tile.shape[-1]
        )

    def operand(self, x: Tensor, rows: slice, cols: slice) -> Tensor:
        """View of a bias or mask that broadcasts to `[batches, heads, rows, cols]`."""
        parts = zip((self.batch, self.q_heads, rows, cols), x.shape, strict=True)
        return x[tuple(slice(None) if size == 1 else part for part, size in parts)]


def _blocks(length: int, size: int) -> Iterator[slice]:
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _head_blocks(call: SdpaCall) -> Iterator[_Heads]:
    """Cover batch × heads with blocks whose tiles hold about `TILE_SCORES` scores; none if there is no query."""
    if call.b * call.h_q * call.t == 0:
        return
    query_rows = max(16, QUERY_ROWS // call.group)
    tile = call.group * min(query_rows, call.t) * max(1, min(KEY_ROWS, call.s))
    heads = min(call.h_kv, max(1, TILE_SCORES // tile))
    batches = max(1, TILE_SCORES // (tile * heads)) if heads == call.h_kv else 1
    for batch in _blocks(call.b, batches):
        for kv_heads in _blocks(call.h_kv, heads):
            yield _Heads(call, batch, kv_heads, query_rows)


def _band(call: SdpaCall) -> tuple[int, int]:
    """Query i sees keys i − left … i + right at most; as many as there are tokens where nothing says less."""
    left, right = call.window or (call.t, call.s)
    return left, min(right, 0) if call.causal else right


def _visible_blocks(call: SdpaCall, rows: slice) -> Iterator[slice]:
    """Blocks of keys that some query of `rows` may see."""
    left, right = _band(call)
    for cols in _blocks(min(call.s, rows.stop + right), KEY_ROWS):
        if cols.stop > rows.start - left:
            yield cols


def _seeing_blocks(call: SdpaCall, cols: slice, query_rows: int) -> Iterator[slice]:
    """Blocks of queries that may see some key of `cols`."""
    left, right = _band(call)
    for rows in _blocks(call.t, query_rows):
        if rows.stop + right > cols.start and cols.stop > rows.start - left:
            yield rows


def _hide(
    call: SdpaCall, scores: Tensor, heads: _Heads, rows: slice, cols: slice, bias: Tensor | None, mask: Tensor | None
) -> None:
    """Add the bias to scores `[batches, heads, rows, cols]` and set those of hidden keys to −∞, in place."""
    if bias is not None:
        scores += heads.operand(bias, rows, cols)
    if mask is not None:
        scores.masked_fill_(heads.operand(mask, rows, cols).logical_not(), -torch.inf)
    left, right = _band(call)
    query = torch.arange(rows.start, rows.stop, device=scores.device)[:, None]
    key = torch.arange(cols.start, cols.stop, device=scores.device)
    if cols.stop - 1 > rows.start + right:
        scores.masked_fill_(key > query + right, -torch.inf)
    if cols.start < rows.stop - 1 - left:
        scores.masked_fill_(key < query - left, -torch.inf)


def _dropout_gains(call: SdpaCall, heads: _Heads, rows: slice, cols: slice, seed: Tensor, like: Tensor) -> Tensor:
    """What dropout multiplies a tile of weights by, 0 or 1/(1 − p), in the tile's shape and dtype."""
    kept = dropout.keep(seed[heads.batch], heads.q_heads, rows, cols, call.dropout_p)
    return kept.reshape(like.shape).to(like.dtype).mul_(spec_sdpa.dropout_gain(call.dropout_p))
