"""Times power attention in Pallas beside its CUDA twin and cuDNN's softmax attention, all through JAX, on one GPU in one run.

    python benchmarks/gpu_pallas.py OUT.json [flagship | forms | wide ...]

bfloat16, causal, p = 2, gates. `jax_power.power_attention` with implementation="mosaic_gpu" and "cuda_ffi", and
`jax.nn.dot_product_attention(implementation="cudnn")` on the same q, k, v (softmax has no gates), each as one compiled program
forward and one forward with gradients. `kernel_ms` is the time of all kernels of a program by CUPTI, `kernels` lists them;
`wall_ms` is that of calls issued one after the other; medians. `trace_s` and `compile_s` are what the first call of the program
with gradients costs, while the other programs compile beside it. A contestant whose result is wrong has no time: y and the
gradients of q, k, v on the last rows of one head, against float64.
"""

from __future__ import annotations

import collections
import functools
import json
import pathlib
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

sys.path.insert(0, ".")
import jax_power

ROWS = 32


class Shape(NamedTuple):
    """A call: its sizes, and the form that power attention is asked for."""

    b: int
    t: int
    h: int
    d: int
    form: str


SHAPES = {
    "flagship": [Shape(1, 65536, 8, 64, "chunked")],
    # Around the length at which `jax_power.mosaic_gpu.power` changes from one form to the other.
    "forms": [Shape(65536 // t, t, 8, 64, form) for t in (8192, 16384) for form in ("attention", "chunked")],
    "wide": [Shape(65536 // t, t, 8, 128, form) for t in (16384, 65536) for form in ("attention", "chunked")],
}


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


def prepare(name: str, shape: Shape) -> Programs:
    attend, (b, t, h, d, _) = attention(name, shape), shape
    keys = jax.random.split(jax.random.key(0), 5)
    *qkv, dy = (jax.random.normal(key, (b, t, h, d), jnp.bfloat16) for key in keys[:4])
    gates = [] if name == "cudnn" else [jax.nn.log_sigmoid(jax.random.normal(keys[4], (b, t, h)) + 4.0)]

    def differentiate(*arrays: jax.Array) -> Any:
        y, pull_back = jax.vjp(attend, *arrays[:-1])
        return y, pull_back(arrays[-1])

    inputs, start = (*qkv, *gates, dy), time.perf_counter()
    lowered = jax.jit(differentiate).lower(*inputs)
    traced = time.perf_counter()
    both = lowered.compile()
    cost = {"trace_s": traced - start, "compile_s": time.perf_counter() - traced}
    return Programs(name, shape, inputs, jax.jit(attend).lower(*inputs[:-1]).compile(), both, cost)


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
    return total, {name: round(ms, 4) for name, ms in kernels.most_common(24)}


def errors(x: Programs) -> dict[str, float]:
    """Relative error of y, dq, dk, dv on the last rows of head 0 of batch 0; no query before them sees these keys."""
    q, k, v, *gates, dy = (np.asarray(array[0, :, 0]).astype(np.float64) for array in x.inputs)
    q, dy, mask, scale = q[-ROWS:], dy[-ROWS:], np.tri(ROWS, x.shape.t, x.shape.t - ROWS), x.shape.d**-0.5
    score = q @ k.T * scale
    if x.name == "cudnn":
        weight, slope = np.exp(score) * mask, np.ones_like(score)
    else:
        total = np.cumsum(gates[0])
        decay = np.exp(np.minimum(total[-ROWS:, None] - total, 0.0)) * mask
        weight, slope = score**2 * decay, np.divide(2.0, score, where=score != 0, out=np.zeros_like(score))
    weight /= weight.sum(1, keepdims=True)
    y = weight @ v
    change = weight * (dy @ v.T - (dy * y).sum(1, keepdims=True)) * slope * scale
    want = {"y": y, "dq": change @ k, "dk": (change.T @ q)[-ROWS:], "dv": (weight.T @ dy)[-ROWS:]}
    got_y, grads = x.both(*x.inputs)
    got = dict(zip(want, (got_y, *grads), strict=False))
    found = {}
    for name, exact in want.items():
        rows = np.asarray(got[name][0, -ROWS:, 0]).astype(np.float64)
        found[name] = float(np.linalg.norm(rows - exact) / np.linalg.norm(exact))
    return found


def measure(x: Programs) -> dict[str, Any]:
    """One row of the result."""
    row: dict[str, Any] = {"contestant": x.name, **x.shape._asdict(), **x.cost, "errors": errors(x)}
    if not max(row["errors"].values()) < 1e-2:
        return row
    for name, program, arrays in (("forward", x.forward, x.inputs[:-1]), ("both", x.both, x.inputs)):
        total, kernels = kernel_ms(program, *arrays)
        row[name] = {"wall_ms": wall_ms(functools.partial(program, *arrays)), "kernel_ms": total, "kernels": kernels}
    return row


def main() -> None:
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    shapes = [shape for name in sys.argv[2:] or SHAPES for shape in SHAPES[name]]
    # cuDNN knows no form: it is timed once for every size.
    sizes = {shape[:4]: shape for shape in shapes}.values()
    contestants = [(name, shape) for shape in shapes for name in ("mosaic_gpu", "cuda_ffi")] + [("cudnn", x) for x in sizes]
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(8) as pool:
        for x in pool.map(lambda contestant: prepare(*contestant), contestants):
            rows.append(measure(x))
            print(json.dumps(rows[-1]), flush=True)
            pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
