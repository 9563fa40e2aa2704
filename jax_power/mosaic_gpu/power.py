"""Power attention on Hopper GPUs in Pallas: the kernels behind the interface every implementation has.

The attention form alone, `jax_power.mosaic_gpu.attention`. The chunked form (`chunked`) has not been held to the oracle
on a GPU and is not served from here.
"""

from __future__ import annotations

import dataclasses

from jax import Array

from bridge import spec
from jax_power.mosaic_gpu import attention


def plan(call: spec.PowerCall) -> spec.PowerCall:
    """Replace a form that was left open by the attention form, the one there is here."""
    if not call.auto_form or call.has_state or call.return_state:
        return call
    return dataclasses.replace(call, form="attention")


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    return attention.supports(call, device)


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Array, Array | None, Array | None]:
    """y `[b, t, h_q, e]` in the dtype of v, norm `[b, t, h_q]` float32, and the final state (None unless asked for)."""
    return attention.forward(call, q, k, v, log_g, s0, z0)


def backward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None,
    z0: Array | None, y: Array, norm: Array, dy: Array, ds: Array | None, dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:  # fmt: skip
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None)."""
    return attention.backward(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz)
