"""`jax_power.dot_product_attention` against the float64 oracle and against JAX's own function."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_power
from bridge import cases, cases_sdpa
from jax_power import ops_sdpa
from jax_power.sdpa import dot_product_attention as attention
from jax_power.xla import sdpa as xla

# Those that run on a CPU; the others have tests of their own.
IMPLEMENTATIONS = ("xla", "reference")


@pytest.fixture(autouse=True)
def wide_types():
    with jax.enable_x64(True):
        yield


def normal(*shape, dtype="float64", seed=0):
    return jnp.asarray(np.random.default_rng([seed, *shape]).standard_normal(shape), dtype)


# Compiling is what these tests spend their time on: where the numbers are all that counts, the compiler is told to hurry
# (a quarter of the time), and to do its usual work in the dtypes narrower than float64.
HURRY = {"xla_backend_optimization_level": 0}


def results(function, operands, dy, compiler_options=None):
    """The output and the gradients of every operand, compiled as one."""

    @functools.partial(jax.jit, compiler_options=compiler_options)
    def both(dy, *operands):
        y, pull_back = jax.vjp(function, *operands)
        return y, *pull_back(dy)

    return both(dy, *operands)


# ---------------------------------------------------------------------------------------------------------------------
# Against the oracle
# ---------------------------------------------------------------------------------------------------------------------

JAX_CASES = [case for case in cases_sdpa.SDPA if "jax" in case.twins]
# Every case runs in float64, and in the narrower dtypes those that between them reach every line.
NARROW = {
    "float32": ("gqa", "mask_hides_rows", "several_blocks_causal", "bias_of_heads", "everything"),
    "bfloat16": ("large_inputs", "mask_hides_rows", "everything"),
    "float16": ("large_inputs", "mask_hides_rows", "everything"),
}
IN_REFERENCE = ("gqa", "no_keys", "bias_and_mask", "window_leaves_rows_empty", "everything")


def selected():
    for case in JAX_CASES:
        for dtype in case.dtypes:
            if dtype == "float64" or case.name in NARROW[dtype]:
                yield pytest.param(case, dtype, "xla", id=f"{case.name}-{dtype}-xla")
        if case.name in IN_REFERENCE:
            yield pytest.param(case, "float64", "reference", id=f"{case.name}-float64-reference")


def call_of(case, arrays, implementation):
    """The public function as a function of the operands that have gradients, and these operands."""
    options = {
        "scale": case.scale, "is_causal": case.causal, "local_window_size": case.window,
        "query_seq_lengths": arrays.get("query_lengths"), "key_value_seq_lengths": arrays.get("key_lengths"),
        "implementation": implementation,
    }  # fmt: skip
    operands = [jnp.asarray(arrays[name]) for name in ("q", "k", "v", "bias") if name in arrays]
    return functools.partial(attention, mask=arrays.get("mask"), **options), operands


@pytest.mark.parametrize(("case", "dtype", "implementation"), list(selected()))
def test_matches_oracle(case, dtype, implementation):
    arrays = case.make(dtype)
    function, operands = call_of(case, arrays, implementation)
    found = results(function, operands, jnp.asarray(arrays["dy"]), HURRY if dtype == "float64" else None)
    assert all(x.dtype == dtype for x in found)
    got = dict(zip(("y", "dq", "dk", "dv", "dbias"), found, strict=False))
    want = case.exact(arrays, "mean")
    del want["lse"]
    cases.assert_within(cases.errors(got, want, case, arrays["dy"]), cases_sdpa.bounds(dtype, implementation))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", ["everything", "key_lengths"])
def test_residual(name, implementation):
    """The log-sum-exp, and what JAX's function returns for rows that see no key; no gradient comes through it."""
    case = cases_sdpa.BY_NAME[name]
    arrays = case.make("float64")
    function, operands = call_of(case, arrays, implementation)
    lse = np.asarray(function(*operands, return_residual=True)[1])
    want = case.exact(arrays, "mean")["lse"]
    seen = np.isfinite(want)
    np.testing.assert_allclose(lse[seen], want[seen], rtol=1e-12)
    np.testing.assert_allclose(lse[~seen], -0.7 * float(np.finfo(np.float32).max))
    slope = jax.grad(lambda q: function(q, *operands[1:], return_residual=True)[1].sum())(operands[0])
    assert not slope.any()


# ---------------------------------------------------------------------------------------------------------------------
# Against JAX's function
# ---------------------------------------------------------------------------------------------------------------------

LENGTHS = np.array([5, 2], np.int32), np.array([3, 7], np.int32)
CALLS = {
    "plain": {},
    "causal": {"is_causal": True},
    "causal_window": {"is_causal": True, "local_window_size": 2},
    "window_pair": {"local_window_size": (1, 0), "scale": -0.7},
    "window_leaves_rows_empty": {"local_window_size": (-6, 7)},
    "query_lengths": {"query_seq_lengths": LENGTHS[0]},
    "key_lengths": {"key_value_seq_lengths": np.array([0, 5], np.int32), "scale": 0.0},
    "both_lengths": {"query_seq_lengths": LENGTHS[0], "key_value_seq_lengths": LENGTHS[1], "is_causal": True},
    "mask": {"mask": (2, 4, 5, 7)},
    "mask_of_keys": {"mask": (7,), "is_causal": True},
    "mask_of_heads": {"mask": (4, 1, 7), "query_seq_lengths": LENGTHS[0]},
    "bias": {"bias": (2, 4, 5, 7), "is_causal": True},
    "bias_of_queries": {"bias": (1, 5, 1), "scale": 0.5},
    "bias_and_mask": {"bias": (2, 1, 5, 7), "mask": (1, 4, 1, 7), "key_value_seq_lengths": LENGTHS[1]},
}


@pytest.mark.parametrize("name", CALLS)
def test_cross_product(name):
    """Output, log-sum-exp and every gradient equal JAX's in float32, rows that see no key included."""
    rng = np.random.default_rng(0)
    options = dict(CALLS[name])
    bias = normal(*options.pop("bias"), dtype="float32") if "bias" in options else None
    mask = rng.random(options.pop("mask")) < 0.6 if "mask" in options else None
    if mask is not None and mask.ndim == 4:
        mask[0, :, 0] = False
    operands = normal(2, 5, 4, 8, dtype="float32"), *(normal(2, 7, 2, 8, dtype="float32", seed=n) for n in (1, 2))
    operands += () if bias is None else (bias,)
    dy = normal(2, 5, 4, 8, dtype="float32", seed=3)

    def outcome(function):
        @functools.partial(jax.jit, compiler_options=HURRY)
        def both(dy, *operands):
            y, pull_back, lse = jax.vjp(
                lambda *x: function(*x, mask=mask, **options, return_residual=True), *operands, has_aux=True
            )
            return y, lse, *pull_back(dy)

        return both(dy, *operands)

    for ours, theirs in zip(outcome(attention), outcome(jax.nn.dot_product_attention), strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-5)


def test_defaults_and_positions():
    """Positional arguments, unbatched operands, NumPy arrays and nested lists mean what they mean to JAX's function."""
    q, k, v = (normal(*shape, dtype="float32") for shape in ((5, 4, 8), (7, 2, 8), (7, 2, 8)))
    bias, mask = normal(4, 5, 7, dtype="float32"), np.arange(35).reshape(5, 7) % 3 > 0
    for arguments in ((q, k, v), (q, k, v, bias, mask), tuple(np.asarray(x).tolist() for x in (q, k, v))):
        ours, theirs = attention(*arguments), jax.nn.dot_product_attention(*arguments)
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("shapes", [(0, 5, 7, 8), (2, 0, 7, 8), (2, 5, 0, 8), (2, 5, 7, 0)], ids="b={0[0]} t={0[1]}".format)
def test_empty(shapes):
    b, t, s, d = shapes
    ones = jnp.ones((b, t, 4, d)), jnp.ones((b, s, 2, d)), jnp.ones((b, s, 2, d))
    y, *grads = results(attention, ones, jnp.ones((b, t, 4, d)))
    assert y.shape == jax.nn.dot_product_attention(*ones).shape
    assert all(jnp.isfinite(x).all() for x in (y, *grads))
    assert [x.shape for x in grads] == [x.shape for x in ones]


def test_traced_scale():
    """A scale known only at run time, and its gradient."""
    q, k, v = (normal(2, n, 4, 8, seed=n) for n in (5, 7, 6))
    v = normal(2, 7, 4, 8, seed=9)

    def objective(function, scale):
        return (function(q, k, v, scale=scale) ** 2).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(functools.partial(objective, f)))(0.3) for f in (attention, jax.nn.dot_product_attention)
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert attention(*(x.astype(jnp.bfloat16) for x in (q, k, v)), scale=jnp.float32(0.3)).dtype == jnp.bfloat16


# ---------------------------------------------------------------------------------------------------------------------
# Errors
# ---------------------------------------------------------------------------------------------------------------------

Q, K = np.zeros((2, 5, 4, 8), np.float32), np.zeros((2, 7, 4, 8), np.float32)
SAME_ERROR = {
    "value_length": lambda f: f(Q, K, K[:, :6, :, :7]),
    "value_dtype": lambda f: f(Q, K, K.astype(np.float16)),
    "query_dtype": lambda f: f(Q.astype(np.float16), K, K),
    "query_batch": lambda f: f(Q[:1], K, K),
    "query_head_size": lambda f: f(Q[..., :7], K, K),
    "heads": lambda f: f(Q, K[:, :, :3], K[:, :, :3]),
    "mask_dtype": lambda f: f(Q, K, K, mask=np.ones((5, 7), np.int32)),
    "mask_axes": lambda f: f(Q, K, K, mask=np.ones((1, 1, 1, 5, 7), bool)),
    "bias_axes": lambda f: f(Q, K, K, np.ones((1, 1, 1, 5, 7), np.float32)),
    "lengths_dtype": lambda f: f(Q, K, K, query_seq_lengths=np.ones(2, np.float32)),
    "lengths_size": lambda f: f(Q, K, K, key_value_seq_lengths=np.ones(3, np.int32)),
    "lengths_axes": lambda f: f(Q, K, K, query_seq_lengths=np.int32(3)),
    "too_many_positions": lambda f: f(Q, K, K, None, None, 1.0),
    "no_value": lambda f: f(Q, K),
}
OWN_ERROR = {
    "five_axes": (lambda f: f(Q[None], K[None], K[None]), "query ndim should be 4, but got 5"),
    "no_heads": (lambda f: f(Q, K[:, :, :0], K[:, :, :0]), "multiple of key/value heads, but got 4 vs 0"),
    "mask_heads": (lambda f: f(Q, K, K, mask=np.ones((2, 2, 5, 7), bool)), "mask shape should be broadcastable"),
    "mask_batch": (lambda f: f(Q, K, K, mask=np.ones((3, 1, 5, 7), bool)), "mask shape should be broadcastable"),
    "bias_length": (lambda f: f(Q, K, K, np.ones((6, 7))), "to [2, 4, 5, 7]: but got (1, 1, 6, 7)"),
    "window_of_three": (lambda f: f(Q, K, K, local_window_size=(1, 2, 3)), "local_window_size should be an integer or"),
    "window_fraction": (lambda f: f(Q, K, K, local_window_size=1.5), "but got 1.5"),
    "integers": (lambda f: f(*(x.astype(np.int32) for x in (Q, K, K))), "query dtype should be one of float16"),
    "implementation": (lambda f: f(Q, K, K, implementation="cudnn2"), "'cudnn2'"),
}


@pytest.mark.parametrize("name", SAME_ERROR)
def test_errors_are_jaxs(name):
    """Type and text are those of JAX's function (but for e ≠ d, which it refuses and we do not: shown as -1)."""
    with pytest.raises((ValueError, TypeError)) as theirs:
        SAME_ERROR[name](jax.nn.dot_product_attention)
    with pytest.raises(type(theirs.value)) as ours:
        SAME_ERROR[name](attention)
    expected = str(theirs.value)
    if name == "value_length":
        expected = expected.replace("[2, 7, 4, 8]", "[2, 7, 4, -1]")
    assert str(ours.value) == expected


@pytest.mark.parametrize("name", OWN_ERROR)
def test_errors_name_the_cause(name):
    call, text = OWN_ERROR[name]
    with pytest.raises(ValueError) as ours:
        call(attention)
    assert text in str(ours.value)


def test_implementation_block(monkeypatch):
    """A block's choice is used, an argument overrides it, and the block before it comes back."""
    used = []
    for name, entry in list(ops_sdpa.SDPA.items()):

        def forward(*args, name=name, entry=entry):
            used.append(name)
            return entry.forward(*args)

        monkeypatch.setitem(ops_sdpa.SDPA, name, entry._replace(forward=forward))
    with jax_power.implementation("reference"):
        attention(Q, K, K)
        with jax_power.implementation(["xla", "reference"]):
            attention(Q, K, K)
            attention(Q, K, K, implementation="reference")
        attention(Q, K, K)
    assert used == ["reference", "xla", "reference", "reference"]


# ---------------------------------------------------------------------------------------------------------------------
# Transformations, memory and repeatability
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("in_axes", [(0, None, None, None), (None, 2, None, 1), (3, 1, 0, 2)], ids=str)
def test_vmap(in_axes):
    """vmap of the gradient equals a loop, whichever operands are mapped."""
    shapes = (2, 5, 4, 8), (2, 7, 2, 8), (2, 7, 2, 6), (1, 4, 5, 7)
    operands = [
        normal(*shape, seed=n) if axis is None else normal(*shape[:axis], 3, *shape[axis:], seed=n)
        for n, (shape, axis) in enumerate(zip(shapes, in_axes, strict=True))
    ]
    dy = normal(2, 5, 4, 6)
    gradient = jax.jit(jax.grad(lambda *x: (attention(*x, is_causal=True) * dy).sum(), argnums=(0, 1, 2, 3)))
    got = jax.vmap(gradient, in_axes)(*operands)
    singles = [
        gradient(*(x if axis is None else jnp.take(x, n, axis) for x, axis in zip(operands, in_axes, strict=True)))
        for n in range(3)
    ]
    for ours, theirs in zip(got, zip(*singles, strict=True), strict=True):
        np.testing.assert_allclose(ours, jnp.stack(theirs), rtol=1e-10, atol=1e-12)


def test_checkpoint():
    q, dy = normal(2, 5, 4, 8), normal(2, 5, 4, 8, seed=1)

    def block(q):
        return attention(q, q, q, is_causal=True)

    plain, again = (results(f, (q,), dy) for f in (block, jax.checkpoint(block)))
    for ours, theirs in zip(again, plain, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def largest_array(jaxpr) -> int:
    """Elements of the largest array that any equation of a jaxpr, or of one inside it, makes."""
    sizes = [0]
    for equation in jaxpr.eqns:
        sizes += [int(np.prod(x.aval.shape)) for x in equation.outvars if hasattr(x.aval, "shape")]
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                sizes.append(largest_array(inner))
    return max(sizes)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"local_window_size": 100}], ids=str)
def test_memory_is_linear_in_length(options):
    """No array is larger than an operand or a tile, whose size does not depend on t: forward and backward."""
    for t in (4096, 65536):
        q = jax.ShapeDtypeStruct((1, t, 1, 64), jnp.float32)

        def both(q, dy):
            y, pull_back = jax.vjp(lambda x: attention(x, x, x, **options, implementation="xla"), q)
            return y, pull_back(dy)

        largest = largest_array(jax.make_jaxpr(both)(q, q).jaxpr)
        assert xla.KEY_ROWS * xla.QUERY_ROWS[0] <= largest <= max(64 * t, xla.TILE_SCORES)
    assert largest_array(jax.make_jaxpr(lambda x: attention(x, x, x, implementation="reference"))(q).jaxpr) >= t * t


def test_unwanted_bias_gradient_is_not_computed():
    q, bias = jax.ShapeDtypeStruct((1, 2048, 1, 8), jnp.float32), jax.ShapeDtypeStruct((2048, 2048), jnp.float32)

    def count(argnums):
        text = str(jax.make_jaxpr(jax.grad(lambda q, bias: attention(q, q, q, bias).sum(), argnums))(q, bias))
        return text.count("f32[1,1,2048,2048]")

    assert count(0) < count((0, 1))


def test_runs_are_bit_equal():
    operands = [normal(2, 300, 4, 16, dtype="float32", seed=n) for n in range(3)]
    first, second = (results(attention, operands, operands[0]) for _ in range(2))
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_array_equal(ours, theirs)
