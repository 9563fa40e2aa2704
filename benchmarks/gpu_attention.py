"""Times the attention form's kernels against softmax attention on one GPU: python benchmarks/gpu_attention.py OUT.json [--quick].

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
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

sys.path.insert(0, ".")
from bridge import spec  # noqa: E402
from torch_power.cuda import attention  # noqa: E402

TOKENS, WIDTH, ROWS = 16384, 2048, 64


def median(run: Callable[[], Any], rep: int) -> float:
    """Median milliseconds of one run."""
    return float(do_bench(run, warmup=rep // 4, rep=rep, return_mode="median"))


def last_rows(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, deg: int | None) -> torch.Tensor:
    """The last 64 rows of head 0 of batch 0 in float64; `deg` None: softmax."""
    t = q.shape[1]
    score = q[0, -ROWS:, 0].double() @ k[0, :, 0].double().T * q.shape[-1] ** -0.5
    hidden = torch.ones_like(score, dtype=torch.bool).triu(t - ROWS + 1) if causal else torch.zeros_like(score, dtype=torch.bool)
    weight = score.masked_fill(hidden, -torch.inf).exp() if deg is None else (score**deg).masked_fill(hidden, 0.0)
    return weight @ v[0, :, 0].double() / weight.sum(-1, keepdim=True)


def error(y: torch.Tensor, want: torch.Tensor) -> float:
    return ((y.double() - want).norm() / want.norm()).item()


def ours(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, causal: bool, deg: int, rep: int) -> dict[str, float]:
    """Milliseconds of forward and backward, and the error of y."""
    call = spec.check_power(q, k, v, deg=deg, causal=causal, form="attention")
    y, norm, *_ = attention.forward(call, q, k, v, None, None, None)
    return {
        "error": error(y[0, -ROWS:, 0], last_rows(q, k, v, causal, deg)),
        "forward_ms": median(lambda: attention.forward(call, q, k, v, None, None, None), rep),
        "backward_ms": median(lambda: attention.backward(call, q, k, v, None, None, None, y, norm, dy, None, None), rep),
    }


def softmax(backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, dy: torch.Tensor, causal: bool, rep: int) -> dict[str, float]:
    """The same of F.scaled_dot_product_attention, on its own layout [b, h, t, d]."""
    want = last_rows(q, k, v, causal, None)
    q, k, v, dy = (x.transpose(1, 2).contiguous() for x in (q, k, v, dy))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
        with torch.no_grad():
            forward = median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=causal), rep)
        backward = median(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), rep)
    return {"error": error(y[0, 0, -ROWS:], want), "forward_ms": forward, "backward_ms": backward}


def main() -> None:
    quick = "--quick" in sys.argv
    rep = 40 if quick else 150
    lengths = (512, 2048, 16384) if quick else (512, 1024, 2048, 4096, 8192, 16384)
    rows = []
    for d in (64, 128):
        for t in lengths:
            for causal in (True,) if quick else (True, False):
                b, h = TOKENS // t, WIDTH // d
                torch.manual_seed(0)
                q, k, v, dy = (torch.randn(b, t, h, d, device="cuda", dtype=torch.bfloat16) for _ in range(4))
                flops = 4.0 * b * h * t * t * d / (2 if causal else 1)
                contestants = {"power p=2": lambda: ours(q, k, v, dy, causal, 2, rep), "cudnn": lambda: softmax(SDPBackend.CUDNN_ATTENTION, q, k, v, dy, causal, rep)}  # noqa: B023, E501
                if not quick:
                    contestants["flash"] = lambda: softmax(SDPBackend.FLASH_ATTENTION, q, k, v, dy, causal, rep)  # noqa: B023
                    contestants["power p=4"] = lambda: ours(q, k, v, dy, causal, 4, rep)  # noqa: B023
                for name, run in contestants.items():
                    row = {"contestant": name, "b": b, "t": t, "h": h, "d": d, "causal": causal, **run()}
                    if not row["error"] < 1e-2:
                        row |= {"forward_ms": None, "backward_ms": None}
                        print(f"WRONG {row}", flush=True)
                    else:
                        f, g = row["forward_ms"], row["backward_ms"]
                        row |= {"forward_tflops": flops / f / 1e9, "backward_tflops": 2.5 * flops / g / 1e9}
                        print(
                            f"d{d} t{t:6d} {'causal' if causal else 'full  '} {name:10s} fwd {f:7.3f} ({row['forward_tflops']:4.0f})"
                            f"  bwd {g:7.3f} ({row['backward_tflops']:4.0f})  both {f + g:7.3f}  err {row['error']:.1e}",
                            flush=True,
                        )
                    rows.append(row)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
