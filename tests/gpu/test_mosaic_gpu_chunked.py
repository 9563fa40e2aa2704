"""The Pallas kernels of the chunked form on a Hopper GPU: the case table and longer sequences against the float64 oracle.

Also equal bits, memory full of NaN, splitting a sequence, `vmap`, and long sequences on sampled rows. Skipped where there is
no such GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

jax = pytest.importorskip("jax")

import jax.numpy as jnp  # noqa: E402

from bridge import cases, spec  # noqa: E402
from jax_power.mosaic_gpu import chunked  # noqa: E402

Case = cases.Case


def _missing() -> str | None:
    devices = jax.devices()
    if devices[0].platform != "gpu" or str(getattr(devices[0], "compute_capability", "")) != "9.0":
        return "needs a Hopper GPU"
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))

TABLE = [(case, dtype) for case in cases.POWER for dtype in ("bfloat16", "float16") if "chunked" in case.forms]
INPUTS = ("q", "k", "v", "log_g", "s0", "z0")
RESULTS = ("y", "s", "z", "dq", "dk", "dv", "dlog_g", "ds0", "dz0")


def call_of(case: Case, arrays: dict[str, Any]) -> spec.PowerCall:
    state = (arrays["s0"], arrays["z0"]) if "s0" in arrays else None
    options = {name: getattr(case, name) for name in ("deg", "scale", "causal", "normalize", "return_state")}
    inputs = [arrays.get(name) for name in INPUTS[:4]]
    return spec.check_power(*inputs, **options, form="chunked", initial_state=state)


def results(call: spec.PowerCall, arrays: dict[str, Any]) -> dict[str, Any]:
    """Outputs and gradients of the raw implementation, by the oracle's names."""
    inputs = [arrays.get(name) for name in INPUTS]
    y, norm, s, z = chunked.forward(call, *inputs)
    grads = chunked.backward(call, *inputs, y, norm, *(arrays.get(name) for name in ("dy", "ds", "dz")))
    return {name: x for name, x in zip(RESULTS, (y, s, z, *grads), strict=True) if x is not None}


compiled = jax.jit(results, static_argnums=0)


def run(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    call = call_of(case, arrays)
    reason = chunked.supports(call, "cuda")
    if reason is not None:
        pytest.skip(reason)
    return {name: np.asarray(x) for name, x in compiled(call, arrays).items()}


def assert_equal_bits(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name, x in want.items():
        assert got[name].tobytes() == x.tobytes(), name


def assert_matches_oracle(case: Case, dtype: str, seed: int) -> None:
    arrays = case.make(dtype, seed)
    found = cases.errors(run(case, arrays), case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "mosaic_gpu", case), f"{case} {dtype}")


@pytest.mark.parametrize(("case", "dtype"), TABLE, ids=lambda x: getattr(x, "name", x))
def test_matches_oracle(case: Case, dtype: str) -> None:
    assert_matches_oracle(case, dtype, seed=0)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize(
    "changes",
    [
        {"t": 1333, "h_q": 6, "h_kv": 2, "d": 64, "e": 64, "initial_state": True, "return_state": True},
        {"t": 1500, "d": 64, "e": 64, "gates": "mixed"},
        {"t": 1300, "d": 64, "e": 64, "gates": "strong", "cancelling": ("dq", "dk", "dlog_g")},
        {"t": 1100, "d": 128, "e": 128, "return_state": True},
        {"t": 1100, "d": 96, "e": 64, "initial_state": True},
        {"t": 1100, "d": 32, "e": 128},
        {"t": 4096, "d": 64, "e": 64, "std": 8.0, "gates": None, "h_q": 1, "h_kv": 1},
        {"t": 1100, "d": 64, "e": 64, "normalize": False, "initial_state": True, "return_state": True},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
def test_longer_than_a_chunk(changes: dict[str, Any], dtype: str) -> None:
    assert_matches_oracle(Case("long", **changes), dtype, seed=1)


def test_runs_give_equal_bits() -> None:
    case = Case("repeated", t=2500, h_q=4, h_kv=2, d=64, e=64, initial_state=True, return_state=True)
    arrays = case.make("bfloat16", seed=3)
    want = run(case, arrays)
    for _ in range(20):
        assert_equal_bits(run(case, arrays), want)


def test_nothing_depends_on_what_memory_held() -> None:
    """Results come from memory that was full of NaN, then of ones: the same bits."""
    case = Case("poisoned", t=1200, h_q=2, h_kv=2, d=64, e=64, initial_state=True, return_state=True)
    arrays = case.make("bfloat16", seed=3)
    found = []
    for value in (float("nan"), 1.0):
        jnp.full((1 << 28,), value).block_until_ready()  # freed at once: the allocator hands it out again
        found.append(run(case, arrays))
    assert np.isfinite(found[0]["y"].astype(np.float32)).all()
    assert_equal_bits(*found)


def test_splitting_a_sequence() -> None:
    """Two calls that pass the state on give what one gives, the state too."""
    case = Case("split", t=1500, h_q=2, h_kv=2, d=64, e=64, return_state=True)
    arrays = case.make("bfloat16", seed=2)
    whole = case.exact(arrays)
    cut = 700
    first = {name: arrays[name][:, :cut] for name in ("q", "k", "v", "log_g")}
    second = {name: arrays[name][:, cut:] for name in ("q", "k", "v", "log_g")}

    def forward(arrays: dict[str, Any]) -> Any:
        call = call_of(case, arrays)
        return jax.jit(lambda *x: chunked.forward(call, *x))(*(arrays.get(name) for name in INPUTS))

    y0, _, s, z = forward(first)
    y1, _, s, z = forward(second | {"s0": s, "z0": z})
    got = {"y": np.concatenate((np.asarray(y0), np.asarray(y1)), 1), "s": np.asarray(s), "z": np.asarray(z)}
    found = {name: cases.relative_error(x, whole[name]) for name, x in got.items()}
    cases.assert_within(found, cases.bounds("bfloat16", "mosaic_gpu", case))


def test_vmap_over_some_operands() -> None:
    case = Case("mapped", t=300, h_q=2, h_kv=1, d=64, e=64)
    one, two = (case.make("bfloat16", seed) for seed in (0, 1))
    mapped = {name: name in ("k", "dy") for name in one}
    arrays = {name: np.stack((one[name], two[name])) if mapped[name] else x for name, x in one.items()}
    call = call_of(case, one)
    axes = ({name: 0 if is_mapped else None for name, is_mapped in mapped.items()},)
    got = jax.jit(jax.vmap(lambda x: results(call, x), in_axes=axes))(arrays)
    for n in range(2):
        want = run(case, {name: x[n] if mapped[name] else x for name, x in arrays.items()})
        assert_equal_bits({name: np.asarray(x[n]) for name, x in got.items()}, want)


def test_a_long_sequence_on_sampled_rows() -> None:
    """t = 65536 with 64 chunks: y of some rows against a float64 sum over all keys."""
    case = Case("long", t=65536, h_q=2, h_kv=2, d=64, e=64)
    arrays = case.make("bfloat16", seed=5)
    call = call_of(case, arrays)
    y, *_ = jax.jit(lambda *x: chunked.forward(call, *x))(*(arrays.get(name) for name in INPUTS))
    q, k, v, log_g = (arrays[name][0].astype(np.float64) for name in INPUTS[:4])
    rows = np.random.default_rng(0).integers(case.t, size=32)
    got, want = [], []
    for n, row in enumerate(rows):
        head = n % 2
        after = np.cumsum(log_g[: row + 1, head][::-1])[::-1] - log_g[: row + 1, head]  # sum of the gates behind each key
        weights = (k[: row + 1, head] @ q[row, head]) ** 2 * np.exp(after)
        want.append(weights @ v[: row + 1, head] / weights.sum())
        got.append(np.asarray(y[0, row, head]))
    assert cases.relative_error(np.stack(got), np.stack(want)) < cases.bounds("bfloat16", "mosaic_gpu")["y"]
