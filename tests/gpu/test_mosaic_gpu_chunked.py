"""The Pallas kernels of the chunked form on a Hopper GPU: the case table and longer sequences against the float64 oracle.

Also equal bits, memory full of NaN, splitting a sequence, `vmap`, checkpoint, the CUDA twin on the same memory, and a long
sequence on sampled rows. Skipped where there is no such GPU.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

import jax_power
from bridge import cases, dlpack

Case = cases.Case


def _missing() -> str | None:
    devices = jax.devices()
    if devices[0].platform != "gpu" or str(getattr(devices[0], "compute_capability", "")) != "9.0":
        return "needs a Hopper GPU"
    return None


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))

TABLE = [(case, dtype) for case in cases.POWER for dtype in ("bfloat16", "float16") if "chunked" in case.forms]
INPUTS = ("q", "k", "v", "log_g", "s0", "z0")


def attend(package: Any, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Any, ...]:
    """(y,) or (y, s, z) of either package's public function."""
    state = package.PowerState(inputs["s0"], inputs["z0"]) if "s0" in inputs else None
    try:
        result = package.power_attention(*(inputs.get(name) for name in INPUTS[:4]), initial_state=state, **options)
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    return (result[0], *result[1]) if options["return_state"] else (result,)


def options_of(case: Case, form: str = "chunked") -> dict[str, Any]:
    return case.options() | {"form": form, "implementation": "mosaic_gpu"}


def results(case: Case, arrays: dict[str, Any], form: str = "chunked") -> dict[str, Any]:
    """Outputs and gradients by the oracle's names."""
    inputs = {name: jnp.asarray(arrays[name]) for name in INPUTS if name in arrays}
    upstream = tuple(jnp.asarray(arrays[name]) for name in ("dy", "ds", "dz") if name in arrays)
    outputs, pull_back = jax.vjp(lambda x: attend(jax_power, x, options_of(case, form)), inputs)
    (grads,) = pull_back(upstream)
    return dict(zip(("y", "s", "z"), outputs, strict=False)) | {f"d{name}": x for name, x in grads.items()}


def run(case: Case, arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(x) for name, x in jax.jit(functools.partial(results, case))(arrays).items()}


def assert_equal_bits(got: dict[str, Any], want: dict[str, Any]) -> None:
    for name, x in want.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(x).tobytes(), name


def assert_within_bounds(got: dict[str, Any], case: Case, arrays: dict[str, Any]) -> None:
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    dtype = str(arrays["q"].dtype)
    cases.assert_within(found, cases.bounds(dtype, "mosaic_gpu", case), f"{case} {dtype}")


def assert_matches_oracle(case: Case, dtype: str, seed: int) -> None:
    arrays = case.make(dtype, seed)
    assert_within_bounds(run(case, arrays), case, arrays)


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


def test_runs_give_equal_bits_whatever_memory_held() -> None:
    """One program, run again and again; memory was full of NaN, then of ones, then of what earlier runs left."""
    case = Case("repeated", t=2500, h_q=4, h_kv=2, d=64, e=64, initial_state=True, return_state=True)
    arrays = {name: jnp.asarray(x) for name, x in case.make("bfloat16", seed=3).items()}
    both, want = jax.jit(functools.partial(results, case)), None
    for n in range(100):
        if n < 2:
            jnp.full(1 << 28, jnp.nan if n == 0 else 1.0).block_until_ready()  # freed at once: the allocator hands it out again
        got = both(arrays)
        want = want or got
        assert np.isfinite(np.asarray(got["y"]).astype(np.float32)).all()
        assert_equal_bits(got, want)


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_agrees_with_the_cuda_twin_on_the_same_memory(form: str) -> None:
    torch, torch_power = pytest.importorskip("torch"), pytest.importorskip("torch_power")
    case = Case("twins", t=1500, h_q=4, h_kv=2, d=64, e=64, initial_state=form == "chunked", return_state=form == "chunked")
    shared = {name: jnp.asarray(x) for name, x in case.make("bfloat16", seed=4).items()}
    got = jax.jit(functools.partial(results, case, form=form))(shared)
    theirs = dlpack.to_torch(shared, copy=False)
    leaves = {name: theirs[name].detach().requires_grad_() for name in INPUTS if name in theirs}
    outputs = attend(torch_power, leaves, options_of(case, form) | {"implementation": "cuda"})
    upstream = tuple(theirs[name] for name in ("dy", "ds", "dz") if name in theirs)
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
    want = dict(zip(("y", "s", "z"), outputs, strict=False)) | {f"d{name}": x for name, x in zip(leaves, grads, strict=True)}
    want = {name: x.detach().double().cpu().numpy() for name, x in want.items()}
    found = {name: cases.relative_error(got[name], x) for name, x in want.items()}
    cases.assert_within(found, cases.bounds("bfloat16", "mosaic_gpu", case), form)


def test_splitting_a_sequence() -> None:
    """Two calls that pass the state on give what one gives, the state too."""
    case = Case("split", t=1500, h_q=2, h_kv=2, d=64, e=64, return_state=True)
    arrays, cut = case.make("bfloat16", seed=2), 700
    whole = case.exact(arrays)
    first, second = ({name: arrays[name][:, part] for name in INPUTS[:4]} for part in (slice(cut), slice(cut, None)))
    forward = jax.jit(lambda x: attend(jax_power, x, options_of(case)))
    y0, s, z = forward(first)
    y1, s, z = forward(second | {"s0": s, "z0": z})
    got = {"y": np.concatenate((np.asarray(y0), np.asarray(y1)), 1), "s": np.asarray(s), "z": np.asarray(z)}
    found = {name: cases.relative_error(x, whole[name]) for name, x in got.items()}
    cases.assert_within(found, cases.bounds("bfloat16", "mosaic_gpu", case))


def test_vmap_over_some_operands() -> None:
    case = Case("mapped", t=300, h_q=2, h_kv=1, d=64, e=64)
    one, two = (case.make("bfloat16", seed) for seed in (0, 1))
    mapped = {name: name in ("k", "dy") for name in one}
    arrays = {name: np.stack((one[name], two[name])) if mapped[name] else x for name, x in one.items()}
    axes = ({name: 0 if is_mapped else None for name, is_mapped in mapped.items()},)
    got = jax.jit(jax.vmap(functools.partial(results, case), in_axes=axes))(arrays)
    for n in range(2):
        own = {name: x[n] if mapped[name] else x for name, x in arrays.items()}
        assert_within_bounds({name: np.asarray(x[n]) for name, x in got.items()}, case, own)


def test_checkpoint() -> None:
    case = Case("remade", t=700, h_q=2, h_kv=1, d=64, e=64)
    arrays = case.make("bfloat16")
    call = jax.checkpoint(functools.partial(attend, jax_power, options=options_of(case)))
    (y,), (grads,) = jax.jit(lambda x: (lambda y, pull_back: (y, pull_back((arrays["dy"],))))(*jax.vjp(call, x)))(
        {name: jnp.asarray(arrays[name]) for name in INPUTS[:4]}
    )
    assert_within_bounds({"y": y} | {f"d{name}": x for name, x in grads.items()}, case, arrays)


def test_shard_map_over_batch_and_heads() -> None:
    case = Case("sharded", b=2, t=300, h_q=4, h_kv=2, d=64, e=64, initial_state=True, return_state=True)
    arrays = {name: jnp.asarray(x) for name, x in case.make("bfloat16").items()}
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    tokens, states = PartitionSpec("batch", None, "heads"), PartitionSpec("batch", "heads")
    of_names = {"s": states, "z": states, "ds0": states, "dz0": states, "s0": states, "z0": states, "ds": states, "dz": states}
    both = functools.partial(results, case)
    outputs = {name: of_names.get(name, tokens) for name in jax.eval_shape(both, arrays)}
    sharded = jax.shard_map(
        both, mesh=mesh, in_specs=({name: of_names.get(name, tokens) for name in arrays},), out_specs=outputs
    )
    assert_within_bounds(jax.jit(sharded)(arrays), case, {name: np.asarray(x) for name, x in arrays.items()})


def test_a_long_sequence_on_sampled_rows() -> None:
    """t = 65536 with 64 chunks: y of some rows against a float64 sum over all keys."""
    case = Case("long", t=65536, h_q=2, h_kv=2, d=64, e=64)
    arrays = case.make("bfloat16", seed=5)
    (y,) = jax.jit(lambda x: attend(jax_power, x, options_of(case)))({name: arrays[name] for name in INPUTS[:4]})
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


def test_gates_gradient_of_a_very_long_sequence() -> None:
    """t = 262144, one head, all rows against float64: the gates' gradient, a sum over all tokens, starts anew on the way."""
    torch = pytest.importorskip("torch")
    gpu = pytest.importorskip("benchmarks.gpu")
    names, t = ("q", "k", "v", "log_g"), 262144
    keys = jax.random.split(jax.random.key(0), 5)
    *qkv, dy = (jax.random.normal(key, (1, t, 1, 64), jnp.bfloat16) for key in keys[:4])
    inputs = (*qkv, jax.nn.log_sigmoid(jax.random.normal(keys[4], (1, t, 1)) + 4.0))
    call = functools.partial(jax_power.power_attention, form="chunked", implementation="mosaic_gpu")
    y, grads = jax.jit(lambda dy, *x: (lambda y, pull_back: (y, pull_back(dy)))(*jax.vjp(call, *x)))(dy, *inputs)
    got = {"y": y} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    leaves = {name: dlpack.to_torch(x).detach().requires_grad_() for name, x in zip(names, inputs, strict=True)}
    arrays = gpu.Arrays(**leaves, dy=dlpack.to_torch(dy))
    want = gpu.exact(arrays, gpu.power_weight(2), torch.arange(t, device="cuda"), (0, 0), causal=True)
    found = {name: cases.relative_error(got[name][0, :, 0], x.cpu().numpy()) for name, x in want.items()}
    assert set(found) == {"y", "dq", "dk", "dv", "dlog_g"}
    cases.assert_within(found, cases.bounds("bfloat16", "mosaic_gpu"), "very long")
