"""The chunked form on Hopper: glue between the interface every implementation has and the Pallas kernels.

Calls with a state, and those of form 'recurrent', are served by the same kernels: the sums are the same. The chunk length is
the kernels' own (`tiles.chunk_length`): results do not depend on it.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import Array

from bridge import hopper, spec
from jax_power import platforms
from jax_power.mosaic_gpu import chunked_bwd, chunked_fwd


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels of the chunked form cannot serve `call`: the argument, and what would work."""
    return lacks(call, device) or platforms.not_hopper()


def lacks(call: spec.PowerCall, device: str = "cuda") -> str | None:
    """`supports`, whatever this machine has."""
    return hopper.chunked_lacks(call, device, most_heads=None)


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Any, Array | None, Array | None]:
    """y `[b, t, h_q, e]` in the dtype of v, what `backward` takes as norm, and the final state (None unless asked for).

    norm is `chunked_fwd.Saved`: with the normaliser the states before every chunk and the staged keys and values, which this
    pass has in device memory anyway (b = 1, t = 65536, h = 8, d = 64: 270 and 134 MB).
    """
    if not _empty(call):
        return chunked_fwd.forward(call, _scaled(call, q), k, v, log_g, s0, z0)
    s = z = None
    if call.return_state:
        shape = (call.b, call.h_kv, call.rows)
        s, z = (jnp.zeros((*shape, call.e)), jnp.zeros(shape)) if s0 is None else (s0, z0)
    return jnp.zeros((*q.shape[:3], call.e), v.dtype), jnp.zeros(q.shape[:3], jnp.float32), s, z


def backward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None,
    z0: Array | None, y: Array, norm: Any, dy: Array, ds: Array | None, dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:  # fmt: skip
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None).

    Every sum has one order: two runs give equal bits.
    """
    if not _empty(call):
        return chunked_bwd.backward(call, _scaled(call, q), k, v, log_g, s0, z0, y, norm, dy.astype(v.dtype), ds, dz)
    ds0, dz0 = (None if x is None else jnp.zeros_like(x) if dx is None else dx for x, dx in ((s0, ds), (z0, dz)))
    dlog_g = None if log_g is None else jnp.zeros_like(log_g)
    return jnp.zeros_like(q), jnp.zeros_like(k), jnp.zeros_like(v), dlog_g, ds0, dz0


def _empty(call: spec.PowerCall) -> bool:
    return 0 in (call.b, call.t, call.h_q)


def _scaled(call: spec.PowerCall, q: Array) -> Array:
    """q, or zeros for scale = 0, which a normalised row would otherwise not notice."""
    return q if call.scale else jnp.zeros_like(q)
