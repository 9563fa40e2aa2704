"""`jax_power.power_attention` among JAX's transformations, and what its memory and steps cost."""

from __future__ import annotations

import dataclasses

import jax
import jax.extend
import jax.numpy as jnp
import numpy as np
import pytest

import jax_power
from bridge import cases, spec

OPTIONS = [{"form": "attention"}, {"form": "chunked", "chunk_size": 4}, {"form": "recurrent"}]


def inputs(dtype=jnp.float32, t=10, d=8, e=5, batch=()):
    keys = jax.random.split(jax.random.key(0), 4)
    shapes = (2, t, 4, d), (2, t, 2, d), (2, t, 2, e)
    arrays = [jax.random.normal(key, (*batch, *shape), dtype) for key, shape in zip(keys, shapes, strict=False)]
    return *arrays, -jax.random.uniform(keys[3], (*batch, 2, t, 2), jnp.float32)


def loss(*arrays, **options):
    y, state = jax_power.power_attention(*arrays, return_state=True, **options)
    return (y**2).sum() + 1e-3 * (state.s**2).sum()


def assert_close(got, want, rtol=2e-5):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=rtol, atol=rtol * np.abs(y).max()), got, want)


def test_jit_grad():
    arrays = inputs()
    grad = jax.grad(loss, argnums=(0, 1, 2, 3))
    assert_close(jax.jit(grad)(*arrays), grad(*arrays))


@pytest.mark.parametrize("unbatched", [None, 0, 1, 2, 3])
def test_vmap_of_the_gradient(unbatched):
    arrays = list(inputs(batch=(3,)))
    if unbatched is not None:
        arrays[unbatched] = arrays[unbatched][0]
    axes = tuple(None if n == unbatched else 0 for n in range(4))
    grad = jax.grad(loss, argnums=(0, 1, 2, 3))
    got = jax.vmap(grad, in_axes=axes)(*arrays)
    for n in (0, 2):
        want = grad(*(x if axis is None else x[n] for x, axis in zip(arrays, axes, strict=True)))
        assert_close(jax.tree.map(lambda x, n=n: x[n], got), want)


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: options["form"])
def test_checkpoint(options):
    arrays = inputs()
    want = jax.grad(lambda q: loss(q, *arrays[1:], **options))(arrays[0])
    got = jax.grad(jax.checkpoint(lambda q: loss(q, *arrays[1:], **options)))(arrays[0])
    assert_close(got, want)


@pytest.mark.parametrize("options", OPTIONS[:2], ids=lambda options: options["form"])
def test_second_derivatives(options):
    """A derivative of the written gradient, against a difference of gradients."""
    with jax.enable_x64(True):
        q, k, v, log_g = (x.astype(jnp.float64) for x in inputs(t=4, e=2))
        grad = jax.grad(lambda q: loss(q, k, v, log_g, **options))
        direction, step = jnp.cos(jnp.arange(q.size, dtype=q.dtype)).reshape(q.shape), 1e-5
        _, got = jax.vjp(grad, q)
        want = (grad(q + step * direction) - grad(q - step * direction)) / (2 * step)
        assert_close(got(direction)[0], want, 1e-6)


def test_numpy_arrays_are_welcome():
    arrays = [np.asarray(x) for x in inputs()]
    assert_close(jax_power.power_attention(*arrays), jax_power.power_attention(*inputs()))


@pytest.mark.parametrize("name", ["gates", "state_to_state", "degree_4", "degree_1"])
def test_steps_are_the_sequence(name):
    case = dataclasses.replace(cases.BY_NAME[name], b=1, t=6)
    with jax.enable_x64(True):
        arrays = {n: jnp.asarray(x) for n, x in case.make("float64").items()}
        state = jax_power.PowerState(arrays["s0"], arrays["z0"]) if case.initial_state else None
        sequence = [arrays["q"], arrays["k"], arrays["v"], arrays["log_g"]]
        options = {"deg": case.deg, "normalize": case.normalize}
        want, want_state = jax_power.power_attention(*sequence, initial_state=state, return_state=True, **options)
        for i in range(case.t):
            y, state = jax_power.power_step(*(x[:, i] for x in sequence), state, **options)
            assert_close(y, want[:, i], 1e-11)
        assert_close(state, want_state, 1e-11)


def test_block_chooses():
    arrays = inputs()
    with jax_power.implementation("xla"):
        assert_close(jax_power.power_attention(*arrays), jax_power.power_attention(*arrays, implementation="xla"))


def largest(jaxpr) -> int:
    """Most elements of any intermediate of a jaxpr, those of the functions inside it included."""
    found = 0
    for equation in jaxpr.eqns:
        found = max([found, *(np.prod(x.aval.shape, dtype=np.int64) for x in equation.outvars)])
        for inner in jax.extend.core.jaxprs_in_params(equation.params):
            found = max(found, largest(inner))
    return int(found)


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_memory_is_linear(form):
    """No intermediate has t² elements, or a feature for every token, forward or backward."""
    t = 4096
    q = jax.ShapeDtypeStruct((1, t, 1, 16), jnp.float32)
    log_g = jax.ShapeDtypeStruct((1, t, 1), jnp.float32)
    both = jax.make_jaxpr(lambda *x: jax.vjp(lambda *x: jax_power.power_attention(*x, form=form), *x)[1](x[0]))
    rows = spec.state_rows(16, 2)
    found = largest(both(q, q, q, log_g).jaxpr)
    assert t * 16 <= found < min(t * t, t * rows) / 2
