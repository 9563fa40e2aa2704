"""The Pallas kernels of scaled dot-product attention on a Hopper GPU: the case table, and a matrix of shapes like JAX's own.

Skipped where there is no such GPU. Everything is held to the float64 oracle on the same rounded inputs, with random upstream
gradients; in the matrix, also to twice the error of JAX's own function in the same dtype.
"""

from __future__ import annotations

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bridge import cases, cases_sdpa
from jax_power.sdpa import dot_product_attention


def hopper() -> bool:
    return jax.default_backend() == "gpu" and jax.devices()[0].compute_capability == "9.0"


pytestmark = pytest.mark.skipif(not hopper(), reason="needs a Hopper GPU")

TABLE = [
    pytest.param(case, dtype, id=f"{case.name}-{dtype}")
    for case in cases_sdpa.SDPA for dtype in ("bfloat16", "float16") if "jax" in case.twins and dtype in case.dtypes
]  # fmt: skip

# Lengths of queries and of keys: one, tiles of 64 and 128 less one, exact and plus one, and much more of one than of the other.
# The longest first: the oracle takes its time for them.
PAIRS = (
    (4224, 4224), (2048, 2048), (1024, 1023), (1023, 1024), (799, 3), (640, 128), (384, 384), (512, 256), (256, 512),
    (193, 385), (128, 217), (128, 129), (127, 128), (113, 203), (108, 256), (64, 65), (64, 63), (63, 64), (3, 799), (1, 239),
    (2, 1), (1, 2), (1, 1),
)  # fmt: skip
# The other factors; 3, 5 and 7 of them, so that in turn all meet each other, and both dtypes with and without a causal mask.
HEADS = ((2, 2), (3, 1), (4, 2))
WINDOWS = (None, (100, 0), None, (37, 51), None)
SIZES = (64, 128, 96, 256, 80, 128, 40)


def matrix() -> list:
    """Every pair of lengths in both dtypes, causal or not, the other factors taking turns."""
    found = []
    turns = zip(*map(itertools.cycle, (HEADS, WINDOWS, SIZES)), strict=False)
    for (t, s), dtype, causal in itertools.product(PAIRS, ("bfloat16", "float16"), (False, True)):
        (h_q, h_kv), window, d = next(turns)
        name = f"{t}x{s}-{h_q}:{h_kv}-d{d}-{'causal' if causal else 'full'}-{window}"
        case = cases_sdpa.SdpaCase(name, t=t, s=s, h_q=h_q, h_kv=h_kv, d=d, e=d, causal=causal, window=window)
        found.append(pytest.param(case, dtype, id=f"{name}-{dtype}"))
    return found


def results(case, arrays, function) -> dict[str, np.ndarray]:
    """y and the gradients of every operand that has one, by name, through a public function."""
    options = {
        "scale": case.scale, "is_causal": case.causal, "local_window_size": case.window,
        "query_seq_lengths": arrays.get("query_lengths"), "key_value_seq_lengths": arrays.get("key_lengths"),
    }  # fmt: skip
    operands = [jnp.asarray(np.ascontiguousarray(arrays[name])) for name in ("q", "k", "v", "bias") if name in arrays]

    @jax.jit
    def both(dy, mask, *operands):
        y, pull_back = jax.vjp(lambda *x: function(*x, mask=mask, **options), *operands)
        return y, *pull_back(dy)

    found = both(jnp.asarray(np.ascontiguousarray(arrays["dy"])), arrays.get("mask"), *operands)
    return {name: np.asarray(x) for name, x in zip(("y", "dq", "dk", "dv", "dbias"), found, strict=False)}


ours = functools.partial(dot_product_attention, implementation="mosaic_gpu")


@pytest.mark.parametrize(("case", "dtype"), TABLE)
def test_matches_oracle(case, dtype):
    arrays = case.make(dtype)
    want = case.exact(arrays, "mean")
    del want["lse"]
    errors = cases.errors(results(case, arrays, ours), want, case, arrays["dy"])
    cases.assert_within(errors, cases_sdpa.bounds(dtype, "mosaic_gpu"), f"{case.name} {dtype}")


def rough(case, arrays) -> dict[str, np.ndarray]:
    """y and the gradients by JAX's operations in the operands' dtype."""
    _, t, h_q, d = arrays["q"].shape
    i, j = np.arange(t)[:, None], np.arange(case.keys)
    seen = j <= i if case.causal else np.ones((t, case.keys), bool)
    if case.window is not None:
        seen = seen & (i - case.window[0] <= j) & (j <= i + case.window[1])

    @jax.jit
    def both(dy, *operands):
        def attention(q, k, v):
            k, v = (jnp.repeat(x, h_q // x.shape[2], 2) for x in (k, v))
            scores = jnp.einsum("bthd,bshd->bhts", q, k) * jnp.asarray(d**-0.5, q.dtype)
            weights = jax.nn.softmax(jnp.where(seen, scores, jnp.finfo(q.dtype).min))
            return jnp.einsum("bhts,bshe->bthe", weights, v)

        y, pull_back = jax.vjp(attention, *operands)
        return y, *pull_back(dy)

    found = both(*(jnp.asarray(arrays[name]) for name in ("dy", "q", "k", "v")))
    return {name: np.asarray(x) for name, x in zip(("y", "dq", "dk", "dv"), found, strict=True)}


@pytest.mark.parametrize(("case", "dtype"), matrix())
def test_matrix(case, dtype):
    """Never worse than twice JAX's operations in the same dtype, and within the contract where rounding averages out.

    That is, in tensors of 4096 numbers and more; fewer may be unluckier than any bound on the average. A gradient that is 0 but
    for cancellation is measured against dy, by the contract alone.
    """
    arrays = case.make(dtype)
    want = case.exact(arrays, "mean")
    found, theirs = results(case, arrays, ours), rough(case, arrays)
    bounds = cases_sdpa.bounds(dtype, "mosaic_gpu")
    size_of_dy = np.linalg.norm(arrays["dy"].astype(np.float64))
    for name in found:
        size = np.linalg.norm(want[name])
        cancels = size <= 1e-6 * size_of_dy
        size = size_of_dy if cancels else size
        error, their_error = (np.linalg.norm(x[name].astype(np.float64) - want[name]) / size for x in (found, theirs))
        if want[name].size >= 4096 or cancels:
            assert error <= bounds[name], f"{name}: {error:.2e}, bound {bounds[name]:.2e}"
        if not cancels:
            assert error <= 2 * their_error + 1e-7, f"{name}: {error:.2e}, JAX's operations {their_error:.2e}"


@pytest.mark.parametrize(
    ("d", "e", "options"),
    [
        (64, 64, {}), (128, 128, {}), (256, 256, {}), (64, 128, {"window": (200, 31)}), (128, 128, {"bias": "ts"}),
        (256, 192, {"bias": "s"}),
    ],
)  # fmt: skip
def test_more_items_than_multiprocessors(d, e, options):
    """Blocks of the forward kernel take several items, of unequal length: slots, rings and turns go on from one to the next."""
    case = cases_sdpa.SdpaCase("items", t=264, h_q=72, h_kv=8, d=d, e=e, causal=True, **options)
    arrays = case.make("bfloat16")
    want = case.exact(arrays, "mean")
    del want["lse"]
    errors = cases.errors(results(case, arrays, ours), want, case, arrays["dy"])
    cases.assert_within(errors, cases_sdpa.bounds("bfloat16", "mosaic_gpu"), f"{d} {e} {options}")


SIZES_THAT_DIFFER = [(64, 128), (80, 40), (128, 8), (13, 100), (192, 256), (256, 64)]


@pytest.mark.parametrize(("d", "e"), SIZES_THAT_DIFFER)
def test_value_size_may_differ(d, e):
    case = cases_sdpa.SdpaCase(f"d{d}-e{e}", t=200, s=333, h_q=4, h_kv=2, d=d, e=e, causal=True)
    arrays = case.make("bfloat16")
    want = case.exact(arrays, "mean")
    del want["lse"]
    errors = cases.errors(results(case, arrays, ours), want, case, arrays["dy"])
    cases.assert_within(errors, cases_sdpa.bounds("bfloat16", "mosaic_gpu"), case.name)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_large_inputs(dtype):
    """q and k of deviation 8 at t = 4096: finite and within the contract."""
    case = cases_sdpa.SdpaCase("large", t=4096, h_q=2, h_kv=2, d=64, e=64, causal=True, std=8.0)
    arrays = case.make(dtype)
    want = case.exact(arrays, "mean")
    del want["lse"]
    errors = cases.errors(results(case, arrays, ours), want, case, arrays["dy"])
    cases.assert_within(errors, cases_sdpa.bounds(dtype, "mosaic_gpu"), "large")


@pytest.mark.parametrize(("d", "e", "bias", "mask"), [(128, 128, "hts", "bts"), (96, 96, "ts", None), (256, 192, "hts", "bs")])
def test_bias_of_wide_heads(d, e, bias, mask):
    case = cases_sdpa.SdpaCase(f"bias{d}", t=300, s=530, h_q=2, h_kv=2, d=d, e=e, bias=bias, mask=mask, causal=True)
    arrays = case.make("bfloat16")
    want = case.exact(arrays, "mean")
    del want["lse"]
    errors = cases.errors(results(case, arrays, ours), want, case, arrays["dy"])
    cases.assert_within(errors, cases_sdpa.bounds("bfloat16", "mosaic_gpu"), case.name)


def test_log_sum_exp():
    case = cases_sdpa.BY_NAME["everything"]
    arrays = case.make("bfloat16")
    operands = [jnp.asarray(np.ascontiguousarray(arrays[name])) for name in ("q", "k", "v", "bias", "mask")]
    lengths = {"query_seq_lengths": arrays["query_lengths"], "key_value_seq_lengths": arrays["key_lengths"]}
    options = {"scale": case.scale, "is_causal": case.causal, "local_window_size": case.window, "return_residual": True}
    lse = np.asarray(ours(*operands, **options, **lengths)[1], np.float64)
    want = case.exact(arrays, "mean")["lse"]
    seen = np.isfinite(want)
    assert np.linalg.norm(lse[seen] - want[seen]) / np.linalg.norm(want[seen]) < 3e-3
    assert (lse[~seen] < -1e38).all()


def test_vmap():
    """A mapped axis, shared operands among them, equals a loop."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal(shape), jnp.bfloat16)
        for shape in ((3, 2, 70, 2, 64), (2, 90, 2, 64), (3, 2, 90, 2, 64))
    )

    def gradient(q, k, v):
        return jax.grad(lambda *x: (ours(*x).astype(jnp.float32) ** 2).sum(), argnums=(0, 1, 2))(q, k, v)

    got = jax.jit(jax.vmap(gradient, (0, None, 0)))(q, k, v)
    for n in range(3):
        for mapped, single in zip(got, jax.jit(gradient)(q[n], k, v[n]), strict=True):
            np.testing.assert_array_equal(mapped[n], single)


def test_transformed_calls_are_the_call():
    """Chosen without being named, recomputed by `jax.checkpoint` and sharded: the same bits."""
    q = jnp.asarray(np.random.default_rng(0).standard_normal((2, 100, 2, 64)), jnp.bfloat16)

    def attend(q, **options):
        return dot_product_attention(q, q, q, is_causal=True, **options)

    def gradient(function):
        return jax.jit(jax.grad(lambda q: (function(q).astype(jnp.float32) ** 2).sum()))

    mesh = jax.make_mesh((1,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    assert "mosaic_gpu" in jax.jit(attend).lower(q).as_text()
    want = gradient(functools.partial(attend, implementation="mosaic_gpu"))(q)
    for function in (attend, jax.checkpoint(attend), jax.shard_map(attend, mesh=mesh, in_specs=spec, out_specs=spec)):
        np.testing.assert_array_equal(gradient(function)(q), want)


def test_second_derivatives():
    """Those of xla, whoever computes the first ones.

    y, dy, their tangents and the result are rounded to bfloat16 on the way, which costs xla alone 5.7e-3 where the compiler
    leaves these roundings in (on a CPU); a wrong rule is wrong by far more than 1e-2.
    """
    q = jnp.asarray(np.random.default_rng(0).standard_normal((1, 50, 2, 64)), jnp.bfloat16)

    def curvature(q, implementation):
        def loss(q):
            y = dot_product_attention(q, q, q, is_causal=True, implementation=implementation)
            return (y.astype(jnp.float32) ** 2).sum()

        return np.asarray(jax.jit(lambda q: jax.jvp(jax.grad(loss), (q,), (q,))[1])(q), np.float64)

    got, want = curvature(q, None), curvature(q.astype(jnp.float32), "xla")
    assert np.linalg.norm(got - want) <= 1e-2 * np.linalg.norm(want)


@pytest.mark.parametrize("bias", ["hts", None])
def test_runs_are_bit_equal(bias):
    """A thousand calls, forward and backward; with a bias, every feature is on."""
    mask = "bs" if bias else None
    case = cases_sdpa.SdpaCase("repeat", b=2, t=1000, h_q=4, h_kv=2, d=64, e=64, causal=True, bias=bias, mask=mask)
    arrays = case.make("bfloat16")
    operands = [jnp.asarray(np.ascontiguousarray(arrays[name])) for name in ("q", "k", "v", "bias") if name in arrays]
    dy, mask = jnp.asarray(arrays["dy"]), arrays.get("mask")

    @jax.jit
    def both(dy, *operands):
        y, pull_back = jax.vjp(lambda *x: ours(*x, mask=mask, is_causal=True), *operands)
        return y, *pull_back(dy)

    @jax.jit
    def differing(found, first):
        return sum((x.view(jnp.uint16) != y.view(jnp.uint16)).sum() for x, y in zip(found, first, strict=True))

    first = both(dy, *operands)
    assert sum(differing(both(dy, *operands), first) for _ in range(1000)) == 0


def test_memory_is_linear_in_length():
    """Temporary memory of forward and backward: no more than a few operands, at a length whose scores would take 17 GB."""
    q = jax.ShapeDtypeStruct((1, 65536, 1, 64), jnp.bfloat16)

    def both(q, dy):
        y, pull_back = jax.vjp(lambda x: ours(x, x, x, is_causal=True), q)
        return y, pull_back(dy)

    memory = jax.jit(both).lower(q, q).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 12 * 65536 * 64 * 2


def test_bias_gradient_takes_no_more_memory_than_the_bias():
    q = jax.ShapeDtypeStruct((4, 2048, 4, 64), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 1, 2048, 2048), jnp.bfloat16)

    def gradient(q, bias):
        return jax.grad(lambda bias: ours(q, q, q, bias).astype(jnp.float32).sum())(bias)

    memory = jax.jit(gradient).lower(q, bias).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 12 * 4 * 2048 * 4 * 64 * 2 + 2 * 2048 * 2048 * 2
