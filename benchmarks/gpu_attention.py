"""Times the attention form of power attention against softmax attention on one GPU.

    python -m benchmarks.gpu_attention OUT.json [--quick | --forms]

b·t = 16384 tokens, h·d = 2048, bfloat16, no gates: the public function, and `F.scaled_dot_product_attention` with cuDNN and
with flash attention, on the same random arrays. Causal at every power of two from 512 to 16384, without a mask, and short
queries against long keys; d = 256 for information (beside flash attention; cuDNN's backward stops at 128). How times and
errors are taken: benchmarks/gpu.py. About 30 s; `--quick` takes degree 2 and cuDNN alone, causal, in 10 s.

`--forms`: the attention form against the chunked one, with gates and without, from which `bridge.hopper.CROSSING` is read;
times alone, 20 s.
"""

from __future__ import annotations

import functools
import pathlib
import sys
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import torch_power
from benchmarks import gpu

TOKENS, WIDTH = 16384, 2048


class Shape(NamedTuple):
    """One line of the result: t queries of each of b·h heads against t_kv keys."""

    b: int
    t: int
    t_kv: int
    h: int
    d: int
    causal: bool


def power(deg: int, causal: bool, q: Tensor, k: Tensor, v: Tensor, log_g: None) -> Tensor:
    return torch_power.power_attention(q, k, v, log_g, deg=deg, causal=causal, form="attention", implementation="cuda")


def contestant(name: str, causal: bool) -> gpu.Contestant:
    if name.startswith("power"):
        deg = int(name[-1])
        return gpu.Contestant(functools.partial(power, deg, causal), gpu.power_weight(deg))
    return gpu.heads_first(gpu.PYTORCH[name], ours=False, is_causal=causal)


def measure(name: str, shape: Shape) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    torch.cuda.empty_cache()
    b, t, t_kv, h, d, causal = shape
    row: dict[str, Any] = {"contestant": name, **shape._asdict()}
    one = contestant(name, causal)
    row |= gpu.measure(one, gpu.make(one, b, t, h, d, t_kv=t_kv), causal=causal)
    if row["forward_ms"] is not None:
        product = 2.0 * b * h * t * t_kv * d / (2 if causal else 1)
        row |= {
            "forward_tflops": 2 * product / row["forward_ms"] / 1e9,
            "backward_tflops": 5 * product / row["backward_ms"] / 1e9,
        }
    print(f"d{d} t{t:6d} keys{t_kv:6d} {'causal' if causal else 'full  '} {name:10s} {gpu.line(row)}", flush=True)
    return row


def rows(quick: bool) -> Iterator[tuple[Shape, str]]:
    """Shapes and contestants, what matters most first."""
    for d in (64, 128):
        for t in (512, 1024, 2048, 4096, 8192, 16384):
            for name in ("power p=2", "cudnn") if quick else ("power p=2", "cudnn", "flash"):
                yield Shape(TOKENS // t, t, t, WIDTH // d, d, True), name
    if quick:
        return
    for d in (64, 128):
        for t, t_kv in ((2048, 2048), (16384, 16384), (1024, 16384)):
            for name in ("power p=2", "cudnn"):
                yield Shape(TOKENS // t_kv, t, t_kv, WIDTH // d, d, False), name
        yield Shape(1, 16384, 16384, WIDTH // d, d, True), "power p=4"
    for t in (512, 4096, 16384):
        for name in ("power p=2", "flash"):
            yield Shape(TOKENS // t, t, t, WIDTH // 256, 256, True), name


def forms() -> Iterator[dict[str, Any]]:
    """Both forms on the same arrays, in turns, 32768 tokens of 1024 numbers: milliseconds, and nanoseconds a token and head."""
    tokens, width, both_forms = 32768, 1024, ("attention", "chunked")
    attend = functools.partial(torch_power.power_attention, deg=2, causal=True, implementation="cuda")
    for d in (64, 128):
        for t in (8192, 4096, 16384, 2048, 32768, 1024):
            for gates in (True, False):
                row: dict[str, Any] = {"b": tokens // t, "t": t, "h": width // d, "d": d, "gates": gates}
                made = {form: gpu.Contestant(functools.partial(attend, form=form), gpu.power_weight(2)) for form in both_forms}
                x = gpu.make(made["attention"], tokens // t, t, width // d, d, gates=gates)
                calls = {
                    f"{form}_{function.__name__}_ms": functools.partial(function, contestant, x)
                    for form, contestant in made.items()
                    for function in (gpu.forward, gpu.both)
                }
                row |= gpu.medians(calls)
                row |= {f"{form}_both_ns": row[f"{form}_both_ms"] * 1e6 / (tokens * width // d) for form in both_forms}
                print({name: round(value, 3) for name, value in row.items()}, flush=True)
                yield row


def main() -> None:
    output = pathlib.Path(next(x for x in sys.argv[1:] if not x.startswith("--")))
    found: list[dict[str, Any]] = []
    all_rows = forms() if "--forms" in sys.argv else (measure(name, shape) for shape, name in rows("--quick" in sys.argv))
    for row in all_rows:
        found.append(row)
        gpu.save(output, {"about": gpu.about(), "rows": found})


if __name__ == "__main__":
    main()
