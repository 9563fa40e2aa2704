"""The CUDA kernels as JAX calls them, on a machine without a GPU: what is lowered, what is refused, and what the handlers do.

The handlers run here with the CPU's entry points behind them (`on_cpu`), through the same Python and C++ but for the stream.
`tests/gpu/test_cuda_ffi.py` runs the kernels themselves.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import pathlib
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_power
from bridge import cases, spec
from jax_power import ops, platforms
from jax_power.choice import CHOICE
from jax_power.cuda_ffi import attention, library, power

ROOT = pathlib.Path(__file__).resolve().parent.parent

needs_library = pytest.mark.skipif(library.missing() is not None, reason=str(library.missing()))

NAMES = ("q", "k", "v", "log_g", "s0", "z0")
# A choice left open between these two, whatever else the table holds.
EITHER = ["cuda_ffi", "xla"]


def operands(case: cases.Case, dtype: str = "bfloat16") -> list[jax.Array | None]:
    arrays = case.make(dtype)
    return [jnp.asarray(arrays[name]) if name in arrays else None for name in NAMES]


def lowered(function, *arguments, platforms: tuple[str, ...]) -> str:
    return jax.jit(function).trace(*arguments).lower(lowering_platforms=platforms).as_text()


def targets(text: str) -> set[str]:
    return {name for name in library.OPERATIONS if f"custom_call @power_{name}(" in text}


# ---------------------------------------------------------------------------------------------------------------------
# What is refused
# ---------------------------------------------------------------------------------------------------------------------

CALLS = {
    "float32": {"dtype": "float32"},
    "mixed": {"dtype": "bfloat16", "v_dtype": "float16"},
    "deg": {"deg": 4},
    "deg_6": {"deg": 6, "form": "attention"},
    "not_causal": {"causal": False},
    "head_size": {"d": 136},
    "value_size": {"e": 12},
    "narrow": {"d": 4, "form": "attention"},
    "many_heads": {"b": 40000, "h": 2},
    "served_state": {"return_state": True, "form": "attention"},
    "served_attention": {"form": "attention"},
    "served_chunked": {},
    "open": {"form": "auto"},
    "open_long": {"form": "auto", "t": 100_000},
    "open_wide": {"form": "auto", "t": 15_000, "d": 128},
    "open_degree_4": {"form": "auto", "t": 100_000, "deg": 4, "d": 8},
    "open_state": {"form": "auto", "return_state": True},
}


def call_of(dtype="bfloat16", v_dtype=None, b=1, t=64, h=2, d=16, e=16, form="chunked", **options) -> spec.PowerCall:
    q, v = jax.ShapeDtypeStruct((b, t, h, d), dtype), jax.ShapeDtypeStruct((b, t, h, e), v_dtype or dtype)
    return spec.check_power(q, q, v, form=form, **options)


@pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="needs torch")
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_serves_and_refuses_what_torch_does_in_the_same_words(monkeypatch, name, device):
    theirs, their_library = (importlib.import_module(f"torch_power.cuda.{x}") for x in ("power", "library"))
    their_attention = importlib.import_module("torch_power.cuda.attention")
    for module in (library, their_library):
        monkeypatch.setattr(module, "missing", lambda: None)
    call = call_of(**CALLS[name])
    planned = power.plan(call)
    assert planned == theirs.plan(call)
    assert power.supports(planned, device) == theirs.supports(planned, device)
    assert attention.supports(planned, device) == their_attention.supports(planned, device)
    if device == "cuda":
        assert (power.supports(planned, device) is None) == name.startswith(("served", "open"))


def test_named_on_a_cpu_says_what_would_work():
    q = jnp.zeros((1, 8, 1, 8), jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="device cpu: .* Hopper GPU.*implementation='xla' would work"):
        jax_power.power_attention(q, q, q, implementation="cuda_ffi")


@pytest.fixture
def fresh():
    """What is remembered about the library, forgotten before and after."""
    for function in (library.load, library.missing, platforms.not_hopper):
        function.cache_clear()
    yield
    for function in (library.load, library.missing, platforms.not_hopper):
        function.cache_clear()


def test_no_library_says_how_to_build_one(monkeypatch, tmp_path, fresh):
    monkeypatch.setenv("POWER_KERNELS", str(tmp_path / "libpower_kernels.so"))
    assert library.path() == tmp_path / "libpower_ffi.so"
    assert "not installed; build it with: pip install --no-build-isolation" in library.missing()
    (tmp_path / "libpower_ffi.so").write_bytes(b"no library")
    library.missing.cache_clear()
    assert f"cannot be loaded from {tmp_path / 'libpower_ffi.so'}" in library.missing()
    either = functools.partial(jax_power.power_attention, implementation=EITHER)
    text = lowered(either, *operands(cases.BY_NAME["plain"])[:3], platforms=("cuda",))
    assert not targets(text)


def test_another_gpu_is_refused(monkeypatch, fresh):
    monkeypatch.setattr(jax, "devices", lambda platform: [type("Device", (), {"compute_capability": "8.0"})])
    assert platforms.not_hopper() == "compute capability 8.0: the kernels run on a Hopper GPU (9.0)"


@needs_library
def test_the_library_brings_no_torch():
    code = (
        "import sys; from jax_power.cuda_ffi import library; assert library.load() is not None;"
        "assert 'torch' not in sys.modules and 'torch_power' not in sys.modules;"
        "assert 'libtorch' not in open('/proc/self/maps').read()"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


# ---------------------------------------------------------------------------------------------------------------------
# What is lowered
# ---------------------------------------------------------------------------------------------------------------------


def value_and_gradients(q, k, v, log_g, **options):
    """y, and gradients of q, k, v, log_g with y as their upstream gradient."""
    y, pull_back = jax.vjp(functools.partial(jax_power.power_attention, **options), q, k, v, log_g)
    return y, *pull_back(y)


@needs_library
@pytest.mark.parametrize("form", ["attention", "chunked"])
def test_one_program_for_both_platforms(form):
    """Of a choice left open, CUDA gets the kernels, the CPU gets xla, and a program for both gets both."""
    arguments = operands(cases.BY_NAME["gates"])[:4]
    both = functools.partial(value_and_gradients, form=form, implementation=EITHER)
    kernel = {"attention": "attention_quadratic", "chunked": "chunked"}[form]
    expected = {f"{kernel}_backward", f"{kernel}_forward"}
    assert targets(lowered(both, *arguments, platforms=("cuda",))) == expected
    assert targets(lowered(both, *arguments, platforms=("cpu",))) == set()
    assert targets(lowered(both, *arguments, platforms=("cpu", "cuda"))) == expected
    assert targets(lowered(functools.partial(both, implementation=EITHER[::-1]), *arguments, platforms=("cuda",))) == set()


@needs_library
@pytest.mark.parametrize("case", cases.POWER, ids=lambda case: case.name)
def test_every_case_lowers(case):
    """In each form, where the kernels support the call; else one plan is for every platform. An empty call needs no kernel."""
    arrays = operands(case)
    state = None if arrays[4] is None else tuple(arrays[4:])
    for form in case.forms:
        call = spec.check_power(*arrays[:4], **case.options(), form=form, initial_state=state)
        plans = CHOICE.plans("power_attention", call, EITHER)
        assert plans.here.implementation == "xla" and not plans.here_is_cuda
        if power.supports(call, "cuda") is not None:
            assert plans.elsewhere is None
            continue
        text = lowered(functools.partial(ops.power_attention, plans), *arrays, platforms=("cuda",))
        empty = 0 in (call.b, call.t) and (form != "attention" or call.return_state)
        assert len(targets(text)) == (0 if empty else 1)


@needs_library
def test_shapes_and_names_of_a_call():
    """Attributes name the buffers in their order; the workspace comes last."""
    case = cases.BY_NAME["state_to_state"]
    q, k, v, log_g, s0, z0 = operands(case)

    def both(q, k, v, log_g, s0, z0):
        def call(*x):
            state = jax_power.PowerState(*x[4:])
            return jax_power.power_attention(*x[:4], initial_state=state, return_state=True, implementation=EITHER)

        results, pull_back = jax.vjp(call, q, k, v, log_g, s0, z0)
        return results, pull_back(results)

    text = lowered(both, q, k, v, log_g, s0, z0, platforms=("cuda",))
    forward, backward = (
        next(line for line in text.splitlines() if f"@power_chunked_{which}(" in line) for which in ("forward", "backward")
    )
    assert 'operands = "q k v log_g s0 z0", results = "y norm s z saved"' in forward
    assert 'operands = "q k v log_g y norm dy s0 z0 ds dz saved", results = "dq dk dv dlog_g ds0 dz0"' in backward
    for name in ("b", "t", "t_kv", "h_q", "h_kv", "d", "e"):
        assert re.search(rf"[{{ ]{name} = {getattr(call_of_case(case), name)} : i64", forward), name
    for line in (forward, backward):
        assert line.rstrip().endswith("xui8>)")


def call_of_case(case: cases.Case) -> spec.PowerCall:
    arrays = operands(case)
    state = None if arrays[4] is None else (arrays[4], arrays[5])
    return spec.check_power(*arrays[:4], **case.options(), initial_state=state)


@needs_library
@pytest.mark.parametrize("forward_is_mapped", [True, False])
def test_kept_states_are_of_one_batch(forward_is_mapped):
    """Where only the gradient is mapped, the backward pass gets none; where the forward pass is, those of the larger batch."""
    arguments = operands(cases.BY_NAME["gates"])[:4]
    call = spec.check_power(*arguments, form="chunked")
    plans = platforms.Plans(platforms.Plan("cuda_ffi", call), None, here_is_cuda=True)

    def gradients(*arguments, upstream=1):
        y, pull_back = jax.vjp(lambda *x: ops.power_attention(plans, *x, None, None)[0], *arguments)
        return pull_back(y) if upstream == 1 else jax.vmap(pull_back)(jnp.stack([y] * upstream))

    if forward_is_mapped:
        text = lowered(jax.vmap(gradients), *(jnp.stack([x] * 3) for x in arguments), platforms=("cuda",))
    else:
        text = lowered(functools.partial(gradients, upstream=3), *arguments, platforms=("cuda",))
    (backward,) = (line for line in text.splitlines() if "@power_chunked_backward(" in line)
    assert (' saved", results = ' in backward) == forward_is_mapped
    assert f"saved = {int(forward_is_mapped)} : i64" in backward and f"b = {3 * call.b} : i64" in backward


@needs_library
def test_mapped_and_sharded_calls_are_one_call():
    q, k, v, log_g = operands(cases.BY_NAME["gates"])[:4]
    both = functools.partial(value_and_gradients, implementation=EITHER)
    mapped = jax.vmap(jax.vmap(both, in_axes=(0, None, 0, 0)))
    many = [jnp.zeros((5, 3, *x.shape), x.dtype) for x in (q, k, v, log_g)]
    text = lowered(mapped, many[0], many[1][:, 0], *many[2:], platforms=("cuda",))
    assert targets(text) == {"attention_quadratic_backward", "attention_quadratic_forward"}
    assert f"b = {5 * 3 * q.shape[0]} : i64" in text

    mesh = jax.sharding.Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("batch", "heads"))
    where = jax.sharding.PartitionSpec("batch", None, "heads")
    attention = functools.partial(jax_power.power_attention, implementation=EITHER)
    sharded = jax.shard_map(attention, mesh=mesh, in_specs=(where,) * 4, out_specs=where)
    text = lowered(lambda *x: jax.vjp(sharded, *x)[1](x[0]), q, k, v, log_g, platforms=("cuda",))
    assert targets(text) == {"attention_quadratic_backward", "attention_quadratic_forward"}


# ---------------------------------------------------------------------------------------------------------------------
# What the handlers do
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The test's own handlers, compiled and registered for the CPU under the names of the kernels' calls."""
    if library.missing() is not None or shutil.which("g++") is None:
        pytest.skip(f"needs g++ and the compiled library: {library.missing()}")
    out, kernels = tmp_path_factory.mktemp("ffi") / "ffi_on_cpu.so", library.path().parent
    command = ["g++", "-std=c++17", "-O1", "-shared", "-fPIC", "-fvisibility=hidden", f"-isystem{jax.ffi.include_dir()}"]
    command += [str(ROOT / "tests/ffi_on_cpu.cpp"), f"-L{kernels}", "-lpower_kernels", f"-Wl,-rpath,{kernels}", "-o", str(out)]
    subprocess.run(command, check=True)
    handlers = ctypes.CDLL(str(out))
    for operation in library.OPERATIONS:
        handler = handlers.forward_on_cpu if operation.endswith("forward") else handlers.backward_on_cpu
        jax.ffi.register_ffi_target(f"power_{operation}", jax.ffi.pycapsule(handler), platform="cpu")
    return handlers


@pytest.fixture
def on_cpu(compiled, monkeypatch):
    """Calls of "cuda_ffi" run the CPU's entry points."""

    def workspace_bytes(operation, shape):
        size = getattr(compiled, f"power_attention_{operation.rpartition('_')[2]}_workspace_cpu")
        size.restype, size.argtypes = ctypes.c_int64, (ctypes.c_void_p, ctypes.c_void_p)
        return size(ctypes.addressof(shape), None)

    monkeypatch.setattr(library, "workspace_bytes", workspace_bytes)
    monkeypatch.setattr(power, "KEEP_STATES", False)  # a matter of the kernels alone


def run(case: cases.Case, arrays: dict[str, jax.Array], form: str) -> dict[str, jax.Array]:
    """Outputs and gradients of the implementation "cuda_ffi", by the oracle's names."""
    arguments = [arrays.get(name) for name in NAMES]
    state = None if arguments[4] is None else tuple(arguments[4:])
    call = spec.check_power(*arguments[:4], **case.options(), form=form, initial_state=state)
    y, norm, s, z = ops.POWER["cuda_ffi"].forward(call, *arguments)
    grads = ops.POWER["cuda_ffi"].backward(call, *arguments, y, norm, *(arrays.get(name) for name in ("dy", "ds", "dz")))
    found = {"y": y, "s": s, "z": z} | {f"d{name}": x for name, x in zip(NAMES, grads, strict=True)}
    return {name: x for name, x in found.items() if x is not None}


HANDLED = ["plain", "gqa", "mqa_wide_value", "zero_scale"]
HANDLED_STATES = ["state_to_state", "from_state", "state_empty"]


@pytest.mark.parametrize(
    ("name", "form"),
    [(name, form) for name in HANDLED for form in ("attention", "chunked")] + [(name, "chunked") for name in HANDLED_STATES],
)
def test_handlers_match_the_oracle(on_cpu, name, form):
    case = cases.BY_NAME[name]
    arrays = case.make("float32")
    got = run(case, {name: jnp.asarray(x) for name, x in arrays.items()}, form)
    found = cases.errors({name: np.asarray(x) for name, x in got.items()}, case.exact(arrays), case, arrays["dy"])
    cases.assert_within(found, cases.bounds("float32", "cpp", case), f"{name} {form}")


@pytest.mark.parametrize("mapped", [(0, 0, 0, 0), (0, None, 0, 0), (2, 0, None, None)])
def test_vmap_is_a_larger_batch(on_cpu, mapped):
    case = cases.BY_NAME["gqa"]
    arrays = [{name: jnp.asarray(x) for name, x in case.make("float32", seed).items()} for seed in range(3)]
    names = ("q", "k", "v", "log_g")
    stacked = [
        arrays[0][name] if axis is None else jnp.stack([x[name] for x in arrays], axis)
        for name, axis in zip(names, mapped, strict=True)
    ]

    def forward(*x):
        return run(case, dict(zip(names, x, strict=True)) | {"dy": arrays[0]["dy"]}, "chunked")

    got = jax.vmap(forward, in_axes=mapped)(*stacked)
    for n in range(3):
        own = (arrays[0 if axis is None else n][name] for name, axis in zip(names, mapped, strict=True))
        for name, want in forward(*own).items():
            np.testing.assert_array_equal(got[name][n], want, err_msg=name)


def test_the_kernels_errors_arrive(on_cpu, monkeypatch):
    q = jnp.zeros((1, 8, 1, 8))
    call = spec.check_power(q, q, q, form="chunked")
    with pytest.raises(Exception, match="no field of PowerAttentionArrays: 'x'"):
        jax.block_until_ready(library.run("chunked_forward", call, {"x": q}, {"y": library.like(q)}))
    monkeypatch.setattr(library, "workspace_bytes", lambda operation, shape: 0)
    with pytest.raises(Exception, match=r"INTERNAL: workspace of \d+ bytes, \d+ needed"):
        jax.block_until_ready(power.forward(call, q, q, q, None, None, None))


# ---------------------------------------------------------------------------------------------------------------------
# Who serves where
# ---------------------------------------------------------------------------------------------------------------------


@needs_library
def test_saved_by_another_platform():
    """A program traced where CUDA is the default, run on a CPU: the forward pass is run again for the backward pass."""
    case = cases.BY_NAME["state_to_state"]
    arrays = {name: jnp.asarray(x) for name, x in case.make("bfloat16").items()}
    arguments = [arrays[name] for name in NAMES]
    call = call_of_case(case)
    xla = platforms.Plan("xla", call)
    traced_there = platforms.Plans(platforms.Plan("cuda_ffi", call), xla, here_is_cuda=True)

    def gradients(plans):
        results, pull_back = jax.vjp(functools.partial(ops.power_attention, plans), *arguments)
        return results, pull_back((arrays["dy"], arrays["ds"], arrays["dz"]))

    for transform in (jax.jit, lambda function: function):
        got = transform(functools.partial(gradients, traced_there))()
        want = transform(functools.partial(gradients, platforms.Plans(xla, None, here_is_cuda=False)))()
        jax.tree.map(np.testing.assert_array_equal, got, want)


@needs_library
def test_second_derivatives_of_an_open_choice():
    """They are xla's, whoever computes the first ones; without xla among those asked for, an error says so."""
    q, k, v, log_g = operands(cases.BY_NAME["two_tokens"], "float16")[:4]

    def curvature(**options):
        def loss(q):
            return (jax_power.power_attention(q, k, v, log_g, **options).astype(jnp.float32) ** 2).sum()

        return jax.grad(lambda q: (jax.grad(loss)(q).astype(jnp.float32) * jnp.cos(q.astype(jnp.float32))).sum())

    got, want = (jax.jit(curvature(implementation=names))(q) for names in (EITHER, "xla"))
    np.testing.assert_allclose(got.astype(np.float32), want.astype(np.float32), rtol=2e-3, atol=2e-3 * np.abs(want).max())
    alone = platforms.Plans(platforms.Plan("cuda_ffi", call_of_case(cases.BY_NAME["two_tokens"])), None, here_is_cuda=True)

    def first(q):
        return jax.vjp(lambda q: ops.power_attention(alone, q, k, v, log_g, None, None)[0], q)[1](q)[0]

    with pytest.raises(NotImplementedError, match="second derivatives.*'cuda_ffi'; implementation='xla' would work"):
        jax.jit(lambda q: jax.vjp(first, q)[1](q)).trace(q)
