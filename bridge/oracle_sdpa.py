"""Float64 NumPy oracle of scaled dot-product attention and its gradients, written to be read.

Every implementation in both twins is held to these functions. They hold all t · s weights, take any floating inputs and
convert them to float64 first, so that they see the same rounded values.

    S_ij = scale · <q_i, k_j> + bias_ij,     P_ij = exp(S_ij) / Σ_j exp(S_ij) over the keys j that i sees,     y_i = Σ_j
    P_ij v_j
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from bridge import spec_sdpa


class SdpaResult(NamedTuple):
    """y `[b, t, h_q, e]` and the log-sum-exp of every row of scores, lse `[b, t, h_q]`: −∞ where no key is seen."""

    y: np.ndarray
    lse: np.ndarray


class SdpaGrads(NamedTuple):
    """Gradients of Σ y·dy in the shapes of the inputs; `dbias` is None without a bias."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dbias: np.ndarray | None


def visible_keys(
    t: int,
    s: int,
    mask: np.ndarray | None = None,
    *,
    causal: bool = False,
    window: tuple[int, int] | None = None,
    query_lengths: np.ndarray | None = None,
    key_lengths: np.ndarray | None = None,
) -> np.ndarray:
    """Whether query i sees key j: bool, broadcastable to `[b, h_q, t, s]`. `window` = (left, right): i − left ≤ j ≤ i +
    right."""
    i, j = np.arange(t)[:, None], np.arange(s)
    visible = np.ones((1, 1, t, s), bool)
    if causal:
        visible = visible & (j <= i)
    if window is not None:
        visible = visible & (i - window[0] <= j) & (j <= i + window[1])
    if query_lengths is not None:
        visible = visible & (i < np.asarray(query_lengths)[:, None, None, None])
    if key_lengths is not None:
        visible = visible & (j < np.asarray(key_lengths)[:, None, None, None])
    return visible if mask is None else visible & np.asarray(mask)


def dropout_gains(seed: np.ndarray, h_q: int, t: int, s: int, dropout_p: float) -> np.ndarray:
    """What dropout multiplies each weight by, 0 or 1/(1 − p): `[b, h_q, t, s]` for one 64-bit seed a batch element.

    Philox 4×32 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011) in unsigned 64-bit arithmetic:
    counter (key // 4, query, head, 0), key the two halves of the seed; word `key % 4` is kept if at least round(p ·
    2³²).
    """
    low, shift = np.uint64(0xFFFFFFFF), np.uint64(32)
    seed = np.asarray(seed).astype(np.uint64).reshape(-1, 1, 1, 1)
    shape = (seed.shape[0], h_q, t, -(-s // 4))
    _, head, query, quad = (axis.astype(np.uint64) for axis in np.indices(shape))
    words: tuple[np.ndarray, ...] = (quad, query, head, np.zeros_like(quad))
    keys: tuple[np.ndarray, ...] = (seed & low, seed >> shift)
    for _ in range(spec_sdpa.PHILOX_ROUNDS):
        first = words[0] * np.uint64(spec_sdpa.PHILOX_MULTIPLIERS[0])
        second = words[2] * np.uint64(spec_sdpa.PHILOX_MULTIPLIERS[1])
        words = (second >> shift) ^ words[1] ^ keys[0], second & low, (first >> shift) ^ words[3] ^ keys[1], first & low
        keys = tuple((key + np.uint64(step)) & low for key, step in zip(keys, spec_sdpa.PHILOX_STEPS, strict=True))
    bits = np.stack(words, -1).reshape(*shape[:3], -1)[..., :s]
    return (bits >= spec_sdpa.dropout_threshold(dropout_p)) * spec_sdpa.dropout_gain(dropout_p)


def sdpa(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    scale: float | None = None,
    gains: np.ndarray | None = None,
    empty_rows: str = "zero",
    **visibility: Any,
) -> SdpaResult:
    """Attention of q `[b, t, h_q, d]`, k `[b, s, h_kv, d]`, v `[b, s, h_kv, e]`, bias and mask `[b, h_q, t, s]` or
    broadcast.

    Args:
      gains: what dropout multiplies the weights by, from `dropout_gains`.
      empty_rows: what a query that sees no key gets: "zero", as in PyTorch, or "mean", as in JAX: the mean of all s
        values (JAX hides a key with a large finite score), but 0 where a query length excludes the query.
      visibility: `causal`, `window`, `query_lengths`, `key_lengths` of `visible_keys`.
    """
    q, k, v = _per_query_head(q, k, v)
    weights, lse = _weights(q, k, bias, mask, scale, visibility)
    weights = weights * (1.0 if gains is None else gains) + _mean_weights(lse, k.shape[2], empty_rows, visibility)
    return SdpaResult(np.swapaxes(weights @ v, 1, 2), np.swapaxes(lse, 1, 2))


def sdpa_grads(
    q: Any,
    k: Any,
    v: Any,
    bias: Any = None,
    mask: Any = None,
    *,
    dy: Any,
    scale: float | None = None,
    gains: np.ndarray | None = None,
    empty_rows: str = "zero",
    **visibility: Any,
) -> SdpaGrads:
    """Gradients of Σ y·dy, by hand, for `y` and arguments as in `sdpa`.

        dV = Pᵀ dY        dP = dY Vᵀ        dS = P ∘ (dP − rowsum(P ∘ dP))        dQ = scale · dS K        dK = scale ·
        dSᵀ Q

    A bias of fewer rows, columns, heads or batch elements gets the sum over those it was repeated for, and a key-value
    head the sum over the query heads that read it.
    """
    shapes = [np.shape(x) for x in (q, k, v)]
    q, k, v = _per_query_head(q, k, v)
    dy = np.swapaxes(np.asarray(dy).astype(np.float64), 1, 2)
    gains = np.ones(()) if gains is None else gains
    weights, lse = _weights(q, k, bias, mask, scale, visibility)
    mean_weights = _mean_weights(lse, k.shape[2], empty_rows, visibility)

    dv = np.swapaxes(weights * gains + mean_weights, 2, 3) @ dy
    dweights = (dy @ np.swapaxes(v, 2, 3)) * gains
    dscores = weights * (dweights - (weights * dweights).sum(-1, keepdims=True))
    scale = spec_sdpa.default_scale(q.shape[-1]) if scale is None else scale
    dq = scale * dscores @ k
    dk = scale * np.swapaxes(dscores, 2, 3) @ q
    dq, dk, dv = (_of_own_heads(x, shape) for x, shape in zip((dq, dk, dv), shapes, strict=True))
    if bias is None:
        return SdpaGrads(dq, dk, dv, None)
    repeated = tuple(axis for axis, n in enumerate(np.shape(bias)) if n == 1)
    return SdpaGrads(dq, dk, dv, dscores.sum(repeated, keepdims=True))


def _per_query_head(q: Any, k: Any, v: Any) -> list[np.ndarray]:
    """q, k, v as float64 `[b, h_q, length, size]`, key-value heads repeated: query head i reads head i // (h_q //
    h_kv)."""
    heads = q.shape[2]
    wide = (np.swapaxes(np.asarray(x).astype(np.float64), 1, 2) for x in (q, k, v))
    return [np.repeat(x, heads // max(x.shape[1], 1), 1) for x in wide]


def _of_own_heads(dx: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """`[b, h_q, length, size]` summed over the query heads of a group and brought to `shape` `[b, length, heads,
    size]`."""
    b, length, heads, size = shape
    return np.swapaxes(dx.reshape(b, heads, dx.shape[1] // max(heads, 1), length, size).sum(2), 1, 2)


def _weights(
    q: np.ndarray, k: np.ndarray, bias: Any, mask: Any, scale: float | None, visibility: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    """P `[b, h_q, t, s]`, rows of zeros where no key is seen, and the log-sum-exp `[b, h_q, t]`, −∞ there."""
    scale = spec_sdpa.default_scale(q.shape[-1]) if scale is None else scale
    # An empty product of vectors of size 0 is 0, whatever it is then multiplied by.
    scores = scale * (q @ np.swapaxes(k, 2, 3)) if q.shape[-1] else np.zeros((*q.shape[:3], k.shape[2]))
    if bias is not None:
        scores = scores + np.asarray(bias).astype(np.float64)
    scores = np.where(visible_keys(q.shape[2], k.shape[2], mask, **visibility), scores, -np.inf)
    top = scores.max(-1, keepdims=True, initial=-np.inf)
    unnormalised = np.exp(scores - np.where(top == -np.inf, 0.0, top))
    total = unnormalised.sum(-1, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (top + np.log(total))[..., 0]
    return unnormalised / np.where(total == 0, 1.0, total), lse


def _mean_weights(lse: np.ndarray, s: int, empty_rows: str, visibility: dict[str, Any]) -> np.ndarray | float:
    """Weights that rows without a key have by the convention `empty_rows`: 1/s in "mean", but in rows that a length
    excludes."""
    if empty_rows == "zero" or s == 0:
        return 0.0
    counted = visible_keys(lse.shape[2], s, query_lengths=visibility.get("query_lengths"))
    return ((lse == -np.inf)[..., None] & counted) / s
