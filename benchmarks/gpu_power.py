"""Times power attention on one GPU, beside softmax attention and the peer in the same run.

    python benchmarks/gpu_power.py OUT.json [--lengths 65536 …] [--sizes 64 128] [--contestants power cudnn …]

bfloat16, p = 2, gates on, h = 8, b·t = max(t, 16384) tokens: the public function, forward alone and forward with backward, and
`F.scaled_dot_product_attention` with cuDNN and with flash attention on the same q, k, v (softmax has no gates). `retention`
takes part where it is installed; its first call tunes for a minute.

Medians of CUDA events between calls that are queued without waiting, as they are in training. Peak memory is of forward and
backward, inputs and gradients included. `fraction` is of the matrix units' measured 790 TFLOP/s, by the operations that the
algorithm cannot do without. A contestant whose y, dq, dk or dv is wrong (against float64, the last 64 tokens of one head) has
no time.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import pathlib
import subprocess
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, ".")
import torch_power
from bridge import spec
from torch_power.cuda import power

ROWS, HEADS, TOKENS = 64, 8, 16384
CEILING = 790e12
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072, 262144, 1048576)
# Softmax attention takes seconds above; d = 128 does not fit into memory at a million tokens.
LONGEST = {"cudnn": 131072, "flash": 65536, "retention": 131072}
LONGEST_WIDE = 262144


class Arrays(NamedTuple):
    """q, k, v, dy [b, t, h, d], log_g [b, t, h]."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor
    log_g: Tensor


class Contestant(NamedTuple):
    """One to be timed.

    Fields:
      attend: (q, k, v, log_g) → y on [b, t, h, d].
      weight: of a score and a log decay.
      operations: (b, t, d) → floating-point operations of forward, and of both passes.
      gates: log_g has a gradient.
    """

    attend: Callable[..., Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]
    operations: Callable[[int, int, int], tuple[float, float]]
    gates: bool


def quadratic(b: int, t: int, d: int) -> tuple[float, float]:
    """Two causal products forward, five more backward."""
    product = b * HEADS * t**2 * d
    return 2.0 * product, 7.0 * product


def linear(b: int, t: int, d: int) -> tuple[float, float]:
    """Two products with a state forward, four more backward; inside chunks of 1024, two and five."""
    state, inside = 2.0 * b * t * HEADS * spec.state_rows(d, 2) * d, 1024.0 * b * t * HEADS * d
    return 2 * state + 2 * inside, 6 * state + 7 * inside


def softmax(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    del log_g
    with sdpa_kernel(backend):
        y = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True)
    return y.transpose(1, 2)


def retention(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor) -> Tensor:
    from retention.triton import power_retention

    return power_retention(q, k, v, log_g, deg=2, scale=q.shape[-1] ** -0.5, chunk_size=min(1024, q.shape[1]))


def contestants() -> dict[str, Contestant]:
    attend = functools.partial(torch_power.power_attention, implementation="cuda")
    chunked = functools.partial(attend, form="chunked")

    def power_weight(score: Tensor, decay: Tensor) -> Tensor:
        return score**2 * decay.exp()

    def softmax_weight(score: Tensor, decay: Tensor) -> Tensor:
        return score.exp() * (decay == decay)

    table = {
        "power": Contestant(attend, power_weight, linear, True),
        "power chunked": Contestant(chunked, power_weight, linear, True),
        "cudnn": Contestant(functools.partial(softmax, SDPBackend.CUDNN_ATTENTION), softmax_weight, quadratic, False),
        "flash": Contestant(functools.partial(softmax, SDPBackend.FLASH_ATTENTION), softmax_weight, quadratic, False),
    }
    if importlib.util.find_spec("retention"):
        table["retention"] = Contestant(retention, power_weight, linear, True)
    return table


def takes_part(name: str, t: int, d: int) -> bool:
    """Whether a contestant is timed: `power` where it chooses the attention form, the chunked one from t = 4096 on."""
    if name == "power":
        return t < power.CROSSING[d]
    if name == "power chunked" and t < 4096:
        return False
    return t <= LONGEST.get(name, t) and (d == 64 or t <= LONGEST_WIDE)


def exact(x: Arrays, weight: Callable[[Tensor, Tensor], Tensor]) -> dict[str, Tensor]:
    """y, dq, dk, dv of the last 64 tokens of head 0 of batch 0 in float64; only rows from there on reach these keys."""
    t = x.q.shape[1]
    q = x.q[0, -ROWS:, 0].detach().double().requires_grad_()
    k, v = (a[0, :, 0].detach().double().requires_grad_() for a in (x.k, x.v))
    sums = x.log_g[0, :, 0].detach().double().cumsum(0)
    hidden = torch.ones(ROWS, t, dtype=torch.bool, device=q.device).triu(t - ROWS + 1)
    w = weight(q @ k.T * q.shape[-1] ** -0.5, (sums[-ROWS:, None] - sums).masked_fill(hidden, 0.0)).masked_fill(hidden, 0.0)
    y = w @ v / w.sum(-1, keepdim=True)
    dq, dk, dv = torch.autograd.grad(y, (q, k, v), x.dy[0, -ROWS:, 0].double())
    return {"y": y.detach(), "dq": dq, "dk": dk[-ROWS:], "dv": dv[-ROWS:]}


def median(run: Callable[[], Any], least: int = 5) -> float:
    """Median milliseconds of a call among calls queued for about a quarter of a second, after two."""

    def queue(count: int) -> list[float]:
        events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
        events[0].record()
        for event in events[1:]:
            run()
            event.record()
        torch.cuda.synchronize()
        return sorted(first.elapsed_time(last) for first, last in zip(events[:-1], events[1:], strict=True))

    run()
    once = queue(2)[0]
    times = queue(min(100, max(least, int(250 / once))))
    return times[len(times) // 2]


def measure(name: str, b: int, t: int, d: int) -> dict[str, Any]:
    """One row of the result: a contestant on one shape."""
    contestant = contestants()[name]
    torch.manual_seed(0)
    torch.cuda.empty_cache()
    q, k, v = (torch.randn(b, t, HEADS, d, device="cuda", dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    dy, log_g = torch.randn_like(q), F.logsigmoid(torch.randn(b, t, HEADS, device="cuda") + 3)
    x = Arrays(q, k, v, dy.detach(), log_g.requires_grad_(contestant.gates))
    leaves = [a for a in (x.q, x.k, x.v, x.log_g) if a.requires_grad]

    def forward() -> Tensor:
        with torch.no_grad():
            return contestant.attend(x.q, x.k, x.v, x.log_g)

    def both() -> tuple[Tensor, ...]:
        y = contestant.attend(x.q, x.k, x.v, x.log_g)
        return y.detach(), *torch.autograd.grad(y, leaves, x.dy)

    both()
    torch.cuda.reset_peak_memory_stats()
    got = dict(zip(("y", "dq", "dk", "dv"), (a[0, -ROWS:, 0].double() for a in both()[:4]), strict=True))
    peak = torch.cuda.max_memory_allocated()
    times = median(forward), median(both)
    errors = {name: float((got[name] - want).norm() / want.norm()) for name, want in exact(x, contestant.weight).items()}
    right = max(errors.values()) < 1e-2
    row: dict[str, Any] = {"contestant": name, "b": b, "t": t, "h": HEADS, "d": d, "errors": errors, "peak_mib": peak / 2**20}
    for pass_, time, operations in zip(("forward", "both"), times, contestant.operations(b, t, d), strict=True):
        fraction = operations / (time / 1e3) / CEILING
        row |= {f"{pass_}_ms": time if right else None, f"{pass_}_fraction": fraction if right else None}
    row["backward_ms"] = times[1] - times[0] if right else None
    print(
        f"b{b:3d} t{t:8d} d{d:4d} {name:14s} forward {times[0]:8.3f}  both {times[1]:8.3f}  peak {row['peak_mib']:6.0f} MiB  "
        + " ".join(f"{key} {value:.1e}" for key, value in errors.items())
        + ("" if right else "  WRONG"),
        flush=True,
    )
    return row


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("output", type=pathlib.Path)
    parser.add_argument("--lengths", type=int, nargs="+", default=LENGTHS)
    parser.add_argument("--sizes", type=int, nargs="+", default=(64, 128), choices=(64, 128))
    parser.add_argument("--contestants", nargs="+", default=list(contestants()))
    options = parser.parse_args()
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda, "commit": commit}
    rows: list[dict[str, Any]] = []
    for d in options.sizes:
        for t in options.lengths:
            for name in options.contestants:
                if takes_part(name, t, d):
                    rows.append(measure(name, max(1, TOKENS // t), t, d))
                    options.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
