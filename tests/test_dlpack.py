"""`bridge.dlpack`: values, types and pointers that cross between JAX and PyTorch, and every trap on the way."""

import collections
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jax_power
import torch_power
from bridge import dlpack
from bridge.dlpack import to_jax, to_torch

NARROW = sorted(d for d in dlpack.DTYPES if d not in ("int64", "uint64", "float64", "complex128"))
WIDE = sorted(dlpack.DTYPES - set(NARROW))

Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def on_cpu():
    """Arrays that a test makes are on the CPU also where JAX has a GPU, as PyTorch's are."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def values(dtype: str, n: int = 48) -> torch.Tensor:
    """Distinct small values that every dtype can hold."""
    return (torch.arange(n) % 2).to(getattr(torch, dtype)).reshape(6, n // 6)


def same_memory(array: jax.Array, tensor: torch.Tensor) -> bool:
    return array.unsafe_buffer_pointer() == tensor.data_ptr()


def as_bytes(x) -> bytes:
    if isinstance(x, torch.Tensor):
        return x.contiguous().view(torch.uint8).numpy().tobytes()
    return np.asarray(x).tobytes()


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("copy", [None, True, False])
def test_to_jax_keeps_dtype_values_and_memory(dtype, copy):
    x = values(dtype)
    y = to_jax(x, copy=copy)
    assert str(y.dtype) == dtype
    assert y.shape == tuple(x.shape)
    assert as_bytes(y) == as_bytes(x)
    assert same_memory(y, x) == (copy is not True)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("copy", [None, True, False])
def test_to_torch_keeps_dtype_values_and_memory(dtype, copy):
    x = to_jax(values(dtype), copy=True)
    y = to_torch(x, copy=copy)
    assert y.dtype == getattr(torch, dtype)
    assert tuple(y.shape) == x.shape
    assert as_bytes(y) == as_bytes(x)
    assert same_memory(x, y) == (copy is not True)
    assert not y.requires_grad


@pytest.mark.parametrize("dtype", WIDE)
def test_64_bit_values_keep_their_width_or_raise(dtype):
    x = values(dtype)
    with pytest.raises(ValueError, match=r"jax_enable_x64.*True"):
        to_jax(x)
    with jax.enable_x64(True):
        y = to_jax(x, copy=False)
        assert str(y.dtype) == dtype
        assert same_memory(y, x)
    # The width survives the way back even with x64 off again.
    assert to_torch(y, copy=False).dtype == x.dtype


def test_writes_are_seen_through_shared_memory_and_not_through_a_copy():
    x = torch.zeros(16)
    shared, copied = to_jax(x), to_jax(x, copy=True)
    x[3] = 7
    assert float(shared[3]) == 7
    assert float(copied[3]) == 0

    a = jnp.zeros(16)
    shared, copied = to_torch(a), to_torch(a, copy=True)
    shared[3] = 7
    assert float(a[3]) == 7
    assert float(copied[3]) == 0


def test_there_and_back_is_the_same_memory():
    x = torch.randn(5, 7)
    assert to_torch(to_jax(x)).data_ptr() == x.data_ptr()


def test_shared_memory_outlives_its_first_owner():
    x = torch.arange(1000.0)
    y = to_jax(x)
    del x
    torch.full((1000,), -1.0)  # would reuse the memory had it been freed
    np.testing.assert_array_equal(np.asarray(y), np.arange(1000.0))


@pytest.mark.parametrize(
    "make",
    [
        lambda x: x.T,
        lambda x: x.reshape(2, 3, 2, 4).permute(0, 2, 3, 1),
        lambda x: x.reshape(2, 3, 2, 4).contiguous(memory_format=torch.channels_last),
        lambda x: x.reshape(6, 1, 8).transpose(0, 1),
    ],
    ids=["transposed", "permuted", "channels_last", "length_1_axis"],
)
def test_any_order_of_dimensions_is_shared(make):
    x = make(torch.randn(6, 8))
    y = to_jax(x, copy=False)
    assert same_memory(y, x)
    np.testing.assert_array_equal(np.asarray(y), x.numpy())
    np.testing.assert_array_equal(np.asarray(jax.jit(lambda a: a + 0)(y)), x.numpy())


VIEWS = {
    "gaps": (lambda x: x[:, :4], "strides"),
    "step": (lambda x: x[::2], "strides"),
    "column": (lambda x: x[:, :1], "strides"),
    "expand": (lambda x: x[:1].expand(3, 8), "strides"),
    "window": (lambda x: x.flatten().unfold(0, 5, 1), "strides"),
    "unaligned": (lambda x: x.flatten()[1:], "unaligned"),
    "conj": (lambda x: torch.complex(x, x + 1).conj(), "conjugate"),
    "neg": (torch._neg_view, "negative"),
    "imag_of_conj": (lambda x: torch.complex(x, x + 1).conj().imag, "negative"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_views_are_copied_right_and_refused_with_copy_false(name):
    make, reason = VIEWS[name]
    x = make(torch.randn(6, 8))
    want = x.resolve_conj().resolve_neg().numpy()
    for copy in (None, True):
        y = to_jax(x, copy=copy)
        np.testing.assert_array_equal(np.asarray(y), want)
        assert not same_memory(y, x)
    with pytest.raises(ValueError, match=reason):
        to_jax(x, copy=False)


@pytest.mark.parametrize("shape", [(), (0,), (3, 0, 2), (1,), (1, 1, 1)])
@pytest.mark.parametrize("copy", [None, True, False])
def test_scalars_and_empty_arrays(shape, copy):
    x = torch.full(shape, 3.0)
    y = to_jax(x, copy=copy)
    assert y.shape == shape
    np.testing.assert_array_equal(np.asarray(y), x.numpy())
    z = to_torch(jnp.full(shape, 3.0), copy=copy)
    assert tuple(z.shape) == shape
    assert torch.equal(z, x)
    assert to_jax(torch.zeros(4, 0, 3)[::2], copy=copy).shape == (2, 0, 3)


def test_inference_tensors_parameters_and_detached_views():
    with torch.inference_mode():
        x = torch.randn(4)
    assert same_memory(to_jax(x), x)
    p = torch.nn.Parameter(torch.randn(4))
    assert same_memory(to_jax(p.detach()), p)
    assert same_memory(to_jax(torch.nn.Parameter(torch.randn(4), requires_grad=False)), p) is False


def test_trees_keep_their_structure_and_settings():
    x = {"a": [torch.ones(2), (torch.zeros(3), None)], "p": Pair(torch.ones(1), 4), "name": "x", "flag": True}
    y = to_jax(x)
    assert isinstance(y["a"][0], jax.Array) and isinstance(y["a"][1], tuple) and y["a"][1][1] is None
    assert isinstance(y["p"], Pair) and y["p"].second == 4
    assert y["name"] == "x" and y["flag"] is True
    assert same_memory(y["a"][1][0], x["a"][1][0])
    z = to_torch(y)
    assert torch.equal(z["p"].first, x["p"].first)
    assert to_torch(None) is None and to_jax([]) == [] and to_jax({"a": None}) == {"a": None}
    ordered = collections.OrderedDict(b=jnp.ones(1), a=jnp.zeros(1))
    assert list(to_torch(ordered)) == ["b", "a"]


def test_power_state_becomes_the_other_twins_class():
    state = torch_power.PowerState(torch.randn(1, 2, 8, 3), torch.randn(1, 2, 8))
    there = to_jax({"state": state, "step": 3})
    assert type(there["state"]) is jax_power.PowerState and there["step"] == 3
    assert same_memory(there["state"].s, state.s) and same_memory(there["state"].z, state.z)
    back = to_torch(there)["state"]
    assert type(back) is torch_power.PowerState
    assert torch.equal(back.s, state.s) and torch.equal(back.z, state.z)
    with pytest.raises(ValueError, match=r"x\['state'\]\.s requires grad"):
        to_jax({"state": state._replace(s=state.s.requires_grad_())})


def a_tracer():
    tracers = []
    jax.jit(lambda x: tracers.append(x) or x)(jnp.ones(2))
    return tracers[0]


def deleted():
    x = jnp.ones(3)
    x.delete()
    return x


BAD_ARRAYS = {
    "numpy": (lambda: np.ones(3), TypeError, r"NumPy ndarray; call torch.as_tensor"),
    "numpy_scalar": (lambda: np.float64(3), TypeError, "NumPy float64"),
    "list": (lambda: [[1.0, 2.0], [3.0, 4.0]], TypeError, r"x\[0\]\[0\] must be a jax.Array, got the Python float 1.0"),
    "float": (lambda: 1.5, TypeError, "x must be a jax.Array, got the Python float 1.5"),
    "string": (lambda: "abc", TypeError, "Python str 'abc'"),
    "torch": (lambda: torch.ones(2), TypeError, "torch.Tensor already; to_jax"),
    "numpy_leaf": (lambda: {"a": jnp.ones(2), "b": np.ones(3)}, TypeError, r"leaf x\['b'\] must be"),
    "object": (lambda: object(), TypeError, "builtins.object, which is neither"),
    "tracer": (a_tracer, TypeError, "tracer.*torch_to_jax"),
    "prng_key": (lambda: jax.random.key(0), TypeError, "key_data"),
    "int4": (lambda: jnp.ones(4, "int4"), TypeError, "dtype int4, which PyTorch lacks"),
    "float8_e3m4": (lambda: jnp.ones(4, "float8_e3m4"), TypeError, "float8_e3m4"),
    "deleted": (deleted, ValueError, "deleted"),
}


@pytest.mark.parametrize("name", BAD_ARRAYS)
def test_to_torch_names_what_is_wrong(name):
    make, error, message = BAD_ARRAYS[name]
    with pytest.raises(error, match=f"to_torch: .*{message}"):
        to_torch(make())


@pytest.mark.filterwarnings("ignore")  # quantised and nested tensors warn when made
def test_to_jax_names_what_is_wrong():
    bad = {
        "numpy": (lambda: np.ones(3), TypeError, "NumPy ndarray; call jax.numpy.asarray"),
        "list": (lambda: [1, 2], TypeError, r"x\[0\] must be a torch.Tensor, got the Python int 1"),
        "jax": (lambda: jnp.ones(2), TypeError, "jax.Array already; to_torch"),
        "tracer": (a_tracer, TypeError, "jax.Array already"),
        "requires_grad": (lambda: torch.ones(2, requires_grad=True), ValueError, r"requires grad.*x.detach\(\)"),
        "parameter": (lambda: torch.nn.Linear(2, 2).weight, ValueError, r"detach\(\)"),
        "sparse": (lambda: torch.eye(2).to_sparse(), TypeError, "to_dense"),
        "csr": (lambda: torch.eye(2).to_sparse_csr(), TypeError, "to_dense"),
        "quantised": (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8), TypeError, "dequantize"),
        "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), TypeError, "nested"),
        "meta": (lambda: torch.ones(2, device="meta"), ValueError, "meta device"),
        "complex32": (lambda: torch.ones(2, dtype=torch.complex32), TypeError, "complex32, which JAX lacks"),
        "object": (lambda: {"m": torch.nn.Linear(2, 2)}, TypeError, "neither an array nor a registered pytree"),
    }
    for name, (make, error, message) in bad.items():
        with pytest.raises(error, match=f"to_jax: .*{message}"):
            to_jax(make())
            pytest.fail(f"{name} was accepted")


def test_to_jax_refuses_tensors_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(3)
    with pytest.raises(TypeError, match="FakeTensor"):
        to_jax(fake)
    with pytest.raises(TypeError, match="jax_to_torch"):
        torch.func.vmap(lambda x: to_jax(x))(torch.ones(3))
    with pytest.raises(TypeError, match="jax_to_torch"):
        torch.func.grad(lambda x: to_jax(x))(torch.ones(()))


@pytest.mark.parametrize("function, x", [(to_torch, jnp.ones(2)), (to_jax, torch.ones(2))])
def test_bad_options(function, x):
    with pytest.raises(ValueError, match="copy='never' must be None"):
        function(x, copy="never")
    with pytest.raises(ValueError, match="device='abacus' is not available"):
        function(x, device="abacus")
    with pytest.raises(ValueError, match=r"device='cuda:99' is not available .*cpu"):
        function(x, device="cuda:99")


def test_a_device_that_is_already_right_shares():
    x = torch.ones(4)
    assert same_memory(to_jax(x, device="cpu", copy=False), x)
    y = jnp.ones(4)
    assert same_memory(y, to_torch(y, device=torch.device("cpu"), copy=False))


def test_export_waits_for_the_computation():
    x = to_jax(torch.full((600, 600), 1e-3))
    for _ in range(5):
        y = to_torch(jax.jit(lambda a: a @ a @ a @ a @ a)(x))
        early = y.clone()
        jax.effects_barrier()
        assert torch.equal(early, y) and bool((y != 0).all())


def run_python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_arrays_on_several_devices_or_another_device():
    run_python("""
        import os
        os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
        os.environ["JAX_PLATFORMS"] = "cpu"
        import jax, jax.numpy as jnp, torch
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from bridge.dlpack import to_jax, to_torch

        mesh = Mesh(jax.devices(), "x")
        for spec in (P("x"), P()):
            try:
                to_torch(jax.device_put(jnp.ones(4), NamedSharding(mesh, spec)))
            except ValueError as error:
                assert "2 devices" in str(error) and "device_put" in str(error), error
            else:
                raise AssertionError("a sharded array was accepted")

        second = jax.devices()[1]
        x = torch.arange(4.0)
        assert to_jax(x, device=second).devices() == {second}
        try:
            to_jax(x, device=second, copy=False)
        except ValueError as error:
            assert "copy=False" in str(error), error
        else:
            raise AssertionError("copy=False moved a tensor")
        assert torch.equal(to_torch(jax.device_put(jnp.arange(4.0), second)), x)
    """)


def test_importing_the_bridge_imports_neither_framework():
    run_python("""
        import sys
        import bridge, bridge.dlpack, bridge.autograd
        loaded = {"jax", "jaxlib", "torch"} & set(sys.modules)
        assert not loaded, loaded
    """)


@pytest.mark.gpu
class TestGpu:
    def test_memory_is_shared_both_ways(self):
        x = torch.randn(64, 32, device="cuda")
        y = to_jax(x, copy=False)
        assert same_memory(y, x) and next(iter(y.devices())).platform == "gpu"
        z = to_torch(y, copy=False)
        assert z.device == x.device and z.data_ptr() == x.data_ptr()
        assert not same_memory(to_jax(x, copy=True), x)
        assert not same_memory(y, to_torch(y, copy=True))

    def test_device_moves_and_copy_false_refuses_to(self):
        x = torch.randn(64, device="cuda")
        y = to_jax(x, device="cpu")
        assert next(iter(y.devices())).platform == "cpu"
        np.testing.assert_array_equal(np.asarray(y), x.cpu().numpy())
        assert torch.equal(to_torch(y, device="cuda"), x)
        assert to_jax(x.cpu(), device="gpu").devices() == to_jax(x).devices()
        with pytest.raises(ValueError, match="copy=False"):
            to_jax(x, device="cpu", copy=False)
        with pytest.raises(ValueError, match="copy=False"):
            to_torch(y, device="cuda", copy=False)

    @pytest.mark.parametrize("name", VIEWS)
    def test_views_arrive_right(self, name):
        x = VIEWS[name][0](torch.randn(6, 8, device="cuda"))
        np.testing.assert_array_equal(np.asarray(to_jax(x)), x.resolve_conj().resolve_neg().cpu().numpy())

    def test_streams_are_ordered(self):
        a = torch.randn(2048, 2048, device="cuda") / 64
        square = jax.jit(lambda x: x @ x)
        for _ in range(10):
            x = a
            for _ in range(8):
                x = x @ a  # still running when JAX is handed its result
            want = x @ x
            y = to_torch(square(to_jax(x)))
            x.zero_()  # queued behind JAX's use of x, which to_torch made this stream wait for
            assert float((y - want).norm() / want.norm()) < 1e-2  # both may use TF32
