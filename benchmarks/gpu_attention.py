"""Times the attention form's kernels against softmax attention on one GPU.

    python benchmarks/gpu_attention.py OUT.json [--quick]

b·t = 16384 tokens, h·d = 2048, bfloat16, p = 2, no gates: our forward and backward kernels through the raw interface, and
`F.scaled_dot_product_attention` with cuDNN and with flash attention, on the same random arrays. Medians of CUDA events.
A contestant whose result is wrong (against float64 on the last 64 rows of one head) has no time.
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
from triton.testing import do_bench

sys.path.insert(0, ".")
from bridge import spec
from torch_power.cuda import attention

TOKENS, WIDTH, ROWS = 16384, 2048, 64


def median(run: Callable[[], Any], rep: int) -> float:
    """Median milliseconds of one run."""
    return float(do_bench(run, warmup=rep // 4, rep=rep, return_mode="median"))


def last_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, deg: int | None) -> torch.Tensor:
    """The last 64 rows of head 0 of batch 0 in float64; `deg` None: softmax."""
    t = q.shape[1]
    score = q[0, -ROWS:, 0].double() @ k[0, :, 0].double().T * q.shape[-1] ** -0.5
    hidden = torch.ones_like(score, dtype=torch.bool).triu(t - ROWS + 1) & causal
    weight = score.masked_fill(hidden, -torch.inf).exp() if deg is None else (score**deg).masked_fill(hidden, 0.0)
    return weight @ v[0, :, 0].double() / weight.sum(-1, keepdim=True)


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


class Arrays(NamedTuple):
    """q, k, v, dy [b, t, h, d] and the options that all contestants share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor
    causal: bool
    rep: int


def ours(x: Arrays, deg: int) -> dict[str, float]:
    """Milliseconds of forward and backward, and the error of y."""
    qkv = (x.q, x.k, x.v, None, None, None)
    call = spec.check_power(x.q, x.k, x.v, deg=deg, causal=x.causal, form="attention")
    y, norm, *_ = attention.forward(call, *qkv)
    return {
        "error": error(y[0, -ROWS:, 0], last_rows(x.q, x.k, x.v, x.causal, deg)),
        "forward_ms": median(lambda: attention.forward(call, *qkv), x.rep),
        "backward_ms": median(lambda: attention.backward(call, *qkv, y, norm, x.dy, None, None), x.rep),
    }


def softmax(x: Arrays, backend: SDPBackend) -> dict[str, float]:
    """The same of F.scaled_dot_product_attention, on its own layout [b, h, t, d]."""
    q, k, v, dy = (array.transpose(1, 2).contiguous() for array in x[:4])
    q, k, v = (array.requires_grad_() for array in (q, k, v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.causal)
        with torch.no_grad():
            forward = median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=x.causal), x.rep)
        backward = median(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), x.rep)
    want = last_rows(x.q, x.k, x.v, x.causal, None)
    return {"error": error(y[0, 0, -ROWS:], want), "forward_ms": forward, "backward_ms": backward}


CONTESTANTS: dict[str, Callable[[Arrays], dict[str, float]]] = {
    "power p=2": lambda x: ours(x, 2),
    "cudnn": lambda x: softmax(x, SDPBackend.CUDNN_ATTENTION),
    "power p=4": lambda x: ours(x, 4),
    "flash": lambda x: softmax(x, SDPBackend.FLASH_ATTENTION),
}


def measure(name: str, b: int, t: int, h: int, d: int, causal: bool, rep: int) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    torch.manual_seed(0)
    q, k, v, dy = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
    row: dict[str, Any] = {"contestant": name, "b": b, "t": t, "h": h, "d": d, "causal": causal}
    row |= CONTESTANTS[name](Arrays(q, k, v, dy, causal, rep))
    where = f"d{d} t{t:6d} {'causal' if causal else 'full  '} {name:10s}"
    if not row["error"] < 1e-2:
        print(f"{where} WRONG: error {row['error']}", flush=True)
        return row | {"forward_ms": None, "backward_ms": None}
    flops, f, g = 4.0 * b * h * t * t * d / (2 if causal else 1), row["forward_ms"], row["backward_ms"]
    row |= {"forward_tflops": flops / f / 1e9, "backward_tflops": 2.5 * flops / g / 1e9}
    print(
        f"{where} forward {f:7.3f} ({row['forward_tflops']:4.0f})  backward {g:7.3f} ({row['backward_tflops']:4.0f})"
        f"  both {f + g:7.3f}  error {row['error']:.1e}",
        flush=True,
    )
    return row


def main() -> None:
    quick = "--quick" in sys.argv
    rows = []
    for d in (64, 128):
        for t in (512, 1024, 2048, 4096, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384):
            for causal in (True,) if quick else (True, False):
                for name in list(CONTESTANTS)[: 2 if quick else None]:
                    rows.append(measure(name, TOKENS // t, t, WIDTH // d, d, causal, 30 if quick else 100))
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
