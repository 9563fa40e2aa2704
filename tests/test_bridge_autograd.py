"""`bridge.autograd`: wrapped functions against the same function written in the other framework."""

import threading

import jax
import jax.numpy as jnp
import jax.test_util
import numpy as np
import pytest
import torch

from bridge.autograd import jax_to_torch, torch_to_jax
from bridge.dlpack import to_jax


@pytest.fixture(autouse=True)
def on_cpu():
    """Arrays that a test makes are on the CPU also where JAX has a GPU, as PyTorch's are."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator).to(dtype)
    return x.requires_grad_() if grad else x


def assert_close(got, want, tolerance=2e-6):
    """Relative L2 error, for tensors of either framework."""
    assert tuple(got.shape) == tuple(want.shape)
    a, b = (np.asarray(x.detach().double() if isinstance(x, torch.Tensor) else x, np.float64) for x in (got, want))
    assert np.linalg.norm(a - b) <= tolerance * np.linalg.norm(b)


# jax_to_torch


def layer_jax(x, w, *, scale=1.0, power=1):
    return {"y": jnp.tanh(x @ w) ** power * scale, "best": jnp.argmax(x, -1)}, (jnp.exp(x),)


def layer_torch(x, w, *, scale=1.0, power=1):
    return {"y": torch.tanh(x @ w) ** power * scale, "best": x.argmax(-1).int()}, (torch.exp(x),)


def weighted(results):
    """A scalar with a different, fixed random weight on every element of every floating-point result."""
    leaves = [x for x in jax.tree_util.tree_leaves(results) if x.is_floating_point()]
    return sum((x.double() * normal(*x.shape, seed=10 + i).double()).sum() for i, x in enumerate(leaves))


class TestJaxToTorch:
    @pytest.mark.parametrize("settings", [{}, {"scale": 0.5, "power": 2}])
    def test_results_and_gradients_match_torch(self, settings):
        wrapped = jax_to_torch(layer_jax)
        x, w = normal(5, 4, grad=True), normal(4, 3, seed=1, grad=True)
        got, want = wrapped(x, w, **settings), layer_torch(x, w, **settings)
        assert jax.tree_util.tree_structure(got) == jax.tree_util.tree_structure(want)
        assert torch.equal(got[0]["best"], want[0]["best"]) and not got[0]["best"].requires_grad
        assert_close(got[0]["y"], want[0]["y"])
        assert_close(got[1][0], want[1][0])
        for a, b in zip(
            torch.autograd.grad(weighted(got), (x, w)), torch.autograd.grad(weighted(want), (x, w)), strict=True
        ):
            assert a.dtype == b.dtype
            assert_close(a, b)

    def test_gradcheck_in_float64(self):
        with jax.enable_x64(True):
            wrapped = jax_to_torch(lambda x, w, n: (jnp.sin(x) @ w * n, x.sum()))
            inputs = normal(3, 4, dtype=torch.float64, grad=True), normal(4, 2, dtype=torch.float64, grad=True)
            assert torch.autograd.gradcheck(wrapped, (*inputs, torch.tensor(3)))

    def test_complex_gradients_follow_torch(self):
        z = torch.complex(normal(4), normal(4, seed=1)).requires_grad_()
        got = jax_to_torch(lambda z: z * z * jnp.abs(z))(z)
        want = z * z * z.abs()
        upstream = torch.complex(normal(4, seed=2), normal(4, seed=3))
        (a,), (b,) = (torch.autograd.grad(y, z, upstream) for y in (got, want))
        assert torch.allclose(a, b, rtol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
    def test_dtypes_are_kept(self, dtype):
        x = normal(8, dtype=dtype, grad=True)
        y = jax_to_torch(jnp.sin)(x)
        y.backward(normal(8, seed=1, dtype=dtype))
        assert y.dtype == dtype and x.grad.dtype == dtype
        assert_close(x.grad, normal(8, seed=1, dtype=dtype).double() * x.detach().double().cos(), 1e-2)

    def test_compiles_once_per_shape_setting_and_set_of_gradients(self):
        traces = []

        def function(x, w, scale):
            traces.append(scale)
            return x * w * scale

        wrapped = jax_to_torch(function)
        x, w = normal(3, grad=True), normal(3, seed=1, grad=True)
        for _ in range(3):
            wrapped(x, w, 2.0).sum().backward()
        assert len(traces) == 1
        for _ in range(2):
            wrapped(x, w.detach(), 2.0).sum().backward()
        assert len(traces) == 2
        with torch.no_grad():
            wrapped(x, w, 2.0)
            wrapped(x, w, 2.0)
        assert len(traces) == 3
        wrapped(x, w, 2)  # an int is another setting than a float
        wrapped(normal(4, grad=True), normal(4), 2)
        assert len(traces) == 5

    def test_only_wanted_gradients_are_computed(self):
        asked = []

        probe = jax.custom_vjp(lambda x, name: x, nondiff_argnums=(1,))
        probe.defvjp(lambda x, name: (x, None), lambda name, _, g: (asked.append(name), (g,))[1])
        wrapped = jax_to_torch(lambda x, w: (probe(x, "x") * probe(w, "w")).sum())
        x, w = normal(3), normal(3, seed=1, grad=True)
        wrapped(x, w).backward()
        assert asked == ["w"]
        assert x.grad is None
        assert_close(w.grad, x)

    def test_no_grad_keeps_nothing(self):
        x = normal(3, grad=True)
        with torch.no_grad():
            y = jax_to_torch(jnp.exp)(x)
        assert not y.requires_grad
        with torch.inference_mode():
            assert_close(jax_to_torch(jnp.exp)(x), x.exp())

    def test_arguments_without_gradient(self):
        def function(x, index, mask, nothing=None):
            return jnp.where(mask, x, 0)[index]

        x = normal(5, grad=True)
        index, mask = torch.tensor([0, 3, 3], dtype=torch.int32), torch.tensor([True, True, False, True, True])
        y = jax_to_torch(function)(x, index, mask)
        y.backward(torch.tensor([1.0, 2.0, 5.0]))
        assert x.grad.tolist() == [1.0, 0.0, 0.0, 7.0, 0.0]

    def test_an_argument_that_does_not_matter_gets_zeros(self):
        x, w = normal(3, grad=True), normal(3, grad=True)
        jax_to_torch(lambda x, w: x * 2)(x, w).sum().backward()
        assert w.grad.tolist() == [0, 0, 0]

    def test_only_some_results_are_used(self):
        x = normal(3, grad=True)
        used, _ = jax_to_torch(lambda x: (jnp.sin(x), jnp.exp(x)))(x)
        used.sum().backward()
        assert_close(x.grad, x.detach().cos())

    def test_views_and_expanded_cotangents(self):
        base = normal(6, 8, grad=True)
        x = base.T[1:7:2]
        y = jax_to_torch(jnp.sin)(x)
        assert_close(y, x.sin())
        y.sum().backward()
        assert_close(base.grad[:, 1:7:2], base.detach()[:, 1:7:2].cos())

    def test_results_never_share_memory_with_inputs_or_each_other(self):
        x = normal(4, grad=True)
        a, b = jax_to_torch(lambda x: (x, x))(x)
        with torch.no_grad():
            a.zero_()
        assert_close(b, x)
        assert x.abs().sum() > 0

    def test_inputs_and_results_are_not_copied_for_backward(self):
        w, x = normal(50, 40, grad=True), normal(30, 50, grad=True)
        y = jax_to_torch(lambda x, w: x @ w)(x, w)
        assert {t.data_ptr() for t in y.grad_fn.saved_tensors if t.numel()} == {x.data_ptr(), w.data_ptr()}
        z = jax_to_torch(jnp.exp)(x)
        assert {t.data_ptr() for t in z.grad_fn.saved_tensors if t.numel()} == {z.data_ptr()}

    def test_writing_in_place_before_backward_raises(self):
        x = normal(3, grad=True)
        y = x * 1
        z = jax_to_torch(lambda y: y * y)(y)
        y.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()
        z = jax_to_torch(jnp.exp)(x)
        z.add_(1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            z.sum().backward()

    def test_backward_twice_needs_retain_graph(self):
        x = normal(3, grad=True)
        y = jax_to_torch(lambda x: jnp.sin(jnp.sin(x)))(x).sum()
        y.backward(retain_graph=True)
        y.backward()
        assert_close(x.grad, 2 * x.detach().sin().cos() * x.detach().cos())
        with pytest.raises(RuntimeError, match="second time"):
            y.backward()

    def test_checkpoint_recomputes(self):
        x, w = normal(5, 4, grad=True), normal(4, 3, seed=1, grad=True)
        wrapped = jax_to_torch(lambda x, w: jnp.sin(jnp.tanh(x @ w)))
        y = torch.utils.checkpoint.checkpoint(wrapped, x, w, use_reentrant=False)
        got = torch.autograd.grad(weighted(y), (x, w))
        want = torch.autograd.grad(weighted(torch.sin(torch.tanh(x @ w))), (x, w))
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)

    def test_double_backward_is_a_clear_error(self):
        x = normal(3, grad=True)
        (g,) = torch.autograd.grad(jax_to_torch(jnp.sin)(x).sum(), x, create_graph=True)
        assert_close(g, x.cos())
        # Nothing that the gradient keeps depends on x here; a zero second derivative would be a silent mistake.
        with pytest.raises(RuntimeError, match="sin: .*cannot be differentiated again.*in JAX"):
            (g.sum() + x.sum()).backward()
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.func.grad(torch.func.grad(jax_to_torch(jnp.sin)))(torch.tensor(1.0))

    def test_torch_func(self):
        wrapped = jax_to_torch(lambda x, w: jnp.tanh(x @ w))
        x, w = normal(6, 5, 4), normal(4, 3, seed=1)
        assert_close(torch.func.vmap(wrapped, (0, None))(x, w), torch.tanh(x @ w))
        assert_close(torch.func.vmap(wrapped, (2, None))(x.permute(1, 2, 0), w), torch.tanh(x @ w))

        def loss(function):
            return lambda w: weighted(torch.func.vmap(function, (0, None))(x, w))

        assert_close(torch.func.grad(loss(wrapped))(w), torch.func.grad(loss(lambda x, w: torch.tanh(x @ w)))(w))
        with pytest.raises(NotImplementedError, match=r"jax\.vmap\(jax\.grad"):
            torch.func.vmap(torch.func.grad(lambda x: wrapped(x, w).sum()))(x)

    def test_torch_compile_breaks_its_graph_and_is_right(self):
        wrapped = jax_to_torch(jnp.sin)
        x = normal(4, grad=True)
        y = torch.compile(lambda x: wrapped(x * 2) + 1, backend="eager")(x)
        y.sum().backward()
        assert_close(y, (x * 2).sin() + 1)
        assert_close(x.grad, 2 * (x.detach() * 2).cos())

    def test_random_keys_among_the_residuals(self):
        def dropout(x, seed):
            return jnp.where(jax.random.bernoulli(jax.random.key(seed), 0.5, x.shape), x, 0)

        x = normal(64, grad=True)
        y = jax_to_torch(dropout)(x, torch.tensor(3, dtype=torch.int32))
        y.sum().backward()
        assert torch.equal(x.grad != 0, y != 0) and 0 < int((y == 0).sum()) < 64

    def test_many_threads(self):
        wrapped = jax_to_torch(lambda x, w: jnp.tanh(x @ w))
        failures = []

        def work(seed):
            x, w = normal(8, 8, seed=seed, grad=True), normal(8, 8, seed=seed + 1, grad=True)
            for _ in range(20):
                got = torch.autograd.grad(weighted(wrapped(x, w)), (x, w))
                want = torch.autograd.grad(weighted(torch.tanh(x @ w)), (x, w))
                failures.extend(float((a - b).norm()) for a, b in zip(got, want, strict=True) if (a - b).norm() > 1e-4)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures

    def test_backward_in_a_thread_with_other_settings(self):
        x = normal(3, dtype=torch.float64, grad=True)
        with jax.enable_x64(True):
            y = jax_to_torch(jnp.sin)(x).sum()
        thread = threading.Thread(target=y.backward)
        thread.start()
        thread.join()
        assert x.grad is not None and x.grad.dtype == torch.float64
        assert_close(x.grad, x.detach().cos(), 1e-12)

    def test_name_and_docstring_are_kept(self):
        assert jax_to_torch(layer_jax).__name__ == "layer_jax"

    def test_wrong_calls(self):
        wrapped = jax_to_torch(layer_jax)
        x = normal(3, 3)
        with pytest.raises(TypeError, match="layer_jax: no argument is a torch.Tensor"):
            wrapped(1.0, 2.0)
        with pytest.raises(TypeError, match=r"numpy.ndarray; every argument must be a torch.Tensor"):
            wrapped(x, np.ones((3, 3)))
        with pytest.raises(ValueError, match="layer_jax: tensor 1 has dtype float64.*jax_enable_x64"):
            wrapped(x, x.double())
        with pytest.raises(TypeError, match="tensor 0 has layout torch.sparse_coo"):
            wrapped(x.to_sparse(), x)
        with pytest.raises(TypeError, match="dot_general"):
            wrapped(x, normal(4, 3))


# torch_to_jax


def two_torch(x, w, index=None, *, scale=1.0):
    y = torch.tanh(x @ w) * scale
    return {"y": y if index is None else y[index.long()], "best": x.argmax(-1).int()}, (x.exp(),)


def two_jax(x, w, index=None, *, scale=1.0):
    y = jnp.tanh(x @ w) * scale
    return {"y": y if index is None else y[index], "best": jnp.argmax(x, -1).astype(jnp.int32)}, (jnp.exp(x),)


def loss_of(function):
    def loss(*args, **kwargs):
        leaves = [x for x in jax.tree_util.tree_leaves(function(*args, **kwargs)) if x.dtype == jnp.float32]
        return sum((x * jax.random.normal(jax.random.key(i), x.shape)).sum() for i, x in enumerate(leaves))

    return loss


METHODS = ["sequential", "expand_dims", "broadcast_all"]


class TestTorchToJax:
    x = np.asarray(normal(5, 4))
    w = np.asarray(normal(4, 3, seed=1))
    index = np.array([0, 2, 2], np.int32)

    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_results_and_gradients_match_jax(self, transform):
        def bound(function):
            return lambda x, w, index: function(x, w, index, scale=0.5)

        wrapped = bound(torch_to_jax(two_torch))
        got, want = (transform(f)(self.x, self.w, self.index) for f in (wrapped, bound(two_jax)))
        assert jax.tree_util.tree_structure(got) == jax.tree_util.tree_structure(want)
        for a, b in zip(jax.tree_util.tree_leaves(got), jax.tree_util.tree_leaves(want), strict=True):
            assert isinstance(a, jax.Array) and a.dtype == b.dtype
            assert_close(a, b)
        got, want = (
            transform(jax.grad(loss_of(f), argnums=(0, 1)))(self.x, self.w, self.index)
            for f in (wrapped, bound(two_jax))
        )
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)

    @staticmethod
    @jax.jit(static_argnums=0)
    def batched(function, xs, ws):
        """Nested vmap of the function, vmap of its gradient, and gradient of its vmap."""

        def twice(f):
            return jax.vmap(jax.vmap(f, (0, None)), (0, 0))

        gradient = jax.grad(lambda x, w: twice(loss_of(function))(x, w).sum(), (0, 1))
        return twice(function)(xs, ws), twice(jax.grad(loss_of(function), (0, 1)))(xs, ws), gradient(xs, ws)

    @pytest.mark.parametrize("method", METHODS)
    def test_vmap(self, method):
        xs, ws = np.asarray(normal(2, 6, 5, 4)), np.asarray(normal(2, 4, 3, seed=1))
        wrapped = torch_to_jax(two_torch, vmap_method=method)
        got, want = self.batched(wrapped, xs, ws), self.batched(two_jax, xs, ws)
        for a, b in zip(jax.tree_util.tree_leaves(got), jax.tree_util.tree_leaves(want), strict=True):
            assert_close(a, b, 1e-5)
        eager = jax.vmap(wrapped, (0, None))(xs[0], ws[0])
        assert_close(eager[0]["y"], want[0][0]["y"][0])

    def test_vmap_methods_call_torch_as_often_as_they_say(self):
        for method, expected in (("sequential", 6), ("expand_dims", 1), ("broadcast_all", 1)):
            calls = []

            def function(x, calls=calls):
                calls.append(type(x).__name__)
                return x * 2

            wrapped = torch_to_jax(function, vmap_method=method)
            jax.vmap(wrapped)(jnp.ones((6, 3))).block_until_ready()
            assert calls.count("Tensor") == expected

    def test_check_grads_in_float64(self):
        with jax.enable_x64(True):
            x, w = self.x.astype(np.float64), self.w.astype(np.float64)
            wrapped = torch_to_jax(lambda x, w: (torch.sin(x) @ w, x.sum()))
            jax.test_util.check_grads(wrapped, (jnp.asarray(x), jnp.asarray(w)), order=1, modes=["rev"])

    def test_complex_gradients_follow_jax(self):
        z = jnp.array([1 + 2j, 3 - 1j], jnp.complex64)
        got, want = (
            jax.grad(lambda z, f=f: jnp.real(f(z) * (2 + 3j)).sum())(z)
            for f in (torch_to_jax(lambda z: z * z * z.abs()), lambda z: z * z * jnp.abs(z))
        )
        np.testing.assert_allclose(got, want, rtol=1e-5)

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "int32", "bool", "float8_e4m3fn", "complex64"])
    def test_dtypes_are_kept(self, dtype):
        x = jnp.array([[1, 0], [0, 1]], dtype)
        y = jax.jit(torch_to_jax(lambda x: x.T.clone()))(x)
        assert y.dtype == x.dtype
        np.testing.assert_array_equal(np.asarray(y), np.asarray(x.T))
        if dtype in ("float16", "bfloat16"):
            assert jax.grad(lambda x: torch_to_jax(torch.sin)(x).sum().astype(jnp.float32))(x).dtype == x.dtype

    def test_only_wanted_gradients_are_computed(self):
        wanted = []

        def function(x, w):
            if torch.is_grad_enabled():
                wanted.append((x.requires_grad, w.requires_grad))
            return x * w

        jax.grad(lambda w: torch_to_jax(function)(self.w, w).sum())(self.w).block_until_ready()
        assert wanted == [(False, True)]

    def test_results_that_do_not_depend_on_an_argument(self):
        wrapped = torch_to_jax(lambda x, w: (x * 2, torch.ones(3)))
        gx, gw = jax.grad(lambda x, w: sum(y.sum() for y in wrapped(x, w)), (0, 1))(self.x, self.w)
        assert (np.asarray(gx) == 2).all() and (np.asarray(gw) == 0).all()
        assert (jax.grad(lambda x: torch_to_jax(lambda x: torch.ones(3))(x).sum())(self.x) == 0).all()

    def test_writing_to_an_argument_changes_no_jax_array(self):
        x = jnp.ones(64)
        y = torch_to_jax(lambda x: x.add_(1))(x)
        assert (np.asarray(x) == 1).all() and (np.asarray(y) == 2).all()

    def test_module_with_closed_over_and_with_functional_weights(self):
        module = torch.nn.Linear(4, 3)
        with torch.no_grad():
            want = np.asarray(module(torch.from_numpy(self.x)))
        assert_close(torch_to_jax(module)(self.x), want)
        parameters = to_jax({name: p.detach() for name, p in module.named_parameters()}, copy=True)
        functional = torch_to_jax(lambda p, x: torch.func.functional_call(module, p, (x,)))
        grads = jax.jit(jax.grad(lambda p: (functional(p, self.x) ** 2).sum()))(parameters)
        (module(torch.from_numpy(self.x)) ** 2).sum().backward()
        assert_close(grads["weight"], module.weight.grad)
        assert_close(grads["bias"], module.bias.grad)

    def test_empty_and_scalar_arrays(self):
        assert torch_to_jax(torch.sin)(jnp.ones((0, 3))).shape == (0, 3)
        assert jax.jit(torch_to_jax(torch.sin))(jnp.float32(0)).shape == ()

    def test_there_and_back(self):
        wrapped = jax_to_torch(torch_to_jax(torch.sin))
        x = normal(4, grad=True)
        wrapped(x).sum().backward()
        assert_close(x.grad, x.detach().cos())

    def test_fake_tensors_do_not_compute(self):
        calls = []

        def function(x):
            calls.append(type(x).__name__)
            return x * 2

        shape = jax.eval_shape(torch_to_jax(function), jax.ShapeDtypeStruct((1 << 20, 1 << 20), jnp.float32))
        assert shape.shape == (1 << 20, 1 << 20)
        assert calls == ["FakeTensor"]

    def test_given_result_shapes(self):
        struct = jax.ShapeDtypeStruct((2,), jnp.float32)
        wrapped = torch_to_jax(lambda x: x[x > 0], result_shape_dtypes=struct)
        assert wrapped(jnp.array([1.0, -1.0, 2.0])).tolist() == [1.0, 2.0]
        assert jax.grad(lambda x: wrapped(x).sum())(jnp.array([1.0, -1.0, 2.0])).tolist() == [1.0, 0.0, 1.0]
        with pytest.raises(Exception, match=r"results are \[\(\(3,\), 'float32'\)\], not \[\(\(2,\), 'float32'\)\]"):
            wrapped(jnp.ones(3)).block_until_ready()

    @pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
    @pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
    def test_wrong_calls(self, transform):
        x = jnp.ones(3)
        bad = {
            "boolean index": (lambda x: x[x > 0], ValueError, "fake tensors.*result_shape_dtypes"),
            "item": (lambda x: x * x.sum().item(), ValueError, "result_shape_dtypes"),
            "own error": (lambda x: x @ torch.ones(4), ValueError, "fake tensors of"),
            "not a tensor": (lambda x: 3.0, TypeError, "result 0 is a float; every result must be a torch.Tensor"),
            "64 bit": (lambda x: x.argmax(), ValueError, "result 0 has dtype int64.*jax_enable_x64"),
            "quantised": (lambda x: x.to(torch.complex32), TypeError, "complex32, which JAX lacks"),
        }
        for name, (function, error, message) in bad.items():
            with pytest.raises(error, match=f"<lambda>: .*{message}"):
                transform(torch_to_jax(function))(x)
                pytest.fail(f"{name} was accepted")
        with pytest.raises(TypeError, match="no argument is a JAX array"):
            torch_to_jax(torch.sin)(1.0)
        with pytest.raises(TypeError, match="dtype int4, which PyTorch lacks"):
            transform(torch_to_jax(lambda x: x))(jnp.ones(3, "int4"))
        with pytest.raises(ValueError, match="vmap_method='parallel' must be one of sequential"):
            torch_to_jax(torch.sin, vmap_method="parallel")

    def test_forward_mode_is_a_clear_error(self):
        with pytest.raises(TypeError, match="custom_vjp"):
            jax.jvp(torch_to_jax(torch.sin), (jnp.ones(3),), (jnp.ones(3),))


@pytest.mark.gpu
class TestGpu:
    def test_jax_to_torch_stays_on_the_device(self):
        x, w = (normal(*shape, seed=i).cuda().requires_grad_() for i, shape in enumerate([(64, 32), (32, 16)]))
        y = jax_to_torch(lambda x, w: jnp.tanh(x @ w))(x, w)
        assert y.device == x.device
        assert {x.data_ptr(), w.data_ptr()} <= {t.data_ptr() for t in y.grad_fn.saved_tensors}
        upstream = normal(64, 16, seed=2).cuda()
        got, want = (torch.autograd.grad(f, (x, w), upstream) for f in (y, torch.tanh(x @ w)))
        for a, b in zip(got, want, strict=True):
            assert a.device == x.device
            assert_close(a.cpu(), b.cpu(), 2e-3)  # both may use TF32

    def test_torch_to_jax_can_run_on_the_gpu(self):
        devices = []

        def function(x):
            devices.append(x.device.type)
            return x.sin()

        x = to_jax(normal(8).cuda())
        y = jax.jit(torch_to_jax(function, device="cuda"))(x)
        np.testing.assert_allclose(np.asarray(y), np.sin(np.asarray(x)), rtol=1e-5)
        assert set(devices) == {"cuda"} and y.devices() == x.devices()
