"""Times JAX's scaled dot-product attentions on one GPU: ours in Pallas, cuDNN's, and the Pallas kernel that ships with JAX.

    python -m benchmarks.gpu_sdpa_jax OUT.json [CELL ...]

b·t = 16384 tokens, h·d = 2048, bfloat16 (float16 for JAX's Pallas kernel, which takes no other). A cell is "t,d,mask", for
example "16384,64,causal"; without any, all are run. Each contestant is one compiled program forward and one for the gradients
of a forward pass that has been kept. `kernel_ms` is the time of all kernels of a program by CUPTI, `wall_ms` that of calls
issued one after the other; medians. A contestant whose y or gradients are wrong (one head, against float64) has no time.
"""

from __future__ import annotations

import functools
import os
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental.mosaic.gpu import profiler

from benchmarks import gpu
from benchmarks.gpu_pallas import wall_ms
from benchmarks.run import commit
from jax_power import dot_product_attention

TOKENS, WIDTH = 16384, 2048
# Wrong by more than this, and a contestant has no time: all compute in 16 bits, with errors of 2 to 7e-3.
TOLERANCE = 1e-2
# Programs that are compiled at once. Most of a Pallas kernel's compilation is Python, which is one thread's at a time.
COMPILING = 8
Attention = Callable[[Array, Array, Array], Array]


class Cell(NamedTuple):
    """One shape of the table."""

    t: int
    d: int
    mask: str

    @property
    def causal(self) -> bool:
        return self.mask == "causal"

    def shape(self) -> tuple[int, int, int, int]:
        """`[b, t, h, d]`."""
        return TOKENS // self.t, self.t, WIDTH // self.d, self.d


CELLS = [Cell(t, d, mask) for t in (2048, 4096, 16384) for d in (64, 128) for mask in ("causal", "full")]


def ours(cell: Cell) -> Attention:
    return lambda q, k, v: dot_product_attention(q, k, v, is_causal=cell.causal, implementation="mosaic_gpu")


def cudnn(cell: Cell) -> Attention:
    return lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=cell.causal, implementation="cudnn")


def jax_pallas(cell: Cell) -> Attention:
    """Tiles as in its own benchmark and tests; it leaves the scale to its caller."""
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    backward: dict[str, Any] = dict.fromkeys(("block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), 64)
    config = attention_mgpu.TuningConfig(
        block_q=64, block_kv=128, max_concurrent_steps=2, causal=cell.causal, compute_wgs_bwd=2, **backward
    )
    return lambda q, k, v: attention_mgpu.attention(q * jnp.asarray(cell.d**-0.5, q.dtype), k, v, config)


CONTESTANTS: dict[str, Callable[[Cell], Attention]] = {"ours": ours, "cudnn": cudnn, "jax pallas": jax_pallas}


def inputs(cell: Cell, dtype: Any) -> list[Array]:
    """Random q, k, v and dy, the same numbers for all contestants: those of bfloat16, which float16 holds."""
    return [jax.random.normal(key, cell.shape(), jnp.bfloat16).astype(dtype) for key in jax.random.split(jax.random.key(0), 4)]


class Entry(NamedTuple):
    """A contestant in a cell, compiled. `backward` takes what `keep` returns beside y; None: it has no backward pass."""

    forward: Any
    keep: Any
    backward: Any
    compile_s: float


def prepare(name: str, cell: Cell) -> Entry | str:
    """The entry, or the text of the exception instead: a contestant that cannot is part of the result."""
    attend = CONTESTANTS[name](cell)
    x = jax.ShapeDtypeStruct(cell.shape(), jnp.float16 if name == "jax pallas" else jnp.bfloat16)
    start = time.perf_counter()
    try:
        forward = jax.jit(attend).lower(x, x, x).compile()
        if name == "jax pallas" and cell.causal:  # its backward pass has no causal mask
            return Entry(forward, None, None, time.perf_counter() - start)
        lowered = jax.jit(functools.partial(jax.vjp, attend)).lower(x, x, x)
        pull_back = lowered.out_info[1]
        backward = jax.jit(lambda pull_back, dy: pull_back(dy)).lower(pull_back, x).compile()
        return Entry(forward, lowered.compile(), backward, time.perf_counter() - start)
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:200]}"


def exact(cell: Cell) -> Any:
    """y, dq, dk, dv of a head `[t, ·]` from its q, k, v, dy, in float64, compiled."""

    def attention(q: Array, k: Array, v: Array) -> Array:
        score = q @ k.T * cell.d**-0.5
        hidden = jnp.arange(cell.t) > jnp.arange(cell.t)[:, None]
        return jax.nn.softmax(jnp.where(hidden & cell.causal, -jnp.inf, score)) @ v

    def both(q: Array, k: Array, v: Array, dy: Array) -> tuple[Array, ...]:
        y, pull_back = jax.vjp(attention, *(x.astype(jnp.float64) for x in (q, k, v)))
        return y, *pull_back(dy.astype(jnp.float64))

    with jax.enable_x64(True):
        head = jax.ShapeDtypeStruct((cell.t, cell.d), jnp.bfloat16)
        return jax.jit(both).lower(head, head, head, head).compile()


def first_head(x: Array) -> Array:
    return x[0, :, 0]


def errors(results: tuple[Array, ...], want: tuple[Array, ...]) -> dict[str, float]:
    """Relative error of each result on the first head."""
    with jax.enable_x64(True):
        pairs = [(first_head(x).astype(jnp.float64), y) for x, y in zip(results, want, strict=False)]
        found = [float(jnp.linalg.norm(x - y) / jnp.linalg.norm(y)) for x, y in pairs]
    return dict(zip(("y", "dq", "dk", "dv"), found, strict=False))


def kernel_ms(program: Any, *arrays: Any) -> float:
    cupti: Any = profiler.Cupti  # `finalize` came with JAX 0.11
    runs = cupti(finalize=False).measure(program, aggregate=True, iterations=7)(*arrays)[1]
    return float(statistics.median(runs))


def measure(name: str, cell: Cell, entry: Entry | str, want: tuple[Array, ...]) -> dict[str, Any]:
    """One row of the result: a contestant in a cell."""
    b, _, h, _ = cell.shape()
    row: dict[str, Any] = {"contestant": name, "b": b, "h": h, **cell._asdict()}
    if isinstance(entry, str):
        return row | {"failed": entry}
    *qkv, dy = inputs(cell, jnp.float16 if name == "jax pallas" else jnp.bfloat16)
    row["error"] = errors((entry.forward(*qkv),), want)
    if entry.backward is not None:
        y, pull_back = entry.keep(*qkv)
        row["error"] = errors((y, *entry.backward(pull_back, dy)), want)
    row["compile_s"] = entry.compile_s
    if not max(row["error"].values()) < TOLERANCE:
        return row
    flops = 4.0 * TOKENS * cell.t * WIDTH / (2 if cell.causal else 1)
    calls: dict[str, tuple[Any, Any, float]] = {"forward": (entry.forward, qkv, flops)}
    if entry.backward is not None:
        calls["backward"] = (entry.backward, (pull_back, dy), 2.5 * flops)
    for kind, (program, arrays, flops) in calls.items():
        row[f"{kind}_wall_ms"] = wall_ms(functools.partial(program, *arrays))
        row[f"{kind}_kernel_ms"] = kernel_ms(program, *arrays)
        row[f"{kind}_tflops"] = flops / row[f"{kind}_kernel_ms"] / 1e9
    return row


def told(row: dict[str, Any]) -> str:
    numbers = [f"{key} {row[key]:.3f}" for key in row if key.endswith(("_ms", "_s"))]
    numbers += [f"{key} {row[key]:.0f}" for key in row if key.endswith("_tflops")]
    numbers += [f"{key} {x:.1e}" for key, x in row.get("error", {}).items()]
    return " ".join((f"{row['t']},{row['d']},{row['mask']} {row['contestant']}:", *numbers, row.get("failed", "")))


def main() -> None:
    out, *chosen = sys.argv[1:]
    cells = [cell for cell in CELLS if not chosen or f"{cell.t},{cell.d},{cell.mask}" in chosen]
    about = {"device": jax.devices()[0].device_kind, "jax": jax.__version__, "commit": commit()}
    rows: list[dict[str, Any]] = []
    with ThreadPoolExecutor(COMPILING) as pool:
        exacts = {cell: pool.submit(exact, cell) for cell in cells}
        entries = {(name, cell): pool.submit(prepare, name, cell) for cell in cells for name in CONTESTANTS}
        for future in (*exacts.values(), *entries.values()):  # nothing compiles while something is timed
            future.result()
    for cell in cells:
        want = exacts[cell].result()(*(first_head(x) for x in inputs(cell, jnp.bfloat16)))
        for name in CONTESTANTS:
            rows.append(measure(name, cell, entries[name, cell].result(), want))
            print(told(rows[-1]), flush=True)
            gpu.save(pathlib.Path(out), {"about": about, "rows": rows})


if __name__ == "__main__":
    main()
