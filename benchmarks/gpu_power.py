"""Times the chunked kernels on one GPU, beside softmax attention in the same run.

    python benchmarks/gpu_power.py OUT.json [--quick]

h = 8, bfloat16, p = 2, gates on: forward and backward through the raw interface of implementation "cuda", and
`F.scaled_dot_product_attention` with cuDNN and with flash attention on the same q, k, v (softmax has no gates). Medians of
CUDA events; peak memory counts inputs, gradients and workspaces. A contestant whose result is wrong (against float64 on 64
rows of one head) has no time.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, ".")
from bridge import spec
from torch_power.cuda import power

ROWS = 64


class Arrays(NamedTuple):
    """q, k, v, dy [b, t, h, d], log_g [b, t, h]."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor
    log_g: torch.Tensor


def median(run: Callable[[], Any], repeats: int = 15) -> float:
    """Median milliseconds of one run, after three."""
    times = []
    for i in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) if i >= 3 else None)
    return sorted(time for time in times if time is not None)[repeats // 2]


def last_rows(x: Arrays, weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """The last 64 rows of head 0 of batch 0 in float64, from `weight(scores, log decay)`."""
    t = x.q.shape[1]
    score = x.q[0, -ROWS:, 0].double() @ x.k[0, :, 0].double().T * x.q.shape[-1] ** -0.5
    sums = x.log_g[0, :, 0].double().cumsum(0)
    hidden = torch.ones_like(score, dtype=torch.bool).triu(t - ROWS + 1)
    w = weight(score, sums[-ROWS:, None] - sums).masked_fill(hidden, 0.0)
    return w @ x.v[0, :, 0].double() / w.sum(-1, keepdim=True)


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def chunked(x: Arrays) -> dict[str, float]:
    """Milliseconds of forward and backward, and the error of y."""
    inputs = (x.q, x.k, x.v, x.log_g, None, None)
    call = spec.check_power(x.q, x.k, x.v, x.log_g, deg=2, form="chunked")
    y, norm, *_ = power.forward(call, *inputs)
    return {
        "error": error(y[0, -ROWS:, 0], last_rows(x, lambda score, decay: score**2 * decay.exp())),
        "forward_ms": median(lambda: power.forward(call, *inputs)),
        "backward_ms": median(lambda: power.backward(call, *inputs, y, norm, x.dy, None, None)),
    }


def softmax(x: Arrays, backend: SDPBackend) -> dict[str, float]:
    """The same of F.scaled_dot_product_attention, on its own layout [b, h, t, d]."""
    q, k, v, dy = (array.transpose(1, 2).contiguous() for array in x[:4])
    q, k, v = (array.requires_grad_() for array in (q, k, v))
    repeats = 5 if q.shape[2] > 32768 else 15
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        with torch.no_grad():
            forward = median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True), repeats)
        backward = median(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), repeats)
    want = last_rows(x, lambda score, _: score.exp())
    return {"error": error(y[0, 0, -ROWS:], want), "forward_ms": forward, "backward_ms": backward}


CONTESTANTS: dict[str, Callable[[Arrays], dict[str, float]]] = {
    "power chunked": chunked,
    "cudnn": lambda x: softmax(x, SDPBackend.CUDNN_ATTENTION),
    "flash": lambda x: softmax(x, SDPBackend.FLASH_ATTENTION),
}


def measure(name: str, b: int, t: int, h: int, d: int) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    q, k, v, dy = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    log_g = F.logsigmoid(torch.randn(b, t, h, device="cuda") + 3)
    row: dict[str, Any] = {"contestant": name, "b": b, "t": t, "h": h, "d": d} | CONTESTANTS[name](Arrays(q, k, v, dy, log_g))
    row["peak_mib"] = torch.cuda.max_memory_allocated() / 2**20
    where = f"b{b} t{t:7d} h{h:3d} d{d:3d} {name:14s}"
    if not row["error"] < 1e-2:
        print(f"{where} WRONG: error {row['error']}", flush=True)
        return row | {"forward_ms": None, "backward_ms": None}
    f, g = row["forward_ms"], row["backward_ms"]
    print(
        f"{where} forward {f:8.3f}  backward {g:8.3f}  both {f + g:8.3f}"
        f"  error {row['error']:.1e}  peak {row['peak_mib']:.0f} MiB",
        flush=True,
    )
    return row


def main() -> None:
    lengths = (16384, 65536) if "--quick" in sys.argv else (4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
    rows = []
    for d in (64, 128):
        for t in lengths:
            names = list(CONTESTANTS)[: 2 if t > 16384 else None]
            if t > 131072:
                names = names[:1]  # softmax takes seconds there
            rows += [measure(name, 1, t, 8, d) for name in names if not (d == 128 and t > 262144)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
