"""Times power attention in Pallas beside its CUDA twin and cuDNN's softmax attention, all through JAX, on one GPU in one run.

    python -m benchmarks.gpu_pallas OUT.json [flagship | forms | wide | short ...]

bfloat16, causal, p = 2: `jax_power.power_attention` with implementation="mosaic_gpu" and "cuda_ffi", and
`jax.nn.dot_product_attention(implementation="cudnn")` on the same q, k, v (softmax has no gates), each as one compiled program
forward and one with gradients. `kernel_ms` is the time of all kernels of a program by CUPTI, `kernels` lists them; `wall_ms`
is that of calls issued one after the other; medians. `trace_s` and `compile_s` are what the first call with gradients costs:
of the first contestant of a group, if the group is run by itself (else groups and contestants are compiled beside each other,
which slows each down). A contestant whose result is wrong has no
time: y and every gradient of a whole head against float64 (benchmarks/gpu.py). About 90 s for everything.
"""

from __future__ import annotations

import collections
import fcntl
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import IO, Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

import jax_power
from benchmarks import gpu, run
from bridge import cases, dlpack


class Shape(NamedTuple):
    """A call: its sizes, the form that power attention is asked for, and whether it has gates."""

    b: int
    t: int
    h: int
    d: int
    form: str
    gates: bool = True


# What matters most first: a run that is cut short has it.
SHAPES = {
    "flagship": [Shape(1, 65536, 8, 64, "chunked")],
    # b·t = 16384, h·d = 2048: the lengths at which softmax attention is usually timed.
    "short": [Shape(16384 // t, t, 2048 // d, d, "attention", False) for t in (2048, 16384, 4096, 8192) for d in (64, 128)],
    "wide": [Shape(65536 // t, t, 8, 128, form) for t in (65536, 16384) for form in ("chunked", "attention")],
    # Around the length at which `jax_power.mosaic_gpu.power` changes from one form to the other.
    "forms": [Shape(65536 // t, t, 8, 64, form) for t in (4096, 8192) for form in ("chunked", "attention")],
}
# The attention form at t = 65536 takes as long as all the rest.
LONGEST_ATTENTION = 16384


class Programs(NamedTuple):
    """A contestant on a shape: inputs (the last one dy), its two compiled programs, and what the second one cost to make."""

    name: str
    shape: Shape
    inputs: tuple[jax.Array, ...]
    forward: Any
    both: Any
    cost: dict[str, float]


def attention(name: str, shape: Shape) -> Callable[..., jax.Array]:
    if name == "cudnn":
        return functools.partial(jax.nn.dot_product_attention, is_causal=True, implementation="cudnn")
    return functools.partial(jax_power.power_attention, form=shape.form, implementation=name)


def make(name: str, shape: Shape) -> tuple[jax.Array, ...]:
    """Random q, k, v, log_g (about −0.03 a token) if there are gates, and dy."""
    b, t, h, d, _, gates = shape
    keys = jax.random.split(jax.random.key(0), 5)
    *qkv, dy = (jax.random.normal(key, (b, t, h, d), jnp.bfloat16) for key in keys[:4])
    log_g = [jax.nn.log_sigmoid(jax.random.normal(keys[4], (b, t, h)) + 4.0)] if gates and name != "cudnn" else []
    return (*qkv, *log_g, dy)


def prepare(name: str, shape: Shape) -> Programs:
    attend, inputs = attention(name, shape), jax.block_until_ready(make(name, shape))

    def differentiate(*arrays: jax.Array) -> Any:
        y, pull_back = jax.vjp(attend, *arrays[:-1])
        return y, pull_back(arrays[-1])

    def timed(step: Callable[[], Any]) -> tuple[Any, float]:
        start = time.perf_counter()
        return step(), time.perf_counter() - start

    lowered, trace_s = timed(lambda: jax.jit(differentiate).lower(*inputs))
    both, compile_s = timed(lowered.compile)
    forward = jax.jit(attend).lower(*inputs[:-1]).compile()
    return Programs(name, shape, inputs, forward, both, {"trace_s": trace_s, "compile_s": compile_s})


def wall_ms(run: Callable[[], Any], calls: int = 5) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        results = [run() for _ in range(calls)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def kernel_ms(program: Any, *arrays: Any) -> tuple[float, dict[str, float]]:
    """Median of all kernels' time, and the time of each by name in the last of the runs."""
    cupti: Any = profiler.Cupti  # `finalize` came with JAX 0.11
    runs = cupti(finalize=False).measure(program, aggregate=False, iterations=5)(*arrays)[1]
    kernels: collections.Counter[str] = collections.Counter()
    for name, ms in runs[-1]:
        kernels[name] += ms
    total = statistics.median(sum(ms for _, ms in run) for run in runs)
    return total, {name: round(ms, 4) for name, ms in kernels.most_common(12)}


def errors(x: Programs) -> dict[str, float]:
    """Relative errors of y and every gradient in the last head of the last batch element, against float64."""
    names = ("q", "k", "v", "log_g")[: len(x.inputs) - 1]
    arrays = dict(zip((*names, "dy"), map(dlpack.to_torch, x.inputs), strict=True))
    leaves = {name: array.detach().requires_grad_(name != "dy") for name, array in arrays.items()}
    weight = gpu.softmax_weight if x.name == "cudnn" else gpu.power_weight(2)
    where = x.shape.b - 1, x.shape.h - 1
    want = gpu.exact_once(gpu.Arrays(**leaves), weight, gpu.checked_rows(x.shape.t), where, causal=True)
    y, grads = x.both(*x.inputs)
    got = {"y": y} | {f"d{name}": grad for name, grad in zip(names, grads, strict=True)}
    return {name: cases.relative_error(got[name][where[0], :, where[1]], exact.cpu().numpy()) for name, exact in want.items()}


def measure(x: Programs) -> dict[str, Any]:
    """One row of the result."""
    row: dict[str, Any] = {"contestant": x.name, **x.shape._asdict(), **x.cost, "errors": errors(x)}
    bounds, slack = cases.bounds("bfloat16", "mosaic_gpu"), gpu.SLACK if x.name == "cudnn" else 1.0
    row["wrong"] = [name for name, error in row["errors"].items() if not error <= slack * bounds[name]]
    if row["wrong"]:
        return row
    for name, program, arrays in (("forward", x.forward, x.inputs[:-1]), ("both", x.both, x.inputs)):
        total, kernels = kernel_ms(program, *arrays)
        row[name] = {"wall_ms": wall_ms(functools.partial(program, *arrays)), "kernel_ms": total, "kernels": kernels}
    return row


def line(row: dict[str, Any]) -> str:
    """The numbers of a row, for the log."""
    times = [
        f"{name} wall {row[name]['wall_ms']:.3f} kernels {row[name]['kernel_ms']:.3f}"
        for name in ("forward", "both")
        if name in row
    ]
    found = [f"{name} {error:.1e}" for name, error in row["errors"].items()]
    what = f"b{row['b']:2d} t{row['t']:6d} h{row['h']:3d} d{row['d']:4d} {row['form']:9s} {row['contestant']:10s}"
    return " ".join(
        [what, *(times or [f"wrong: {row['wrong']}"]), *found, f"trace {row['trace_s']:.1f} compile {row['compile_s']:.1f} s"]
    )


def contestants(shapes: Sequence[Shape]) -> list[tuple[str, Shape]]:
    """Who is timed on what: cuDNN, which knows no form, once for every size, and the CUDA twin where its library is."""
    found: dict[Any, tuple[str, Shape]] = {}
    for shape in shapes:
        for name in ("mosaic_gpu", "cuda_ffi", "cudnn"):
            if name != "cudnn" and shape.form == "attention" and shape.t > LONGEST_ATTENTION:
                continue
            found.setdefault((name, shape[:4] if name == "cudnn" else shape), (name, shape))
    return list(found.values())


def measure_group(name: str, output: pathlib.Path, lock: IO[str]) -> None:
    """Compiles the programs of a group, and then, when no group compiles any more, measures them: one group at a time."""
    fcntl.flock(lock, fcntl.LOCK_SH)
    first, *others = contestants(SHAPES[name])
    programs = [prepare(*first)]
    with ThreadPoolExecutor(8) as pool:
        programs += pool.map(lambda contestant: prepare(*contestant), others)
    fcntl.flock(lock, fcntl.LOCK_EX)
    rows: list[dict[str, Any]] = []
    for x in programs:
        rows.append(measure(x))
        print(line(rows[-1]), flush=True)
        about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": run.commit()}
        gpu.save(output, {"about": about, "rows": rows})


def _read(part: pathlib.Path) -> dict[str, Any] | None:
    """A group's result so far; None if there is none, or it is being written."""
    try:
        return json.loads(part.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return None


def main() -> None:
    """A process for each group: they trace and compile beside each other."""
    output, names = pathlib.Path(sys.argv[1]), sys.argv[2:] or list(SHAPES)
    if len(names) == 1:
        lock = os.environ.get("GPU_PALLAS_LOCK")
        with open(lock, "w") if lock else tempfile.TemporaryFile("w") as file:
            measure_group(names[0], output, file)
        return
    with tempfile.TemporaryDirectory() as folder:
        environment = os.environ | {"GPU_PALLAS_LOCK": f"{folder}/lock"}
        parts = {name: pathlib.Path(folder) / f"{name}.json" for name in names}
        workers = [
            subprocess.Popen([sys.executable, "-m", "benchmarks.gpu_pallas", str(part), name], env=environment)
            for name, part in parts.items()
        ]
        running = True
        while running:
            time.sleep(0.5)
            running = any(worker.poll() is None for worker in workers)
            found = [part for part in map(_read, parts.values()) if part is not None]
            if found:  # a run that is cut short leaves what there is so far
                gpu.save(output, {"about": found[0]["about"], "rows": [row for part in found for row in part["rows"]]})
    sys.exit(max(abs(worker.returncode) for worker in workers))


if __name__ == "__main__":
    main()
