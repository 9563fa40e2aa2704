"""Times scaled dot-product attention on one GPU against PyTorch's: ours, cuDNN, flash, memory-efficient.

    python benchmarks/gpu_sdpa.py OUT.json [--quick]            b·t = 16384 tokens, h·d = 2048, bfloat16, causal and full
    python benchmarks/gpu_sdpa.py --diffusion OUT.json          b = 2, h = 8, d = 64: 4096 queries on 77 keys and on themselves

Forward alone, forward that keeps what backward needs ("training"), and backward, through `torch.autograd.grad`; medians of CUDA
events around calls that start with a cold second-level cache. A contestant whose output is wrong (float64 on the last 64
rows of one head, bound 3e-3), or whose dq is (the same rows, 4e-3), has no time.
"""

from __future__ import annotations

import functools
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, ".")
from torch_power.sdpa import scaled_dot_product_attention as ours

TOKENS, WIDTH, ROWS = 16384, 2048, 64
Attention = Callable[..., torch.Tensor]


@functools.cache
def cold_cache() -> torch.Tensor:
    return torch.empty(2**26, dtype=torch.int8, device="cuda")


def median(run: Callable[[], Any], repeats: int) -> float:
    """Median milliseconds of one run."""
    run()
    pairs = []
    for _ in range(repeats):
        cold_cache().zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        pairs.append((begin, end))
    torch.cuda.synchronize()
    return sorted(begin.elapsed_time(end) for begin, end in pairs)[repeats // 2]


def pytorch(backend: SDPBackend) -> Attention:
    def attention(q, k, v, causal):
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    return attention


def naive(q, k, v, causal):
    """What it was before fused kernels: the matrix of weights in memory."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1), -torch.inf)
    return torch.softmax(scores, -1) @ v


CONTESTANTS: dict[str, Attention] = {
    "torch_power": lambda q, k, v, causal: ours(q, k, v, is_causal=causal, implementation="cuda"),
    "cudnn": pytorch(SDPBackend.CUDNN_ATTENTION),
    "flash": pytorch(SDPBackend.FLASH_ATTENTION),
    "memory-efficient": pytorch(SDPBackend.EFFICIENT_ATTENTION),
}


def exact_rows(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """y and dq of the last 64 rows of the first head, in float64."""
    t = q.shape[2]
    rows, k, v, dy = q[0, 0, -ROWS:].double(), k[0, 0].double(), v[0, 0].double(), dy[0, 0, -ROWS:].double()
    scores = rows @ k.T * q.shape[-1] ** -0.5
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(t - ROWS + 1), -torch.inf)
    weights = torch.softmax(scores, -1)
    y, dweights = weights @ v, dy @ v.T
    dscores = weights * (dweights - (dy * y).sum(-1, keepdim=True))
    return y, dscores @ k * q.shape[-1] ** -0.5


def error(x: torch.Tensor, want: torch.Tensor) -> float:
    return ((x[0, 0, -ROWS:].double() - want).norm() / want.norm()).item()


def measure(attention: Attention, arrays: list[torch.Tensor], causal: bool, repeats: int) -> dict[str, Any]:
    """Milliseconds forward and backward and the two errors of one contestant."""
    q, k, v, dy = arrays
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attention(*leaves, causal)
    dq, *_ = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    y_exact, dq_exact = exact_rows(q, k, v, dy, causal)
    row: dict[str, Any] = {"error_y": error(y, y_exact), "error_dq": error(dq, dq_exact)}
    row |= dict.fromkeys(("forward_ms", "training_ms", "backward_ms"))
    if not (row["error_y"] < 3e-3 and row["error_dq"] < 4e-3):
        return row
    with torch.no_grad():
        row["forward_ms"] = median(lambda: attention(q, k, v, causal), repeats)
    row["training_ms"] = median(lambda: attention(*leaves, causal), repeats)
    row["backward_ms"] = median(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True), repeats)
    return row


def say(where: str, name: str, row: dict[str, Any], flops: float) -> None:
    if row["forward_ms"] is None:
        print(f"{where} {name:24s} WRONG or absent: {row}", flush=True)
        return
    forward, backward = row["forward_ms"], row["backward_ms"]
    row |= {"forward_tflops": flops / forward / 1e9, "backward_tflops": 2.5 * flops / backward / 1e9}
    print(
        f"{where} {name:24s} forward {forward:7.3f} ({row['forward_tflops']:4.0f})  backward {backward:7.3f} "
        f"({row['backward_tflops']:4.0f})  errors {row['error_y']:.1e} {row['error_dq']:.1e}", flush=True,
    )  # fmt: skip


def save(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    """Writes what has been measured so far: a run that is cut short leaves that."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}
    path.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def table(path: pathlib.Path, quick: bool) -> None:
    rows: list[dict[str, Any]] = []
    for d in (64, 128):
        for t in (2048, 16384) if quick else (512, 1024, 2048, 4096, 16384):
            for causal in (True, False):
                torch.manual_seed(0)
                b, h = TOKENS // t, WIDTH // d
                arrays = [torch.randn(b, h, t, d, device="cuda", dtype=torch.bfloat16) for _ in range(4)]
                for name, attention in list(CONTESTANTS.items())[: 2 if quick else None]:
                    row = measure(attention, arrays, causal, 5 if quick or t > 4096 else 9)
                    where = f"d{d} t{t:6d} {'causal' if causal else 'full  '}"
                    say(where, name, row, 4.0 * b * h * t * t * d / (2 if causal else 1))
                    rows.append({"contestant": name, "b": b, "t": t, "h": h, "d": d, "causal": causal, **row})
                save(path, rows)


def diffusion(path: pathlib.Path) -> None:
    """A U-Net's attention at 64 × 64 latents: on the 77 tokens of a prompt, and on itself; as is and through torch.compile."""
    rows: list[dict[str, Any]] = []
    b, h, t, d = 2, 8, 4096, 64
    for compiled in (False, True):
        for name, s in (("cross", 77), ("self", 4096)):
            torch.manual_seed(0)
            arrays = [torch.randn(b, h, n, d, device="cuda", dtype=torch.bfloat16) for n in (t, s, s, t)]
            for contestant, attention in {"naive": naive, **CONTESTANTS}.items():
                function = torch.compile(attention) if compiled else attention
                call = {"contestant": contestant, "compiled": compiled, "b": b, "t": t, "s": s, "h": h, "d": d}
                try:
                    row = measure(function, arrays, False, 20)
                except RuntimeError as reason:  # a backend that refuses the call is a result, too
                    print(f"{name:5s} {contestant}: {reason}", flush=True)
                    rows.append(call | {"refused": str(reason)})
                    continue
                say(f"{name:5s}", contestant + (" compiled" if compiled else ""), row, 4.0 * b * h * t * s * d)
                rows.append(call | row)
                save(path, rows)


def main() -> None:
    path = pathlib.Path(next(x for x in sys.argv[1:] if not x.startswith("--")))
    if "--diffusion" in sys.argv:
        diffusion(path)
    else:
        table(path, "--quick" in sys.argv)


if __name__ == "__main__":
    main()
