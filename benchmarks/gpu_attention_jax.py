"""Times the attention form's Pallas kernels against cuDNN's softmax attention in JAX, on one GPU.

    python benchmarks/gpu_attention_jax.py OUT.json

b·t = 16384 tokens, h·d = 2048, bfloat16, causal: `jax_power.power_attention(implementation="mosaic_gpu")` with p = 2 and
`jax.nn.dot_product_attention(implementation="cudnn")`, each as one compiled program forward and one for the gradients of a
forward pass that has been kept. `kernel_ms` is the time of all kernels of a program by CUPTI, `wall_ms` that of calls issued
one after the other; medians. `compile_s` is how long both programs took to compile, those of all contestants at once. A
contestant whose result is wrong (against float64 on the last 64 rows of one head) has no time.
"""

from __future__ import annotations

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

TOKENS, WIDTH, ROWS = 16384, 2048, 64
SHAPES = [(t, d, False) for t in (2048, 4096, 16384) for d in (64, 128)] + [(4096, 64, True), (4096, 128, True)]  # t, d, gates


def power(q: jax.Array, k: jax.Array, v: jax.Array, log_g: jax.Array | None = None) -> jax.Array:
    return jax_power.power_attention(q, k, v, log_g, form="attention", implementation="mosaic_gpu")


def cudnn(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


class Programs(NamedTuple):
    """A contestant on a shape: its inputs (the last one dy), and both compiled programs."""

    name: str
    t: int
    d: int
    inputs: tuple[jax.Array, ...]
    forward: Any
    backward: Any
    kept: Any
    compile_s: float


def prepare(name: str, t: int, d: int, gates: bool) -> Programs:
    attend = power if name == "power p=2" else cudnn
    keys, shape = jax.random.split(jax.random.key(0), 5), (TOKENS // t, t, WIDTH // d, d)
    *qkv, dy = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:4])
    log_g = [jax.nn.log_sigmoid(jax.random.normal(keys[4], shape[:3]) + 4.0)] if gates else []
    start = time.perf_counter()
    forward = jax.jit(attend).lower(*qkv, *log_g).compile()
    keep = jax.jit(lambda *x: jax.vjp(attend, *x)).lower(*qkv, *log_g).compile()
    _, pull_back = keep(*qkv, *log_g)
    backward = jax.jit(lambda pull_back, dy: pull_back(dy)).lower(pull_back, dy).compile()
    return Programs(name, t, d, (*qkv, *log_g, dy), forward, backward, pull_back, time.perf_counter() - start)


def kernel_ms(program: Any, *arrays: Any) -> float:
    cupti: Any = profiler.Cupti  # `finalize` came with JAX 0.11
    runs = cupti(finalize=False).measure(program, aggregate=True, iterations=9)(*arrays)[1]
    return float(statistics.median(runs))


def wall_ms(run: Callable[[], Any], calls: int = 10) -> float:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        results = [run() for _ in range(calls)]
        jax.block_until_ready(results[-1])
        times.append((time.perf_counter() - start) / calls * 1e3)
    return statistics.median(times)


def error(x: Programs) -> float:
    """Relative error of the last 64 rows of head 0 of batch 0, softmax or squares, against float64."""
    q, k, v, *log_g = (np.asarray(array[0, :, 0]).astype(np.float64) for array in x.inputs[:-1])
    score = q[-ROWS:] @ k.T * x.d**-0.5
    weight = score**2 if x.name == "power p=2" else np.exp(score)
    if log_g:
        total = np.cumsum(log_g[0])
        weight *= np.exp(np.minimum(total[-ROWS:, None] - total, 0.0))
    weight *= np.tri(ROWS, x.t, x.t - ROWS)
    want = weight @ v / weight.sum(-1, keepdims=True)
    got = np.asarray(x.forward(*x.inputs[:-1])[0, -ROWS:, 0]).astype(np.float64)
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def measure(x: Programs) -> dict[str, Any]:
    """One row of the result."""
    gates = len(x.inputs) == 5
    row: dict[str, Any] = {"contestant": x.name, "b": TOKENS // x.t, "t": x.t, "h": WIDTH // x.d, "d": x.d, "gates": gates}
    row |= {"causal": True, "error": error(x), "compile_s": x.compile_s}
    if not row["error"] < 1e-2:
        return row
    calls = {"forward": (x.forward, x.inputs[:-1]), "backward": (x.backward, (x.kept, x.inputs[-1]))}
    for name, (program, arrays) in calls.items():
        row[f"{name}_wall_ms"] = wall_ms(functools.partial(program, *arrays))
        row[f"{name}_kernel_ms"] = kernel_ms(program, *arrays)
    return row


def main() -> None:
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    about["commit"] = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    rows: list[dict[str, Any]] = []
    names = [(name, *shape) for shape in SHAPES for name in ("power p=2", "cudnn") if name == "power p=2" or not shape[2]]
    with ThreadPoolExecutor(8) as pool:
        programs = list(pool.map(lambda arguments: prepare(*arguments), names))
    for x in programs:
        rows.append(measure(x))
        print(" ".join(f"{name} {value:.4g}" if isinstance(value, float) else str(value) for name, value in rows[-1].items()))
        pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
