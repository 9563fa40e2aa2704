"""The Pallas kernels of scaled dot-product attention without a GPU: every kernel lowers in every configuration.

Their numbers are checked by tests/gpu/test_mosaic_gpu_sdpa.py; P as an operand in registers is beyond JAX's interpreter.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge import cases_sdpa, spec_sdpa
from bridge.spec_sdpa import SdpaCall
from jax_power.mosaic_gpu import sdpa, sdpa_scores

# Those cases that between them reach every line of the kernels.
CASES = (
    "causal_more_keys", "mqa_wide_value", "one_token", "negative_scale", "mask_several_blocks", "bias_and_mask", "bias_of_keys",
    "bias_of_queries", "window", "window_ahead", "lengths", "everything",
)  # fmt: skip
# Head sizes of queries and of values, and a bias: every row of the tile table, padding, and sizes that differ.
SIZES = (
    (64, 64, None), (96, 96, "hts"), (128, 128, None), (256, 256, None), (256, 256, "hts"), (64, 200, None),
)  # fmt: skip


def lower(function, *operands) -> str:
    """The program for NVIDIA GPUs, as text."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=("cuda",)).as_text()


def call_of(case: cases_sdpa.SdpaCase, arrays: dict[str, np.ndarray], dtype: str) -> SdpaCall:
    return SdpaCall(
        b=case.b, t=case.t, s=case.keys, h_q=case.h_q, h_kv=case.h_kv, d=case.d, e=case.e, dtype=dtype,
        scale=spec_sdpa.default_scale(case.d) if case.scale is None else case.scale, causal=case.causal, window=case.window,
        bias=arrays["bias"].shape if "bias" in arrays else None, mask=arrays["mask"].shape if "mask" in arrays else None,
        query_lengths="query_lengths" in arrays, key_lengths="key_lengths" in arrays,
    )  # fmt: skip


def check_lowers(case: cases_sdpa.SdpaCase, dtype: str) -> None:
    """Forward and backward of a case are one and two or more kernels."""
    arrays = case.make(dtype)
    call = call_of(case, arrays, dtype)
    names = ("q", "k", "v", "bias", "mask", "query_lengths", "key_lengths")
    operands = [jax.ShapeDtypeStruct(arrays[x].shape, arrays[x].dtype) if x in arrays else None for x in names]
    forward = functools.partial(sdpa.forward, call, residual=True)
    assert lower(forward, *operands).count("custom_call @mosaic_gpu") == 1
    call = dataclasses.replace(call, bias_grad="bias" in arrays)
    out, lse, residual = jax.eval_shape(forward, *operands)
    assert (residual.shape, residual.dtype) == (out.shape, out.dtype)
    kernels = lower(functools.partial(sdpa.backward, call), *operands, out, lse, out, residual).count("custom_call @mosaic_gpu")
    assert kernels == 2 + (max(case.d, case.e) > 128) + (case.bias is not None and {"t", "s"} <= set(case.bias))


@pytest.mark.parametrize("name", CASES)
def test_lowers(name):
    check_lowers(cases_sdpa.BY_NAME[name], "bfloat16")


@pytest.mark.parametrize(("d", "e", "bias"), SIZES)
def test_head_sizes_lower(d, e, bias):
    check_lowers(cases_sdpa.SdpaCase("size", t=200, s=150, d=d, e=e, bias=bias, causal=True), "float16")


def test_vmap_lowers():
    x = jax.ShapeDtypeStruct((3, 2, 40, 2, 64), jnp.bfloat16)
    call = SdpaCall(b=2, t=40, s=40, h_q=2, h_kv=2, d=64, e=64, scale=0.125, dtype="bfloat16")
    mapped = jax.vmap(lambda q, k, v: sdpa.forward(call, q, k, v, None, None, None, None), (0, None, 0))
    assert "mosaic_gpu" in lower(mapped, x, jax.ShapeDtypeStruct(x.shape[1:], x.dtype), x)


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", "device cpu: the kernels run on a Hopper GPU; move the arrays there"),
        ({"dtype": "float32"}, "cuda", "query dtype float32: the kernels take bfloat16 or float16"),
        ({"d": 136}, "cuda", "query and key head size 136: the kernels take 1 to 128"),
        ({"e": 0}, "cuda", "value head size 0: the kernels take 1 to 128"),
        (
            {"d": 128, "bias": (1, 1, 8, 8)},
            "cuda",
            "bias shape (1, 1, 8, 8): one that varies with queries and keys takes head sizes up to 64",
        ),
        ({"dropout_p": 0.1}, "cuda", "dropout_p > 0 is not implemented"),
    ],
)
def test_supports_names_the_cause(changes, device, reason):
    call = SdpaCall(b=1, t=8, s=8, h_q=2, h_kv=2, d=64, e=64, scale=1.0, dtype="bfloat16")
    assert sdpa.supports(call, "cuda") is None
    assert sdpa.supports(dataclasses.replace(call, **changes), device) == reason


RANGES = [
    (t, s, causal, window, row, rows, width)
    for t, s in ((1, 1), (300, 200), (130, 700))
    for causal in (False, True)
    for window in (None, (5, 3), (100, 0), (-2, 9), (-150, 400), (10**12, -4))
    for row in range(0, t, 64)
    for rows, width in ((64, 64), (128, 128))
]


def test_blocks_are_those_with_something_to_see():
    """The range of blocks of keys, and of queries, against the mask itself: none is missed, and full ones are full."""
    for t, s, causal, window, row, rows, width in RANGES:
        call = SdpaCall(b=1, t=t, s=s, h_q=1, h_kv=1, d=8, e=8, scale=1.0, dtype="bfloat16", causal=causal, window=window)
        visible = sdpa_scores.Visible.of(call, 0, [], width)
        i, j = np.arange(t)[:, None], np.arange(s)
        seen = np.ones((t, s), bool) if not causal else j <= i
        if window is not None:
            seen = seen & (i - window[0] <= j) & (j <= i + window[1])
        for blocks, part in ((visible.key_blocks(row, rows, width), seen[row : row + rows]), (None, None)):
            if blocks is None:
                if row >= s:
                    continue
                blocks, part = visible.query_blocks(row, rows, width), seen[:, row : row + rows].T
            first, full_first, full_last, last = (int(x) for x in blocks)
            assert 0 <= first <= full_first <= full_last <= last
            for n in range(-(-part.shape[1] // width)):
                tile = part[:, n * width : (n + 1) * width]
                assert first <= n < last or not tile.any()
                if full_first <= n < full_last:
                    assert tile.all()
                    assert tile.shape[1] == width or blocks is not None
