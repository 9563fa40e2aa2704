"""Power attention in plain tensor operations: any device, any floating dtype, any degree. Memory is linear in t.

Inside, arrays are laid out heads first, queries grouped by the key-value head they read: q [b, h_kv, group, t, d],
k [b, h_kv, t, d], and v1 = [v 1] [b, h_kv, t, e + 1], whose last column makes the normaliser one more value. A state is
[b, h_kv, D, e + 1], z its last column. All arithmetic is in `call.compute_dtype`.

The attention form adds the quadratic sum block by block; the chunked form does so inside chunks only, and lets a state
carry what came before. The backward pass recomputes scores and states, so that a forward pass keeps y and norm alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bridge import spec
from torch_power.eager.features import decay_between, row_scale, sum_gates, sympow, sympow_transposed_jacobian


class Operands(NamedTuple):
    """What both passes start from. `gates` is the pair of `sum_gates`, with a zero in front: entry i + 1 is G_i."""

    q: Tensor
    k: Tensor
    v1: Tensor
    gates: tuple[Tensor, Tensor] | None
    scale: tuple[Tensor, Tensor]
    state: Tensor | None


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None: everything in the contract is served."""
    del call, device
    return None


def forward(
    call: spec.PowerCall, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """y `[b, t, h_q, e]` and norm `[b, t, h_q]` in the compute dtype, and the final state (None unless asked for)."""
    x = _operands(call, q, k, v, log_g, s0, z0)
    run = {"attention": _forward_attention, "chunked": _forward_chunked, "recurrent": _forward_recurrent}[call.form]
    sums, state = run(call, x)
    num, norm = sums[..., :-1], sums[..., -1:]
    y = torch.where(norm == 0, 0.0, num / torch.where(norm == 0, 1.0, norm)) if call.normalize else num
    s, z = (None, None) if state is None else (state[..., :-1].contiguous(), state[..., -1].contiguous())
    return _tokens_first(y), _tokens_first(norm)[..., 0].contiguous(), s, z


def backward(
    call: spec.PowerCall,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    y: Tensor,
    norm: Tensor,
    dy: Tensor,
    ds: Tensor | None,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None)."""
    x = _operands(call, q, k, v, log_g, s0, z0)
    dsums = _heads_first(call, _sums_gradient(call, y, norm, dy.to(x.q.dtype)))
    dstate = None if ds is None else torch.cat((ds, dz[..., None]), -1).to(x.q.dtype)
    run = _backward_attention if call.form == "attention" else _backward_chunked
    dq, dk, dv1, dlog_g, dstate0 = run(call, x, dsums, dstate)
    dq = dq * x.scale[0] * x.scale[1]
    return (
        _tokens_first(dq).to(q.dtype),
        dk.movedim(1, 2).to(k.dtype).contiguous(),
        dv1[..., :-1].movedim(1, 2).to(v.dtype).contiguous(),
        None if log_g is None else dlog_g.movedim(1, 2).to(log_g.dtype).contiguous(),
        None if s0 is None else dstate0[..., :-1].to(s0.dtype).contiguous(),
        None if z0 is None else dstate0[..., -1].to(z0.dtype).contiguous(),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------------------------------


def _operands(
    call: spec.PowerCall, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, s0: Tensor | None, z0: Tensor | None
) -> Operands:
    dtype = getattr(torch, call.compute_dtype)
    q = _heads_first(call, q.to(dtype))
    scale = row_scale(q, call.scale, call.normalize)
    v1 = torch.cat((v.to(dtype), torch.ones_like(v[..., :1], dtype=dtype)), -1)
    gates = None
    if log_g is not None:
        high, low = sum_gates(log_g.to(dtype).movedim(1, 2))
        gates = torch.nn.functional.pad(high, (1, 0)), torch.nn.functional.pad(low, (1, 0))
    state = None if s0 is None else torch.cat((s0, z0[..., None]), -1).to(dtype)
    k, v1 = k.to(dtype).movedim(1, 2).contiguous(), v1.movedim(1, 2).contiguous()
    return Operands(q * scale[0] * scale[1], k, v1, gates, scale, state)


def _heads_first(call: spec.PowerCall, x: Tensor) -> Tensor:
    """[b, t, h_q, n] → [b, h_kv, group, t, n]."""
    return x.unflatten(2, (call.h_kv, call.group)).movedim(1, 3).contiguous()


def _tokens_first(x: Tensor) -> Tensor:
    """[b, h_kv, group, t, n] → [b, t, h_q, n]."""
    return x.movedim(3, 1).flatten(2, 3).contiguous()


def _rows(x: Tensor) -> Tensor:
    """[b, h_kv, group, c, n] → [b, h_kv, group · c, n]: the queries that share keys become rows of one matrix product."""
    return x.flatten(2, 3)


def _chunks(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _sums_gradient(call: spec.PowerCall, y: Tensor, norm: Tensor, dy: Tensor) -> Tensor:
    """Gradients of numerators and normaliser, `[…, e + 1]`: dy / n and −<dy, y> / n, zero where n is; dy and 0 unnormalised."""
    if not call.normalize:
        return torch.nn.functional.pad(dy, (0, 1))
    dsums = torch.cat((dy, -(dy * y.to(dy.dtype)).sum(-1, keepdim=True)), -1)
    norm = norm[..., None].to(dy.dtype)
    return torch.where(norm == 0, 0.0, dsums / torch.where(norm == 0, 1.0, norm))


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------


def _gate_at(x: Operands, index: int | slice) -> tuple[Tensor, Tensor]:
    """The pair of sums G after `index` tokens, as `[b, h_kv, n]` (n = 1 for a single index)."""
    index = slice(index, index + 1) if isinstance(index, int) else index
    return x.gates[0][..., index], x.gates[1][..., index]


def _after(chunk: slice) -> slice:
    """Entries of the padded sums that hold G_i for the tokens of a chunk."""
    return slice(chunk.start + 1, chunk.stop + 1)


def _decay_to_rows(x: Operands, chunk: slice, start: int) -> Tensor | float:
    """exp(G_i − G) for the queries i of a chunk, G the sum after `start` tokens: `[b, h_kv, 1, c, 1]`, or 1 without gates."""
    if x.gates is None:
        return 1.0
    return decay_between(_gate_at(x, _after(chunk)), _gate_at(x, start))[:, :, None, :, None]


def _decay_from_keys(x: Operands, chunk: slice, stop: int) -> Tensor | float:
    """exp(G − G_j) for the keys j of a chunk, G the sum after `stop` tokens: `[b, h_kv, c, 1]`, or 1 without gates."""
    return 1.0 if x.gates is None else decay_between(_gate_at(x, stop), _gate_at(x, _after(chunk)))[..., None]


def _decay_across(x: Operands, start: int, stop: int) -> Tensor | float:
    """exp(G_stop − G_start) `[b, h_kv, 1, 1]`: what all gates of tokens start … stop − 1 leave of a state."""
    return 1.0 if x.gates is None else decay_between(_gate_at(x, stop), _gate_at(x, start))[..., None]


def _decay_inside(x: Operands, chunk: slice) -> Tensor:
    """exp(G_i − G_j) for j ≤ i inside a chunk, 0 above the diagonal: `[b, h_kv, 1, c, c]`, or `[c, c]` without gates."""
    length = chunk.stop - chunk.start
    mask = torch.ones(length, length, dtype=torch.bool, device=x.k.device).tril()
    if x.gates is None:
        return mask.to(x.k.dtype)
    rows = tuple(part[..., :, None] for part in _gate_at(x, _after(chunk)))
    columns = tuple(part[..., None, :] for part in _gate_at(x, _after(chunk)))
    return decay_between(rows, columns, mask)[:, :, None]


def _gate_gradient(suffix: Tensor, prefix: Tensor, carry: Tensor | float) -> Tensor:
    """dlog_g_m = Σ_{i ≥ m} suffix_i + Σ_{j < m} prefix_j + carry, all `[b, h_kv, n]`.

    `suffix` holds what queries receive from keys before them, less what keys give to queries after them; `prefix` what keys
    give to a state at the end; `carry` what a state at the start gives to one at the end.
    """
    before = torch.nn.functional.pad(prefix.cumsum(-1)[..., :-1], (1, 0))
    return suffix.flip(-1).cumsum(-1).flip(-1) + before + carry


# ---------------------------------------------------------------------------------------------------------------------
# The four products and their gradients
# ---------------------------------------------------------------------------------------------------------------------


def _attend(call: spec.PowerCall, q: Tensor, k: Tensor, v1: Tensor, decay: Tensor | None) -> Tensor:
    """Σ_j <q_i, k_j>^p decay_ij v1_j for one block of queries `[b, h_kv, g, c, d]` and one of keys; decay None is 1."""
    weights = (_rows(q) @ k.mT).pow(call.deg)
    if decay is not None:
        weights = (weights.unflatten(2, q.shape[2:4]) * decay).flatten(2, 3)
    return (weights @ v1).unflatten(2, q.shape[2:4])


def _attend_backward(
    call: spec.PowerCall, q: Tensor, k: Tensor, v1: Tensor, decay: Tensor | None, dsums: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv1 of `_attend`, and Σ over keys and over queries of weight · dweight (`[b, h_kv, c]`, the group summed).

    On a diagonal block (decay given) the sums leave out j = i, on which no gate acts: it would cancel, but for its rounding.
    """
    scores, group = (_rows(q) @ k.mT), q.shape[2:4]
    powers = scores.pow(call.deg - 1)
    dscores = _rows(dsums) @ v1.mT * powers * call.deg
    weights = powers * scores
    if decay is not None:
        dscores = (dscores.unflatten(2, group) * decay).flatten(2, 3)
        weights = (weights.unflatten(2, group) * decay).flatten(2, 3)
    pairs = (dscores * scores / call.deg).unflatten(2, group).sum(2)
    if decay is not None:
        pairs = pairs.tril(-1)
    dq = (dscores @ k).unflatten(2, group)
    return dq, dscores.mT @ _rows(q), weights.mT @ _rows(dsums), pairs.sum(-1), pairs.sum(-2)


def _query_state(call: spec.PowerCall, q: Tensor, state: Tensor) -> Tensor:
    """ψ(q_i)ᵀ S: what the queries of a chunk receive from a state, before gates."""
    return (sympow(_rows(q), call.deg) @ _with_multiplicity(call, state)).unflatten(2, q.shape[2:4])


def _query_state_backward(call: spec.PowerCall, q: Tensor, state: Tensor, dsums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dS of `_query_state`, and <sums, dsums> `[b, h_kv, c]`, which is <q, dq> / p as φ is homogeneous of degree p."""
    dphi = _rows(dsums) @ _with_multiplicity(call, state).mT
    dq = sympow_transposed_jacobian(_rows(q), dphi, call.deg).unflatten(2, q.shape[2:4])
    dstate = _with_multiplicity(call, sympow(_rows(q), call.deg).mT @ _rows(dsums))
    return dq, dstate, (q * dq).sum((2, 4)) / call.deg


def _update_state(call: spec.PowerCall, k: Tensor, v1: Tensor) -> Tensor:
    """Σ_j φ(k_j) v1_jᵀ: what a chunk adds to the state; gates are already in v1."""
    return sympow(k, call.deg).mT @ v1


def _update_state_backward(call: spec.PowerCall, k: Tensor, v1: Tensor, dstate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dk, dv1 of `_update_state`, and <v1_j, dv1_j> `[b, h_kv, c]`, which is <k, dk> / p."""
    dk = sympow_transposed_jacobian(k, v1 @ dstate.mT, call.deg)
    return dk, sympow(k, call.deg) @ dstate, (k * dk).sum(-1) / call.deg


def _with_multiplicity(call: spec.PowerCall, state: Tensor) -> Tensor:
    multiplicity = torch.as_tensor(spec.sympow_multiplicity(call.d, call.deg), device=state.device)
    return state * multiplicity.to(state.dtype)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Attention form
# ---------------------------------------------------------------------------------------------------------------------


def _key_chunks(call: spec.PowerCall, rows: slice) -> Iterator[slice]:
    """Blocks of keys that a block of queries sees: all of them, or those up to its own."""
    return (keys for keys in _chunks(call.t_kv, call.chunk_size) if not call.causal or keys.start <= rows.start)


def _forward_attention(call: spec.PowerCall, x: Operands) -> tuple[Tensor, Tensor | None]:
    sums = x.q.new_zeros(*x.q.shape[:-1], call.e + 1)
    for rows in _chunks(call.t, call.chunk_size):
        q = x.q[..., rows, :]
        for keys in _key_chunks(call, rows):
            k, v1 = x.k[..., keys, :], x.v1[..., keys, :]
            if call.causal and keys == rows:
                sums[..., rows, :] += _attend(call, q, k, v1, _decay_inside(x, rows))
            else:
                attended = _attend(call, q, k, _decay_from_keys(x, keys, keys.stop) * v1, None)
                sums[..., rows, :] += _decay_to_rows(x, rows, keys.stop) * attended
        if x.state is not None:
            sums[..., rows, :] += _decay_to_rows(x, rows, 0) * _query_state(call, q, x.state)
    return sums, _final_state(call, x) if call.return_state else None


def _final_state(call: spec.PowerCall, x: Operands) -> Tensor:
    """S after the last token: the sum over all keys, each decayed by the gates after it, and the decayed initial state."""
    state = x.k.new_zeros(call.b, call.h_kv, call.rows, call.e + 1)
    if x.state is not None:
        state = _decay_across(x, 0, call.t_kv) * x.state
    for keys in _chunks(call.t_kv, call.chunk_size):
        state = state + _update_state(call, x.k[..., keys, :], _decay_from_keys(x, keys, call.t_kv) * x.v1[..., keys, :])
    return state


def _backward_attention(call: spec.PowerCall, x: Operands, dsums: Tensor, dstate: Tensor | None) -> tuple[Tensor, ...]:
    dq, dk, dv1 = (torch.zeros_like(part) for part in (x.q, x.k, x.v1))
    suffix, prefix = (x.k.new_zeros(call.b, call.h_kv, call.t_kv) for _ in range(2))
    dstate0 = None if x.state is None else torch.zeros_like(x.state)
    carry: Tensor | float = 0.0
    for rows in _chunks(call.t, call.chunk_size):
        q, drows = x.q[..., rows, :], dsums[..., rows, :]
        for keys in _key_chunks(call, rows):
            k, v1 = x.k[..., keys, :], x.v1[..., keys, :]
            inside = call.causal and keys == rows
            decay = _decay_inside(x, rows) if inside else None
            of_rows = 1.0 if inside else _decay_to_rows(x, rows, keys.stop)
            of_keys = 1.0 if inside else _decay_from_keys(x, keys, keys.stop)
            dq_part, dk_part, dv1_part, received, given = _attend_backward(call, q, k, of_keys * v1, decay, of_rows * drows)
            dq[..., rows, :] += dq_part
            dk[..., keys, :] += dk_part
            dv1[..., keys, :] += of_keys * dv1_part
            if call.causal:
                suffix[..., rows] += received
                suffix[..., keys] -= given
        if x.state is not None:
            dq_part, dstate_part, received = _query_state_backward(call, q, x.state, _decay_to_rows(x, rows, 0) * drows)
            dq[..., rows, :] += dq_part
            dstate0 += dstate_part
            suffix[..., rows] += received
    if dstate is not None:
        for keys in _chunks(call.t_kv, call.chunk_size):
            of_keys = _decay_from_keys(x, keys, call.t_kv)
            dk_part, dv1_part, given = _update_state_backward(call, x.k[..., keys, :], of_keys * x.v1[..., keys, :], dstate)
            dk[..., keys, :] += dk_part
            dv1[..., keys, :] += of_keys * dv1_part
            prefix[..., keys] += given
        if x.state is not None:
            decayed = _decay_across(x, 0, call.t_kv) * dstate
            dstate0 += decayed
            carry = (decayed * x.state).sum((-2, -1))[..., None]
    dlog_g = None if x.gates is None else _gate_gradient(suffix, prefix, carry)
    return dq, dk, dv1, dlog_g, dstate0


# ---------------------------------------------------------------------------------------------------------------------
# Chunked form
# ---------------------------------------------------------------------------------------------------------------------


def _states(call: spec.PowerCall, x: Operands) -> Iterator[Tensor]:
    """The state before every chunk, and after the last: S_n = exp(G_n − G_{n−1}) S_{n−1} + φ(k)ᵀ diag(exp(G_n − G)) v1."""
    state = x.k.new_zeros(call.b, call.h_kv, call.rows, call.e + 1) if x.state is None else x.state
    yield state
    for chunk in _chunks(call.t_kv, call.chunk_size):
        added = _update_state(call, x.k[..., chunk, :], _decay_from_keys(x, chunk, chunk.stop) * x.v1[..., chunk, :])
        state = _decay_across(x, chunk.start, chunk.stop) * state + added
        yield state


def _forward_chunked(call: spec.PowerCall, x: Operands) -> tuple[Tensor, Tensor | None]:
    sums = x.q.new_empty(*x.q.shape[:-1], call.e + 1)
    states = _states(call, x)
    if not call.causal:
        *_, state = states
        for rows in _chunks(call.t, call.chunk_size):
            sums[..., rows, :] = _query_state(call, x.q[..., rows, :], state)
        return sums, state if call.return_state else None
    for chunk in _chunks(call.t, call.chunk_size):
        q, state = x.q[..., chunk, :], next(states)
        sums[..., chunk, :] = _attend(call, q, x.k[..., chunk, :], x.v1[..., chunk, :], _decay_inside(x, chunk))
        if chunk.start or x.state is not None:
            sums[..., chunk, :] += _decay_to_rows(x, chunk, chunk.start) * _query_state(call, q, state)
    return sums, next(states) if call.return_state else None


def _forward_recurrent(call: spec.PowerCall, x: Operands) -> tuple[Tensor, Tensor | None]:
    """Token by token, which is the chunked form in chunks of one: exp(log_g_i) ψ(q_i)ᵀ S_{i−1} + <q_i, k_i>^p v1_i.

    A token's own weight is not read back from S_i: there, a small <q, k>^p is the sum of large products that cancel.
    """
    return _forward_chunked(dataclasses.replace(call, chunk_size=1), x)


def _backward_chunked(call: spec.PowerCall, x: Operands, dsums: Tensor, dstate: Tensor | None) -> tuple[Tensor, ...]:
    states = list(_states(call, x))
    if dstate is None:
        dstate = torch.zeros_like(states[-1])
    dq, dk, dv1 = (torch.empty_like(part) for part in (x.q, x.k, x.v1))
    if not call.causal:
        for rows in _chunks(call.t, call.chunk_size):
            dq[..., rows, :], added, _ = _query_state_backward(call, x.q[..., rows, :], states[-1], dsums[..., rows, :])
            dstate = dstate + added
        for keys in _chunks(call.t_kv, call.chunk_size):
            dk[..., keys, :], dv1[..., keys, :], _ = _update_state_backward(
                call, x.k[..., keys, :], x.v1[..., keys, :], dstate
            )
        return dq, dk, dv1, None, None
    dlog_g = x.k.new_empty(call.b, call.h_kv, call.t)
    for chunk, state in reversed(list(zip(_chunks(call.t, call.chunk_size), states, strict=False))):
        q, k, v1, drows = x.q[..., chunk, :], x.k[..., chunk, :], x.v1[..., chunk, :], dsums[..., chunk, :]
        dq_inside, dk_inside, dv1_inside, received, given = _attend_backward(call, q, k, v1, _decay_inside(x, chunk), drows)
        of_rows, of_keys = _decay_to_rows(x, chunk, chunk.start), _decay_from_keys(x, chunk, chunk.stop)
        dq_query, dstate_query, received_query = _query_state_backward(call, q, state, of_rows * drows)
        dk_update, dv1_update, given_update = _update_state_backward(call, k, of_keys * v1, dstate)
        dq[..., chunk, :] = dq_inside + dq_query
        dk[..., chunk, :] = dk_inside + dk_update
        dv1[..., chunk, :] = dv1_inside + of_keys * dv1_update
        decayed = _decay_across(x, chunk.start, chunk.stop) * dstate
        carry = (decayed * state).sum((-2, -1))[..., None]
        dlog_g[..., chunk] = _gate_gradient(received + received_query - given, given_update, carry)
        dstate = decayed + dstate_query
    return dq, dk, dv1, dlog_g, dstate
