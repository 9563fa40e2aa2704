"""The Pallas kernels of the attention form on a Hopper GPU: the case table and longer sequences against the float64 oracle.

Also equal bits, and what JAX does to a function: jit, vmap, checkpoint, shard_map. Skipped where there is no GPU.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jax_power
from bridge import cases, spec
from jax_power import mosaic_gpu

pytestmark = pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU that JAX sees")

Case = cases.Case
DTYPES = ("bfloat16", "float16")
# Longer than a tile, a ring of stages and a block of gates; odd lengths; every combination of padded head sizes.
LONGER = (
    Case("plain", t=1000, h_q=4, h_kv=2, d=64, e=64, gates=None),
    Case("gates", t=1000, h_q=4, h_kv=2, d=64, e=64),
    Case("mixed_gates", t=1501, d=64, e=64, gates="mixed"),
    Case("wide_plain", t=777, d=128, e=128, gates=None),
    Case("wide_gates", t=777, d=128, e=128),
    Case("wide_value", b=2, t=300, d=64, e=128),
    Case("wide_key", b=2, t=300, d=128, e=64, deg=4),
    Case("cross", t=333, t_kv=701, h_q=4, h_kv=2, d=64, e=64, causal=False, gates=None),
    Case("degree_4", t=600, d=64, e=64, deg=4),
    Case("odd_degree", t=601, d=64, e=64, deg=3, normalize=False),
    Case("large", t=4096, h_q=1, h_kv=1, d=64, e=64, std=8.0),
    Case("small", t=700, d=64, e=64, std=0.01),
)
TABLE = [
    (case, dtype)
    for case in (*cases.POWER, *LONGER)
    for dtype in DTYPES
    if "attention" in case.forms and not (case.initial_state or case.return_state) and case.deg <= 4
]


def arguments(arrays: dict[str, np.ndarray]) -> tuple[jax.Array, ...]:
    return tuple(jnp.asarray(arrays[name]) for name in ("q", "k", "v", "log_g") if name in arrays)


def attend(case: Case, *inputs: jax.Array) -> jax.Array:
    options = {name: getattr(case, name) for name in ("deg", "scale", "causal", "normalize")}
    return jax_power.power_attention(*inputs, **options, form="attention", implementation="mosaic_gpu")


def both(case: Case, dy: jax.Array, *inputs: jax.Array) -> dict[str, jax.Array]:
    """y and the gradients, by name."""
    y, pull_back = jax.vjp(functools.partial(attend, case), *inputs)
    return dict(zip(("y", "dq", "dk", "dv", "dlog_g"), (y, *pull_back(dy)), strict=False))


def assert_equal_bits(got: dict[str, jax.Array], want: dict[str, jax.Array]) -> None:
    for name, x in want.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(x).tobytes(), name


@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=lambda x: getattr(x, "name", x))
def test_matches_oracle(case: Case, dtype: str) -> None:
    arrays = case.make(dtype)
    got = jax.jit(functools.partial(both, case))(jnp.asarray(arrays["dy"]), *arguments(arrays))
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "mosaic_gpu", case), f"{case.name} {dtype}")


def test_a_hundred_runs_give_equal_bits() -> None:
    case = Case("repeat", t=1000, h_q=4, h_kv=2, d=64, e=64)
    arrays = case.make("bfloat16")
    run = jax.jit(functools.partial(both, case))
    inputs = jnp.asarray(arrays["dy"]), *arguments(arrays)
    first = run(*inputs)
    for _ in range(100):
        assert_equal_bits(run(*inputs), first)


def test_is_chosen_by_itself() -> None:
    q, k, v = arguments(Case("chosen", t=100, d=64, e=64, gates=None).make("bfloat16"))
    call = spec.check_power(q, k, v)
    assert mosaic_gpu.power.supports(mosaic_gpu.power.plan(call), "cuda") is None
    assert mosaic_gpu.power.supports(call, "cpu") is not None


# ---------------------------------------------------------------------------------------------------------------------
# What JAX does to a function
# ---------------------------------------------------------------------------------------------------------------------

CASE = Case("transformed", b=2, t=200, h_q=4, h_kv=2, d=64, e=64)


def example() -> tuple[jax.Array, tuple[jax.Array, ...]]:
    arrays = CASE.make("bfloat16")
    return jnp.asarray(arrays["dy"]), arguments(arrays)


def test_vmap_over_each_operand() -> None:
    dy, inputs = example()
    for mapped in range(len(inputs)):
        axes = [None] * len(inputs)
        axes[mapped] = 0
        several = [jnp.stack((x, jnp.flip(x, 1))) if i == mapped else x for i, x in enumerate(inputs)]
        got = jax.jit(jax.vmap(functools.partial(both, CASE, dy), axes))(*several)
        for n in range(2):
            one = [x[n] if i == mapped else x for i, x in enumerate(several)]
            assert_equal_bits(jax.tree.map(lambda x, n=n: x[n], got), both(CASE, dy, *one))


def test_checkpoint_gives_the_same_gradients() -> None:
    dy, inputs = example()
    call = functools.partial(attend, CASE)
    kept, remade = (jax.jit(lambda *x, f=f: jax.vjp(f, *x)[1](dy))(*inputs) for f in (call, jax.checkpoint(call)))
    assert_equal_bits(dict(enumerate(remade)), dict(enumerate(kept)))


@pytest.mark.parametrize("axis", ["batch", "heads"])
def test_shard_map(axis: str) -> None:
    dy, inputs = example()
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]), (axis,))
    of = PartitionSpec(axis) if axis == "batch" else PartitionSpec(None, None, axis)
    sharded = jax.shard_map(functools.partial(both, CASE), mesh=mesh, in_specs=(of,) * (1 + len(inputs)), out_specs=of)
    assert_equal_bits(jax.jit(sharded)(dy, *inputs), both(CASE, dy, *inputs))
