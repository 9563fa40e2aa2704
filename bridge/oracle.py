"""Float64 NumPy oracle of power attention, written to be read: the O(t²) sum, its gradients, and the recurrence.

Everything else in this project is held to these functions. They follow the formulas literally, head by head, without
blocking, and take any floating inputs, which they convert to float64 first (so they see the same rounded values).

    w_ij = (scale · <q_i, k_j>)^p · exp(G_i − G_j)  for j ≤ i,       y_i = Σ_j w_ij v_j / Σ_j w_ij

With an initial state (S, z), token i also sees everything before the sequence through
<ψ(scale·q_i), S> exp(G_i) and <ψ(scale·q_i), z> exp(G_i), G_i counting every gate up to i, the first included.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64

from bridge import spec

Array = Float64[np.ndarray, "..."]


class PowerResult(NamedTuple):
    """y `[b, t, h_q, e]` and the state after the last token, s `[b, h_kv, D, e]` and z `[b, h_kv, D]` (None without one)."""

    y: np.ndarray
    s: np.ndarray | None
    z: np.ndarray | None


class PowerGrads(NamedTuple):
    """Gradients of Σ y·dy + Σ s·ds + Σ z·dz; `dlog_g`, `ds0`, `dz0` are None where the call had no such argument."""

    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray
    dlog_g: np.ndarray | None
    ds0: np.ndarray | None
    dz0: np.ndarray | None


def sympow(x: Float64[np.ndarray, "... d"], deg: int) -> Float64[np.ndarray, "... D"]:
    """φ_p(x): for every tile tuple I_1 ≤ … ≤ I_p, in order, the flattened outer product x[I_1] ⊗ … ⊗ x[I_p]."""
    x = np.asarray(x, np.float64)
    tile = spec.check_head_size(x.shape[-1], deg)
    tiles = x.reshape(*x.shape[:-1], x.shape[-1] // tile, tile)
    blocks = []
    for tile_tuple in spec.tile_tuples(x.shape[-1], deg):
        block = np.ones((*x.shape[:-1], 1))
        for index in tile_tuple:
            block = (block[..., :, None] * tiles[..., None, index, :]).reshape(*x.shape[:-1], tile * block.shape[-1])
        blocks.append(block)
    return np.concatenate(blocks, -1)


def sympow_transposed_jacobian(x: np.ndarray, dphi: np.ndarray, deg: int) -> np.ndarray:
    """Σ_r dφ_r ∂φ_r/∂x for dφ `[..., D]`: the gradient that reaches x `[..., d]` through φ(x)."""
    d, tile = x.shape[-1], spec.POWER_TILE[deg]
    tiles, dx = x.reshape(*x.shape[:-1], d // tile, tile), np.zeros((*x.shape[:-1], d // tile, tile))
    letters = "abcd"[:deg]
    blocks = dphi.reshape(*x.shape[:-1], len(spec.tile_tuples(d, deg)), *[tile] * deg)
    for n, tile_tuple in enumerate(spec.tile_tuples(d, deg)):
        for slot, index in enumerate(tile_tuple):
            others = [(tiles[..., tile_tuple[r], :], letters[r]) for r in range(deg) if r != slot]
            subscripts = ",".join([f"...{letters}"] + [f"...{letter}" for _, letter in others])
            block = blocks[(..., n) + (slice(None),) * deg]
            dx[..., index, :] += np.einsum(f"{subscripts}->...{letters[slot]}", block, *[x for x, _ in others])
    return dx.reshape(x.shape)


def _as_float64(*arrays: Any) -> list[Any]:
    return [None if x is None else np.asarray(x).astype(np.float64) for x in arrays]


def _decay(log_g: np.ndarray | None, t: int) -> np.ndarray | float:
    """exp(G_i − G_j) `[t, t]` for one head, summed between j and i so that no digits of a large G are lost; 1 without gates."""
    if log_g is None:
        return 1.0
    exponent = np.zeros((t, t))
    for j in range(t):
        exponent[j + 1 :, j] = np.cumsum(log_g[j + 1 :])
    return np.exp(np.tril(exponent))


def power(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = True,
    initial_state: tuple[Any, Any] | None = None,
    return_state: bool = False,
) -> PowerResult:
    """Power attention by the O(t²) sum. Shapes as in `power_attention`; everything returned is float64."""
    call = spec.check_power(
        q, k, v, log_g, deg=deg, scale=scale, causal=causal, normalize=normalize, form="attention",
        initial_state=initial_state, return_state=return_state,
    )  # fmt: skip
    s0, z0 = initial_state or (None, None)
    q, k, v, log_g, s0, z0 = _as_float64(q, k, v, log_g, s0, z0)
    y = np.zeros((call.b, call.t, call.h_q, call.e))
    for b, h in np.ndindex(call.b, call.h_q):
        num, norm, *_ = _head(call, q, k, v, log_g, s0, z0, b, h)
        y[b, :, h] = np.divide(num, norm[:, None], out=np.zeros_like(num), where=norm[:, None] != 0) if normalize else num
    return PowerResult(y, *(_final_state(call, k, v, log_g, s0, z0) if return_state else (None, None)))


def _head(call: spec.PowerCall, q: Any, k: Any, v: Any, log_g: Any, s0: Any, z0: Any, b: int, h: int) -> tuple[Any, ...]:
    """Numerators, normalisers, scores, decays and the exponential of G of one query head."""
    kv = h // call.group
    scores = call.scale * q[b, :, h] @ k[b, :, kv].T
    decay = _decay(None if log_g is None else log_g[b, :, kv], call.t)
    if call.causal:
        decay = np.tril(np.ones((call.t, call.t)) * decay)
    weights = scores**call.deg * decay
    num, norm = weights @ v[b, :, kv], weights.sum(-1)
    growth = np.ones(call.t) if log_g is None else np.exp(np.cumsum(log_g[b, :, kv]))
    if s0 is not None:
        psi = growth[:, None] * _psi(call, q[b, :, h])
        num, norm = num + psi @ s0[b, kv], norm + psi @ z0[b, kv]
    return num, norm, scores, decay, growth


def _psi(call: spec.PowerCall, q: np.ndarray) -> np.ndarray:
    """ψ(scale · q): φ with every row times its multiplicity."""
    return sympow(call.scale * q, call.deg) * spec.sympow_multiplicity(call.d, call.deg)


def _final_state(call: spec.PowerCall, k: Any, v: Any, log_g: Any, s0: Any, z0: Any) -> tuple[np.ndarray, np.ndarray]:
    """S_t = exp(G_t) S_0 + Σ_j exp(G_t − G_j) φ(k_j) v_jᵀ and likewise z_t."""
    rows = spec.state_rows(call.d, call.deg)
    s, z = np.zeros((call.b, call.h_kv, rows, call.e)), np.zeros((call.b, call.h_kv, rows))
    for b, h in np.ndindex(call.b, call.h_kv):
        phi = sympow(k[b, :, h], call.deg) * _to_end(log_g, b, h, call.t_kv)[:, None]
        s[b, h], z[b, h] = phi.T @ v[b, :, h], phi.sum(0)
        if s0 is not None:
            total = 1.0 if log_g is None else np.exp(log_g[b, :, h].sum())
            s[b, h] += total * s0[b, h]
            z[b, h] += total * z0[b, h]
    return s, z


def _to_end(log_g: np.ndarray | None, b: int, h: int, t: int) -> np.ndarray:
    """exp(G_t − G_j) for every token j: the gates after it."""
    if log_g is None or t == 0:
        return np.ones(t)
    after = np.append(log_g[b, 1:, h], 0.0)
    return np.exp(np.cumsum(after[::-1])[::-1])


def power_grads(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any,
    dy: Any,
    ds: Any = None,
    dz: Any = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    causal: bool = True,
    normalize: bool = True,
    initial_state: tuple[Any, Any] | None = None,
) -> PowerGrads:
    """Hand-derived gradients of Σ y·dy (+ Σ s·ds + Σ z·dz for the final state), float64.

    With ỹ_i the numerator, n_i the normaliser: dỹ_i = dy_i / n_i and dn_i = −<dy_i, y_i> / n_i (0 where n_i = 0), then
    dw_ij = <dỹ_i, v_j> + dn_i,  dscore_ij = p · score^{p−1} · decay · dw_ij, and, as w_ij depends on every gate m with
    j < m ≤ i through exp(G_i − G_j):  dlog_g_m = Σ_{i ≥ m > j} w_ij dw_ij.
    """
    call = spec.check_power(
        q, k, v, log_g, deg=deg, scale=scale, causal=causal, normalize=normalize, form="attention",
        initial_state=initial_state, return_state=ds is not None,
    )  # fmt: skip
    s0, z0 = initial_state or (None, None)
    q, k, v, log_g, s0, z0, dy, ds, dz = _as_float64(q, k, v, log_g, s0, z0, dy, ds, dz)
    zeros: list[Any] = [None if x is None else np.zeros_like(x) for x in (q, k, v, log_g, s0, z0)]
    dq, dk, dv, dlog_g, ds0, dz0 = zeros
    for b, h in np.ndindex(call.b, call.h_q):
        kv = h // call.group
        num, norm, scores, decay, growth = _head(call, q, k, v, log_g, s0, z0, b, h)
        inverse = np.divide(1.0, norm, out=np.zeros_like(norm), where=norm != 0) if normalize else np.ones_like(norm)
        dnum = dy[b, :, h] * inverse[:, None]
        dnorm = -(dnum * num).sum(-1) * inverse if normalize else np.zeros_like(norm)
        dweights = dnum @ v[b, :, kv].T + dnorm[:, None]
        weights = scores**call.deg * decay
        dscores = call.deg * scores ** (call.deg - 1) * decay * dweights
        dq[b, :, h] += call.scale * dscores @ k[b, :, kv]
        dk[b, :, kv] += call.scale * dscores.T @ q[b, :, h]
        dv[b, :, kv] += weights.T @ dnum
        if dlog_g is not None:
            # Σ_{i ≥ m > j}: columns before m (exclusive prefix sum over j), then rows from m on (suffix sum over i).
            pairs = weights * dweights
            before = np.cumsum(pairs, 1) - pairs
            dlog_g[b, :, kv] += np.cumsum(before[::-1], 0)[::-1].diagonal()
        if s0 is not None:
            psi, multiplicity = _psi(call, q[b, :, h]), spec.sympow_multiplicity(call.d, call.deg)
            ds0[b, kv] += psi.T @ (growth[:, None] * dnum)
            dz0[b, kv] += psi.T @ (growth * dnorm)
            dpsi = growth[:, None] * (dnum @ s0[b, kv].T + dnorm[:, None] * z0[b, kv])
            dq[b, :, h] += call.scale * sympow_transposed_jacobian(call.scale * q[b, :, h], dpsi * multiplicity, call.deg)
            if dlog_g is not None:
                dlog_g[b, :, kv] += np.cumsum((psi * dpsi).sum(-1)[::-1])[::-1]
    if ds is not None:
        _final_state_grads(call, k, v, log_g, s0, z0, ds, dz, dk, dv, dlog_g, ds0, dz0)
    return PowerGrads(dq, dk, dv, dlog_g, ds0, dz0)


def _final_state_grads(
    call: spec.PowerCall, k: Any, v: Any, log_g: Any, s0: Any, z0: Any, ds: Any, dz: Any,
    dk: Any, dv: Any, dlog_g: Any, ds0: Any, dz0: Any,
) -> None:  # fmt: skip
    """Add the gradients of Σ s·ds + Σ z·dz, (s, z) = `_final_state`, to dk … dz0 in place."""
    for b, h in np.ndindex(call.b, call.h_kv):
        decay, phi = _to_end(log_g, b, h, call.t_kv), sympow(k[b, :, h], call.deg)
        dphi = decay[:, None] * (v[b, :, h] @ ds[b, h].T + dz[b, h])
        dk[b, :, h] += sympow_transposed_jacobian(k[b, :, h], dphi, call.deg)
        dv[b, :, h] += decay[:, None] * (phi @ ds[b, h])
        total = 1.0 if log_g is None else np.exp(log_g[b, :, h].sum())
        if dlog_g is not None:
            # Gate m scales every token before m, and the initial state.
            contribution = (phi * dphi).sum(-1)
            dlog_g[b, :, h] += np.cumsum(contribution) - contribution
            if s0 is not None:
                dlog_g[b, :, h] += total * ((ds[b, h] * s0[b, h]).sum() + (dz[b, h] * z0[b, h]).sum())
        if s0 is not None:
            ds0[b, h] += total * ds[b, h]
            dz0[b, h] += total * dz[b, h]


def power_recurrent(
    q: Any,
    k: Any,
    v: Any,
    log_g: Any = None,
    *,
    deg: int = 2,
    scale: float | None = None,
    normalize: bool = True,
    initial_state: tuple[Any, Any] | None = None,
) -> PowerResult:
    """Power attention token by token: S_i = exp(log_g_i) S_{i−1} + φ(k_i) v_iᵀ, likewise z_i, then y_i = ψᵀS_i / ψᵀz_i."""
    call = spec.check_power(
        q, k, v, log_g, deg=deg, scale=scale, normalize=normalize, form="recurrent",
        initial_state=initial_state, return_state=True,
    )  # fmt: skip
    s0, z0 = initial_state or (None, None)
    q, k, v, log_g, s0, z0 = _as_float64(q, k, v, log_g, s0, z0)
    s = np.zeros((call.b, call.h_kv, call.rows, call.e)) if s0 is None else s0.copy()
    z = np.zeros((call.b, call.h_kv, call.rows)) if z0 is None else z0.copy()
    y = np.zeros((call.b, call.t, call.h_q, call.e))
    for i in range(call.t):
        gate = np.ones((call.b, call.h_kv)) if log_g is None else np.exp(log_g[:, i])
        phi = sympow(k[:, i], deg)
        s = gate[..., None, None] * s + phi[..., :, None] * v[:, i, :, None, :]
        z = gate[..., None] * z + phi
        psi = _psi(call, q[:, i]).reshape(call.b, call.h_kv, call.group, call.rows)
        num = np.einsum("bhgD,bhDe->bhge", psi, s).reshape(call.b, call.h_q, call.e)
        norm = np.einsum("bhgD,bhD->bhg", psi, z).reshape(call.b, call.h_q, 1)
        y[:, i] = np.divide(num, norm, out=np.zeros_like(num), where=norm != 0) if normalize else num
    return PowerResult(y, s, z)
