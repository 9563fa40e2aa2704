"""Power attention in plain XLA: any device, any floating dtype, any degree. Memory is linear in t.

Inside, arrays are laid out chunk first, then heads, queries grouped by the key-value head they read:
q [n, b, h_kv, group, c, d], k [n, b, h_kv, c, d], and v1 = [v 1] [n, b, h_kv, c, e + 1], whose last column makes the
normaliser one more value. A state is [b, h_kv, D, e + 1], z its last column. All arithmetic is in `call.compute_dtype`.
The last chunk is filled up with zeros, whose weights are 0 (p ≥ 1) and whose gates are 1.

The attention form adds the quadratic sum block by block; the chunked form does so inside chunks only, and lets a state
carry what came before. The backward pass recomputes scores and states, so that a forward pass keeps y and norm alone.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from bridge import spec
from jax_power.xla.features import decay_between, matmul, row_scale, sum_gates, sympow, sympow_transposed_jacobian


class Chunk(NamedTuple):
    """One chunk, or all of them with an axis n in front. The gates' entries are None without gates (every decay is 1).

    Fields:
      q, k, v1: as above; q is scaled, and in calls without a mask it has chunks of its own.
      gates: the pair of sums G_i `[b, h_kv, c]` for the tokens of the chunk, from the start of the sequence.
      of_rows: exp(G_i − G) `[b, h_kv, 1, c, 1]`, G the sum before the chunk: what is left of a state at token i.
      of_keys: exp(G − G_j) `[b, h_kv, c, 1]`, G the sum after the chunk: what is left of token j at its end.
      across: exp(G after − G before) `[b, h_kv, 1, 1]`: what the chunk leaves of a state.
    """

    q: Array
    k: Array
    v1: Array
    gates: tuple[Array, ...] | None
    of_rows: Array | None
    of_keys: Array | None
    across: Array | None


class Operands(NamedTuple):
    """What both passes start from: all chunks, the two factors that scale q, and the initial state."""

    chunks: Chunk
    scale: tuple[Array, Array]
    state: Array | None


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None: everything in the contract is served."""
    del call, device
    return None


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """y `[b, t, h_q, e]` and norm `[b, t, h_q]` in the compute dtype, and the final state (None unless asked for)."""
    arrays = _as_computed(call, q, k, v, log_g, s0, z0)
    return _forward(_fit_chunks(call), *arrays)


def backward(
    call: spec.PowerCall,
    q: Array,
    k: Array,
    v: Array,
    log_g: Array | None,
    s0: Array | None,
    z0: Array | None,
    y: Array,
    norm: Array,
    dy: Array,
    ds: Array | None,
    dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None)."""
    arrays = _as_computed(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz)
    grads = _backward(_fit_chunks(call, backward=True), *arrays)
    return tuple(
        None if x is None else dx.astype(x.dtype) for x, dx in zip((q, k, v, log_g, s0, z0), grads, strict=True)
    )


# Compiled here so that calls outside of any `jit` are too, and so that dtypes computed in float32 share one program.
@functools.partial(jax.jit, static_argnums=0)
def _forward(call: spec.PowerCall, *arrays: Array | None) -> tuple[Array, Array, Array | None, Array | None]:
    x = _operands(call, *arrays)
    run = _forward_attention if call.form == "attention" else _forward_chunked
    sums, state = run(call, x)
    num, norm = sums[..., :-1], sums[..., -1:]
    y = jnp.where(norm == 0, 0.0, num / jnp.where(norm == 0, 1.0, norm)) if call.normalize else num
    s, z = (None, None) if state is None else (state[..., :-1], state[..., -1])
    return _tokens_first(y, call.t), _tokens_first(norm, call.t)[..., 0], s, z


@functools.partial(jax.jit, static_argnums=0)
def _backward(
    call: spec.PowerCall,
    q: Array,
    k: Array,
    v: Array,
    log_g: Array | None,
    s0: Array | None,
    z0: Array | None,
    y: Array,
    norm: Array,
    dy: Array,
    ds: Array | None,
    dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:
    x = _operands(call, q, k, v, log_g, s0, z0)
    dsums = _chunk(call, _heads_first(call, _sums_gradient(call, y, norm, dy)), 3)
    dstate = None if ds is None else jnp.concatenate((ds, dz[..., None]), -1)
    run = _backward_attention if call.form == "attention" else _backward_chunked
    dq, dk, dv1, dlog_g, dstate0 = run(call, x, dsums, dstate)
    return (
        _tokens_first(dq * x.scale[0] * x.scale[1], call.t),
        _tokens_first(dk[:, :, :, None], call.t_kv),
        _tokens_first(dv1[:, :, :, None, :, :-1], call.t_kv),
        None if log_g is None else _tokens_first(dlog_g[:, :, :, None, :, None], call.t_kv)[..., 0],
        None if s0 is None else dstate0[..., :-1],
        None if s0 is None else dstate0[..., -1],
    )


# ---------------------------------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------------------------------


def _fit_chunks(call: spec.PowerCall, *, backward: bool = False) -> spec.PowerCall:
    """Chunks of one for the recurrence, which is the chunked form in them; else no longer than the sequence.

    The recurrence's gradient is the chunked form's, in chunks: one state a token would not fit. Forward, token i is
    exp(log_g_i) ψ(q_i)ᵀ S_{i−1} + <q_i, k_i>^p v1_i: a token's own weight is not read back from S_i, where a small <q, k>^p
    is the sum of large products that cancel.
    """
    longest = 1 if call.form == "recurrent" and not backward else max(1, call.t, call.t_kv)
    return dataclasses.replace(call, chunk_size=min(call.chunk_size, longest), dtypes=(call.compute_dtype,) * 3)


def _as_computed(call: spec.PowerCall, *arrays: Array | None) -> tuple[Array | None, ...]:
    return tuple(None if x is None else x.astype(call.compute_dtype) for x in arrays)


def _operands(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> Operands:
    q = _chunk(call, _heads_first(call, q), 3)
    scale = row_scale(q, call.scale, call.normalize)
    v1 = jnp.concatenate((v, jnp.ones_like(v[..., :1])), -1)
    k, v1 = (_chunk(call, jnp.moveaxis(x, 1, 2), 2) for x in (k, v1))
    gates = (None, None, None, None) if log_g is None else _gates(call, jnp.moveaxis(log_g, 1, 2))
    state = None if s0 is None else jnp.concatenate((s0, z0[..., None]), -1)
    return Operands(Chunk(q * scale[0] * scale[1], k, v1, *gates), scale, state)


def _gates(call: spec.PowerCall, log_g: Array) -> tuple[tuple[Array, ...], Array, Array, Array]:
    """The last four fields of `Chunk` for all chunks, from gates `[b, h_kv, t]`."""
    gates = tuple(_chunk(call, part, 2) for part in sum_gates(_merge(_chunk(call, log_g, 2))))
    after = tuple(part[..., -1:] for part in gates)
    before = tuple(jnp.concatenate((jnp.zeros_like(part[:1]), part[:-1])) for part in after)
    of_rows = decay_between(gates, before)[:, :, :, None, :, None]
    return gates, of_rows, decay_between(after, gates)[..., None], decay_between(after, before)[..., None]


def _chunk(call: spec.PowerCall, x: Array, axis: int) -> Array:
    """Cut the time axis into chunks, filling up the last with zeros, and move the axis that counts them to the front."""
    count = max(1, -(-x.shape[axis] // call.chunk_size))
    fill = [(0, 0)] * x.ndim
    fill[axis] = (0, count * call.chunk_size - x.shape[axis])
    x = jnp.pad(x, fill)
    return jnp.moveaxis(x.reshape(*x.shape[:axis], count, call.chunk_size, *x.shape[axis + 1 :]), axis, 0)


def _merge(x: Array) -> Array:
    """[chunks, b, h_kv, c] → [b, h_kv, chunks · c]."""
    return jnp.moveaxis(x, 0, 2).reshape(*x.shape[1:3], x.shape[0] * x.shape[3])


def _heads_first(call: spec.PowerCall, x: Array) -> Array:
    """[b, t, h_q, n] → [b, h_kv, group, t, n]."""
    return jnp.moveaxis(x.reshape(*x.shape[:2], call.h_kv, call.group, x.shape[-1]), 1, 3)


def _tokens_first(x: Array, t: int) -> Array:
    """[chunks, b, h_kv, group, c, n] → [b, t, h_q, n]."""
    x = jnp.transpose(x, (1, 0, 4, 2, 3, 5))
    b, chunks, c, h_kv, group, n = x.shape
    return x.reshape(b, chunks * c, h_kv * group, n)[:, :t]


def _rows(x: Array) -> Array:
    """[b, h_kv, group, c, n] → [b, h_kv, group · c, n]: the queries that share keys become rows of one matrix product."""
    return x.reshape(*x.shape[:2], x.shape[2] * x.shape[3], x.shape[4])


def _grouped(x: Array, group: tuple[int, ...]) -> Array:
    """The inverse of `_rows`."""
    return x.reshape(*x.shape[:2], *group, x.shape[-1])


def _sums_gradient(call: spec.PowerCall, y: Array, norm: Array, dy: Array) -> Array:
    """Gradients of numerators and normaliser, `[…, e + 1]`: dy / n and −<dy, y> / n, zero where n is; dy and 0 unnormalised."""
    if not call.normalize:
        return jnp.pad(dy, [(0, 0)] * 3 + [(0, 1)])
    dsums = jnp.concatenate((dy, -(dy * y).sum(-1, keepdims=True)), -1)
    norm = norm[..., None]
    return jnp.where(norm == 0, 0.0, dsums / jnp.where(norm == 0, 1.0, norm))


# ---------------------------------------------------------------------------------------------------------------------
# Gates
# ---------------------------------------------------------------------------------------------------------------------


def _decayed(decay: Array | None, x: Array) -> Array:
    return x if decay is None else decay * x


def _decay_inside(chunk: Chunk) -> Array:
    """exp(G_i − G_j) for j ≤ i inside a chunk, 0 above the diagonal: `[b, h_kv, 1, c, c]`, or `[c, c]` without gates."""
    mask = np.tri(chunk.k.shape[-2], dtype=bool)
    if chunk.gates is None:
        return jnp.asarray(mask, chunk.k.dtype)
    rows, columns = (tuple(jnp.expand_dims(part, axis) for part in chunk.gates) for axis in (-1, -2))
    return decay_between(rows, columns, mask)[:, :, None]


def _gate_gradient(suffix: Array, prefix: Array, carry: Array | float) -> Array:
    """dlog_g_m = Σ_{i ≥ m} suffix_i + Σ_{j < m} prefix_j + carry, all `[b, h_kv, n]`.

    `suffix` holds what queries receive from keys before them, less what keys give to queries after them; `prefix` what keys
    give to a state at the end; `carry` what a state at the start gives to one at the end.
    """
    before = jnp.pad(jnp.cumsum(prefix, -1)[..., :-1], [(0, 0)] * (prefix.ndim - 1) + [(1, 0)])
    return jnp.flip(jnp.cumsum(jnp.flip(suffix, -1), -1), -1) + before + carry


# ---------------------------------------------------------------------------------------------------------------------
# The four products and their gradients
# ---------------------------------------------------------------------------------------------------------------------


def _attend(call: spec.PowerCall, q: Array, k: Array, v1: Array, decay: Array | None) -> Array:
    """Σ_j <q_i, k_j>^p decay_ij v1_j for one block of queries `[b, h_kv, g, c, d]` and one of keys; decay None is 1."""
    weights = _grouped(matmul(_rows(q), k.mT), q.shape[2:4]) ** call.deg
    return _grouped(matmul(_rows(_decayed(decay, weights)), v1), q.shape[2:4])


def _attend_backward(
    call: spec.PowerCall, q: Array, k: Array, v1: Array, decay: Array | None, dsums: Array
) -> tuple[Array, Array, Array, Array, Array]:
    """dq, dk, dv1 of `_attend`, and Σ over keys and over queries of weight · dweight (`[b, h_kv, c]`, the group summed).

    On a diagonal block (decay given) the sums leave out j = i, on which no gate acts: it would cancel, but for its rounding.
    """
    group = q.shape[2:4]
    scores = _grouped(matmul(_rows(q), k.mT), group)
    powers = _decayed(decay, scores ** (call.deg - 1))
    dscores = _grouped(matmul(_rows(dsums), v1.mT), group) * powers * call.deg
    pairs = (dscores * scores).sum(2) / call.deg
    if decay is not None:
        pairs = jnp.tril(pairs, -1)
    dq = _grouped(matmul(_rows(dscores), k), group)
    dk, dv1 = matmul(_rows(dscores).mT, _rows(q)), matmul(_rows(powers * scores).mT, _rows(dsums))
    return dq, dk, dv1, pairs.sum(-1), pairs.sum(-2)


def _query_state(call: spec.PowerCall, q: Array, state: Array) -> Array:
    """ψ(q_i)ᵀ S: what the queries of a chunk receive from a state, before gates."""
    return _grouped(matmul(sympow(_rows(q), call.deg), _with_multiplicity(call, state)), q.shape[2:4])


def _query_state_backward(call: spec.PowerCall, q: Array, state: Array, dsums: Array) -> tuple[Array, Array, Array]:
    """dq, dS of `_query_state`, and <sums, dsums> `[b, h_kv, c]`, which is <q, dq> / p as φ is homogeneous of degree p."""
    dphi = matmul(_rows(dsums), _with_multiplicity(call, state).mT)
    dq = _grouped(sympow_transposed_jacobian(_rows(q), dphi, call.deg), q.shape[2:4])
    dstate = _with_multiplicity(call, matmul(sympow(_rows(q), call.deg).mT, _rows(dsums)))
    return dq, dstate, (q * dq).sum((2, 4)) / call.deg


def _update_state(call: spec.PowerCall, k: Array, v1: Array) -> Array:
    """Σ_j φ(k_j) v1_jᵀ: what a chunk adds to the state; gates are already in v1."""
    return matmul(sympow(k, call.deg).mT, v1)


def _update_state_backward(call: spec.PowerCall, k: Array, v1: Array, dstate: Array) -> tuple[Array, Array, Array]:
    """dk, dv1 of `_update_state`, and <v1_j, dv1_j> `[b, h_kv, c]`, which is <k, dk> / p."""
    dk = sympow_transposed_jacobian(k, matmul(v1, dstate.mT), call.deg)
    return dk, matmul(sympow(k, call.deg), dstate), (k * dk).sum(-1) / call.deg


def _with_multiplicity(call: spec.PowerCall, state: Array) -> Array:
    return state * jnp.asarray(spec.sympow_multiplicity(call.d, call.deg), state.dtype)[:, None]


# ---------------------------------------------------------------------------------------------------------------------
# Attention form
# ---------------------------------------------------------------------------------------------------------------------


def _block_pairs(call: spec.PowerCall, x: Operands) -> tuple[Array, ...]:
    """Pairs (block of queries, block of keys) with no mask inside: those below the diagonal, or all."""
    shape = x.chunks.q.shape[0], x.chunks.k.shape[0]
    rows, keys = np.nonzero(np.tri(*shape, -1)) if call.causal else np.nonzero(np.ones(shape))
    return jnp.asarray(rows, jnp.int32), jnp.asarray(keys, jnp.int32)


def _pair_operands(x: Operands, i: Array, j: Array) -> tuple[Array, Array, Array, Array | None, Array | None]:
    """q of block i, k and v1 of block j, and the decays from the end of block j to the rows, and from the keys to it."""
    chunks = x.chunks
    of_rows = of_keys = None
    if chunks.gates is not None:
        after = tuple(part[j][..., -1:] for part in chunks.gates)
        of_rows = decay_between(tuple(part[i] for part in chunks.gates), after)[:, :, None, :, None]
        of_keys = chunks.of_keys[j]
    return chunks.q[i], chunks.k[j], chunks.v1[j], of_rows, of_keys


def _from_start(chunk: Chunk) -> Array | None:
    """exp(G_i) `[b, h_kv, 1, c, 1]`: what the gates up to token i leave of the initial state."""
    return None if chunk.gates is None else jnp.exp(chunk.gates[0] + chunk.gates[1])[:, :, None, :, None]


def _to_end(x: Operands) -> Array | None:
    """exp(G_t − G_j) `[n, b, h_kv, c, 1]`: what the gates after token j leave of it."""
    if x.chunks.gates is None:
        return None
    return decay_between(tuple(part[-1:, ..., -1:] for part in x.chunks.gates), x.chunks.gates)[..., None]


def _whole(x: Operands) -> Array | None:
    """exp(G_t) `[b, h_kv, 1, 1]`: what all gates leave of the initial state."""
    if x.chunks.gates is None:
        return None
    return jnp.exp(sum(part[-1, ..., -1:] for part in x.chunks.gates))[..., None]


def _forward_attention(call: spec.PowerCall, x: Operands) -> tuple[Array, Array | None]:
    def diagonal(_: None, chunk: Chunk) -> tuple[None, Array]:
        sums = _attend(call, chunk.q, chunk.k, chunk.v1, _decay_inside(chunk))
        if x.state is not None:
            sums += _decayed(_from_start(chunk), _query_state(call, chunk.q, x.state))
        return None, sums

    def below(sums: Array, pair: tuple[Array, ...]) -> tuple[Array, None]:
        q, k, v1, of_rows, of_keys = _pair_operands(x, *pair)
        return sums.at[pair[0]].add(_decayed(of_rows, _attend(call, q, k, _decayed(of_keys, v1), None))), None

    if call.causal:
        _, sums = lax.scan(diagonal, None, x.chunks)
    else:
        sums = jnp.zeros_like(x.chunks.q, shape=(*x.chunks.q.shape[:-1], call.e + 1))
    sums, _ = lax.scan(below, sums, _block_pairs(call, x))
    return sums, _final_state(call, x) if call.return_state else None


def _final_state(call: spec.PowerCall, x: Operands) -> Array:
    """S after the last token: the sum over all keys, each decayed by the gates after it, and the decayed initial state."""

    def add(state: Array, chunk: tuple[Array, Array, Array | None]) -> tuple[Array, None]:
        k, v1, of_keys = chunk
        return state + _update_state(call, k, _decayed(of_keys, v1)), None

    state = _initial_state(call, x) if x.state is None else _decayed(_whole(x), x.state)
    return lax.scan(add, state, (x.chunks.k, x.chunks.v1, _to_end(x)))[0]


def _initial_state(call: spec.PowerCall, x: Operands) -> Array:
    return _empty_state(call, x) if x.state is None else x.state


def _empty_state(call: spec.PowerCall, x: Operands) -> Array:
    # Made like k, not anew: inside `shard_map`, what a scan carries must vary over the mesh as what is added to it does.
    return jnp.zeros_like(x.chunks.k, shape=(call.b, call.h_kv, call.rows, call.e + 1))


def _backward_attention(call: spec.PowerCall, x: Operands, dsums: Array, dstate: Array | None) -> tuple[Array | None, ...]:
    dstate0, prefix = None, None
    carry: Array | float = 0.0

    def diagonal(dstate0: Array | None, inputs: tuple[Chunk, Array]) -> tuple[Array | None, tuple[Array, ...]]:
        chunk, drows = inputs
        dq, dk, dv1, received, given = _attend_backward(call, chunk.q, chunk.k, chunk.v1, _decay_inside(chunk), drows)
        if x.state is not None:
            dq_state, added, from_state = _query_state_backward(call, chunk.q, x.state, _decayed(_from_start(chunk), drows))
            dq, dstate0, received = dq + dq_state, dstate0 + added, received + from_state
        return dstate0, (dq, dk, dv1, received - given)

    def below(grads: tuple[Array, ...], pair: tuple[Array, ...]) -> tuple[tuple[Array, ...], None]:
        i, j = pair
        q, k, v1, of_rows, of_keys = _pair_operands(x, i, j)
        parts = _attend_backward(call, q, k, _decayed(of_keys, v1), None, _decayed(of_rows, dsums[i]))
        dq, dk, dv1, suffix = grads
        if call.causal:
            suffix = suffix.at[i].add(parts[3]).at[j].add(-parts[4])
        return (dq.at[i].add(parts[0]), dk.at[j].add(parts[1]), dv1.at[j].add(_decayed(of_keys, parts[2])), suffix), None

    def update(_: None, chunk: tuple[Array, Array, Array | None]) -> tuple[None, tuple[Array, Array, Array]]:
        k, v1, of_keys = chunk
        dk, dv1, given = _update_state_backward(call, k, _decayed(of_keys, v1), dstate)
        return None, (dk, _decayed(of_keys, dv1), given)

    if call.causal:
        zero = None if x.state is None else jnp.zeros_like(x.state)
        dstate0, grads = lax.scan(diagonal, zero, (x.chunks, dsums))
    else:
        grads = tuple(map(jnp.zeros_like, (x.chunks.q, x.chunks.k, x.chunks.v1, x.chunks.k[..., 0])))
    (dq, dk, dv1, suffix), _ = lax.scan(below, grads, _block_pairs(call, x))
    if dstate is not None:
        _, (dk_update, dv1_update, prefix) = lax.scan(update, None, (x.chunks.k, x.chunks.v1, _to_end(x)))
        dk, dv1 = dk + dk_update, dv1 + dv1_update
        if x.state is not None:
            decayed = _decayed(_whole(x), dstate)
            dstate0, carry = dstate0 + decayed, (decayed * x.state).sum((-2, -1))[..., None]
    if x.chunks.gates is None:
        return dq, dk, dv1, None, dstate0
    flat_suffix, flat_prefix = (_merge(part) for part in (suffix, jnp.zeros_like(suffix) if prefix is None else prefix))
    return dq, dk, dv1, _chunk(call, _gate_gradient(flat_suffix, flat_prefix, carry), 2), dstate0


# ---------------------------------------------------------------------------------------------------------------------
# Chunked form
# ---------------------------------------------------------------------------------------------------------------------


def _next_state(call: spec.PowerCall, state: Array, chunk: Chunk) -> Array:
    """S_n = exp(G_n − G_{n−1}) S_{n−1} + φ(k)ᵀ diag(exp(G_n − G)) v1."""
    return _decayed(chunk.across, state) + _update_state(call, chunk.k, _decayed(chunk.of_keys, chunk.v1))


def _forward_chunked(call: spec.PowerCall, x: Operands) -> tuple[Array, Array | None]:
    def step(state: Array, chunk: Chunk) -> tuple[Array, Array]:
        sums = _attend(call, chunk.q, chunk.k, chunk.v1, _decay_inside(chunk))
        sums += _decayed(chunk.of_rows, _query_state(call, chunk.q, state))
        return _next_state(call, state, chunk), sums

    if not call.causal:
        state = _final_state(call, x)
        sums = lax.map(lambda q: _query_state(call, q, state), x.chunks.q)
    else:
        state, sums = lax.scan(step, _initial_state(call, x), x.chunks)
    return sums, state if call.return_state else None


def _backward_chunked(call: spec.PowerCall, x: Operands, dsums: Array, dstate: Array | None) -> tuple[Array | None, ...]:
    def remember(state: Array, chunk: Chunk) -> tuple[Array, Array]:
        return _next_state(call, state, chunk), state

    def step(dstate: Array, inputs: tuple[Chunk, Array, Array]) -> tuple[Array, tuple[Array, ...]]:
        chunk, state, drows = inputs
        dq, dk, dv1, received, given = _attend_backward(call, chunk.q, chunk.k, chunk.v1, _decay_inside(chunk), drows)
        dq_query, dstate_query, received_query = _query_state_backward(
            call, chunk.q, state, _decayed(chunk.of_rows, drows)
        )
        dk_update, dv1_update, given_update = _update_state_backward(
            call, chunk.k, _decayed(chunk.of_keys, chunk.v1), dstate
        )
        decayed = _decayed(chunk.across, dstate)
        carry = (decayed * state).sum((-2, -1))[..., None]
        dlog_g = _gate_gradient(received + received_query - given, given_update, carry)
        dv1 += _decayed(chunk.of_keys, dv1_update)
        return decayed + dstate_query, (dq + dq_query, dk + dk_update, dv1, dlog_g)

    if dstate is None:
        dstate = _empty_state(call, x)
    if not call.causal:
        return _backward_chunked_not_causal(call, x, dsums, dstate)
    _, states = lax.scan(remember, _initial_state(call, x), x.chunks)
    dstate, (dq, dk, dv1, dlog_g) = lax.scan(step, dstate, (x.chunks, states, dsums), reverse=True)
    return dq, dk, dv1, dlog_g, dstate


def _backward_chunked_not_causal(call: spec.PowerCall, x: Operands, dsums: Array, dstate: Array) -> tuple[Array | None, ...]:
    state = _final_state(call, x)

    def query(dstate: Array, inputs: tuple[Array, Array]) -> tuple[Array, Array]:
        dq, added, _ = _query_state_backward(call, inputs[0], state, inputs[1])
        return dstate + added, dq

    def update(_: None, inputs: tuple[Array, Array]) -> tuple[None, tuple[Array, Array]]:
        return None, _update_state_backward(call, *inputs, dstate)[:2]

    dstate, dq = lax.scan(query, dstate, (x.chunks.q, dsums))
    _, (dk, dv1) = lax.scan(update, None, (x.chunks.k, x.chunks.v1))
    return dq, dk, dv1, None, None
