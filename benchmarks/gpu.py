"""What the benchmarks of one GPU share: times by CUDA events, memory, float64 checks of whole heads, result files.

A contestant is timed twice. `forward_ms` and `both_ms` are of the public call among calls that are queued without waiting, as
they are in training: the host's time for a call counts where it is longer than the GPU's. `*_graph_ms` are of the same call
replayed from a CUDA graph: its kernels alone, one behind the other. `backward_ms` is both passes less forward. Contestants that
are compared take turns (`measure_all`).
"""

from __future__ import annotations

import functools
import json
import pathlib
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks import run
from bridge import cases

# Operations a second of the matrix units, 16-bit operands, random numbers: measured, one H100 (NOTES.md).
CEILING = 790e12
# Up to this length a head is checked as a whole, as the contract's bounds are of whole tensors; beyond, through this many rows.
WHOLE, ROWS = 262144, 32
# Scores in float64 that are held at a time: 0.5 GB an array.
SCORES = 1 << 26
# Errors are held to the contract's bounds for kernels that round to 16 bits inside. Others promise none; four times those tells
# rounding from mistakes (cuDNN takes dy·y from a rounded y: dk 7.3e-3 where few rows decide).
SLACK = 4.0
# A call is timed for about this long (milliseconds), but not fewer or more often than so many times; one that is longer than
# LONG is not replayed from a graph: there is nothing to hide.
BUDGET, LEAST, MOST, LONG = 60.0, 2, 50, 50.0
# In so many turns.
TURNS = 5


class Arrays(NamedTuple):
    """q, k, v, dy `[b, t, h, d]`, log_g `[b, t, h]` or None; the first three and log_g are leaves."""

    q: Tensor
    k: Tensor
    v: Tensor
    dy: Tensor
    log_g: Tensor | None = None

    def leaves(self) -> list[Tensor]:
        return [x for x in (self.q, self.k, self.v, self.log_g) if x is not None and x.requires_grad]


class Contestant(NamedTuple):
    """Someone to be timed.

    Fields:
      attend: (q, k, v, log_g) → y, all `[b, t, h, d]`.
      weight: of a score and a log decay.
      ours: held to the contract's bounds; others to `SLACK` times those.
      heads_first: its arrays are stored `[b, h, t, d]`, as it likes them.
    """

    attend: Callable[..., Tensor]
    weight: Callable[[Tensor, Tensor], Tensor]
    ours: bool = True
    heads_first: bool = False


@functools.cache
def power_weight(deg: int) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda score, decay: score**deg * decay.exp()


def softmax_weight(score: Tensor, decay: Tensor) -> Tensor:
    del decay
    return score.exp()


def heads_first(attention: Callable[..., Tensor], *, ours: bool, **options: Any) -> Contestant:
    """Softmax attention by a function with the arguments of `F.scaled_dot_product_attention`."""

    def attend(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None) -> Tensor:
        del log_g
        return attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), **options).transpose(1, 2)

    return Contestant(attend, softmax_weight, ours, heads_first=True)


def _on(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor, is_causal: bool = False) -> Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


# PyTorch's kernels of softmax attention.
PYTORCH = {
    "cudnn": functools.partial(_on, SDPBackend.CUDNN_ATTENTION),
    "flash": functools.partial(_on, SDPBackend.FLASH_ATTENTION),
    "memory-efficient": functools.partial(_on, SDPBackend.EFFICIENT_ATTENTION),
}


def make(
    contestant: Contestant,
    b: int,
    t: int,
    h: int,
    d: int,
    *,
    t_kv: int | None = None,
    gates: bool = False,
    device: Any = "cuda",
) -> Arrays:
    """Random bfloat16 arrays, the same for every contestant; gates of about −0.07 a token, without a gradient for softmax."""
    torch.manual_seed(0)
    t_kv = t if t_kv is None else t_kv
    arrays = [torch.randn(b, n, h, d, device=device, dtype=torch.bfloat16) for n in (t, t_kv, t_kv, t)]
    if contestant.heads_first:
        arrays = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in arrays]
    q, k, v, dy = arrays
    log_g = None
    if gates:
        log_g = F.logsigmoid(torch.randn(b, t, h, device=device) + 3).requires_grad_(not contestant.heads_first)
    return Arrays(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dy, log_g)


# ---------------------------------------------------------------------------------------------------------------------
# Right or wrong
# ---------------------------------------------------------------------------------------------------------------------


def checked_rows(t: int, device: Any = "cuda") -> Tensor:
    """The rows whose upstream gradient is not zero: all up to t = `WHOLE`; beyond, the second, the last, and some between."""
    if t <= WHOLE:
        return torch.arange(t, device=device)
    return torch.linspace(1, t - 1, ROWS, device=device).long().unique()


def exact(
    x: Arrays, weight: Callable[[Tensor, Tensor], Tensor], rows: Tensor, where: tuple[int, int], causal: bool
) -> dict[str, Tensor]:
    """y of `rows` of one (batch element, head), and the gradients of q in those rows and of k, v, log_g everywhere, in
    float64, for an upstream gradient that is zero in all other rows; so many rows at a time that their scores fit `SCORES`."""
    b, h = where
    q, k, v = (a.detach()[b, :, h].double() for a in (x.q, x.k, x.v))
    whole = {"k": k, "v": v}
    if x.log_g is not None and x.log_g.requires_grad:
        whole["log_g"] = x.log_g.detach()[b, :, h].double()
    grads = {name: torch.zeros_like(a) for name, a in whole.items()}
    y, dq = [], []
    for some in rows.split(max(1, SCORES // len(k))):
        seen = int(some.max()) + 1 if causal else len(k)
        leaves = {"q": q[some].requires_grad_()} | {name: a[:seen].clone().requires_grad_() for name, a in whole.items()}
        hidden = (torch.arange(seen, device=q.device) > some[:, None]) & causal
        decay = torch.zeros((), dtype=torch.float64, device=q.device)
        if "log_g" in leaves:
            sums = leaves["log_g"].cumsum(0)
            decay = (sums[some, None] - sums).masked_fill(hidden, 0.0)
        w = weight(leaves["q"] @ leaves["k"].T * q.shape[-1] ** -0.5, decay).masked_fill(hidden, 0.0)
        part = w @ leaves["v"] / w.sum(-1, keepdim=True)
        found = torch.autograd.grad(part, list(leaves.values()), x.dy[b, some, h].double())
        y.append(part.detach())
        dq.append(found[0])
        for name, dx in zip(whole, found[1:], strict=True):
            grads[name][:seen] += dx
    return {"y": torch.cat(y), "dq": torch.cat(dq)} | {f"d{name}": dx for name, dx in grads.items()}


# What is exact does not depend on who is timed: `make` gives all the same arrays.
_EXACT: dict[Any, dict[str, Tensor]] = {}


def exact_once(
    x: Arrays, weight: Callable[[Tensor, Tensor], Tensor], rows: Tensor, where: tuple[int, int], causal: bool
) -> dict[str, Tensor]:
    """`exact`, once for all contestants of a shape."""
    gated = x.log_g is not None and x.log_g.requires_grad
    key = (weight, x.q.shape, x.k.shape, x.q.device, gated, where, causal)
    if key not in _EXACT:
        if len(_EXACT) >= 4:  # two heads of softmax and of power attention
            _EXACT.pop(next(iter(_EXACT)))
        _EXACT[key] = exact(x, weight, rows, where, causal)
    return _EXACT[key]


def errors(contestant: Contestant, x: Arrays, causal: bool = True) -> dict[str, float]:
    """Relative L2 errors of y and every gradient in the last head, up to t = 16384 in the first too; the larger of the two."""
    rows, (b, t, h, _) = checked_rows(x.q.shape[1], x.q.device), x.q.shape
    heads = list(dict.fromkeys([(0, 0), (b - 1, h - 1)]))[0 if t <= 16384 else -1 :]
    dy = x.dy
    if len(rows) < t:
        dy = torch.zeros_like(x.dy)
        dy[:, rows] = x.dy[:, rows]
    y = contestant.attend(x.q, x.k, x.v, x.log_g)
    names = ("dq", "dk", "dv", "dlog_g")[: len(x.leaves())]
    got = dict(zip(names, torch.autograd.grad(y, x.leaves(), dy), strict=True)) | {"y": y.detach()}
    found: dict[str, float] = {}
    for i, j in heads:
        for name, want in exact_once(x, contestant.weight, rows, (i, j), causal).items():
            result = got[name][i, :, j] if name not in ("y", "dq") else got[name][i, rows, j]
            error = float((result.double() - want).norm() / want.norm())
            found[name] = max(found.get(name, 0.0), error if error == error else float("inf"))
    return found


def breach(contestant: Contestant, found: Mapping[str, float]) -> str | None:
    """The tensor whose error is furthest beyond its bound; None if all hold."""
    bounds, slack = cases.bounds("bfloat16", "cuda"), 1.0 if contestant.ours else SLACK
    name = max(found, key=lambda name: found[name] / bounds[name])
    return f"{name}: error {found[name]:.1e}" if not found[name] <= slack * bounds[name] else None


# ---------------------------------------------------------------------------------------------------------------------
# Time and memory
# ---------------------------------------------------------------------------------------------------------------------


def queued(call: Callable[[], Any], count: int) -> list[float]:
    """Milliseconds between the ends of `count` calls queued without waiting, behind one not counted: it waits for the host."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    for event in events:
        call()
        event.record()
    torch.cuda.synchronize()
    return [first.elapsed_time(last) for first, last in zip(events[:-1], events[1:], strict=True)]


def medians(calls: Mapping[Any, Callable[[], Any]]) -> dict[Any, float]:
    """Median milliseconds of each call. They take turns: what runs first, on a cool card, has a higher clock for a while."""
    samples: dict[Any, list[float]] = {name: [] for name in calls}
    counts = {name: int(min(MOST, max(LEAST, BUDGET / queued(call, 1)[0]))) for name, call in calls.items()}
    for turn in range(TURNS):
        for name, call in calls.items():
            if turn < counts[name]:
                samples[name] += queued(call, -(-counts[name] // TURNS))
    return {name: statistics.median(found) for name, found in samples.items()}


def graph_of(call: Callable[[], Any]) -> Callable[[], None]:
    """What replays `call` from a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def peak_bytes(call: Callable[[], Any], arrays: Sequence[Tensor]) -> int:
    """Most memory in use during `call`, but for what others hold: its inputs, what it allocates, its results."""
    call()  # libraries make their workspaces at first use, once for the process
    held = torch.cuda.memory_allocated() - sum(x.untyped_storage().nbytes() for x in arrays)
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() - held


def measure(contestant: Contestant, x: Arrays, *, causal: bool = True) -> dict[str, Any]:
    """Errors, times and memory of a contestant, as columns of a row; no times and a reason where it is wrong or refuses."""
    return measure_all({"": contestant}, x, causal=causal)[""]


def measure_all(contestants: Mapping[str, Contestant], x: Arrays, *, causal: bool = True) -> dict[str, dict[str, Any]]:
    """`measure` for several contestants on the same arrays, whose calls are timed in turns."""
    rows: dict[str, dict[str, Any]] = {}
    calls: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, contestant in contestants.items():
        row = rows[name] = dict.fromkeys(("forward_ms", "both_ms", "backward_ms", "forward_graph_ms", "both_graph_ms"))
        passes: dict[str, Callable[[], Any]] = {
            "forward": functools.partial(forward, contestant, x),
            "both": functools.partial(both, contestant, x),
        }
        try:
            row["peak_mib"] = peak_bytes(passes["both"], [a for a in x if a is not None]) / 2**20
            row["errors"] = errors(contestant, x, causal)
            row["reason"] = breach(contestant, row["errors"])
            if row["reason"] is None:
                columns = {f"{which}_ms": call for which, call in passes.items()}
                if queued(passes["both"], 1)[0] < LONG:
                    columns |= {f"{which}_graph_ms": graph_of(call) for which, call in passes.items()}
                calls |= {(name, column): call for column, call in columns.items()}
        except (NotImplementedError, RuntimeError) as error:  # out of memory, or a backend that refuses the call
            row["reason"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    for (name, column), ms in medians(calls).items():
        rows[name][column] = ms
    for row in rows.values():
        if row["both_ms"] is not None:
            row["backward_ms"] = row["both_ms"] - row["forward_ms"]
    return rows


def forward(contestant: Contestant, x: Arrays) -> Tensor:
    """y, without what a backward pass would need."""
    with torch.no_grad():
        return contestant.attend(x.q, x.k, x.v, x.log_g)


def both(contestant: Contestant, x: Arrays) -> tuple[Tensor, ...]:
    """y and the gradients of the leaves."""
    y = contestant.attend(x.q, x.k, x.v, x.log_g)
    return y.detach(), *torch.autograd.grad(y, x.leaves(), x.dy)


def kernels(call: Callable[[], Any], calls: int = 3) -> list[dict[str, Any]]:
    """Name, launches and milliseconds in one call of every kernel that takes part, the longest first, by CUPTI."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        for _ in range(calls):
            call()
        torch.cuda.synchronize()
    found = [
        {"name": event.key, "launches": event.count / calls, "ms": event.self_device_time_total / 1e3 / calls}
        for event in profile.key_averages()
        if event.self_device_time_total > 0
    ]
    return sorted(found, key=lambda kernel: -kernel["ms"])


# ---------------------------------------------------------------------------------------------------------------------
# Result files
# ---------------------------------------------------------------------------------------------------------------------


def about() -> dict[str, Any]:
    """Device, versions and commit."""
    name, version = torch.cuda.get_device_name(), torch.__version__
    return {"device": name, "torch": version, "cuda": torch.version.cuda, "commit": run.commit()}


def save(path: pathlib.Path, found: Mapping[str, Any]) -> None:
    """Writes what has been measured so far: a run that is cut short leaves that."""
    path.write_text(json.dumps(found, indent=1, allow_nan=False) + "\n")


def line(row: Mapping[str, Any]) -> str:
    """The numbers of a row, for the log."""
    if row["forward_ms"] is None:
        return f"no times: {row['reason']}"
    alone = "" if row["both_graph_ms"] is None else f" (kernels {row['forward_graph_ms']:.3f} {row['both_graph_ms']:.3f})"
    worst = " ".join(f"{name} {value:.1e}" for name, value in row["errors"].items())
    return f"forward {row['forward_ms']:8.3f} both {row['both_ms']:8.3f}{alone} peak {row['peak_mib']:6.0f} MiB  {worst}"
