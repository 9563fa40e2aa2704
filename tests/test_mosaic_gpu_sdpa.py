"""The Pallas kernels of scaled dot-product attention without a GPU: all lower for CUDA, and interpreted they match the float64
oracle.

`tests/mosaic_gpu_interpreted.py` says what interpreting tests, and what it does not.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_power
from bridge import cases, cases_sdpa, spec_sdpa
from bridge.spec_sdpa import SdpaCall
from jax_power import ops_sdpa
from jax_power.mosaic_gpu import attention_common, power_bwd, sdpa, sdpa_block, sdpa_schedule, sdpa_scores, tiles
from tests.mosaic_gpu_interpreted import interpreted

# Those cases that between them reach every line of the kernels.
CASES = (
    "causal_more_keys", "mqa_wide_value", "one_token", "negative_scale", "mask_several_blocks", "bias_and_mask", "bias_of_keys",
    "bias_of_queries", "window", "window_ahead", "lengths", "everything",
)  # fmt: skip
# Head sizes of queries and of values, a bias and a mask: every row of the tile table, padding, and sizes that differ.
SIZES = (
    (64, 64, None, None), (96, 96, "hts", None), (128, 128, None, None), (256, 256, None, "bts"), (192, 256, "hts", "bts"),
    (64, 200, None, None), (192, 256, None, None),
)  # fmt: skip


def lower(function, *operands, platform: str = "cuda") -> str:
    """The program for one platform, as text."""
    return jax.jit(function).trace(*operands).lower(lowering_platforms=(platform,)).as_text()


def call_of(case: cases_sdpa.SdpaCase, arrays: dict[str, np.ndarray], dtype: str) -> SdpaCall:
    return SdpaCall(
        b=case.b, t=case.t, s=case.keys, h_q=case.h_q, h_kv=case.h_kv, d=case.d, e=case.e, dtype=dtype,
        scale=spec_sdpa.default_scale(case.d) if case.scale is None else case.scale, causal=case.causal, window=case.window,
        bias=arrays["bias"].shape if "bias" in arrays else None, mask=arrays["mask"].shape if "mask" in arrays else None,
        query_lengths="query_lengths" in arrays, key_lengths="key_lengths" in arrays,
    )  # fmt: skip


def operands_of(arrays: dict[str, np.ndarray]) -> list[jax.Array | None]:
    names = ("q", "k", "v", "bias", "mask", "query_lengths", "key_lengths")
    return [jnp.asarray(arrays[name]) if name in arrays else None for name in names]


def check_lowers(case: cases_sdpa.SdpaCase, dtype: str, bias_dtype: str | None = None) -> None:
    """Forward and backward of a case are one and two or more kernels."""
    arrays = case.make(dtype)
    if bias_dtype is not None and "bias" in arrays:
        arrays["bias"] = arrays["bias"].astype(bias_dtype)
    call = call_of(case, arrays, dtype)
    assert sdpa.supports(call, "cuda") is None
    operands = jax.eval_shape(lambda: operands_of(arrays))
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


@pytest.mark.parametrize(("d", "e", "bias", "mask"), SIZES)
def test_head_sizes_lower(d, e, bias, mask):
    """With a float32 bias: the most shared memory that the row of the table can be asked for."""
    check_lowers(cases_sdpa.SdpaCase("size", t=200, s=150, d=d, e=e, bias=bias, mask=mask, causal=True), "float16", "float32")


def test_shared_memory_is_counted_before_compiling(monkeypatch):
    """All that a kernel allocates: with one byte less than it takes at head size 64, it is refused by name."""
    x = jax.ShapeDtypeStruct((1, 64, 1, 64), jnp.bfloat16)
    call = SdpaCall(b=1, t=64, s=64, h_q=1, h_kv=1, d=64, e=64, scale=1.0, dtype="bfloat16")

    def trace():
        jax.eval_shape(lambda x: sdpa.forward.__wrapped__(call, x, x, x, None, None, None, None), x)

    # Q of 3 warpgroups twice and their O, 4 stages of K and V of 128 keys, and lse in units of 1 KiB.
    needed = 2 * 64 * (3 * 3 * 64 + 4 * 2 * 128) + 1024
    monkeypatch.setattr(tiles, "SMEM_BYTES", needed)
    trace()
    monkeypatch.setattr(tiles, "SMEM_BYTES", needed - 1)
    with pytest.raises(NotImplementedError, match="forward of softmax attention: .* bytes of shared memory"):
        trace()


# ---------------------------------------------------------------------------------------------------------------------
# The public function
# ---------------------------------------------------------------------------------------------------------------------


def attend(q, k, v, **options):
    return jax_power.dot_product_attention(q, k, v, is_causal=True, **options)


def gradients(function):
    return jax.grad(lambda *x: function(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))


def test_chosen_for_hopper_and_nowhere_else():
    """With nothing named: the kernels for CUDA, none for a CPU, in one program; and first in the table."""
    assert next(iter(ops_sdpa.SDPA)) == "mosaic_gpu"
    x = jax.ShapeDtypeStruct((1, 40, 2, 64), jnp.bfloat16)
    # Traced for a CPU, which keeps nothing for the kernels: the forward pass runs again before the two of the backward pass.
    assert lower(gradients(attend), x, x, x).count("@mosaic_gpu_v2") == 4
    assert "mosaic_gpu" not in lower(gradients(attend), x, x, x, platform="cpu")
    wide = jax.ShapeDtypeStruct(x.shape, jnp.float32)
    assert "mosaic_gpu" not in lower(attend, wide, wide, wide)


@pytest.mark.parametrize("transform", [jax.checkpoint, lambda f: jax.vmap(f, (0, None, 2), 1)], ids=["checkpoint", "vmap"])
def test_transformed_calls_lower(transform):
    x = jax.ShapeDtypeStruct((2, 40, 2, 64), jnp.bfloat16)
    mapped = [jax.ShapeDtypeStruct((2, *x.shape), x.dtype), x, jax.ShapeDtypeStruct((2, 40, 2, 2, 64), x.dtype)]
    operands = [x, x, x] if transform is jax.checkpoint else mapped
    assert lower(gradients(transform(attend)), *operands).count("@mosaic_gpu_v2") == 4


def test_sharded_calls_lower():
    mesh = jax.make_mesh((1,), ("heads",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec(None, None, "heads")
    sharded = jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)
    x = jax.ShapeDtypeStruct((1, 40, 2, 64), jnp.bfloat16)
    assert lower(gradients(sharded), x, x, x).count("@mosaic_gpu_v2") == 4


def test_a_block_says_why_none_of_its_implementations_can():
    x = jnp.zeros((1, 8, 2, 64), jnp.bfloat16)
    told = "implementation='mosaic_gpu' cannot serve this call: device cpu: .*; implementation='xla' would work"
    with jax_power.implementation(["mosaic_gpu"]), pytest.raises(NotImplementedError, match=told):
        attend(x, x, x)
    with jax_power.implementation(["mosaic_gpu", "xla"]):
        assert attend(x, x, x).shape == x.shape


def test_second_derivatives_are_those_of_xla():
    """Forward over reverse and, without a causal mask, reverse over reverse; without xla to ask, an error says so."""
    q, k, v = (jnp.asarray(x, jnp.float16) for x in np.random.default_rng(0).standard_normal((3, 1, 5, 1, 4)))

    def slope(q, causal=True, **options):
        y = jax_power.dot_product_attention
        return jax.grad(lambda q: (y(q, k, v, is_causal=causal, **options).astype(jnp.float32) ** 2).sum())(q)

    def twice(reverse, **options):
        if reverse:
            return jax.jit(lambda q: jax.vjp(functools.partial(slope, causal=False, **options), q)[1](q)[0])(q)
        return jax.jit(lambda q: jax.jvp(functools.partial(slope, **options), (q,), (q,))[1])(q)

    for reverse in (False, True):
        got, want = (np.asarray(twice(reverse, implementation=names), np.float32) for names in (None, "xla"))
        np.testing.assert_allclose(got, want, rtol=2e-3, atol=2e-3 * np.abs(want).max())
    alone = ops_sdpa.Plans(ops_sdpa.Plan("mosaic_gpu", call_like(q)), None, here_is_cuda=True)

    def first(q):
        operands = ops_sdpa.Operands(q, k, v, None, None, None, None)
        return jax.vjp(lambda operands: ops_sdpa.attention(alone, operands)[0], operands)[1](q)[0].q

    with pytest.raises(NotImplementedError, match="second derivatives.*'mosaic_gpu'; implementation='xla' would work"):
        jax.jit(lambda q: jax.jvp(first, (q,), (q,))[1]).trace(q)


def call_like(q: jax.Array) -> SdpaCall:
    b, t, h, d = q.shape
    return SdpaCall(b=b, t=t, s=t, h_q=h, h_kv=h, d=d, e=d, scale=1.0, dtype=str(q.dtype))


@pytest.mark.parametrize(
    ("changes", "device", "reason"),
    [
        ({}, "cpu", "device cpu: the kernels run on a Hopper GPU; move the arrays there"),
        ({"dtype": "float32"}, "cuda", "dtype float32: the kernels take bfloat16 and float16"),
        ({"d": 264}, "cuda", "head size d=264: the kernels take 1 to 256"),
        ({"e": 0}, "cuda", "head size e=0: the kernels take 1 to 256"),
        ({"dropout_p": 0.1}, "cuda", "dropout_p > 0 is not implemented"),
    ],
)
def test_supports_names_the_cause(changes, device, reason):
    call = SdpaCall(b=1, t=8, s=8, h_q=2, h_kv=2, d=64, e=64, scale=1.0, dtype="bfloat16")
    assert sdpa.supports(call, "cuda") is None
    assert sdpa.supports(dataclasses.replace(call, **changes), device) == reason


# ---------------------------------------------------------------------------------------------------------------------
# Interpreting
# ---------------------------------------------------------------------------------------------------------------------

Case = cases_sdpa.SdpaCase
# Every kernel, rings that run around, grouped heads, lengths, both dtypes.
INTERPRETED = (
    ("bfloat16", Case("bias_several_tiles", t=130, s=130, h_q=1, h_kv=1, d=64, e=64, bias="ts")),
    ("float16", Case("group_and_lengths", t=66, s=70, h_q=2, h_kv=1, d=64, e=64, key_lengths=(67,), query_lengths=(65,))),
    ("bfloat16", Case("window_of_wide_heads", t=200, s=64, h_q=1, h_kv=1, d=128, e=128, window=(200, 200))),
)
needs_interpreter = pytest.mark.skipif(
    jax.__version_info__ < (0, 11), reason="JAX 0.10 interprets no plgpu.load and detects no races"
)


def run_interpreted(case: Case, dtype: str, arrays: dict[str, Any], *patches: tuple[Any, str, Any]) -> dict[str, Any]:
    """y and the gradients, by name, from interpreted kernels, that is, traced anew and not as `jax.jit` remembers them."""
    call, operands = call_of(case, arrays, dtype), operands_of(arrays)
    with interpreted(jnp.dtype(dtype)) as patch:
        patch.setattr(attention_common, "start", power_bwd.start)
        for target in patches:
            patch.setattr(*target)
        out, lse, residual = sdpa.forward.__wrapped__(call, *operands, residual=True)
        call = dataclasses.replace(call, bias_grad="bias" in arrays)
        grads = sdpa.backward.__wrapped__(call, *operands, out, lse, jnp.asarray(arrays["dy"]), residual)
    results = zip(("y", "dq", "dk", "dv", "dbias"), (out, *grads), strict=True)
    return {name: np.asarray(x) for name, x in results if x is not None}


@needs_interpreter
@pytest.mark.parametrize(("dtype", "case"), INTERPRETED, ids=lambda x: getattr(x, "name", x))
def test_interpreted_matches_oracle(dtype, case):
    arrays = case.make(dtype)
    got = run_interpreted(case, dtype, arrays)
    want = case.exact(arrays, "zero")
    del want["lse"]
    cases.assert_within(cases.errors(got, want, case, arrays["dy"]), cases_sdpa.bounds(dtype, "mosaic_gpu"), case.name)


@needs_interpreter
@pytest.mark.parametrize("size", [64, 256], ids=["results apart", "results in the place of queries"])
def test_blocks_with_several_items_match_oracle(size, monkeypatch):
    """One multiprocessor for all: rings, slots and turns go on from item to item."""
    monkeypatch.setattr(sdpa_schedule, "multiprocessors", lambda: 1)
    case = Case("several_items", t=260, s=140, h_q=2, h_kv=1, d=size, e=size, causal=True)
    arrays = case.make("bfloat16")
    call, operands = call_of(case, arrays, "bfloat16"), operands_of(arrays)
    with interpreted(jnp.dtype("bfloat16")):
        out, lse, residual = sdpa.forward.__wrapped__(call, *operands, residual=True)
    want = case.exact(arrays, "zero")
    y = np.asarray(out, np.float64)
    assert np.linalg.norm(y - want["y"]) <= cases_sdpa.bounds("bfloat16", "mosaic_gpu")["y"] * np.linalg.norm(want["y"])
    assert np.linalg.norm(y + np.asarray(residual, np.float64) - want["y"]) <= np.linalg.norm(y - want["y"])
    np.testing.assert_allclose(np.asarray(lse).swapaxes(1, 2), want["lse"], rtol=1e-3, atol=1e-3)


@needs_interpreter
def test_a_stage_released_without_a_fence_is_found():
    """Loads from shared memory and the copy engine's next write are ordered by the fence of `Ring.release` alone."""
    dtype, case = INTERPRETED[0]
    release = sdpa_block.Ring.release

    def without_fence(ring, n, *, loaded=False):
        release(ring, n)

    with pytest.raises(Exception, match="RACE DETECTED"):
        run_interpreted(case, dtype, case.make(dtype), (sdpa_block.Ring, "release", without_fence))


# ---------------------------------------------------------------------------------------------------------------------
# Which tiles there are
# ---------------------------------------------------------------------------------------------------------------------

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


# ---------------------------------------------------------------------------------------------------------------------
# Who works on what
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("causal", "window"), [(False, None), (True, None), (False, (5, 3)), (True, (100, 7)), (False, (-150, 400))]
)
def test_items_cost_what_they_see(causal, window):
    for t, s, rows, width in ((1, 1, 192, 128), (300, 200, 128, 64), (700, 130, 192, 128)):
        call = SdpaCall(b=1, t=t, s=s, h_q=1, h_kv=1, d=8, e=8, scale=1.0, dtype="bfloat16", causal=causal, window=window)
        visible = sdpa_scores.Visible.of(call, 0, [], width)
        seen = [visible.key_blocks(row, rows, width) for row in range(0, t, rows)]
        costs = sdpa_schedule.costs(call, rows, width) - sdpa_schedule.ITEM_COST
        np.testing.assert_array_equal(costs, [int(x.last) - int(x.first) for x in seen])


@pytest.mark.parametrize(("t", "heads"), [(1, 3), (2048, 256), (16384, 32), (1000, 7)])
def test_every_item_is_dealt_once_and_fairly(t, heads, monkeypatch):
    """No multiprocessor works longer than the mean and one item more."""
    monkeypatch.setattr(sdpa_schedule, "multiprocessors", lambda: 132)
    call = SdpaCall(b=1, t=t, s=t, h_q=heads, h_kv=heads, d=8, e=8, scale=1.0, dtype="bfloat16", causal=True)
    table = sdpa_schedule.table(call, 192, 128)
    costs = sdpa_schedule.costs(call, 192, 128)
    hands = [row[1 : 1 + row[0]] for row in table]
    assert sorted(np.concatenate(hands)) == list(range(len(costs) * heads))
    together = sdpa_scores.head_group(heads)
    loads = [sum(costs[len(costs) - 1 - n % (together * len(costs)) // together] for n in hand) for hand in hands]
    assert max(loads) <= costs.sum() * heads / len(hands) + costs.max()
