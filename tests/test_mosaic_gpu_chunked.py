"""The Pallas kernels of the chunked form without a GPU: all lower for CUDA, and interpreted they match the float64 oracle; so
does what is around them with the kernels' formulas in plain JAX in their places, which is fast enough for more cases.

`tests/mosaic_gpu_interpreted.py` says what interpreting tests, and what it does not.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jax_power
from bridge import cases, spec
from jax_power import ops
from jax_power.mosaic_gpu import chunked, chunked_bwd, chunked_prepare, chunked_stage, power, tiles
from tests import mosaic_gpu_formulas
from tests.mosaic_gpu_interpreted import interpreted

Case = cases.Case


def call_of(case: Case, arrays: dict[str, Any]) -> spec.PowerCall:
    state = (arrays["s0"], arrays["z0"]) if case.initial_state else None
    options = {name: getattr(case, name) for name in ("deg", "scale", "causal", "normalize", "return_state")}
    return spec.check_power(
        arrays["q"], arrays["k"], arrays["v"], arrays.get("log_g"), **options, form="chunked", initial_state=state
    )


def run(case: Case, arrays: dict[str, Any], kernels: Any = chunked) -> dict[str, Any]:
    """y, the last state and the gradients, by name, from the kernels."""
    call = call_of(case, arrays)
    inputs = [None if name not in arrays else jnp.asarray(arrays[name]) for name in ("q", "k", "v", "log_g", "s0", "z0")]
    y, norm, s, z = kernels.forward(call, *inputs)
    upstream = [None if name not in arrays else jnp.asarray(arrays[name]) for name in ("dy", "ds", "dz")]
    grads = kernels.backward(call, *inputs, y, norm, *upstream)
    results = dict(zip(("y", "s", "z", "dq", "dk", "dv", "dlog_g", "ds0", "dz0"), (y, s, z, *grads), strict=True))
    return {name: x for name, x in results.items() if x is not None}


# ---------------------------------------------------------------------------------------------------------------------
# Lowering
# ---------------------------------------------------------------------------------------------------------------------

# Both dtypes and padded sizes, several chunks and one with states, groups, with and without normaliser.
# Kernels: two stagings, moments, scan, update, query, both gradients; with groups the stagings, moments and update once for
# queries, once for keys.
LOWERED = (
    ("bfloat16", Case("wide", t=600, d=128, e=72), 8),
    ("bfloat16", Case("two_chunks", t=1100, d=64, e=64), 8),
    ("float16", Case("states", t=70, h_q=4, d=48, e=64, normalize=False, initial_state=True, return_state=True), 12),
)


@pytest.mark.parametrize(("dtype", "case", "kernels"), LOWERED, ids=lambda x: getattr(x, "name", x))
def test_lowers_for_cuda(dtype: str, case: Case, kernels: int) -> None:
    """Every kernel, and each once: lowering and compiling them is most of a program's first call."""
    lowered = jax.jit(lambda x: run(case, x)).trace(case.make(dtype)).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("@mosaic_gpu_v2") == kernels


def test_shared_memory_is_estimated_before_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "query", lambda d: tiles.Chunked(4, 12, 3, 112, 32, together=2))
    with pytest.raises(NotImplementedError, match="query_kernel: .* bytes of shared memory"):
        case = Case("too_much", t=300, d=64, e=64)
        jax.eval_shape(lambda x: run(case, x), case.make("bfloat16"))


# ---------------------------------------------------------------------------------------------------------------------
# Interpreting
# ---------------------------------------------------------------------------------------------------------------------


def interpret() -> None:
    """Every kernel, with an initial state, in the shortest chunk that blocks of two warpgroups take."""
    case = Case("interpreted", t=70, h_q=1, h_kv=1, d=64, e=64, initial_state=True)
    arrays = case.make("bfloat16")
    with interpreted(jnp.float16) as patch:
        patch.setattr(tiles, "chunk_length", lambda t, size: 128)
        patch.setattr(tiles, "query", lambda d: tiles.Chunked(2, 3, 3, 232, 40, together=2))
        got = run(case, arrays)
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds("bfloat16", "mosaic_gpu", case), case.name)


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="before JAX 0.12 no interpreter lets a last release go unseen")
def test_interpreted_matches_oracle() -> None:
    """The interpreter's warpgroups wait for each other, and need as many threads of XLA's."""
    in_a_process("interpret", NPROC="8")


def in_a_process(function: str, **environment: str) -> None:
    code = f"from tests import test_mosaic_gpu_chunked; test_mosaic_gpu_chunked.{function}()"
    root = pathlib.Path(__file__).parents[1]
    subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ | environment, check=True, timeout=300)


# ---------------------------------------------------------------------------------------------------------------------
# Around the kernels
# ---------------------------------------------------------------------------------------------------------------------

AROUND = (
    ("bfloat16", Case("odd_length", t=300, h_q=4, h_kv=2, d=16, e=24)),
    ("float16", Case("states", b=2, t=150, h_q=2, h_kv=1, d=24, e=16, initial_state=True, return_state=True)),
    ("float16", Case("not_normalized", t=150, d=16, e=16, normalize=False, initial_state=True, return_state=True)),
    ("bfloat16", Case("mixed_decay", t=300, d=16, e=16, gates="mixed")),
)


@pytest.mark.parametrize(("dtype", "case"), AROUND, ids=lambda x: getattr(x, "name", x))
def test_around_the_kernels_matches_oracle(monkeypatch: pytest.MonkeyPatch, dtype: str, case: Case) -> None:
    mosaic_gpu_formulas.use(monkeypatch)
    monkeypatch.setattr(tiles, "chunk_length", lambda t, size: 128)
    arrays = case.make(dtype)
    got = jax.jit(lambda x: run(case, x))(arrays)
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "mosaic_gpu", case), case.name)


@pytest.mark.parametrize("state", [False, True])
def test_sums_of_gates_start_anew(monkeypatch: pytest.MonkeyPatch, state: bool) -> None:
    """At the start of a segment, <S, dS> is what the sum over all tokens before is: five chunks in segments of two."""
    mosaic_gpu_formulas.use(monkeypatch)
    monkeypatch.setattr(tiles, "chunk_length", lambda t, size: 128)
    case = Case("anchored", b=2, t=600, h_q=4, h_kv=2, d=16, e=24, initial_state=state, return_state=state)
    arrays = case.make("bfloat16")
    anchors = []
    gate_gradient = chunked_bwd.gate_gradient

    def differentiate(*arguments: Any, **options: Any) -> jax.Array:
        anchors.append(arguments[4].shape[1])
        return gate_gradient(*arguments, **options)

    monkeypatch.setattr(chunked_bwd, "gate_gradient", differentiate)
    want = jax.jit(lambda x: run(case, x))(arrays)
    monkeypatch.setattr(tiles, "UNANCHORED", 2)
    monkeypatch.setattr(tiles, "ANCHOR", 2)
    got = jax.jit(lambda x: run(case, x))(arrays)
    assert anchors == [1, 3]
    assert cases.relative_error(got["dlog_g"], np.asarray(want["dlog_g"]).astype(np.float64)) < 5e-4
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds("bfloat16", "mosaic_gpu", case), case.name)


def test_vmap_becomes_part_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    mosaic_gpu_formulas.use(monkeypatch)
    registered = ops.POWER["mosaic_gpu"]
    case = Case("mapped", b=2, t=20, d=8, e=8, h_q=2, h_kv=1)
    one, two = (case.make("bfloat16", seed) for seed in (0, 1))
    mapped = {name: name in ("q", "log_g") for name in one}
    arrays = {name: jnp.stack((one[name], two[name])) if mapped[name] else jnp.asarray(x) for name, x in one.items()}
    axes = ({name: 0 if is_mapped else None for name, is_mapped in mapped.items()},)
    got = jax.jit(jax.vmap(lambda x: run(case, x, registered), in_axes=axes))(arrays)
    for n in range(2):
        want = jax.jit(lambda x: run(case, x, registered))({name: x[n] if mapped[name] else x for name, x in arrays.items()})
        for name, x in want.items():
            np.testing.assert_array_equal(np.asarray(got[name][n]), np.asarray(x), err_msg=name)


def shard() -> None:
    """On a mesh of two by two devices, batch and heads apart, the public function gives what it gives on one device."""
    case = Case("sharded", b=2, t=150, d=16, e=16, h_q=4, h_kv=2, initial_state=True, return_state=True)
    inputs = {name: jnp.asarray(x) for name, x in case.make("bfloat16").items()}

    def both(x: dict[str, jax.Array]) -> Any:
        def attend(x: dict[str, jax.Array]) -> Any:
            state = jax_power.PowerState(x["s0"], x["z0"])
            y, last = jax_power.power_attention(
                *(x[name] for name in ("q", "k", "v", "log_g")), form="chunked", initial_state=state, return_state=True,
                implementation="mosaic_gpu",
            )  # fmt: skip
            return y, *last

        upstream = tuple(x[name] for name in ("dy", "ds", "dz"))
        outputs, pull_back = jax.vjp(attend, {name: x[name] for name in ("q", "k", "v", "log_g", "s0", "z0")})
        return outputs, pull_back(upstream)[0]

    tokens, states = PartitionSpec("batch", None, "heads"), PartitionSpec("batch", "heads")
    of = {name: states if name in ("s0", "z0", "ds", "dz") else tokens for name in inputs}
    grads = {name: of[name] for name in ("q", "k", "v", "log_g", "s0", "z0")}
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(2, 2), ("batch", "heads"))
    sharded = jax.shard_map(both, mesh=mesh, in_specs=(of,), out_specs=((tokens, states, states), grads))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ops.POWER, "mosaic_gpu", ops.POWER["mosaic_gpu"]._replace(supports=lambda call, device: None))
        text = jax.jit(sharded).trace(inputs).lower(lowering_platforms=("cuda",)).as_text()
        assert text.count("@mosaic_gpu_v2") == 12
        jax.clear_caches()
        mosaic_gpu_formulas.use(patch)
        patch.setattr(tiles, "chunk_length", lambda t, size: 128)
        got, want = jax.jit(sharded)(inputs), jax.jit(both)(inputs)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        # Ranges, powers of two, are of a head: only the order of float32 sums may differ.
        assert cases.relative_error(x, np.asarray(y).astype(np.float64)) < 1e-3


def test_shard_map_over_batch_and_heads() -> None:
    in_a_process("shard", XLA_FLAGS="--xla_force_host_platform_device_count=4")


def test_square_moments_are_the_public_state() -> None:
    """Moments of all pairs of features in, the public rows out, and back: each pair once, symmetric."""
    z = chunked_prepare.Sizes(1, 1, 1, 1, 24, 8, 256)
    x = np.random.default_rng(0).standard_normal(64) * (np.arange(64) < 24)
    square = jnp.asarray(np.outer(x, x)[None, :, :, None], jnp.float32)
    tiles = spec.tile_tuples(24, 2)
    want = np.concatenate([np.outer(x[8 * i : 8 * i + 8], x[8 * j : 8 * j + 8]).ravel() for i, j in tiles])
    public = chunked_prepare.from_square(z, square)
    np.testing.assert_allclose(public[0, :, 0], want, rtol=1e-6)
    np.testing.assert_array_equal(chunked_prepare.to_square(z, public), square)
    blocks = chunked_prepare.to_blocks(z, jnp.repeat(square, 8, axis=3))
    assert [b.shape for b in blocks] == [(1, 16, 64, 64 - 16 * n) for n in range(4)]
    np.testing.assert_array_equal(chunked_prepare.from_blocks(z, blocks)[..., 0], public[..., 0])


def scan_interpreted() -> None:
    """In both orders: fewer chunks than are loaded at once, as many, and more; from a first state or from nothing."""
    rng = np.random.default_rng(0)
    for chunks, reverse, with_first in ((3, False, True), (8, True, False), (17, True, True)):
        x, decay, bound = rng.standard_normal((2, chunks, 64, 64)), rng.random((2, chunks)), rng.random((2, chunks))
        decay[:, chunks // 2] = 0.0
        first = (rng.standard_normal((2, 64, 64)), rng.random((2, 2))) if with_first else None
        inputs = jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), (x, decay, bound, first))
        walk = chunked_prepare.walk_of(inputs[1], reverse=reverse)
        with interpreted(jnp.float16):
            got = chunked_stage.scan(*inputs, walk, jnp.asarray([8.0, 2.0], jnp.float32))
        want = mosaic_gpu_formulas.scan(*inputs, walk, jnp.asarray([8.0, 2.0], jnp.float32))
        for y, exact in zip(got, want, strict=True):
            assert cases.relative_error(y, np.asarray(exact).astype(np.float64)) < 1e-4


@pytest.mark.skipif(jax.__version_info__ < (0, 12), reason="before JAX 0.12 no interpreter lets a last release go unseen")
def test_scan_interpreted_is_the_recurrence() -> None:
    in_a_process("scan_interpreted", NPROC="8")


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"deg": 4}, "deg=4"),
        ({"causal": False}, "causal=False"),
        ({"dtypes": ("float32",) * 3}, "dtypes float32"),
        ({"d": 12}, "head size d=12"),
        ({"e": 256}, "head size e=256"),
    ],
)
def test_says_what_it_lacks(change: dict[str, Any], why: str) -> None:
    case = Case("served", t=8, d=16, e=16)
    call = call_of(case, case.make("bfloat16"))
    assert chunked.supports(call, "cuda") is None
    assert (chunked.supports(dataclasses.replace(call, **change), "cuda") or "").startswith(why)
    assert (chunked.supports(call, "cpu") or "").startswith("device cpu")


@pytest.mark.parametrize(
    ("change", "form"),
    [
        ({"t": power.CROSSING[64] - 1}, "attention"),
        ({"t": power.CROSSING[64]}, "chunked"),
        ({"t": power.CROSSING[64], "e": 128}, "attention"),
        ({"t": power.CROSSING[128], "e": 128}, "chunked"),
        ({"t": power.CROSSING[64], "h_q": 6}, "chunked"),
        ({"t": 5, "return_state": True}, "chunked"),
        ({"t": 10**6, "e": 20}, "attention"),
        ({"t": 10**6, "deg": 4}, "attention"),
        ({"t": 5, "auto_form": False}, "chunked"),
    ],
    ids=str,
)
def test_the_form_left_open_is_the_faster_one_that_is_served(change: dict[str, Any], form: str) -> None:
    case = Case("planned", t=8, d=64, e=64)
    call = dataclasses.replace(call_of(case, case.make("bfloat16")), **{"auto_form": True, **change})
    planned = power.plan(call)
    assert planned.form == form
    assert power.supports(planned, "cuda") is None
