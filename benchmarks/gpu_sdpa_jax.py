"""Times JAX's scaled dot-product attentions on one GPU: ours in Pallas, cuDNN's, JAX's own Pallas kernel, and XLA's.

    python benchmarks/gpu_sdpa_jax.py OUT.json [--quick]

b·t = 16384 tokens, h·d = 2048, bfloat16 (float16 for JAX's Pallas kernel, which takes no other). Two times of forward, and of
forward and backward together: `kernel`, what JAX's profiler saw the GPU busy with, and `wall`, the median of calls that follow
each other. Every result of every contestant is held to float64 on one head first; one that is wrong has no time.
"""

from __future__ import annotations

import concurrent.futures
import functools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from jax import Array

sys.path.insert(0, ".")
from jax_power import dot_product_attention, ops_sdpa
from jax_power.mosaic_gpu import sdpa

TOKENS, WIDTH = 16384, 2048
# Wrong by more than this, and a contestant has no time: all compute in 16 bits, with errors of 2 to 4e-3.
TOLERANCE = 1e-2
REPEATS = 8


class Shape(NamedTuple):
    d: int
    t: int
    causal: bool

    def arrays(self, dtype: Any) -> list[Array]:
        """Random q, k, v and dy `[b, t, h, d]`."""
        size = TOKENS // self.t, self.t, WIDTH // self.d, self.d
        return [jax.random.normal(key, size, jnp.bfloat16).astype(dtype) for key in jax.random.split(jax.random.key(0), 4)]


ops_sdpa.SDPA["mosaic_gpu"] = sdpa.IMPLEMENTATION


def ours(shape: Shape) -> Callable[..., Array]:
    return lambda q, k, v: dot_product_attention(q, k, v, is_causal=shape.causal, implementation="mosaic_gpu")


def jax_nn(implementation: str) -> Callable[[Shape], Callable[..., Array]]:
    def contestant(shape: Shape) -> Callable[..., Array]:
        attend: Any = jax.nn.dot_product_attention  # whose annotations name the implementations
        return lambda q, k, v: attend(q, k, v, is_causal=shape.causal, implementation=implementation)

    return contestant


def jax_pallas(shape: Shape) -> Callable[..., Array]:
    """The kernel that ships with JAX, tiles as in its own benchmark; it leaves the scale to its caller."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    backward: dict[str, Any] = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=shape.causal, compute_wgs_bwd=2, **backward
    )
    return lambda q, k, v: attention_mgpu.attention(q * jnp.asarray(shape.d**-0.5, q.dtype), k, v, config)


CONTESTANTS: dict[str, Callable[[Shape], Callable[..., Array]]] = {
    "ours": ours,
    "cudnn": jax_nn("cudnn"),
    "jax pallas": jax_pallas,
    "xla": jax_nn("xla"),
}


def enters(name: str, shape: Shape, backward: bool) -> bool:
    """XLA's scores take 34 GB at t = 16384; JAX's kernel has no causal backward."""
    return not (name == "xla" and shape.t > 2048) and not (name == "jax pallas" and backward and shape.causal)


def exact(shape: Shape) -> dict[str, Array]:
    """y, dq, dk, dv of the first head in float64."""

    def attention(q: Array, k: Array, v: Array) -> Array:
        score = q @ k.T * shape.d**-0.5
        hidden = jnp.arange(shape.t) > jnp.arange(shape.t)[:, None]
        return jax.nn.softmax(jnp.where(hidden & shape.causal, -jnp.inf, score)) @ v

    with jax.enable_x64(True):
        *qkv, dy = (x[0, :, 0].astype(jnp.float64) for x in shape.arrays(jnp.bfloat16))
        y, pull_back = jax.vjp(jax.jit(attention), *qkv)
        return dict(zip(("y", "dq", "dk", "dv"), (y, *pull_back(dy)), strict=True))


def kernel_ms(run: Callable[[], Any]) -> float:
    """Milliseconds that the GPU was busy in one run, by JAX's profiler."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(REPEATS):
                result = run()
            jax.block_until_ready(result)
        files = list(pathlib.Path(folder).rglob("*.xplane.pb"))
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
    lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    return sum(event.duration_ns for event in events) / 1e6 / REPEATS


def wall_ms(run: Callable[[], Any]) -> float:
    """Milliseconds of one of several runs in a row, the median of five times."""
    samples = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(REPEATS):
            result = run()
        jax.block_until_ready(result)
        samples.append((time.perf_counter() - start) / REPEATS * 1e3)
    return statistics.median(samples)


def compiled(name: str, shape: Shape, backward: bool) -> Any:
    """A contestant's forward, or forward and backward, ready to run; or the text of the exception instead."""
    attention = CONTESTANTS[name](shape)

    def both(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, ...]:
        y, pull_back = jax.vjp(attention, q, k, v)
        return y, *pull_back(dy)

    dtype = jnp.float16 if name == "jax pallas" else jnp.bfloat16
    *qkv, dy = jax.eval_shape(lambda: shape.arrays(dtype))
    try:
        return jax.jit(both).lower(*qkv, dy).compile() if backward else jax.jit(attention).lower(*qkv).compile()
    except Exception as error:  # a contestant that cannot is part of the result
        return f"{type(error).__name__}: {str(error)[:200]}"


def measure(name: str, shape: Shape, programs: dict[Any, Any], want: dict[str, Array]) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    row: dict[str, Any] = {"contestant": name, "b": TOKENS // shape.t, "h": WIDTH // shape.d, **shape._asdict()}
    arrays = shape.arrays(jnp.float16 if name == "jax pallas" else jnp.bfloat16)
    times: dict[str, float] = {}
    for backward, operands in ((False, arrays[:3]), (True, arrays)):
        program = programs.get((name, shape, backward))
        if program is None:
            continue
        kind = "both" if backward else "forward"
        if isinstance(program, str):
            row[f"{kind}_failed"] = program
            continue
        results = program(*operands) if backward else (program(*operands),)
        with jax.enable_x64(True):
            errors = {
                x: float(jnp.linalg.norm(y[0, :, 0].astype(jnp.float64) - want[x]) / jnp.linalg.norm(want[x]))
                for x, y in zip(want, results, strict=False)
            }
        row |= {f"{kind}_error": errors}
        if not max(errors.values()) < TOLERANCE:
            continue
        run = functools.partial(program, *operands)
        times |= {f"{kind}_kernel_ms": kernel_ms(run), f"{kind}_wall_ms": wall_ms(run)}
    row |= times
    flops = 4.0 * TOKENS * shape.t * WIDTH / (2 if shape.causal else 1)
    if "forward_kernel_ms" in times:
        row["forward_tflops"] = flops / times["forward_kernel_ms"] / 1e9
        if "both_kernel_ms" in times:
            row["backward_kernel_ms"] = times["both_kernel_ms"] - times["forward_kernel_ms"]
            row["backward_tflops"] = 2.5 * flops / row["backward_kernel_ms"] / 1e9
    print_row(row)
    return row


def print_row(row: dict[str, Any]) -> None:
    numbers = [f"{key} {row[key]:.0f}" for key in ("forward_tflops", "backward_tflops") if key in row]
    numbers += [f"{key} {x:.3f}" for key, x in row.items() if key.endswith("_ms")]
    numbers += [f"{key} {max(x.values()):.1e}" for key, x in row.items() if key.endswith("_error")]
    numbers += [x for key, x in row.items() if key.endswith("_failed")]
    print(f"d{row['d']} t{row['t']} {'causal' if row['causal'] else 'full  '} {row['contestant']:10s}", *numbers, flush=True)


def main() -> None:
    quick = "--quick" in sys.argv
    shapes = [
        Shape(d, t, causal) for d in (64, 128) for t in ((16384,) if quick else (2048, 16384)) for causal in (True, False)
    ]
    entries = [
        (name, shape, backward)
        for shape in shapes
        for name in list(CONTESTANTS)[: 2 if quick else None]
        for backward in (False, True)
        if enters(name, shape, backward)
    ]
    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
        programs = dict(zip(entries, pool.map(lambda entry: compiled(*entry), entries), strict=True))
    rows = []
    for shape in shapes:
        want = exact(shape)
        rows += [measure(name, shape, programs, want) for name in dict.fromkeys(x[0] for x in entries if x[1] == shape)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit}
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
