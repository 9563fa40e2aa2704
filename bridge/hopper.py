"""What the kernels for Hopper GPUs take, in one wording, and which form is faster there, whoever calls them.

The CUDA kernels are called by `torch_power` ("cuda") and by `jax_power` ("cuda_ffi"); the Pallas kernels ("mosaic_gpu") are
their twins, and pass the limits in which they differ.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from bridge import spec

# Tokens from which the chunked form is faster, by the head size that kernels pad to and whether there are gates: one H100,
# forward and backward together, nanoseconds a token and head, 32768 tokens of 1024 numbers, all in one run
# (benchmarks/results/gpu_forms_h100.json), in proportion between the lengths timed.
CROSSING: Mapping[tuple[int, bool], int] = {
    (64, True): 4_200,  # attention 5.9 at t = 4096 and 10.9 at 8192, chunked 6.0 and 5.8
    (64, False): 7_000,  # attention 4.1 at 4096 and 7.2 at 8192, chunked 6.4 and 6.2
    (128, True): 11_500,  # attention 18.0 at 8192 and 35.7 at 16384, chunked 24.6 and 25.9
    (128, False): 16_700,  # attention 27.3 at 16384 and 52.3 at 32768, chunked 27.8 and 30.8
}


def plan(call: spec.PowerCall) -> spec.PowerCall:
    """Replace a form that was left open by the one that is faster here, forward and backward together.

    What the chunked kernels lack (other degrees, no mask, heads of more than 128 or not of whole tiles) is left to the
    attention form.
    """
    if not call.auto_form or call.has_state or call.return_state:
        return call
    if call.deg != 2 or not call.causal or call.d % 8 or call.e % 8 or max(call.d, call.e) > 128:
        return dataclasses.replace(call, form="attention")
    crossing = CROSSING[64 if max(call.d, call.e) <= 64 else 128, call.has_gate]
    return dataclasses.replace(call, form="attention" if call.t < crossing else "chunked")


def in_attention_form(call: spec.PowerCall) -> bool:
    """Whether the attention form's kernels serve `call`.

    A call with a state, and one of form 'recurrent', is served by the chunked kernels whatever the form: the sums are the same.
    """
    return call.form == "attention" and not (call.has_state or call.return_state)


def attention_lacks(call: spec.PowerCall, device: str, *, largest: int = 256, padded: bool = False) -> str | None:
    """None, or why the kernels of the attention form cannot serve `call`: the argument, and what would work.

    Args:
      largest: head size that they take.
      padded: the caller fills head sizes up to multiples of 8.
    """
    if (reason := _elsewhere(device)) is not None:
        return reason
    if call.form != "attention":
        return f"form={call.form!r}: these kernels compute form='attention'"
    if (reason := _dtypes(call)) is not None:
        return reason
    if call.deg > 4:
        return f"deg={call.deg}: the kernels of the attention form take 1 to 4"
    least, step, sizes = (0, 1, "") if padded else (8, 8, "multiples of 8 ")
    for name, size in (("d", call.d), ("e", call.e)):
        if not least <= size <= largest or size % step:
            return f"head size {name}={size}: the kernels of the attention form take {sizes}up to {largest}"
        if size > 128 and call.deg == 4 and call.dtypes[0] == "float16":
            return f"head size {name}={size}: with deg=4 in float16 the kernels take up to 128; bfloat16 takes up to {largest}"
    if call.has_state or call.return_state:
        return "initial_state, return_state: the attention form's kernels have no state; use form='chunked'"
    return None


def chunked_lacks(call: spec.PowerCall, device: str, *, largest: int = 128, most_heads: int | None = 65535) -> str | None:
    """None, or why the chunked kernels cannot serve `call`: the argument, and what would work.

    Args:
      largest: head size that they take.
      most_heads: b·h_q that they take; None for any.
    """
    if (reason := _elsewhere(device)) is not None:
        return reason
    if call.deg != 2:
        return f"deg={call.deg}: the chunked kernels take 2; form='attention' without a state takes 1 to 4"
    if not call.causal:
        return "causal=False: the chunked kernels are causal; use form='attention'"
    if (reason := _dtypes(call)) is not None:
        return reason
    for name, size in (("d", call.d), ("e", call.e)):
        if not 8 <= size <= largest or size % 8:
            return f"head size {name}={size}: the chunked kernels take multiples of 8 up to {largest}"
    if most_heads is not None and call.b * call.h_q > most_heads:
        return f"b·h_q={call.b * call.h_q}: the chunked kernels take at most {most_heads} heads in all"
    return None


def _elsewhere(device: str) -> str | None:
    return None if device.startswith("cuda") else f"device {device}: the kernels run on a Hopper GPU; move the arrays there"


def _dtypes(call: spec.PowerCall) -> str | None:
    if len(set(call.dtypes)) == 1 and call.dtypes[0] in ("bfloat16", "float16"):
        return None
    return f"dtypes {', '.join(call.dtypes)} of q, k, v: the kernels take bfloat16 or float16, the same for all three"
