"""Times contestants against each other in one process, and only those whose result is right.

    python -m benchmarks.run --t 1024,4096 [--d 64] [--h 4] [--dtype float32] [--pass forward|both] [--device cpu|cuda]
        [--contestants 'torch_power/*,torch/sdpa'] [--base NAME] [--out FILE.json]

For every length each contestant is first held to a float64 computation at that length; one whose result is wrong is
named and has no time. The others take turns, one measurement each a round, so that whatever the machine does meanwhile
meets them all; reported are medians, and the 10th and 90th percentile. Also reported are the first call's time, in which JAX
compiles (or reads what it compiled before: JAX_COMPILATION_CACHE_DIR names the folder), and for JAX on a GPU the time of the
kernels alone, by its profiler. Exit status: 0, 1 if someone's result was wrong or its call failed, 2 if the command cannot be
carried out.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import json
import math
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Before JAX is imported: it shares the GPU's memory with PyTorch.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import numpy as np
from absl import flags
from rich.console import Console
from rich.table import Table

from benchmarks import exact, registry
from bridge import cases, measure, report, spec

FLAGS = flags.FlagValues()
flags.DEFINE_list("t", ["1024", "4096"], "sequence lengths", flag_values=FLAGS)
flags.DEFINE_integer("b", 1, "batch", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("h", 4, "query heads", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("h_kv", None, "key-value heads (default: as many as query heads)", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("d", 64, "head size", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_integer("deg", 2, "degree of power attention, even", lower_bound=2, flag_values=FLAGS)
flags.DEFINE_enum("dtype", "float32", spec.FLOAT_DTYPES, "of q, k, v", flag_values=FLAGS)
flags.DEFINE_bool("gates", True, "give power attention gates", flag_values=FLAGS)
flags.DEFINE_enum("pass", "both", ["forward", "both"], "forward alone, or forward and backward", flag_values=FLAGS)
flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute", flag_values=FLAGS)
flags.DEFINE_list("contestants", [], "names or shell patterns (default: everyone here)", flag_values=FLAGS)
flags.DEFINE_string("base", None, "contestant that the others' times are compared with", flag_values=FLAGS)
flags.DEFINE_integer("rounds", 10, "measurements of each contestant", lower_bound=1, flag_values=FLAGS)
flags.DEFINE_float("least", 0.02, "least seconds of one measurement: short calls are repeated", flag_values=FLAGS)
flags.DEFINE_string("out", None, "result file (default: only printed)", flag_values=FLAGS)
flags.DEFINE_bool("help", False, "show this help", flag_values=FLAGS)


class UsageError(ValueError):
    """A command that cannot be carried out; the message is one line."""


# ---------------------------------------------------------------------------------------------------------------------
# Right or wrong
# ---------------------------------------------------------------------------------------------------------------------


def references(shape: registry.Shape, arrays: Mapping[str, np.ndarray]) -> Callable[[str], dict[str, np.ndarray]]:
    """A function from an operation's name to its float64 results, which are worked out when first asked for.

    They are those of the rows of `exact.sampled_rows`, and through an upstream gradient that is zero elsewhere the gradients of
    every token.
    """
    rows = exact.sampled_rows(shape.t)
    kept = dict(arrays) | {"dy": exact.keep_rows(arrays["dy"], rows)}
    return functools.cache(lambda name: exact.power(kept, rows, deg=shape.deg) if name == "power" else exact.sdpa(kept, rows))


def check(
    contestant: registry.Contestant,
    ready: registry.Ready,
    shape: registry.Shape,
    arrays: Mapping[str, np.ndarray],
    want: Mapping[str, np.ndarray],
    which: str,
    device: str,
) -> tuple[dict[str, float], str | None, float]:
    """Errors of a contestant at the length that is timed, what is wrong about them (None: nothing), and the call's seconds."""
    rows = exact.sampled_rows(shape.t)
    dy = ready.array(exact.keep_rows(arrays["dy"], rows))
    begin = time.perf_counter()
    result = ready.launch[which](dy)
    ready.wait(result)
    seconds = time.perf_counter() - begin
    got = {name: ready.numpy(x) for name, x in result.items()}
    got["y"] = got["y"][:, rows]
    found = {name: cases.relative_error(x, want[name]) for name, x in got.items()}
    bounds = contestant.bounds(shape.dtype, device)
    name = max(found, key=lambda name: found[name] / bounds[name])
    if found[name] <= bounds[name]:
        return found, None, seconds
    return found, f"{name}: relative L2 error {found[name]:.3g} > {bounds[name]:.3g}", seconds


# ---------------------------------------------------------------------------------------------------------------------
# Time
# ---------------------------------------------------------------------------------------------------------------------


def stopwatch(launch: Callable[[], Any], wait: Callable[[Any], None], *, events: bool) -> Callable[[int], float]:
    """A function that launches `repeats` calls, waits for them, and returns the seconds of one.

    With `events`, for PyTorch on a GPU, it is timed by CUDA events; else by the wall clock around launches and one wait.
    """
    if events:
        import torch

        def by_events(repeats: int) -> float:
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            for _ in range(repeats):
                launch()
            end.record()
            end.synchronize()
            return begin.elapsed_time(end) / 1e3 / repeats

        return by_events

    def by_clock(repeats: int) -> float:
        begin, result = time.perf_counter(), None
        for _ in range(repeats):
            result = launch()
        wait(result)
        return (time.perf_counter() - begin) / repeats

    return by_clock


def kernel_seconds(launch: Callable[[], Any], wait: Callable[[Any], None], repeats: int = 5) -> float:
    """Seconds that the GPU was busy with one of JAX's calls: what its profiler saw on all streams."""
    import jax

    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(repeats):
                result = launch()
            wait(result)
        files = list(pathlib.Path(folder).rglob("*.xplane.pb"))
        planes = [plane for file in files for plane in jax.profiler.ProfileData.from_file(str(file)).planes]
    lines = [line for plane in planes if plane.name.startswith("/device:GPU") for line in plane.lines]
    events = [event for line in lines if line.name.startswith("Stream") for event in line.events]
    return sum(event.duration_ns for event in events) / 1e9 / repeats


def interleave(watches: Mapping[str, Callable[[int], float]], rounds: int, least: float) -> dict[str, list[float]]:
    """Seconds of one call by name, `rounds` of each: every contestant is measured once before any is measured again."""
    repeats = {}
    for name, watch in watches.items():
        watch(1)
        repeats[name] = max(1, math.ceil(least / max(watch(1), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in watches}
    for _ in range(rounds):
        for name, watch in watches.items():
            samples[name].append(watch(repeats[name]))
    return samples


def compare(
    entrants: Sequence[registry.Contestant], shape: registry.Shape, which: str, device: str, rounds: int, least: float
) -> list[dict[str, Any]]:
    """One row for every contestant at one shape: timed, or why not."""
    arrays = shape.make()
    want = references(shape, arrays)
    rows: dict[str, dict[str, Any]] = {}
    watches = {}
    for contestant in entrants:
        row: dict[str, Any] = {
            "contestant": contestant.name, "framework": contestant.framework, "operation": contestant.operation,
            "pass": which, **dataclasses.asdict(shape), "status": "timed", "reason": "",
        }  # fmt: skip
        rows[contestant.name] = row
        try:
            ready = contestant.prepare(shape, arrays, device)
            row["errors"], wrong, row["first_seconds"] = check(
                contestant, ready, shape, arrays, want(contestant.operation), which, device
            )
            if wrong is None:
                launch = functools.partial(ready.launch[which], ready.array(arrays["dy"]))
                if device == "cuda" and contestant.framework == "jax":
                    row["kernel_seconds"] = kernel_seconds(launch, ready.wait)
                watches[contestant.name] = stopwatch(
                    launch, ready.wait, events=device == "cuda" and contestant.framework == "torch"
                )
            else:
                row |= {"status": "wrong", "reason": wrong}
        except NotImplementedError as error:
            row |= {"status": "not served", "reason": _one_line(error)}
        except Exception as error:  # a peer may raise anything, and the others are to be timed all the same
            row |= {"status": "failed", "reason": f"{type(error).__name__}: {_one_line(error)}"[:500]}
    for name, samples in interleave(watches, rounds, least).items():
        low, median, high = np.percentile(samples, (10, 50, 90))
        rows[name] |= {"seconds": float(median), "low": float(low), "high": float(high), "samples": samples}
    return list(rows.values())


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> tuple[list[registry.Shape], tuple[registry.Contestant, ...]] | None:
    """Shapes and contestants that the command asks for; None if only help is asked for.

    Raises:
      UsageError: something is unknown or does not fit together.
    """
    FLAGS.unparse_flags()
    try:
        rest = FLAGS(argv)[1:]
    except flags.Error as error:
        raise UsageError(_one_line(error)) from error
    if FLAGS.help:
        return None
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; --help lists the flags")
    try:
        lengths = [int(t) for t in FLAGS.t]
    except ValueError:
        raise UsageError(f"--t={','.join(FLAGS.t)}: expected whole numbers") from None
    if not lengths or min(lengths) < 2:
        raise UsageError(f"--t={','.join(FLAGS.t)}: expected lengths of at least 2")
    h_kv = FLAGS.h if FLAGS.h_kv is None else FLAGS.h_kv
    if FLAGS.h % h_kv:
        raise UsageError(f"--h={FLAGS.h}: not a multiple of --h_kv={h_kv}")
    if FLAGS.deg % 2:
        raise UsageError(f"--deg={FLAGS.deg}: expected an even degree")
    if FLAGS.out is not None:
        _check_out(pathlib.Path(FLAGS.out))
    everyone = registry.contestants(FLAGS.device)
    if not everyone:
        raise UsageError(f"--device={FLAGS.device}: no framework here sees one")
    try:
        chosen = registry.select(everyone, FLAGS.contestants)
        if FLAGS.base is not None:
            registry.select(chosen, [FLAGS.base])
    except ValueError as error:
        raise UsageError(f"--{error}") from error
    shapes = [registry.Shape(t, FLAGS.b, FLAGS.h, h_kv, FLAGS.d, FLAGS.d, FLAGS.deg, FLAGS.dtype, FLAGS.gates) for t in lengths]
    return shapes, chosen


def _check_out(out: pathlib.Path) -> None:
    """Make the result's folder and see that it can be written, before minutes of work."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out={out}: cannot be written: {error.strerror}") from error
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        raise UsageError(f"--out={out}: cannot be written")


def commit() -> str | None:
    """The commit of the working tree, with "+" if it has changes; None outside a git checkout.

    POWER_COMMIT says it where the tree is a copy, whose `.git` is missing or older.
    """
    if os.environ.get("POWER_COMMIT"):
        return os.environ["POWER_COMMIT"]
    root = pathlib.Path(__file__).resolve().parent
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=root, capture_output=True, text=True, check=True,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def show(rows: Sequence[Mapping[str, Any]], base: str | None, console: Console) -> None:
    """Print the rows of one length; times relative to `base` are how many times faster a contestant is."""
    table = Table(box=None, pad_edge=False, title=f"t = {rows[0]['t']}, {rows[0]['pass']}", title_justify="left")
    kernels = ["kernels"] if any("kernel_seconds" in row for row in rows) else []
    against = [f"against {base}"] if base else []
    for column in ("contestant", "median", "10 % … 90 %", *kernels, "first call", "worst error", *against):
        table.add_column(column, justify="left" if column == "contestant" else "right", no_wrap=True)
    reference = next((row.get("seconds") for row in rows if row["contestant"] == base), None)
    for row in rows:
        if row["status"] != "timed":
            console.print(f"{row['contestant']} {row['status']}: {row['reason']}", markup=False, soft_wrap=True)
            continue
        spread = f"{report.seconds_text(row['low'])} … {report.seconds_text(row['high'])}"
        against = [f"{reference / row['seconds']:.2f}x" if reference else "–"] if base else []
        busy = [report.seconds_text(row["kernel_seconds"]) if "kernel_seconds" in row else "–"] if kernels else []
        worst, first = f"{max(row['errors'].values()):.1e}", report.seconds_text(row["first_seconds"])
        table.add_row(row["contestant"], report.seconds_text(row["seconds"]), spread, *busy, first, worst, *against)
    console.print(table)


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    try:
        parsed = parse(argv)
    except UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    if parsed is None:
        print(__doc__, FLAGS.get_help(), sep="\n")
        return 0
    shapes, entrants = parsed
    console, rows = Console(width=None if sys.stdout.isatty() else 120), []
    for shape in shapes:
        found = compare(entrants, shape, str(FLAGS["pass"].value), FLAGS.device, FLAGS.rounds, FLAGS.least)
        show(found, FLAGS.base, console)
        rows += found
    if FLAGS.out is not None:
        result = {
            "schema": 1, "argv": list(argv[1:]), "commit": commit(),
            "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
             "device": {"kind": FLAGS.device, "names": registry.device_names(FLAGS.device)},
            "environment": measure.environment(), "base": FLAGS.base,
            "compilation_cache": "JAX_COMPILATION_CACHE_DIR" in os.environ, "rows": rows,
        }  # fmt: skip
        report.write_whole(pathlib.Path(FLAGS.out), json.dumps(report.plain(result), indent=1, allow_nan=False) + "\n")
    return 1 if any(row["status"] in ("wrong", "failed") for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
