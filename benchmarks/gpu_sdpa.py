"""Times scaled dot-product attention on one GPU against PyTorch's: ours, cuDNN, flash, memory-efficient.

    python -m benchmarks.gpu_sdpa OUT.json [--quick]            b·t = 16384 tokens, h·d = 2048, bfloat16, causal and full
    python -m benchmarks.gpu_sdpa --diffusion OUT.json          b = 2, h = 8, d = 64: 4096 queries on 77 keys and on themselves

How times, memory and errors are taken: benchmarks/gpu.py. The first table says of every cell of ours whether it reaches its bar
(`BARS`), and where it does not, `why`: what the host adds to the kernels' time, or the kernels' own times beside cuDNN's.
The diffusion table has every contestant as it is and through `torch.compile`.
"""

from __future__ import annotations

import functools
import pathlib
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks import gpu
from torch_power.sdpa import scaled_dot_product_attention as ours

TOKENS, WIDTH = 16384, 2048
# The least ratio of a peer's time to ours, by pass and head size.
BARS = {
    "cudnn": {("forward", 64): 1.0, ("forward", 128): 0.95, ("backward", 64): 0.9, ("backward", 128): 0.9},
    "flash": {("forward", 64): 1.3, ("forward", 128): 1.3, ("backward", 64): 1.3, ("backward", 128): 1.3},
}

FUSED: dict[str, Callable[..., Tensor]] = {"torch_power": functools.partial(ours, implementation="cuda"), **gpu.PYTORCH}


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What it was before fused kernels: the matrix of weights in memory."""
    return torch.softmax(q @ k.mT * q.shape[-1] ** -0.5, -1) @ v


def make(contestant: gpu.Contestant, shape: Mapping[str, Any]) -> gpu.Arrays:
    torch.cuda.empty_cache()
    return gpu.make(contestant, shape["b"], shape["t"], shape["h"], shape["d"], t_kv=shape["s"])


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def time_of(row: Mapping[str, Any], pass_: str, column: str) -> float | None:
    """Milliseconds of a pass, as called ("ms") or of its kernels alone ("graph_ms"); backward is both passes less forward."""
    forward, both = row[f"forward_{column}"], row[f"both_{column}"]
    if pass_ == "forward":
        return forward
    return None if both is None or forward is None else both - forward


def judge(mine: Mapping[str, Any], peers: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For each bar: how many times faster ours is, as called and the kernels alone, and whether it is reached."""
    found = []
    for peer in BARS.keys() & peers.keys():
        for (pass_, d), bar in BARS[peer].items():
            if d != mine["d"]:
                continue
            judged: dict[str, Any] = {"peer": peer, "pass": pass_, "bar": bar}
            for column, name in (("ms", "ratio"), ("graph_ms", "kernels_ratio")):
                own, theirs = time_of(mine, pass_, column), time_of(peers[peer], pass_, column)
                judged[name] = theirs / own if own and theirs else None
            found.append(judged | {"reached": judged["ratio"] is not None and judged["ratio"] >= bar})
    return sorted(found, key=lambda judged: (judged["peer"], judged["pass"]))


def why(judged: Mapping[str, Any], mine: Mapping[str, Any], profile: Mapping[str, list[dict[str, Any]]]) -> str:
    """The measured reason of a cell below its bar."""
    if judged["ratio"] is None:
        return f"not timed: {mine['reason']}"
    alone, called = time_of(mine, judged["pass"], "graph_ms"), time_of(mine, judged["pass"], "ms")
    if judged["kernels_ratio"] is not None and judged["kernels_ratio"] >= judged["bar"]:
        return (
            f"the host: {called:.3f} ms as called, {alone:.3f} ms of kernels, which alone reach {judged['kernels_ratio']:.2f}"
        )

    def listed(name: str) -> str:
        times: dict[str, float] = {}
        for kernel in profile[name]:
            short = kernel["name"].removeprefix("void ").split("<")[0].split("(")[0].split("::")[-1][:60]
            times[short] = times.get(short, 0.0) + kernel["ms"]
        return ", ".join(f"{short} {ms:.3f}" for short, ms in times.items() if ms > 0.01 * sum(times.values()))

    return f"kernels of both passes, ms: {listed('torch_power')}; {judged['peer']}: {listed(judged['peer'])}"


def profile(name: str, x: gpu.Arrays, causal: bool) -> list[dict[str, Any]]:
    """The kernels of forward and backward."""
    attend = gpu.heads_first(FUSED[name], ours=True, is_causal=causal).attend
    return gpu.kernels(lambda: torch.autograd.grad(attend(x.q, x.k, x.v, None), x.leaves(), x.dy))


def cell(shape: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of one shape, ours with what became of its bars."""
    found: dict[str, dict[str, Any]] = {}
    where = f"d{shape['d']:4d} t{shape['t']:6d} {'causal' if shape['causal'] else 'full  '}"
    product = 2.0 * TOKENS * shape["t"] * WIDTH / (2 if shape["causal"] else 1)
    contestants = {name: gpu.heads_first(FUSED[name], ours=name == "torch_power", is_causal=shape["causal"]) for name in names}
    x = make(contestants["torch_power"], shape)
    for name, columns in gpu.measure_all(contestants, x, causal=shape["causal"]).items():
        for pass_, products in (("forward", 2), ("backward", 5)):
            ms = columns[f"{pass_}_ms"]
            columns[f"{pass_}_tflops"] = products * product / ms / 1e9 if ms else None
        found[name] = {"contestant": name, **shape, **columns}
        print(f"{where} {name:12s} {gpu.line(columns)}", flush=True)
    mine = found["torch_power"]
    mine["bars"] = judge(mine, found)
    missed = [judged for judged in mine["bars"] if not judged["reached"]]
    named = {"torch_power", *(judged["peer"] for judged in missed)} if missed else set()
    profiles = {name: profile(name, x, shape["causal"]) for name in named}
    for judged in missed:
        judged["why"] = why(judged, mine, profiles)
        print(
            f"    {judged['pass']} {judged['ratio'] or 0:.2f} of {judged['peer']}, bar {judged['bar']}: {judged['why']}",
            flush=True,
        )
    return list(found.values())


def table(path: pathlib.Path, quick: bool) -> None:
    rows: list[dict[str, Any]] = []
    for d in (64, 128):
        for t in (2048, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (True, False):
                shape = {"b": TOKENS // t, "t": t, "s": t, "h": WIDTH // d, "d": d, "causal": causal}
                rows += cell(shape, list(FUSED)[: 2 if quick else 3])
                gpu.save(path, {"about": gpu.about(), "rows": rows})


# ---------------------------------------------------------------------------------------------------------------------
# Diffusion
# ---------------------------------------------------------------------------------------------------------------------


def through_compile(attention: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
    """`attention` as a compiled function whose code is its own: torch.compile gives up after eight versions of the same
    code, and looks through them at each call."""

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v)

    code = call.__code__.replace(co_name=name)
    return torch.compile(types.FunctionType(code, call.__globals__, name, None, call.__closure__), dynamic=False)


def diffusion(path: pathlib.Path) -> None:
    """A U-Net's attention at 64 × 64 latents: on the 77 tokens of a prompt, and on itself; as is and through torch.compile."""
    rows: list[dict[str, Any]] = []
    for compiled in (False, True):
        for workload, s in (("cross", 77), ("self", 4096)):
            shape = {"b": 2, "t": 4096, "s": s, "h": 8, "d": 64, "causal": False}
            contestants = {}
            for name, attention in {"naive": naive, **FUSED}.items():
                function = through_compile(attention, f"{name}_{workload}") if compiled else attention
                contestants[name] = gpu.heads_first(function, ours=name == "torch_power")
            x = make(contestants["torch_power"], shape)
            for name, columns in gpu.measure_all(contestants, x, causal=False).items():
                rows.append({"workload": workload, "contestant": name, "compiled": compiled, **shape, **columns})
                print(f"{workload:5s} {name:16s} {'compiled' if compiled else 'as is   '} {gpu.line(columns)}", flush=True)
            gpu.save(path, {"about": gpu.about(), "rows": rows})


def main() -> None:
    path = pathlib.Path(next(x for x in sys.argv[1:] if not x.startswith("--")))
    if "--diffusion" in sys.argv:
        diffusion(path)
    else:
        table(path, "--quick" in sys.argv)


if __name__ == "__main__":
    main()
