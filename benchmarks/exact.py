"""Float64 results to hold a contestant to at any length, in time and memory linear in t.

The upstream gradient is zero but for a few rows of the output. Then those rows decide every gradient, and with n of
them the O(t²) sums shrink to O(n·t): the check covers dk, dv and dlog_g of all tokens, at the length that is timed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

ROWS = 32


def sampled_rows(t: int, seed: int = 0) -> np.ndarray:
    """Up to `ROWS` distinct rows in order: the second, the last, and random ones between.

    The first sees itself alone. Its exact dq is 0, and what is computed is rounding divided by its score: where that happens
    to be small (cosine 1e-3 at t = 16384), the row would decide the error of the whole sample.
    """
    inner = np.random.default_rng(seed).permutation(np.arange(2, max(t - 1, 2)))[: ROWS - 2]
    return np.unique(np.concatenate([[min(1, t - 1), t - 1], inner])).astype(np.int64)


def keep_rows(dy: np.ndarray, rows: Sequence[int] | np.ndarray) -> np.ndarray:
    """`dy` `[b, t, h, e]` with every other row zero."""
    kept = np.zeros_like(dy)
    kept[:, rows] = dy[:, rows]
    return kept


def power(arrays: Mapping[str, np.ndarray], rows: np.ndarray, *, deg: int) -> dict[str, np.ndarray]:
    """Causal, normalised power attention: `y` of `rows`, and dq dk dv [dlog_g] for a `dy` that is zero elsewhere.

    w_ij = (<q_i, k_j>/√d)^p exp(G_i − G_j),  y_i = Σ_j w_ij v_j / Σ_j w_ij,  dlog_g_m = Σ_{i ≥ m > j} w_ij dw_ij
    """
    x = {name: array.astype(np.float64) for name, array in arrays.items()}
    found = _zeros(x, rows)
    scale = x["q"].shape[-1] ** -0.5
    for b, h, kv in _heads(x):
        q, k, v, dy = x["q"][b, rows, h], x["k"][b, :, kv], x["v"][b, :, kv], x["dy"][b, rows, h]
        decay = _visible(rows, len(k))
        if "log_g" in x:
            total = np.cumsum(x["log_g"][b, :, kv])
            # Above the diagonal the exponent is positive and its exponential could overflow before it is dropped.
            decay = decay * np.exp(np.minimum(total[rows, None] - total, 0.0))
        scores = scale * q @ k.T
        weights = scores**deg * decay
        norm = weights.sum(-1, keepdims=True)
        y = weights @ v / norm
        dweights = (dy @ v.T - (dy * y).sum(-1, keepdims=True)) / norm
        dscores = scale * deg * scores ** (deg - 1) * decay * dweights
        found["y"][b, :, h] = y
        found["dq"][b, rows, h] = dscores @ k
        found["dk"][b, :, kv] += dscores.T @ q
        found["dv"][b, :, kv] += (weights / norm).T @ dy
        if "log_g" in x:
            pairs = weights * dweights
            before = (np.cumsum(pairs, 1) - pairs) * _visible(rows, len(k))
            found["dlog_g"][b, :, kv] += before.sum(0)
    return found


def sdpa(arrays: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    """Causal softmax attention at scale 1/√d: `y` of `rows`, and dq dk dv for a `dy` that is zero elsewhere."""
    x = {name: array.astype(np.float64) for name, array in arrays.items() if name != "log_g"}
    found = _zeros(x, rows)
    scale = x["q"].shape[-1] ** -0.5
    for b, h, kv in _heads(x):
        q, k, v, dy = x["q"][b, rows, h], x["k"][b, :, kv], x["v"][b, :, kv], x["dy"][b, rows, h]
        scores = np.where(_visible(rows, len(k)) > 0, scale * q @ k.T, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        y = weights @ v
        dscores = scale * weights * (dy @ v.T - (dy * y).sum(-1, keepdims=True))
        found["y"][b, :, h] = y
        found["dq"][b, rows, h] = dscores @ k
        found["dk"][b, :, kv] += dscores.T @ q
        found["dv"][b, :, kv] += weights.T @ dy
    return found


def _heads(x: Mapping[str, np.ndarray]) -> list[tuple[int, int, int]]:
    """(batch element, query head, the key-value head it reads)."""
    (b, _, h_q, _), h_kv = x["q"].shape, x["k"].shape[2]
    return [(i, h, h // (h_q // h_kv)) for i in range(b) for h in range(h_q)]


def _visible(rows: np.ndarray, t: int) -> np.ndarray:
    return (np.arange(t) <= rows[:, None]).astype(np.float64)


def _zeros(x: Mapping[str, np.ndarray], rows: np.ndarray) -> dict[str, Any]:
    zeros = {f"d{name}": np.zeros_like(x[name]) for name in ("q", "k", "v", "log_g") if name in x}
    return zeros | {"y": np.zeros_like(x["dy"][:, rows])}
