"""The function names and argument names of the `power-attention` and `retention` packages, on `power_attention`.

    from torch_power.compat import power_full, power_retention, power_retention_inference

Code that calls them with named arguments runs with this import changed and nothing else, on any device. What differs:

Results
  - No epsilons. `retention` adds 1e-7 to |score| and 1e-6 to the sum of weights, so its output changes when q or k are
    scaled; here it does not (for inputs of ordinary size the two agree to rounding).
  - `scale=0` means 0, not the default, which is 1/sqrt(d) in both.
  - Every query after a state is decayed by its own gates. `retention` gives all queries of one call the last one's.
  - Lengths that are not a multiple of anything are right, gradients included; nothing is padded.
  - The fused variants of `retention` (`vidrial`) put ones into the first value column; here no column is overwritten.
State
  - Given and returned as `(final_state [b, h_kv, D, e], sum_of_keys [b, h_kv, D])`, the s and z of a `PowerState`;
    `power_full` of `power-attention` returned the first alone, which cannot be continued without the second.
  - float32, in the layout of `sympow`: d=64, deg=2 gives D = 2304, multiplicities on the query side. `retention` has
    the inputs' dtype and another layout, D = 2560, multiplicities on the key side. Neither can read the other's.
  - Gradients flow through states both ways. deg is 2 or 4 with a state, any even number without.
Cost
  - `chunk_size` is the chunk length if the O(t) form is the cheaper one. `switch_over_seq_len` does not choose a form,
    only when a state is returned. All forms give the same result to rounding.
Errors
  - Wrong arguments raise ValueError or TypeError, naming them as `power_attention` does, instead of AssertionError.
  - After `log_G`, `power_full` and `power_retention` take named arguments only (the packages differ in their order).
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Float
from torch import Tensor

from torch_power.power import PowerState, power_attention

Result = tuple[Tensor, Tensor | None, Tensor | None]


def power_retention(
    Q: Float[Tensor, "b t h_q d"],
    K: Float[Tensor, "b t h_kv d"],
    V: Float[Tensor, "b t h_kv e"],
    log_G: Float[Tensor, "b t h_kv"] | None = None,
    *,
    initial_state: Float[Tensor, "b h_kv D e"] | None = None,
    sum_of_keys: Float[Tensor, "b h_kv D"] | None = None,
    return_final_state: bool = False,
    deg: int = 2,
    scale: float | None = None,
    chunk_size: int | None = None,
    switch_over_seq_len: int | None = None,
    original_t: int | None = None,
) -> Float[Tensor, "b t h_q e"] | Result:
    """Causal power attention, normalised, with the arguments of `retention.power_retention`.

        y_i = Σ_j w_ij v_j / Σ_j w_ij,    w_ij = (scale · <q_i, k_j>)^deg · exp(G_i − G_j)  for j ≤ i

    with G the running sum of `log_G`.

    Args:
      Q, K, V: queries, keys and values; query head i reads key-value head `i // (h_q // h_kv)`.
      log_G: natural log of the gates, ≤ 0 to forget; converted to float32.
      initial_state, sum_of_keys: a state that this module returned; both or neither.
      return_final_state: also return the state after the last token.
      deg: even. With a state, 2 or 4.
      scale: multiplies the scores; 1/sqrt(d) by default.
      chunk_size: chunk length of the O(t) form, and the default of `switch_over_seq_len`.
      switch_over_seq_len: without an initial state, sequences shorter than this (rounded up to whole chunks) return
        None for the state: the caller is expected to keep their keys and values instead.
      original_t: number of tokens that are not padding. Where it is not a whole number of chunks, the state returned is
        the one before the last chunk, whose keys and values the caller is expected to keep.
    Returns:
      y in the dtype of `V`; with `return_final_state`, `(y, final_state, sum_of_keys)`.
    Raises:
      ValueError, TypeError: as `power_attention`, or only one of `initial_state` and `sum_of_keys` is given.
    """
    gates = _gates(log_G, Q)
    state = _state(initial_state, sum_of_keys, Q)
    t = Q.shape[1]
    chunk = t if chunk_size is None else max(chunk_size, 1)  # power_attention refuses what is below 1
    whole_chunks = -(-t // chunk) * chunk if t else 0
    threshold = chunk_size if switch_over_seq_len is None else switch_over_seq_len
    attend = functools.partial(power_attention, deg=deg, scale=scale, chunk_size=chunk_size)
    if not return_final_state:
        return attend(Q, K, V, gates, initial_state=state)
    if state is None and threshold is not None and whole_chunks < threshold:
        return attend(Q, K, V, gates), None, None

    in_state = t
    if original_t is not None and original_t < whole_chunks:
        in_state = whole_chunks - chunk
    before, after = (
        (Q[:, part], K[:, part], V[:, part], None if gates is None else gates[:, part])
        for part in (slice(0, in_state), slice(in_state, t))
    )
    y, final = attend(*before, initial_state=state, return_state=True)
    if in_state < t:
        y = torch.cat([y, attend(*after, initial_state=final)], 1)
    return y, final.s, final.z


power_full = power_retention
"""The name that `power_retention` had in the `power-attention` package."""


def power_retention_inference(
    Q: Float[Tensor, "b t_q h_q d"],
    K: Float[Tensor, "b t_k h_kv d"] | None,
    V: Float[Tensor, "b t_k h_kv e"] | None,
    log_G: Float[Tensor, "b t_k h_kv"] | None = None,
    initial_state: Float[Tensor, "b h_kv D e"] | None = None,
    sum_of_keys: Float[Tensor, "b h_kv D"] | None = None,
    deg: int = 2,
    scale: float | None = None,
    switch_over_seq_len: int | None = 512,
) -> Result:
    """The last `t_q` outputs of a sequence that is a state followed by a cache of `t_k` keys and values.

    A decoding loop appends each token's key, value and gate to the cache, calls this, and drops the cache whenever a
    new state comes back, as in `retention.power_retention_inference`. The cost is O(t_q · t_k), and the state is read
    once; it is written only on the calls that fold the cache into it.

    Args:
      Q: queries of the last `t_q` ≤ `t_k` tokens of the cache.
      K, V, log_G: keys, values and log gates of all tokens after the state. None for all three: query the state alone.
      initial_state, sum_of_keys: the state that the tokens before the cache left; both or neither.
      deg: even. With a state, 2 or 4.
      scale: multiplies the scores; 1/sqrt(d) by default.
      switch_over_seq_len: from this length on the whole cache is folded into the state that is returned. None: never.
    Returns:
      `(y, state, sum_of_keys)`; the state is the one given unless the cache was folded into it.
    Raises:
      ValueError, TypeError: as `power_attention`, or the arguments do not go together as said above.
    """
    if deg % 2:
        raise ValueError(f"deg={deg}: expected an even degree (an odd power has no sign-definite normaliser)")
    if (K is None) != (V is None):
        raise ValueError("K, V: expected both or neither")
    gates = _gates(log_G, Q)
    state = _state(initial_state, sum_of_keys, Q)
    if K is None or V is None:
        return _query_state(Q, gates, state, deg, scale), initial_state, sum_of_keys

    attend = functools.partial(power_attention, deg=deg, scale=scale, initial_state=state)
    t_q, t_k = Q.shape[1], K.shape[1]
    if t_q > t_k:
        raise ValueError(f"Q: length {t_q} exceeds the length {t_k} of K, whose last tokens the queries belong to")
    folds = switch_over_seq_len is not None and t_k >= switch_over_seq_len
    if t_q == t_k and folds:
        y, new = attend(Q, K, V, gates, return_state=True)
    elif t_q == t_k:
        y = attend(Q, K, V, gates)
    else:
        y = _query_cache(Q, K, V, gates, state, deg, scale)
        if folds:
            _, new = attend(torch.zeros_like(K), K, V, gates, return_state=True)
    return (y, new.s, new.z) if folds else (y, initial_state, sum_of_keys)


def _query_state(Q: Tensor, gates: Tensor | None, state: PowerState | None, deg: int, scale: float | None) -> Tensor:
    """Queries of the state alone: tokens whose keys are 0 have no weight."""
    if state is None:
        raise ValueError("initial_state: expected a state when K and V are None")
    if gates is not None:
        raise ValueError("log_G: expected None when K and V are None (a gate belongs to a token)")
    b, t_q, _, d = Q.shape
    h_kv, e = state.s.shape[1], state.s.shape[3]
    keys, values = Q.new_zeros(b, t_q, h_kv, d), Q.new_zeros(b, t_q, h_kv, e)
    return power_attention(Q, keys, values, deg=deg, scale=scale, initial_state=state)


def _query_cache(
    Q: Tensor, K: Tensor, V: Tensor, gates: Tensor | None, state: PowerState | None, deg: int, scale: float | None
) -> Tensor:
    """Fewer queries than keys: the older tokens, which all queries see, and the recent ones, each beside its query.

    Both parts are left unnormalised, with the normaliser as one more value column, then added and divided.
    """
    dtype = _compute_dtype(Q)
    old, e = K.shape[1] - Q.shape[1], V.shape[-1]
    # The size of a query row cancels in the division. Powers of two change no bit, and keep the powers below in range.
    q = Q.to(dtype)
    q = torch.ldexp(q, -torch.frexp(q.detach().abs().amax(-1, keepdim=True)).exponent)
    k = K.to(dtype)
    v = torch.cat([V.to(dtype), torch.ones_like(V[..., :1], dtype=dtype)], -1)
    attend = functools.partial(power_attention, deg=deg, scale=scale, normalize=False)

    if state is not None:
        state = PowerState(torch.cat([state.s, state.z[..., None]], -1), state.z)
    if gates is None:
        older = attend(q, k[:, :old], v[:, :old], causal=False)
        recent = attend(q, k[:, old:], v[:, old:], initial_state=state)
    else:
        # Float64, because differences of running sums over the whole cache lose digits. No exponent is above 0.
        total = gates.double().cumsum(1)
        before, at_last, since = total[:, :old], total[:, old - 1 : old], total[:, old:]
        within_old = (at_last - before).exp().to(dtype)[..., None]
        until_query = (since - at_last).exp().to(dtype).repeat_interleave(Q.shape[2] // K.shape[2], 2)[..., None]
        older = attend(q, k[:, :old], v[:, :old] * within_old, causal=False) * until_query
        # The first gate of a call acts on the state alone, which the older tokens' gates have decayed as well.
        first = gates[:, old : old + 1] + at_last.to(dtype)
        recent_gates = torch.cat([first, gates[:, old + 1 :]], 1)
        recent = attend(q, k[:, old:], v[:, old:], recent_gates, initial_state=state)
    y, norm = (older + recent).split([e, 1], -1)
    return (y / norm.masked_fill(norm == 0, torch.inf)).to(V.dtype)


def _compute_dtype(Q: Tensor) -> torch.dtype:
    return torch.float64 if Q.dtype == torch.float64 else torch.float32


def _gates(log_G: Tensor | None, Q: Tensor) -> Tensor | None:
    return None if log_G is None else log_G.to(_compute_dtype(Q))


def _state(initial_state: Tensor | None, sum_of_keys: Tensor | None, Q: Tensor) -> PowerState | None:
    if (initial_state is None) != (sum_of_keys is None):
        missing = "sum_of_keys" if sum_of_keys is None else "initial_state"
        raise ValueError(f"{missing}: expected with its other half; a state is initial_state and sum_of_keys together")
    if initial_state is None or sum_of_keys is None:
        return None
    return PowerState(initial_state.to(_compute_dtype(Q)), sum_of_keys.to(_compute_dtype(Q)))
