"""Times what a call costs the host: queued calls so short that the device is never the limit.

    python -m benchmarks.host_overhead [--device cpu|cuda] [--t 64] [--calls 200] [--rounds 15] [--first] [--out FILE.json]

For every contestant, and for PyTorch's own attention beside ours: the time of a queued call ("queued", one wait after all of
them) and of a call that is waited for ("alone"), forward without gradients and forward and backward. Contestants take turns,
one measurement each a round; reported are medians. b = 1, h = 2, d = 64, causal, bfloat16.

--first, before those: the first call of each of ours in a process of its own, in which torch, the device and this package are
ready: what the cost model, the operators and loading the kernels take.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from absl import flags
from torch.nn.attention import SDPBackend, sdpa_kernel

import torch_power
from benchmarks import registry, run
from bridge import measure, report, twins

FLAGS = flags.FlagValues()
flags.DEFINE_enum("device", "cuda", ["cpu", "cuda"], "where to compute", flag_values=FLAGS)
flags.DEFINE_integer("t", 64, "sequence length", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("calls", 200, "calls in one measurement", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("rounds", 15, "measurements of each contestant", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_bool("first", False, "time first calls too", flag_values=FLAGS)
flags.DEFINE_string("first_of", None, "time the first call of this contestant, print milliseconds, end", flag_values=FLAGS)
flags.DEFINE_string("out", None, "result file (default: only printed)", flag_values=FLAGS)

Attention = Callable[..., torch.Tensor]


def contestants(device: str) -> Iterator[tuple[str, Attention, bool, contextlib.AbstractContextManager[Any]]]:
    """Name, function of q, k, v (and gates), whether it takes them as power attention does, and the block it is timed in."""
    ours, nothing = {"cuda": "cuda", "cpu": "cpp"}[device], contextlib.nullcontext()

    def power(form: str) -> Attention:
        return lambda q, k, v, log_g: torch_power.power_attention(q, k, v, log_g, form=form, implementation=ours)

    def softmax(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch_power.scaled_dot_product_attention(q, k, v, is_causal=True, implementation=ours)

    def theirs(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    for form in ("attention", "chunked"):
        yield f"torch_power/{ours}/{form}", power(form), True, nothing
    yield f"torch_power/{ours}/sdpa", softmax, False, nothing
    backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
    for name, backend in (backends if device == "cuda" else {"flash": SDPBackend.FLASH_ATTENTION}).items():
        yield f"torch/sdpa-{name}", theirs, False, sdpa_kernel(backend)
    yield f"torch_power/drop-in ({ours})", theirs, False, dropped_in()


@contextlib.contextmanager
def dropped_in() -> Iterator[None]:
    """PyTorch's function with our kernel behind its flash attention."""
    with torch_power.installed_sdpa(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield


def launches(function: Attention, as_power: bool, device: str, t: int) -> dict[str, Callable[[], Any]]:
    """The two passes as functions that launch one call."""
    arrays = registry.Shape(t, h_q=2, h_kv=2, dtype="bfloat16").make()
    names = ("q", "k", "v", *(("log_g",) if as_power else ()))
    tensors = {name: twins.TORCH.array(arrays[name], device) for name in (*names, "dy")}
    if not as_power:
        tensors = {name: x.transpose(1, 2).contiguous() for name, x in tensors.items()}
    leaves, dy = [tensors[name].requires_grad_() for name in names], tensors["dy"]

    def forward() -> torch.Tensor:
        with torch.no_grad():
            return function(*leaves)

    return {"forward": forward, "both": lambda: torch.autograd.grad(function(*leaves), leaves, dy)}


def microseconds(launch: Callable[[], Any], calls: int, wait: Callable[[], None]) -> tuple[float, float]:
    """Microseconds of a queued call, and of a call that is waited for."""
    launch()
    wait()
    begin = time.perf_counter()
    for _ in range(calls):
        launch()
    wait()
    queued = time.perf_counter() - begin
    alone = max(1, calls // 10)
    begin = time.perf_counter()
    for _ in range(alone):
        launch()
        wait()
    return 1e6 * queued / calls, 1e6 * (time.perf_counter() - begin) / alone


def medians(samples: Mapping[tuple[str, str], Sequence[tuple[float, float]]], t: int) -> list[dict[str, Any]]:
    """A row for every contestant and pass."""
    rows = []
    for (name, which), found in samples.items():
        queued, alone = np.median(found, axis=0).tolist()
        rows.append({"contestant": name, "pass": which, "t": t, "queued_us": queued, "alone_us": alone})
    return rows


def first_call(function: Attention, as_power: bool, device: str, t: int, wait: Callable[[], None]) -> float:
    """Milliseconds of the first forward and backward pass in this process."""
    launch = launches(function, as_power, device, t)["both"]
    wait()
    begin = time.perf_counter()
    launch()
    wait()
    return 1e3 * (time.perf_counter() - begin)


def first_calls(names: Sequence[str], device: str, t: int) -> dict[str, float]:
    """Milliseconds of the first call of each contestant, in new processes."""
    found = {}
    for name in names:
        command = [sys.executable, "-m", "benchmarks.host_overhead", f"--device={device}", f"--t={t}", f"--first_of={name}"]
        found[name] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        print(f"{name:30s} first call, forward and backward {found[name]:7.1f} ms", flush=True)
    return found


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    FLAGS.unparse_flags()
    try:
        FLAGS(argv)
    except flags.Error as error:
        print(f"host_overhead: {error}", file=sys.stderr)
        return 2
    wait = torch.cuda.synchronize if FLAGS.device == "cuda" else lambda: None
    entrants = list(contestants(FLAGS.device))
    for name, function, as_power, block in entrants:
        if name == FLAGS.first_of:
            with block:
                print(first_call(function, as_power, FLAGS.device, FLAGS.t, wait))
            return 0
    ours = [name for name, *_ in entrants if name.startswith("torch_power")]
    first = first_calls(ours, FLAGS.device, FLAGS.t) if FLAGS.first else {}
    about = {
        "schema": 1, "argv": list(argv[1:]), "commit": run.commit(),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": {"kind": FLAGS.device, "names": {"torch": measure.describe("torch_power", FLAGS.device)["device"]}},
        "environment": measure.environment(), "first_call_ms": first,
    }  # fmt: skip
    samples: dict[tuple[str, str], list[tuple[float, float]]] = {}
    made = [launches(function, as_power, FLAGS.device, FLAGS.t) for _, function, as_power, _ in entrants]
    rows: list[dict[str, Any]] = []
    for _ in range(FLAGS.rounds):
        for (name, _, _, _), passes in zip(entrants, made, strict=True):
            # A generator's context manager serves once: those of this round are new.
            block = next(block for other, _, _, block in contestants(FLAGS.device) if other == name)
            with block:
                for which, launch in passes.items():
                    samples.setdefault((name, which), []).append(microseconds(launch, FLAGS.calls, wait))
        rows = medians(samples, FLAGS.t)
        if FLAGS.out is not None:  # after every round: what is cut short leaves the rounds before
            result = report.plain(about | {"rounds": len(samples[ours[0], "both"]), "rows": rows})
            report.write_whole(pathlib.Path(FLAGS.out), json.dumps(result, indent=1, allow_nan=False) + "\n")
    for row in rows:
        times = f"queued {row['queued_us']:7.1f} µs   alone {row['alone_us']:7.1f} µs"
        print(f"{row['contestant']:30s} {row['pass']:8s} {times}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
