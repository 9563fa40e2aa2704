"""Times the attention form's kernels against softmax attention on one GPU.

    python benchmarks/gpu_attention.py OUT.json [--quick]

b·t = 16384 tokens, h·d = 2048, bfloat16, no gates: our forward and backward kernels through the raw interface, and
`F.scaled_dot_product_attention` with cuDNN and with flash attention, on the same random arrays. Medians of CUDA events.
Causal at every power of two from 512 to 16384, without a mask, and short queries against long keys; d = 256 for information
(beside flash attention; cuDNN's backward stops at 128). A contestant whose y, dq, dk or dv is wrong (against float64 on the
last 64 rows of one head) has no time. About 40 s; `--quick` takes degree 2 and cuDNN alone, causal, in 10 s.
"""

from __future__ import annotations

import json
import pathlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from triton.testing import do_bench

sys.path.insert(0, ".")
from bridge import spec
from torch_power.cuda import attention

TOKENS, WIDTH, ROWS, WORST = 16384, 2048, 64, 1e-2


class Shape(NamedTuple):
    """One line of the result: t queries of each of b·h heads against t_kv keys."""

    b: int
    t: int
    t_kv: int
    h: int
    d: int
    causal: bool


class Arrays(NamedTuple):
    """q, k, v, dy [b, t, h, d], and the options that all contestants share."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    dy: torch.Tensor
    causal: bool
    rep: int


def median(run: Callable[[], Any], rep: int) -> float:
    """Median milliseconds of one run."""
    return float(do_bench(run, warmup=rep // 4, rep=rep, return_mode="median"))


def last_rows(x: Arrays, deg: int | None) -> dict[str, torch.Tensor]:
    """y and the gradients that the last 64 rows of head 0 of batch 0 settle, in float64; `deg` None: softmax.

    Their dq, and when causal also dk and dv of the last 64 keys, which no other row sees.
    """
    t = x.k.shape[1]
    q, k, v = (a[0, :, 0].double() for a in (x.q[:, -ROWS:], x.k, x.v))
    q, k, v = (a.requires_grad_() for a in (q, k, v))
    score = q @ k.T * q.shape[-1] ** -0.5
    hidden = torch.ones_like(score, dtype=torch.bool).triu(t - ROWS + 1) & x.causal
    weight = score.masked_fill(hidden, -torch.inf).softmax(-1) if deg is None else (score**deg).masked_fill(hidden, 0.0)
    y = weight @ v / weight.sum(-1, keepdim=True)
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), x.dy[0, -ROWS:, 0].double())
    return {"y": y.detach(), "dq": dq} | ({"dk": dk[-ROWS:], "dv": dv[-ROWS:]} if x.causal else {})


def worst_error(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest relative error of a tensor [b, t, h, d] on the rows of `last_rows`."""
    return max(((got[name][0, -ROWS:, 0].double() - x).norm() / x.norm()).item() for name, x in want.items())


def ours(x: Arrays, deg: int) -> dict[str, float]:
    """Milliseconds of forward and backward, and the worst error."""
    qkv = (x.q, x.k, x.v, None, None, None)
    call = spec.check_power(x.q, x.k, x.v, deg=deg, causal=x.causal, form="attention")
    y, norm, *_ = attention.forward(call, *qkv)
    got = dict(zip(("dq", "dk", "dv"), attention.backward(call, *qkv, y, norm, x.dy, None, None)[:3], strict=True))
    return {
        "error": worst_error({"y": y, **got}, last_rows(x, deg)),
        "forward_ms": median(lambda: attention.forward(call, *qkv), x.rep),
        "backward_ms": median(lambda: attention.backward(call, *qkv, y, norm, x.dy, None, None), x.rep),
    }


def softmax(x: Arrays, backend: SDPBackend) -> dict[str, float]:
    """The same of F.scaled_dot_product_attention, on its own layout [b, h, t, d]."""
    q, k, v, dy = (array.transpose(1, 2).contiguous() for array in x[:4])
    q, k, v = (array.requires_grad_() for array in (q, k, v))
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.causal)
        got = {"y": y, **dict(zip(("dq", "dk", "dv"), torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), strict=True))}
        error = worst_error({name: array.detach().transpose(1, 2) for name, array in got.items()}, last_rows(x, None))
        with torch.no_grad():
            forward = median(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=x.causal), x.rep)
        backward = median(lambda: torch.autograd.grad(y, (q, k, v), dy, retain_graph=True), x.rep)
    return {"error": error, "forward_ms": forward, "backward_ms": backward}


CONTESTANTS: dict[str, Callable[[Arrays], dict[str, float]]] = {
    "power p=2": lambda x: ours(x, 2),
    "cudnn": lambda x: softmax(x, SDPBackend.CUDNN_ATTENTION),
    "power p=4": lambda x: ours(x, 4),
    "flash": lambda x: softmax(x, SDPBackend.FLASH_ATTENTION),
}


def measure(name: str, shape: Shape, rep: int) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    torch.manual_seed(0)
    b, t, t_kv, h, d, causal = shape

    def normal(tokens: int) -> torch.Tensor:
        return torch.randn(b, tokens, h, d, device="cuda", dtype=torch.bfloat16)

    row: dict[str, Any] = {"contestant": name, **shape._asdict()}
    row |= CONTESTANTS[name](Arrays(normal(t), normal(t_kv), normal(t_kv), normal(t), causal, rep))
    where = f"d{d} t{t:6d} keys{t_kv:6d} {'causal' if causal else 'full  '} {name:10s}"
    if not row["error"] < WORST:
        print(f"{where} WRONG: error {row['error']}", flush=True)
        return row | {"forward_ms": None, "backward_ms": None}
    flops, f, g = 4.0 * b * h * t * t_kv * d / (2 if causal else 1), row["forward_ms"], row["backward_ms"]
    row |= {"both_ms": f + g, "forward_tflops": flops / f / 1e9, "backward_tflops": 2.5 * flops / g / 1e9}
    print(
        f"{where} forward {f:7.3f} ({row['forward_tflops']:4.0f})  backward {g:7.3f} ({row['backward_tflops']:4.0f})"
        f"  both {f + g:7.3f}  error {row['error']:.1e}",
        flush=True,
    )
    return row


def rows(quick: bool) -> Iterator[tuple[Shape, str]]:
    """Shapes and contestants, what matters most first."""
    lengths = (512, 1024, 2048, 4096, 8192, 16384)
    for d in (64, 128):
        for t in lengths:
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


def main() -> None:
    quick = "--quick" in sys.argv
    found = [measure(name, shape, 20 if quick else 40) for shape, name in rows(quick)]
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}
    pathlib.Path(sys.argv[1]).write_text(json.dumps({"about": about, "rows": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
