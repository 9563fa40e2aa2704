"""Power attention as a differentiable JAX function: `custom_vjp` around the table of implementations."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
from jax import Array

from bridge import spec
from jax_power import mosaic_gpu, xla

# Best first: the first that supports a call serves it unless one is named.
POWER: dict[str, spec.Implementation] = {
    "mosaic_gpu": spec.Implementation(
        mosaic_gpu.power.forward, mosaic_gpu.power.backward, mosaic_gpu.power.supports, mosaic_gpu.power.plan, wide_output=False
    ),
    "xla": spec.Implementation(xla.power.forward, xla.power.backward, xla.power.supports),
}


class Residuals(NamedTuple):
    """What the backward pass needs of the forward pass: its arguments, y as it was computed, and the row normaliser."""

    q: Array
    k: Array
    v: Array
    log_g: Array | None
    s0: Array | None
    z0: Array | None
    y: Array
    norm: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def power_attention(
    call: spec.PowerCall,
    implementation: str,
    q: Array,
    k: Array,
    v: Array,
    log_g: Array | None,
    s0: Array | None,
    z0: Array | None,
) -> tuple[Array, Array | None, Array | None]:
    """y, s, z of a checked call (s and z None unless it returns the state), y in the precision it was computed in."""
    y, _, s, z = POWER[implementation].forward(call, q, k, v, log_g, s0, z0)
    return y, s, z


def _forward(call: spec.PowerCall, implementation: str, *arrays: Array | None) -> tuple[Any, Residuals]:
    y, norm, s, z = POWER[implementation].forward(call, *arrays)
    q, k, v, log_g, s0, z0 = arrays
    return (y, s, z), Residuals(q, k, v, log_g, s0, z0, y, norm)


def _backward(call: spec.PowerCall, implementation: str, residuals: Residuals, grads: Any) -> tuple[Array | None, ...]:
    return POWER[implementation].backward(call, *residuals, *grads)


power_attention.defvjp(_forward, _backward)
