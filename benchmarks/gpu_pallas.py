"""Times the chunked Pallas kernels on one GPU, beside cuDNN's softmax attention in the same run.

    python benchmarks/gpu_pallas.py OUT.json [--quick]

h = 8, bfloat16, p = 2, gates on: forward and backward through the raw interface of implementation "mosaic_gpu", and
`jax.nn.dot_product_attention(implementation="cudnn")` on the same q, k, v (softmax has no gates). Wall time is the median of
runs queued back to back; kernel time is the sum of what the profiler saw on the device, listed by kernel. Compile time is that
of the first call, tracing apart. A contestant whose result is wrong (y against float64 on 32 rows of one head) has no time.
"""

from __future__ import annotations

import collections
import glob
import json
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

sys.path.insert(0, ".")
from bridge import spec
from jax_power.mosaic_gpu import chunked

H = 8
ROWS = 32


def median(run: Callable[[], Any], queued: int = 5, repeats: int = 7) -> float:
    """Median milliseconds of one run, of `queued` put on the device's queue at once."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for _ in range(queued):
            result = run()
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / queued * 1e3)
    return sorted(times[1:])[repeats // 2]


def kernel_times(run: Callable[[], Any], runs: int = 3) -> dict[str, float]:
    """Milliseconds a run that each kernel took on the device, by the profiler; copies and memsets too."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(runs):
                result = run()
            jax.block_until_ready(result)
        (path,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        profile = jax.profiler.ProfileData.from_file(path)
        times: collections.Counter[str] = collections.Counter()
        for plane in profile.planes:
            for line in plane.lines if plane.name.startswith("/device:GPU") else ():
                if line.name.startswith("Stream"):
                    for event in line.events:
                        times[event.name] += event.duration_ns * 1e-6 / runs
    return {name: round(ms, 4) for name, ms in times.most_common()}


def compiled(function: Callable[..., Any], *arrays: Any) -> tuple[Any, dict[str, float]]:
    start = time.perf_counter()
    lowered = jax.jit(function).lower(*arrays)
    traced = time.perf_counter()
    executable = lowered.compile()
    return executable, {"trace_s": round(traced - start, 2), "compile_s": round(time.perf_counter() - traced, 2)}


def make(b: int, t: int, d: int) -> dict[str, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    arrays = {
        name: jax.random.normal(key, (b, t, H, d), jnp.bfloat16) for name, key in zip(("q", "k", "v", "dy"), keys, strict=False)
    }
    return arrays | {"log_g": -jax.nn.softplus(-(jax.random.normal(keys[4], (b, t, H)) + 4.0))}


def error(y: jax.Array, x: dict[str, jax.Array]) -> float:
    """Relative L2 of y on the last rows of head 0 against float64."""
    q, k, v, log_g = (np.asarray(x[name][0, :, 0].astype(jnp.float32), np.float64) for name in ("q", "k", "v", "log_g"))
    got, want = np.asarray(y[0, -ROWS:, 0].astype(jnp.float32), np.float64), []
    for row in range(len(q) - ROWS, len(q)):
        after = np.cumsum(log_g[: row + 1][::-1])[::-1] - log_g[: row + 1]
        weights = (k[: row + 1] @ q[row]) ** 2 * np.exp(after)
        want.append(weights @ v[: row + 1] / weights.sum())
    return float(np.linalg.norm(got - np.stack(want)) / np.linalg.norm(np.stack(want)))


def ours(x: dict[str, jax.Array]) -> dict[str, Any]:
    inputs = [x[name] for name in ("q", "k", "v", "log_g")]
    call = spec.check_power(*inputs, form="chunked")
    forward, first = compiled(lambda q, k, v, g: chunked.forward(call, q, k, v, g, None, None)[:2], *inputs)
    y, norm = forward(*inputs)
    found = error(y, x)
    if not found < 3e-3:
        return {"error": found}
    upstream = (y, norm, x["dy"])
    backward, second = compiled(
        lambda q, k, v, g, y, norm, dy: chunked.backward(call, q, k, v, g, None, None, y, norm, dy, None, None)[:4],
        *inputs, *upstream,
    )
    row: dict[str, Any] = {"error": found, "compile": {"forward": first, "backward": second}}
    for name, run in (("forward", lambda: forward(*inputs)), ("backward", lambda: backward(*inputs, *upstream))):
        kernels = kernel_times(run)
        row[name] = {"wall_ms": round(median(run), 4), "kernels_ms": round(sum(kernels.values()), 4), "kernels": kernels}
    return row


def cudnn(x: dict[str, jax.Array]) -> dict[str, Any]:
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")

    def both(q: jax.Array, k: jax.Array, v: jax.Array, dy: jax.Array) -> Any:
        y, pull = jax.vjp(attend, q, k, v)
        return y, pull(dy)

    inputs = [x[name] for name in ("q", "k", "v")]
    forward, whole = jax.jit(attend), jax.jit(both)
    return {
        "forward": {"wall_ms": round(median(lambda: forward(*inputs), queued=2, repeats=3), 4)},
        "both": {"wall_ms": round(median(lambda: whole(*inputs, x["dy"]), queued=2, repeats=3), 4)},
    }


def main() -> None:
    shapes = [(1, 65536, 64)] if "--quick" in sys.argv else [(1, 65536, 64), (2, 8192, 64), (1, 65536, 128)]
    device = jax.devices()[0]
    out: dict[str, Any] = {"device": device.device_kind, "jax": jax.__version__, "results": []}
    for b, t, d in shapes:
        x = make(b, t, d)
        row = {"b": b, "t": t, "h": H, "d": d, "mosaic_gpu": ours(x), "cudnn_softmax": cudnn(x)}
        out["results"].append(row)
        print(json.dumps(row, indent=1), flush=True)
    pathlib.Path(sys.argv[1]).write_text(json.dumps(out, indent=1) + "\n")


if __name__ == "__main__":
    main()
