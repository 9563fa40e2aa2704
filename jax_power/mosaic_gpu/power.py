"""Power attention on Hopper GPUs in Pallas: the kernels behind the interface every implementation has.

`jax_power.mosaic_gpu.attention` is the attention form, `jax_power.mosaic_gpu.chunked` the chunked one (degree 2); here is the
choice between them.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from jax import Array

from bridge import hopper, spec
from jax_power.mosaic_gpu import attention, chunked, tiles

# Tokens from which the chunked form is faster, by padded head size: one H100, kernels forward and backward together,
# nanoseconds a token and head: d = 64: chunked 7.7 at t = 65536, with gates; attention 2.5 at t = 2048 and 14.4 at 16384,
# without (NOTES). d = 128: attention 27 at 16384, without; chunked is expected at about 50, not timed yet.
CROSSING = {64: 9_900, 128: 24_000}


def plan(call: spec.PowerCall) -> spec.PowerCall:
    """Replace a form that was left open by the one that is faster here, forward and backward together.

    What the chunked kernels lack is left to the attention form.
    """
    if not call.auto_form or call.has_state or call.return_state:
        return call
    short = call.t < CROSSING[tiles.padded_head(max(call.d, call.e))] or chunked.lacks(call) is not None
    return dataclasses.replace(call, form="attention" if short else "chunked")


def supports(call: spec.PowerCall, device: str) -> str | None:
    """None, or why the kernels cannot serve `call`: the argument, and what would work."""
    return _form(call).supports(call, device)


def forward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None, z0: Array | None
) -> tuple[Array, Any, Array | None, Array | None]:
    """y `[b, t, h_q, e]` in the dtype of v, what `backward` takes as norm, and the final state (None unless asked for).

    A call with a state, and one of form 'recurrent', is served by the chunked kernels whatever the form: the sums are the same.
    """
    return _form(call).forward(call, q, k, v, log_g, s0, z0)


def backward(
    call: spec.PowerCall, q: Array, k: Array, v: Array, log_g: Array | None, s0: Array | None,
    z0: Array | None, y: Array, norm: Any, dy: Array, ds: Array | None, dz: Array | None,
) -> tuple[Array, Array, Array, Array | None, Array | None, Array | None]:  # fmt: skip
    """Gradients of q, k, v, log_g, s0, z0 in the dtypes of those arguments (None where the argument is None)."""
    return _form(call).backward(call, q, k, v, log_g, s0, z0, y, norm, dy, ds, dz)


def _form(call: spec.PowerCall) -> Any:
    """The module that serves `call`."""
    return attention if hopper.in_attention_form(call) else chunked
