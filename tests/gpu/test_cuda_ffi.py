"""The CUDA kernels called by XLA, on a Hopper GPU: against the float64 oracle, and bit for bit against PyTorch's calls of them.

Both frameworks read the same memory. Also what JAX does to a function: jit, vmap, checkpoint, shard_map, programs for several
platforms. Skipped where there is no such GPU or no compiled library.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

torch = pytest.importorskip("torch")

import jax_power  # noqa: E402
import torch_power  # noqa: E402
from bridge import cases, dlpack, spec  # noqa: E402
from jax_power.cuda_ffi import library, power  # noqa: E402


def _missing() -> str | None:
    if not torch.cuda.is_available() or jax.default_backend() != "gpu":
        return "needs a GPU that both frameworks see"
    return library.missing()


pytestmark = pytest.mark.skipif(_missing() is not None, reason=str(_missing()))

TABLE = [(case, dtype, form) for case in cases.POWER for dtype in ("bfloat16", "float16") for form in case.forms]
ARGUMENTS = ("q", "k", "v", "log_g", "s0", "z0")


def attend(package, state_type, arguments: dict, options: dict):
    """(y,) or (y, s, z) of either package's public function."""
    state = state_type(arguments["s0"], arguments["z0"]) if "s0" in arguments else None
    result = package.power_attention(*(arguments.get(name) for name in ARGUMENTS[:4]), initial_state=state, **options)
    return (result[0], *result[1]) if options["return_state"] else (result,)


def in_jax(arrays: dict[str, jax.Array], options: dict) -> dict[str, jax.Array]:
    """Outputs and gradients, one compiled program."""
    call = functools.partial(attend, jax_power, jax_power.PowerState, options=options)
    arguments = {name: arrays[name] for name in ARGUMENTS if name in arrays}
    upstream = tuple(arrays[name] for name in ("dy", "ds", "dz") if name in arrays)

    @jax.jit
    def both(arguments, upstream):
        outputs, pull_back = jax.vjp(call, arguments)
        return outputs, pull_back(upstream)[0]

    outputs, grads = both(arguments, upstream)
    return dict(zip(("y", "s", "z"), outputs, strict=False)) | {f"d{name}": x for name, x in grads.items()}


def in_torch(arrays: dict[str, torch.Tensor], options: dict) -> dict[str, torch.Tensor]:
    leaves = {name: arrays[name].detach().requires_grad_() for name in ARGUMENTS if name in arrays}
    upstream = tuple(arrays[name] for name in ("dy", "ds", "dz") if name in arrays)
    outputs = attend(torch_power, torch_power.PowerState, leaves, options)
    grads = torch.autograd.grad(outputs, tuple(leaves.values()), upstream)
    return dict(zip(("y", "s", "z"), outputs, strict=False)) | {
        f"d{name}": x for name, x in zip(leaves, grads, strict=True)
    }


def on_gpu(arrays: dict[str, np.ndarray]) -> dict[str, jax.Array]:
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def assert_equal_bits(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name, x in want.items():
        assert np.asarray(got[name]).tobytes() == np.asarray(x).tobytes(), name


def random_inputs(t: int, dtype: str = "bfloat16", **changes) -> tuple[cases.Case, dict[str, jax.Array]]:
    case = cases.Case("random", t=t, **({"h_q": 2, "h_kv": 2, "d": 64, "e": 64} | changes))
    return case, on_gpu(case.make(dtype, seed=3))


@pytest.mark.parametrize(("case", "dtype", "form"), TABLE, ids=lambda x: getattr(x, "name", x))
def test_matches_oracle_and_torch(case: cases.Case, dtype: str, form: str) -> None:
    arrays = case.make(dtype, seed=0)
    options = case.options() | {"form": form, "chunk_size": case.chunk_size}
    shared = on_gpu(arrays)
    try:
        got = in_jax(shared, options | {"implementation": "cuda_ffi"})
    except NotImplementedError as reason:
        pytest.skip(str(reason))
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "cuda_ffi", case), f"{case.name} {dtype} {form}")
    theirs = in_torch(dlpack.to_torch(shared, copy=False), options | {"implementation": "cuda"})
    assert_equal_bits(got, dlpack.to_jax({name: x.detach() for name, x in theirs.items()}))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_longer_than_a_chunk(form: str, dtype: str) -> None:
    case = cases.Case("long", t=2500, h_q=4, h_kv=2, d=64, e=64)
    arrays = case.make(dtype, seed=1)
    options = case.options() | {"form": form}
    shared = on_gpu(arrays)
    got = in_jax(shared, options | {"implementation": "cuda_ffi"})
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds(dtype, "cuda_ffi", case), f"{form} {dtype}")
    theirs = in_torch(dlpack.to_torch(shared, copy=False), options | {"implementation": "cuda"})
    assert_equal_bits(got, dlpack.to_jax({name: x.detach() for name, x in theirs.items()}))


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_two_hundred_runs_give_equal_bits(form: str) -> None:
    """One program, run again and again: XLA may record it as a CUDA graph, and memory holds what earlier runs left."""
    case, arrays = random_inputs(1500, h_q=4, return_state=form == "chunked")
    options = case.options() | {"form": form, "implementation": "cuda_ffi"}
    call = functools.partial(attend, jax_power, jax_power.PowerState, options=options)
    upstream = tuple(arrays[name] for name in ("dy", "ds", "dz") if name in arrays)
    both = jax.jit(lambda x: (call(x), jax.vjp(call, x)[1](upstream)))
    arguments = {name: arrays[name] for name in ARGUMENTS if name in arrays}
    want = [np.asarray(x).tobytes() for x in jax.tree.leaves(both(arguments))]
    for n in range(200):
        if n % 50 == 0:
            jnp.full(1 << 27, jnp.nan).block_until_ready()  # freed at once: the allocator hands it out again
        assert [np.asarray(x).tobytes() for x in jax.tree.leaves(both(arguments))] == want


@pytest.mark.parametrize("form", ["attention", "chunked"])
@pytest.mark.parametrize("unmapped", [None, "k"])
def test_vmap_is_a_larger_batch(form: str, unmapped: str | None) -> None:
    case, arrays = random_inputs(700, b=6)
    options = {"form": form, "implementation": "cuda_ffi"}
    x = {name: a.reshape(3, 2, *a.shape[1:]) for name, a in arrays.items()}
    if unmapped:
        x[unmapped] = x[unmapped][0]

    def both(q, k, v, log_g, dy):
        y, pull_back = jax.vjp(lambda *x: jax_power.power_attention(*x, **options), q, k, v, log_g)
        return y, *pull_back(dy)

    operands = tuple(x[name] for name in ("q", "k", "v", "log_g", "dy"))
    axes = tuple(None if name == unmapped else 0 for name in ("q", "k", "v", "log_g", "dy"))
    got = jax.jit(jax.vmap(both, in_axes=axes))(*operands)
    for n in range(3):
        want = both(*(a if axis is None else a[n] for a, axis in zip(operands, axes, strict=True)))
        for g, w in zip(got, want, strict=True):
            assert np.asarray(g[n]).tobytes() == np.asarray(w).tobytes()


def test_kept_states_change_no_bit(monkeypatch) -> None:
    """Worked out again, kept, kept by a mapped forward pass, or kept for another batch than the gradient's: the same bits."""
    case, arrays = random_inputs(2500, h_q=4, b=2)
    q, k, v, log_g, dy = (arrays[name] for name in (*ARGUMENTS[:4], "dy"))
    attention = functools.partial(jax_power.power_attention, form="chunked", implementation="cuda_ffi")

    def gradients(q, k, v, log_g, dy):
        return jax.vjp(attention, q, k, v, log_g)[1](dy)

    kept = jax.jit(gradients)(q, k, v, log_g, dy)
    upstream = jnp.stack([dy, -dy, 2 * dy])
    apart = jax.jit(lambda *x: jax.vmap(jax.vjp(attention, *x)[1])(upstream))(q, k, v, log_g)
    both = jax.jit(jax.vmap(gradients))(*(jnp.stack([x, x[::-1]]) for x in (q, k, v, log_g, dy)))
    monkeypatch.setattr(power, "KEEP_STATES", False)
    jax.clear_caches()
    again = jax.jit(gradients)(q, k, v, log_g, dy)
    jax.clear_caches()
    for n, x in enumerate(again):
        for name, got in (("kept", kept[n]), ("apart", apart[n][0]), ("both", both[n][0]), ("both", both[n][1][::-1])):
            assert np.asarray(got).tobytes() == np.asarray(x).tobytes(), (name, n)


@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_transformations_change_no_bit(form: str) -> None:
    """checkpoint, shard_map over batch and heads, and no jit at all."""
    case, arrays = random_inputs(900, b=2)
    q, k, v, log_g = (arrays[name] for name in ARGUMENTS[:4])
    attention = functools.partial(jax_power.power_attention, form=form, implementation="cuda_ffi")
    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    where = PartitionSpec("batch", None, "heads")
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(where,) * 4, out_specs=where)

    def gradients(function):
        return jax.vjp(function, q, k, v, log_g)[1](arrays["dy"])

    want = gradients(jax.jit(attention))
    for function in (attention, jax.checkpoint(attention), sharded, jax.jit(sharded)):
        for g, w in zip(gradients(function), want, strict=True):
            assert np.asarray(g).tobytes() == np.asarray(w).tobytes()


EITHER = ["cuda_ffi", "xla"]


def test_an_open_choice_is_the_kernels_here_and_xla_on_the_cpu() -> None:
    """The same traced function, run on both: the CPU's program runs its own forward pass for the backward one."""
    case, arrays = random_inputs(300)

    def both(q, k, v, log_g, dy):
        attention = functools.partial(jax_power.power_attention, implementation=EITHER)
        y, pull_back = jax.vjp(attention, q, k, v, log_g)
        return dict(zip(("y", "dq", "dk", "dv", "dlog_g"), (y, *pull_back(dy)), strict=True))

    operands = tuple(arrays[name] for name in (*ARGUMENTS[:4], "dy"))
    traced = jax.jit(both).trace(*operands)
    assert "power_attention_quadratic_forward" in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "power_attention_quadratic" not in traced.lower(lowering_platforms=("cpu",)).as_text()
    want = case.exact({name: np.asarray(x) for name, x in arrays.items()})
    for device, kind in ((jax.devices("cuda")[0], "cuda_ffi"), (jax.devices("cpu")[0], "xla")):
        got = jax.jit(both)(*jax.device_put(operands, device))
        found = cases.errors({name: np.asarray(x) for name, x in got.items()}, want, case, np.asarray(arrays["dy"]))
        cases.assert_within(found, cases.bounds("bfloat16", kind, case), kind)


def test_second_derivatives() -> None:
    """Of an open choice they are those of the portable implementation; named kernels have none and say so."""
    case, arrays = random_inputs(50, d=8, e=8, dtype="float16")
    q, k, v, log_g = (arrays[name] for name in ARGUMENTS[:4])

    def curvature(implementation):
        def loss(q):
            return (jax_power.power_attention(q, k, v, log_g, implementation=implementation).astype(jnp.float32) ** 2).sum()

        return jax.grad(lambda q: (jax.grad(loss)(q).astype(jnp.float32) * jnp.cos(q.astype(jnp.float32))).sum())(q)

    got, want = curvature(EITHER), curvature("xla")
    assert jnp.linalg.norm((got - want).astype(jnp.float32)) < 5e-3 * jnp.linalg.norm(want.astype(jnp.float32))
    with pytest.raises(NotImplementedError, match="second derivatives.*implementation='xla' would work"):
        curvature("cuda_ffi")


def test_refusals_are_the_same_as_torch() -> None:
    """What the kernels themselves refuse arrives as an error, and the checks before them say what PyTorch's do."""
    q = jnp.zeros((1, 16, 1, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="deg=4: the chunked kernels take 2"):
        jax_power.power_attention(q, q, q, deg=4, form="chunked", implementation="cuda_ffi")
    call = spec.check_power(q, q, q, form="chunked", deg=4)
    with pytest.raises(NotImplementedError):
        power.forward(call, q, q, q, None, None, None)
