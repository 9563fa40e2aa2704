"""One program for every platform: an implementation that serves CUDA alone beside the portable one, on a machine without a GPU.

The pretended kernels are the portable implementation with a wrong result, 3.5 times as large: so one sees who computed it.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_power
from bridge import spec
from jax_power import ops, ops_sdpa, platforms
from jax_power.choice import CHOICE


def on_cuda_alone(entry: spec.Implementation) -> spec.Implementation:
    """`entry` as a fused implementation would be, with narrow outputs and on CUDA only; its results are 3.5 times as large."""

    def forward(call, *arrays):
        out, *rest = entry.forward(call, *arrays)
        return 3.5 * out.astype(arrays[2].dtype), *rest

    def supports(call, device):
        return None if device == "cuda" else f"device {device}: pretended"

    return spec.Implementation(forward, entry.backward, supports, wide_output=False)


@pytest.fixture
def pretended(monkeypatch):
    for table in (ops.POWER, ops_sdpa.SDPA):
        monkeypatch.setitem(table, "pretended", on_cuda_alone(table["xla"]))


def attend(q, k, v):
    return jax_power.power_attention(q, k, v, form="attention", implementation=["pretended", "xla"])


def attend_softmax(q, k, v):
    return jax_power.dot_product_attention(q, k, v, implementation=["pretended", "xla"])


def gradients(function, q, k, v):
    y, pull_back = jax.vjp(function, q, k, v)
    return y, pull_back(y)


def qkv(dtype=jnp.bfloat16, *leading):
    keys = jax.random.split(jax.random.key(0), 3)
    return [jax.random.normal(key, (*leading, 2, 12, 2, 8), dtype) for key in keys]


def from_cuda(program: str) -> bool:
    """Whether the lowered program multiplies something by 3.5."""
    return "dense<3.500000e+00>" in program


@pytest.mark.parametrize("function", [attend, attend_softmax])
def test_each_platform_gets_its_own(pretended, function):
    traced = jax.jit(functools.partial(gradients, function)).trace(*qkv())
    assert from_cuda(traced.lower(lowering_platforms=("cuda",)).as_text())
    assert not from_cuda(traced.lower(lowering_platforms=("cpu",)).as_text())
    assert from_cuda(traced.lower(lowering_platforms=("cpu", "cuda")).as_text())


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, jax.checkpoint], ids=["jit", "vmap", "checkpoint"])
@pytest.mark.parametrize("here_is_cuda", [False, True])
@pytest.mark.parametrize("function", [attend, attend_softmax])
def test_a_cpu_runs_the_portable_one(pretended, monkeypatch, function, here_is_cuda, transform):
    """Whatever the default backend was when the call was traced; then, what the backward pass needs is worked out again."""
    arrays = qkv(jnp.bfloat16, *([3] if transform is jax.vmap else []))
    with jax_power.implementation("xla"):
        alone = {attend: jax_power.power_attention, attend_softmax: jax_power.dot_product_attention}[function]
        options = {"form": "attention"} if function is attend else {}
        want = transform(functools.partial(gradients, functools.partial(alone, **options)))(*arrays)
    monkeypatch.setattr(platforms, "backend", lambda: "cuda" if here_is_cuda else "cpu")
    got = transform(functools.partial(gradients, function))(*arrays)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_plans(pretended, monkeypatch):
    q = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    call = spec.check_power(q, q, q, form="attention")
    fused, portable = platforms.Plan("pretended", call), platforms.Plan("xla", call)
    choose = functools.partial(CHOICE.plans, "power_attention", call)
    assert choose(["pretended", "xla"]) == platforms.Plans(portable, fused, here_is_cuda=False)
    assert choose(["xla", "pretended"]) == choose("xla") == platforms.Plans(portable, None, here_is_cuda=False)
    with pytest.raises(NotImplementedError, match="device cpu: pretended; implementation='xla' would work"):
        choose("pretended")
    monkeypatch.setattr(platforms, "backend", lambda: "cuda")
    assert choose(["pretended", "xla"]) == platforms.Plans(fused, portable, here_is_cuda=True)
    assert choose("pretended") == platforms.Plans(fused, None, here_is_cuda=True)


def test_what_is_chosen_for_a_cpu_is_the_fastest_that_can():
    """Whatever the table holds for CUDA: here it is xla for every call, float64 ones included, and alone for those."""
    for dtype in (jnp.bfloat16, jnp.float32):
        q = jax.ShapeDtypeStruct((1, 8, 1, 8), dtype)
        plans = CHOICE.plans("power_attention", spec.check_power(q, q, q), None)
        assert plans.here.implementation == "xla" and not plans.here_is_cuda
    assert plans.elsewhere is None


@pytest.mark.parametrize(
    ("backend", "version", "want"),
    [("cpu", "", "cpu"), ("gpu", "PJRT C API\ncuda 13000", "cuda"), ("gpu", "rocm 60300", "rocm"), ("tpu", "", "tpu")],
)
def test_backends_have_the_names_of_platforms(monkeypatch, backend, version, want):
    client = type("Client", (), {"platform_version": version})
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    monkeypatch.setattr(jax, "devices", lambda: [type("Device", (), {"client": client})])
    assert platforms.backend() == want


def test_another_gpu_is_not_hopper(monkeypatch):
    for capability, told in (("8.0", "compute capability 8.0: the kernels run on a Hopper GPU"), ("9.0", None)):
        device = type("Device", (), {"compute_capability": capability})
        monkeypatch.setattr(jax, "devices", lambda platform, device=device: [device])
        reason = platforms.not_hopper.__wrapped__()
        assert reason is None if told is None else told in reason


@dataclasses.dataclass(frozen=True)
class Call:
    b: int


def test_fold_batch_maps_by_a_larger_batch():
    calls = []

    @platforms.fold_batch
    def kernel(call, x, y, absent):
        assert absent is None and x.shape[0] == y.shape[0] == call.b
        calls.append(call.b)
        return x + y[:, None], None, y * call.b

    x, y = jnp.arange(2 * 5 * 3.0).reshape(2, 5, 3), jnp.arange(4 * 2 * 3.0).reshape(4, 2, 3)
    call = functools.partial(kernel, Call(2))
    got = jax.vmap(lambda y: call(x, y, None))(y)
    assert calls == [2, 8] and got[1] is None  # traced for one, then as one call of four
    np.testing.assert_array_equal(got[0], x + y[:, :, None])
    np.testing.assert_array_equal(got[2], y * 8)
    calls.clear()
    twice = jax.vmap(jax.vmap(lambda x, y: call(x, y, None), in_axes=(None, 1)), in_axes=(0, None))
    nested = twice(jnp.stack([x] * 3), jnp.moveaxis(y, 0, 1))
    assert max(calls) == 24 and nested[0].shape == (3, 4, 2, 5, 3)
    np.testing.assert_array_equal(nested[0], jnp.broadcast_to(x + y[:, :, None], nested[0].shape))


MESH = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
OVER_HEADS = jax.sharding.PartitionSpec("batch", None, "heads")


@pytest.mark.parametrize("options", [{"form": "chunked", "chunk_size": 5}, {"form": "attention", "causal": False}], ids=str)
def test_shard_map_over_batch_and_heads(options):
    """The portable implementation with a state to return: what its scans start from varies over the mesh too."""

    def function(q, k, v):
        y, state = jax_power.power_attention(q, k, v, return_state=True, implementation="xla", **options)
        return y, *state

    states = jax.sharding.PartitionSpec("batch", "heads")
    sharded = jax.shard_map(function, mesh=MESH, in_specs=(OVER_HEADS,) * 3, out_specs=(OVER_HEADS, states, states))
    got, want = (gradients(jax.jit(f), *qkv(jnp.float32)) for f in (sharded, function))
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)


def test_operands_that_vary_over_fewer_axes(pretended):
    """Keys and values that all devices along an axis share: their gradient is the sum over it."""
    q, k, v = (x.astype(jnp.float32) for x in qkv())
    everywhere, own = jax.sharding.PartitionSpec("batch"), OVER_HEADS
    for function in (attend, attend_softmax):
        sharded = jax.shard_map(function, mesh=MESH, in_specs=(own, everywhere, everywhere), out_specs=own)
        arrays = q, k[:, :, :1], v[:, :, :1]
        got, want = (gradients(jax.jit(f), *arrays) for f in (sharded, function))
        jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
        text = jax.jit(functools.partial(gradients, sharded)).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()
        assert from_cuda(text)
