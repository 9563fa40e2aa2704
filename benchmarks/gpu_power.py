"""Times power attention on one GPU, beside softmax attention and the peer in the same run.

    python -m benchmarks.gpu_power OUT.json [--lengths 65536 …] [--sizes 64 128] [--contestants power cudnn …]

bfloat16, p = 2, gates on, h = 8, b·t = max(t, 16384) tokens: `power` is the public function with the form that it chooses,
`power chunked` and `power attention` say which; `eager` is the portable implementation; cuDNN and flash attention are
`F.scaled_dot_product_attention` on the same q, k, v (softmax has no gates). `retention` takes part where it is installed; its
first call tunes for a minute.

How times, memory and errors are taken: benchmarks/gpu.py. `*_fraction` is of the matrix units' measured 790 TFLOP/s, by the
operations that the algorithm cannot do without. The file ends with a summary: the ratios that matter. About 90 s.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import torch_power
from benchmarks import gpu
from bridge import spec

HEADS, TOKENS, FLAGSHIP, LONGEST = 8, 16384, 65536, 1048576
# What matters most first: a run that is cut short has it.
LENGTHS = (FLAGSHIP, 16384, 8192, 4096, 2048, 1024, 512, 32768, 131072, LONGEST, 262144)
# Shortest and longest t of each contestant. Above 262144 softmax attention takes seconds, and d = 128 does not fit into memory;
# `eager` takes 1 to 6 s at 65536. Forms are compared around their crossing. retention's chunks have 1024 tokens.
RANGES = {
    "power": (0, LONGEST), "power chunked": (4096, 131072), "power attention": (4096, 16384), "eager": (0, 16384),
    "cudnn": (0, 262144), "flash": (0, 262144), "retention": (16384, 262144),
}  # fmt: skip
LONGEST_WIDE = 262144


def retention(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    from retention.triton import power_retention

    return power_retention(q, k, v, log_g, deg=2, scale=q.shape[-1] ** -0.5, chunk_size=min(1024, q.shape[1]))


def contestants() -> dict[str, gpu.Contestant]:
    """By name; `retention` where it is installed."""
    attend, weight = torch_power.power_attention, gpu.power_weight(2)
    table = {
        name: gpu.Contestant(functools.partial(attend, implementation="cuda", form=form), weight)
        for name, form in (("power", "auto"), ("power chunked", "chunked"), ("power attention", "attention"))
    }
    table["eager"] = gpu.Contestant(functools.partial(attend, implementation="eager"), weight)
    for name in ("cudnn", "flash"):
        table[name] = gpu.heads_first(gpu.PYTORCH[name], ours=False, is_causal=True)
    if importlib.util.find_spec("retention"):
        table["retention"] = gpu.Contestant(retention, weight, ours=False)
    return table


def chunk_length(name: str, t: int, d: int) -> int:
    """Tokens of a chunk: retention's as it is called here, the CUDA kernels' (csrc/power/tiles.h) for e = d, bfloat16."""
    if name == "retention":
        return min(1024, t)
    if d <= 64:
        return 768
    return next(length for length, below in ((256, 257), (512, 1025), (1024, 16384), (2048, t + 1)) if t < below)


def operations(name: str, b: int, t: int, d: int) -> tuple[float, float]:
    """Floating-point operations of forward and of both passes.

    Attention: two causal products forward, five more backward. Chunked: two products with a state forward, four more
    backward; inside a chunk, two and five.
    """
    product = float(b * HEADS * t**2 * d)
    state, inside = 2.0 * b * t * HEADS * spec.state_rows(d, 2) * d, float(chunk_length(name, t, d)) * b * t * HEADS * d
    attention, chunked = (2 * product, 7 * product), (2 * state + 2 * inside, 6 * state + 7 * inside)
    if name in ("power", "eager"):
        return min(attention, chunked)
    return chunked if name in ("power chunked", "retention") else attention


def takes_part(name: str, t: int, d: int) -> bool:
    """Whether a contestant is timed at this length."""
    shortest, longest = RANGES[name]
    if d != 64 and (name == "retention" or t > LONGEST_WIDE):  # retention's authors leave d = 128 out of their benchmark
        return False
    return shortest <= t <= longest


def measure(name: str, b: int, t: int, d: int) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    torch.cuda.empty_cache()
    contestant = contestants()[name]
    row: dict[str, Any] = {"contestant": name, "b": b, "t": t, "h": HEADS, "d": d}
    row |= gpu.measure(contestant, gpu.make(contestant, b, t, HEADS, d, gates=True))
    for pass_, count in zip(("forward", "both"), operations(name, b, t, d), strict=True):
        time = row[f"{pass_}_ms"]
        row[f"{pass_}_fraction"] = None if time is None else count / (time / 1e3) / gpu.CEILING
    print(f"b{b:3d} t{t:8d} d{d:4d} {name:15s} {gpu.line(row)}", flush=True)
    return row


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each length and head size: how many times faster `power` is than each of the others, forward and both passes.

    Then the flagship's memory, and the time a token at the longest length relative to the flagship's.
    """
    timed = {(row["contestant"], row["d"], row["t"]): row for row in rows if row["forward_ms"] is not None}
    found: list[dict[str, Any]] = []
    for d, t in sorted({(row["d"], row["t"]) for row in rows}):
        ours = timed.get(("power", d, t))
        others = {name: timed[name, d, t] for name in ("cudnn", "flash", "retention", "eager") if (name, d, t) in timed}
        if ours is None or not others:
            continue
        ratios = {
            f"{name}_{pass_}": row[f"{pass_}_ms"] / ours[f"{pass_}_ms"]
            for name, row in others.items()
            for pass_ in ("forward", "both")
        }
        found.append({"d": d, "t": t, "times_faster_than": ratios})
    flagship, longest = (timed.get(("power", 64, t)) for t in (FLAGSHIP, LONGEST))
    if flagship is not None:
        found.append({"d": 64, "t": FLAGSHIP, "peak_mib": flagship["peak_mib"]})
        if longest is not None:
            grown = {
                pass_: longest[f"{pass_}_ms"] / flagship[f"{pass_}_ms"] * FLAGSHIP / LONGEST for pass_ in ("forward", "both")
            }
            found.append({"d": 64, "t": LONGEST, "time_a_token_relative_to_flagship": grown})
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sizes", type=int, nargs="+", default=(64, 128), choices=(64, 128))
    parser.add_argument("--contestants", nargs="+", default=list(contestants()), choices=list(contestants()))
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for t in options.lengths:
        for d in options.sizes:
            for name in options.contestants:
                if takes_part(name, t, d):
                    rows.append(measure(name, max(1, TOKENS // t), t, d))
                    rows.sort(key=lambda row: (row["d"], row["t"]))
                    gpu.save(options.output, {"about": gpu.about(), "rows": rows, "summary": summary(rows)})


if __name__ == "__main__":
    main()
