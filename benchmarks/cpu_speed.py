"""The compiled CPU implementation against its bars: speed and memory of power attention, speed of softmax attention.

    python -m benchmarks.cpu_speed [--quick] [--out benchmarks/results/cpu_speed.json]

Power attention (p = 2, float32, b = 1, h = 4, d = 64, gates, forward and backward) at t = 4096, 16384, 65536 against
`eager` (bar: 3 times as fast) and `xla` (bar: as fast), each at its faster form; the memory of its own choice of form
against eager's (bar: a third). Up to t = 16384 also without gates, where nothing is ever forgotten; those rows have no bar.
Softmax attention (causal, float32 and bfloat16) at t = 1024 and 4096 against PyTorch's own kernel, forward, and forward and
backward (bar: 0.9 of its speed). Contestants take turns (`benchmarks.run`), after a check of their results; medians are
reported. Run it on an idle machine, where it takes about six minutes: the load is written into the result.
`--quick` stops at t = 4096, with 3 rounds. Exit status: 0 if every bar is met.
"""

from __future__ import annotations

import concurrent.futures
import datetime
import json
import multiprocessing
import pathlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import flags

from benchmarks import registry, run
from bridge import measure, report

FLAGS = flags.FlagValues()
flags.DEFINE_bool("quick", False, "only t up to 4096, fewer rounds", flag_values=FLAGS)
flags.DEFINE_string("out", None, "result file (default: only printed)", flag_values=FLAGS)

# Length → rounds. The quadratic form takes part where it is within reach of the chunked one; with gates, ours is at any length.
POWER_ROUNDS = {4096: 7, 16384: 5, 65536: 3}
LONGEST_ATTENTION = 4096
LONGEST_WITHOUT_GATES = 16384
OURS = "torch_power/cpp"
POWER_BARS = {"torch_power/eager": 3.0, "jax_power/xla": 1.0}
MEMORY_BAR = 1 / 3
SDPA_BAR = 0.9


def power_rows(t: int, rounds: int, gates: bool) -> list[dict[str, Any]]:
    """Measurements of ours, eager and xla at one length."""
    forms = ("attention", "chunked") if t <= LONGEST_ATTENTION else ("chunked",)
    ours = ("attention", "chunked") if gates else forms
    names = [f"{OURS}/{form}" for form in ours] + [f"{name}/{form}" for name in POWER_BARS for form in forms]
    entrants = registry.select(registry.contestants("cpu"), names)
    return run.compare(entrants, registry.Shape(t, gates=gates), "both", "cpu", rounds, 0.02)


def sdpa_rows(t: int, dtype: str, which: str, rounds: int) -> list[dict[str, Any]]:
    """Measurements of ours and of PyTorch's own at one length."""
    entrants = registry.select(registry.contestants("cpu"), [f"{OURS}/sdpa", "torch/sdpa"])
    return run.compare(entrants, registry.Shape(t, dtype=dtype, gates=False), which, "cpu", rounds, 0.1)


def peak_bytes(implementation: str, t: int) -> int:
    """Most memory in use during forward and backward above what was in use before, in a process of its own."""
    arrays = registry.Shape(t).make()
    task = measure.Task("torch_power", "power", implementation, "cpu", "float32", arrays, keep_results=False)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        outcome = pool.submit(measure.measure, task).result()
    if outcome.status != "ran" or outcome.peak_bytes is None:
        raise RuntimeError(f"memory of {implementation} at t={t}: {outcome.status} {outcome.reason}")
    return outcome.peak_bytes


def fastest(rows: Sequence[dict[str, Any]], prefix: str) -> float:
    """Median seconds of the faster form of an implementation; infinite if none was timed."""
    timed = [row["seconds"] for row in rows if row["contestant"].startswith(prefix) and "seconds" in row]
    return min(timed, default=float("inf"))


def bars(t: int, rows: Sequence[dict[str, Any]], memory: dict[str, int]) -> Iterator[dict[str, Any]]:
    """What is asked for at one length, and what was measured."""
    for other, bar in POWER_BARS.items():
        times = fastest(rows, other) / fastest(rows, OURS)
        met = bar <= times < float("inf")  # infinite: the other was not timed
        yield {"what": f"power t={t}: times as fast as {other}", "bar": bar, "measured": times, "met": met}
    share = memory["cpp"] / memory["eager"]
    yield {"what": f"power t={t}: share of eager's memory", "bar": MEMORY_BAR, "measured": share, "met": share <= MEMORY_BAR}


def without_gates(t: int, rows: Sequence[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """What was measured at one length without gates, for which there is no bar."""
    for other in POWER_BARS:
        yield {
            "what": f"power t={t} without gates: times as fast as {other}",
            "measured": fastest(rows, other) / fastest(rows, OURS),
        }


def main(argv: Sequence[str]) -> int:
    """Measure everything, print it, write it; returns the exit status."""
    FLAGS(argv)
    rows: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    memories = {}

    def note(found: Iterator[dict[str, Any]]) -> None:
        for row in found:
            summary.append(row)
            verdict = "" if "bar" not in row else "met" if row["met"] else "MISSED"
            bar = f" (bar {row['bar']:.2f})" if "bar" in row else ""
            print(f"{verdict:6} {row['what']}: {row['measured']:.2f}{bar}", flush=True)

    for dtype in ("float32", "bfloat16"):
        for t in (1024, 4096):
            for which in ("forward", "both"):
                found = sdpa_rows(t, dtype, which, 3 if FLAGS.quick else 9)
                rows += found
                times = fastest(found, "torch/sdpa") / fastest(found, OURS)
                what = f"sdpa {dtype} t={t} {which}: times as fast as torch"
                note(iter([{"what": what, "bar": SDPA_BAR, "measured": times, "met": times >= SDPA_BAR}]))
    for t, rounds in POWER_ROUNDS.items():
        if FLAGS.quick and t > LONGEST_ATTENTION:
            continue
        memories[t] = {name: peak_bytes(name, t) for name in ("cpp", "eager")}
        found = power_rows(t, 3 if FLAGS.quick else rounds, gates=True)
        rows += found
        note(bars(t, found, memories[t]))
        if t <= LONGEST_WITHOUT_GATES:
            found = power_rows(t, 3, gates=False)
            rows += found
            note(without_gates(t, found))
    if FLAGS.out is not None:
        result = {
            "schema": 1, "argv": list(argv[1:]), "commit": run.commit(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "environment": measure.environment(), "bars": summary, "peak_bytes": memories, "rows": rows,
        }  # fmt: skip
        report.write_whole(pathlib.Path(FLAGS.out), json.dumps(report.plain(result), indent=1, allow_nan=False) + "\n")
    return 0 if all(bar["met"] for bar in summary if "bar" in bar) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
