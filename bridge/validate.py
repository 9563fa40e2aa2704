"""The agreement run: power attention and softmax attention in both packages, against a float64 oracle and each other.

    python -m bridge.validate [--inputs FILE] [--cases A,B] [--implementations A,B] [--device cpu|cuda]
        [--dtype A,B] [--lengths A,B] [--full] [--out FOLDER]

Every requested case is computed by every implementation of both packages, forward and backward with random upstream
gradients. A table is printed, `report.json` and `report.html` are written. Exit status: 0 if every number is within its
bound, 1 if one is not (the worst is named), 2 if the command or a file cannot be used (one line says why).
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from absl import flags
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from bridge import cases, cases_sdpa, growth, inputs, measure, spec, twins, twins_sdpa, workers

FLAGS = flags.FlagValues()
flags.DEFINE_string("inputs", None, "your own tensors: a .safetensors or .npz file holding q k v [log_g]", flag_values=FLAGS)
flags.DEFINE_list(
    "cases", None, "case names; 'sdpa:NAME' for softmax attention, text_LENGTH for real text (default: a selection)",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_list(
    "implementations", None, "implementation names of either package (default: all but 'reference')", flag_values=FLAGS
)
flags.DEFINE_enum("device", "cpu", ["cpu", "cuda"], "where to compute", flag_values=FLAGS)
flags.DEFINE_list(
    "dtype", None, "dtypes of q, k, v (default: the selection's own; float32,bfloat16 for named cases; a file's own)",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_string("out", "out/validate", "folder for report.json and report.html", flag_values=FLAGS)
flags.DEFINE_list(
    "lengths", None, "sequence lengths to measure time and memory at (default: only with the selection; none: '')",
    flag_values=FLAGS,
)  # fmt: skip
flags.DEFINE_bool("full", False, "measure the attention form at every length instead of extrapolating it", flag_values=FLAGS)
flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=FLAGS)

# What runs when nothing is asked for: text in every form and dtype, and the named cases that are most easily got wrong.
# (case, forms or None for all, dtypes)
SELECTION: tuple[tuple[str, tuple[str, ...] | None, tuple[str, ...]], ...] = (
    ("text_256", None, ("float32",)),
    ("text_256", ("chunked",), ("float64", "float16")),
    ("text_1024", ("attention", "chunked"), ("bfloat16",)),
    ("text_2048", ("chunked",), ("float32",)),
    ("gqa", ("recurrent",), ("bfloat16",)),
    ("mixed_decay", ("chunked",), ("float32",)),
    ("degree_4", ("chunked",), ("float32",)),
    ("state_to_state", ("chunked",), ("float32",)),
    ("not_causal_cross", ("chunked",), ("float32",)),
    ("large_inputs", ("chunked",), ("float16",)),
    ("sdpa:text_1024", None, ("float32", "bfloat16")),
    ("sdpa:gqa", None, ("float16",)),
    ("sdpa:bias", None, ("float32",)),
    ("sdpa:cross", None, ("float64",)),
)

# Beyond this length the O(t²) oracle takes minutes and gigabytes: the portable implementation in float64 stands in for
# it, once it has been shown to equal the oracle on the first `PROOF_LENGTH` tokens of the same inputs.
ORACLE_LENGTH = 4096
PROOF_LENGTH = 1024

Case = cases.Case | cases_sdpa.SdpaCase


class UsageError(ValueError):
    """A command that cannot be carried out; the message is one line."""


class BadReference(RuntimeError):
    """A reference that could not be made, or is not the oracle's: nothing can be held to it."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One case in one dtype: its inputs and exact results are made once, for every form and implementation."""

    operation: str
    case: Case
    dtype: str
    forms: tuple[str, ...]

    @property
    def name(self) -> str:
        return self.case.name if self.operation == "power" else f"sdpa:{self.case.name}"

    def bounds(self, implementation: str) -> dict[str, float]:
        if isinstance(self.case, cases.Case):
            return cases.bounds(self.dtype, implementation, self.case)
        return cases_sdpa.bounds(self.dtype, implementation)


@dataclasses.dataclass(frozen=True)
class Request:
    """The command, checked."""

    device: str
    dtypes: tuple[str, ...] | None
    implementations: tuple[str, ...] | None
    problems: tuple[Problem, ...]
    lengths: tuple[int, ...]
    full: bool
    out: pathlib.Path
    source: str


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> Request | None:
    """The command line as a `Request`; None if only help is asked for.

    Raises:
      UsageError, inputs.InputError: something is unknown, cannot be read or does not fit together.
    """
    FLAGS.unparse_flags()
    try:
        rest = FLAGS(argv)[1:]
    except flags.Error as error:
        raise UsageError(" ".join(str(error).split())) from error
    if FLAGS.help:
        return None
    if rest:
        raise UsageError(f"unexpected argument {rest[0]!r}; --help lists the flags")
    for dtype in FLAGS.dtype or ():
        if dtype not in spec.FLOAT_DTYPES:
            raise UsageError(f"--dtype={dtype}: expected some of {', '.join(spec.FLOAT_DTYPES)}")
    dtypes = tuple(FLAGS.dtype) if FLAGS.dtype else None
    names = tuple(FLAGS.implementations) if FLAGS.implementations else None
    if FLAGS.inputs is not None:
        problems, source = _of_file(FLAGS.inputs, FLAGS.cases, dtypes), FLAGS.inputs
    else:
        problems, source = _of_names(FLAGS.cases, dtypes), "text: the source of Python's standard library"
    lengths = _lengths(FLAGS.lengths, default=FLAGS.inputs is None and not FLAGS.cases)
    return Request(FLAGS.device, dtypes, names, problems, lengths, FLAGS.full, pathlib.Path(FLAGS.out), source)


def _lengths(asked: Sequence[str] | None, *, default: bool) -> tuple[int, ...]:
    if asked is None:
        return growth.LENGTHS if default else ()
    try:
        lengths = tuple(sorted({int(length) for length in asked if length}))
    except ValueError:
        raise UsageError(f"--lengths={','.join(asked)}: expected whole numbers") from None
    if lengths and lengths[0] < 1:
        raise UsageError(f"--lengths={lengths[0]}: expected at least 1")
    return lengths


def known_cases() -> tuple[str, ...]:
    """Every name that `--cases` takes."""
    text = [f"text_{length}" for length in inputs.TEXT_LENGTHS]
    sdpa = [case.name for case in cases_sdpa.SDPA if twins_sdpa.both_express(case)] + text
    return (*text, *cases.BY_NAME, *(f"sdpa:{name}" for name in sdpa))


def _case(name: str) -> Case:
    operation, name = ("sdpa", name.removeprefix("sdpa:")) if name.startswith("sdpa:") else ("power", name)
    if name.startswith("text_"):
        return inputs.text_cases(int(name.removeprefix("text_")))[operation == "sdpa"]
    return (cases_sdpa.BY_NAME if operation == "sdpa" else cases.BY_NAME)[name]


def _problem(case: Case, dtype: str, forms: tuple[str, ...] | None = None) -> Problem:
    if isinstance(case, cases.Case):
        return Problem("power", case, dtype, forms or case.forms)
    return Problem("sdpa", case, dtype, ("attention",))


def _of_names(names: Sequence[str] | None, dtypes: tuple[str, ...] | None) -> tuple[Problem, ...]:
    if not names:
        chosen = ((name, forms, dtypes or own) for name, forms, own in SELECTION)
        found = [_problem(_case(name), dtype, forms) for name, forms, use in chosen for dtype in use]
        return tuple({(problem.name, problem.dtype, problem.forms): problem for problem in found}.values())
    problems, known = [], known_cases()
    for name in names:
        if name not in known:
            raise UsageError(f"--cases={name}: unknown; expected some of {', '.join(known)}")
        case = _case(name)
        fitting = [dtype for dtype in dtypes or ("float32", "bfloat16") if dtype in case.dtypes]
        if dtypes and not fitting:
            raise UsageError(f"--dtype={','.join(dtypes)}: case {name!r} is defined for {', '.join(case.dtypes)}")
        problems += [_problem(case, dtype) for dtype in fitting or case.dtypes]
    return tuple(problems)


def _of_file(path: str, names: Sequence[str] | None, dtypes: tuple[str, ...] | None) -> tuple[Problem, ...]:
    unknown = [name for name in names or () if name not in ("inputs", "sdpa:inputs")]
    if unknown:
        raise UsageError(f"--cases={unknown[0]}: with --inputs, expected 'inputs', 'sdpa:inputs' or both")
    arrays = inputs.load(path)
    own = tuple(dict.fromkeys(spec.dtype_name(arrays[name]) for name in ("q", "k", "v")))
    if dtypes is None and len(own) > 1:
        raise UsageError(f"{path}: q, k and v have dtypes {', '.join(own)}; --dtype says which one to use")
    both: tuple[Case, Case] = inputs.given("inputs", arrays, spec.FLOAT_DTYPES)
    wanted = [case for case, name in zip(both, ("inputs", "sdpa:inputs"), strict=True) if not names or name in names]
    return tuple(_problem(case, dtype) for dtype in dtypes or own for case in wanted)


def check_out(out: pathlib.Path) -> None:
    """Make the folder and try to write in it, before minutes of work whose report would have nowhere to go."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UsageError(f"--out={out}: cannot be written: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The run
# ---------------------------------------------------------------------------------------------------------------------

Contestants = Mapping[str, Sequence[tuple[str, str]]]


def contestants(workshop: workers.Workshop, request: Request) -> tuple[Contestants, dict[str, str]]:
    """(twin, implementation) pairs of each operation, and each twin's name of the device.

    Raises:
      UsageError: no framework is installed, one has no such device, or an implementation is unknown.
    """
    if not workshop.twins:
        raise UsageError("neither jax nor torch is installed: there is nothing to validate")
    found: dict[str, list[tuple[str, str]]] = {"power": [], "sdpa": []}
    devices = {}
    for twin in workshop.twins:
        try:
            described = workshop.call(twin, measure.describe, twin, request.device)
        except ValueError as error:
            raise UsageError(f"--{error}") from error
        devices[twin] = described["device"]
        for operation, names in described["implementations"].items():
            found[operation] += [(twin, name) for name in names]
    known = tuple(dict.fromkeys(name for pairs in found.values() for _, name in pairs))
    for name in request.implementations or ():
        if name not in known:
            raise UsageError(f"--implementations={name}: unknown; expected some of {', '.join(known)}")
    # The references hold all weights at once and are there to be read; they run when named.
    wanted = request.implementations or [name for name in known if name != "reference"]
    return {operation: [pair for pair in pairs if pair[1] in wanted] for operation, pairs in found.items()}, devices


def run_problem(
    problem: Problem,
    pairs: Sequence[tuple[str, str]],
    workshop: workers.Workshop,
    device: str,
    done: Callable[[str], None],
) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows of the report for one case in one dtype, and notes on how its reference was made."""
    arrays = problem.case.make(problem.dtype)
    want, notes = reference(problem, arrays, workshop)
    floors = _floors(problem, arrays)
    rows = []
    for form in problem.forms:
        outcomes = {}
        for twin, implementation in pairs:
            done(f"{problem.name} {problem.dtype} {twin}/{implementation}")
            outcomes[twin, implementation] = workshop.measure(_task(problem, form, twin, implementation, device, arrays))
        rows += [_row(problem, form, pair, outcomes, want, floors) for pair in outcomes]
    return rows, notes


def _task(
    problem: Problem, form: str, twin: str, implementation: str, device: str, arrays: Mapping[str, np.ndarray]
) -> measure.Task:
    case, key = problem.case, f"{problem.name} {problem.dtype} {form} {implementation}"
    if isinstance(case, cases_sdpa.SdpaCase):
        return measure.Task(twin, "sdpa", implementation, device, problem.dtype, arrays, case=_without_arrays(case), key=key)
    options = case.options() | {"form": form, "chunk_size": case.chunk_size}
    return measure.Task(twin, "power", implementation, device, problem.dtype, arrays, options, key=key)


def _without_arrays(case: cases_sdpa.SdpaCase) -> cases_sdpa.SdpaCase:
    """The same case without a copy of its inputs: what travels to another process."""
    return dataclasses.replace(case, arrays={}) if isinstance(case, inputs.GivenSdpaCase) else case


def programs(request: Request, pairs: Contestants, plan: Sequence[growth.Point]) -> list[measure.Task]:
    """Every task of the run that has a program for a GPU to be compiled: those of JAX."""
    found = [
        _task(problem, form, twin, implementation, request.device, problem.case.make(problem.dtype))
        for problem in request.problems
        for form in problem.forms
        for twin, implementation in pairs[problem.operation]
        if twin == "jax_power"
    ]
    return found + [growth.task(point, request.device) for point in plan if point.twin == "jax_power"]


def _floors(problem: Problem, arrays: Mapping[str, np.ndarray]) -> dict[str, float]:
    """What an error is measured against at least: ‖dy‖ for gradients that are 0 but for cancellation, else nothing."""
    size = float(np.linalg.norm(arrays["dy"].astype(np.float64)))
    return {name: size if name in problem.case.cancelling else 0.0 for name in problem.bounds("portable")}


def exact(problem: Problem, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The oracle's outputs and gradients."""
    if isinstance(problem.case, cases.Case):
        return problem.case.exact(arrays)
    return {name: x for name, x in problem.case.exact(arrays, "zero").items() if name != "lse"}


def reference(
    problem: Problem, arrays: Mapping[str, np.ndarray], workshop: workers.Workshop
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The oracle's results; beyond `ORACLE_LENGTH`, the portable implementation's in float64, shown to equal it."""
    case = problem.case
    if case.t <= ORACLE_LENGTH:
        return exact(problem, arrays), []
    twin = workshop.twins[-1]
    portable = {"torch_power": "eager", "jax_power": "xla"}[twin]
    form = "chunked" if "chunked" in problem.forms else "attention"

    def in_float64(case: Case, arrays: Mapping[str, np.ndarray]) -> tuple[Problem, dict[str, np.ndarray]]:
        wide = Problem(problem.operation, case, "float64", problem.forms)
        outcome = workshop.measure(_task(wide, form, twin, portable, "cpu", arrays))
        if outcome.status != "ran":
            raise BadReference(f"reference for {problem.name}: {twin}/{portable} {outcome.status}: {outcome.reason}")
        return wide, outcome.results

    wide = {name: x.astype(np.float64) for name, x in arrays.items()}
    start = {name: x[:, :PROOF_LENGTH] for name, x in wide.items()}
    short, got = in_float64(dataclasses.replace(case, t=PROOF_LENGTH), start)
    floors, want = _floors(short, start), exact(short, start)
    found = {name: cases.relative_error(got[name], x, floors[name]) for name, x in want.items()}
    try:
        cases.assert_within(found, short.bounds(portable), f"{twin}/{portable} as the reference for {problem.name}")
    except AssertionError as error:
        raise BadReference(str(error)) from error
    note = (
        f"{problem.name} {problem.dtype}: t = {case.t} is beyond the O(t²) oracle ({ORACLE_LENGTH}). The reference is "
        f"{twin}/{portable}, {form} form, in float64, whose first {PROOF_LENGTH} tokens "
        f"equal the oracle to {max(found.values()):.1e}."
    )
    return in_float64(case, wide)[1], [note]


def _row(
    problem: Problem,
    form: str,
    pair: tuple[str, str],
    outcomes: Mapping[tuple[str, str], measure.Outcome],
    want: Mapping[str, np.ndarray],
    floors: Mapping[str, float],
) -> dict[str, Any]:
    """One implementation's row: errors and differences per tensor, the worst against its bound, time, memory."""
    outcome, case, (twin, implementation) = outcomes[pair], problem.case, pair
    row: dict[str, Any] = {
        "operation": problem.operation, "case": problem.name, "form": form, "dtype": problem.dtype, "twin": twin,
        "implementation": implementation, "status": outcome.status, "reason": outcome.reason,
        "tensors": {}, "worst": None,
        "b": case.b, "t": case.t, "h_q": case.h_q, "h_kv": case.h_kv, "d": case.d, "e": case.e,
    }  # fmt: skip
    if outcome.status != "ran":
        return row
    bounds = problem.bounds(implementation)
    row["tensors"] = {name: {"error": np.inf, "bound": bounds[name], "difference": None} for name in want}
    for name, tensor in row["tensors"].items():
        got = outcome.results.get(name)
        tensor["error"] = np.inf if got is None else cases.relative_error(got, want[name], floors[name])
    for (other_twin, other), theirs in outcomes.items():
        if other_twin == twin or theirs.status != "ran":
            continue
        allowed = problem.bounds(other)
        for name, tensor in row["tensors"].items():
            if name not in outcome.results or name not in theirs.results:
                continue
            # Exact zeros say nothing about the size of what cancelled: the oracle's norm and ‖dy‖ are the scale here too.
            floor = max(floors[name], float(np.linalg.norm(want[name])))
            difference = cases.relative_error(outcome.results[name], theirs.results[name], floor)
            ratio = difference / max(bounds[name], allowed[name])
            if tensor["difference"] is None or ratio > tensor["difference_ratio"]:
                tensor |= {"difference": difference, "difference_ratio": ratio, "difference_to": other}
    row["worst"] = max((_worst(name, tensor) for name, tensor in row["tensors"].items()), key=lambda worst: worst["ratio"])
    row["repeatable"] = outcome.repeatable
    row["status"] = "holds" if row["worst"]["ratio"] <= 1 and outcome.repeatable is not False else "breach"
    if outcome.repeatable is False:
        row["reason"] = "two calls on the same inputs gave different bits"
    row |= {"seconds": outcome.median_seconds, "all_seconds": list(outcome.seconds), "cpu_seconds": outcome.cpu_seconds}
    return row | {"peak_bytes": outcome.peak_bytes}


def _worst(name: str, tensor: Mapping[str, Any]) -> dict[str, Any]:
    """The larger of a tensor's error and its difference from the other twin, each over its bound."""
    ratio, difference = tensor["error"] / tensor["bound"], tensor.get("difference_ratio", 0.0)
    if difference > ratio:
        bound = tensor["difference"] / difference if difference else tensor["bound"]
        return {"tensor": name, "kind": f"difference from {tensor['difference_to']}", "value": tensor["difference"],
                "bound": bound, "ratio": difference}  # fmt: skip
    return {"tensor": name, "kind": "error", "value": tensor["error"], "bound": tensor["bound"], "ratio": ratio}


def run(request: Request, console: Console, workshop: workers.Workshop) -> dict[str, Any]:
    """Everything that was requested, as the contents of `report.json`."""
    begin = time.perf_counter()
    pairs, devices = contestants(workshop, request)
    check_out(request.out)
    rows: list[dict[str, Any]] = []
    notes: list[str] = []
    measured: list[dict[str, Any]] = []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        steps = sum(len(problem.forms) * len(pairs[problem.operation]) for problem in request.problems)
        plan = growth.plan(pairs["power"], request.lengths, full=request.full)
        ahead = programs(request, pairs, plan) if request.device == "cuda" else []
        bar = progress.add_task("", total=steps + len(plan) + bool(ahead))

        def done(description: str) -> None:
            progress.update(bar, advance=1, description=f"{description:<50}")
            if not console.is_terminal:  # in a log, one line each: it tells where a run is, or was when it ended
                elapsed = time.perf_counter() - begin
                console.print(f"{elapsed:6.1f} s  {description}", markup=False, highlight=False, soft_wrap=True)

        if ahead:
            done(f"compiling {len(ahead)} programs of jax_power")
            workshop.compile_ahead(ahead)
        for problem in request.problems:
            found, said = run_problem(problem, pairs[problem.operation], workshop, request.device, done)
            rows, notes = rows + found, notes + said
        if plan:
            measured = growth.run(plan, workshop, request.device, done)
    return {
        "schema": 1,
        "verdict": verdict(rows),
        "inputs": {"source": request.source, "digests": _digests(request.problems)},
        "device": {"kind": request.device, "names": devices},
        "environment": measure.environment(),
        "memory_method": measure.MEMORY_METHOD[request.device],
        "rows": rows,
        "growth": {"measured": measured, "summary": growth.summary(measured)},
        "notes": notes,
        "seconds": time.perf_counter() - begin,
    }


def _digests(problems: Iterable[Problem]) -> dict[str, str]:
    """What the inputs of given cases were, so that two machines can tell whether they computed the same thing."""
    given = (inputs.GivenCase, inputs.GivenSdpaCase)
    return {problem.case.name: inputs.digest(problem.case.arrays) for problem in problems if isinstance(problem.case, given)}


def verdict(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Whether all holds: nothing is broken and something was checked (a row that was not served is no pass)."""
    counts = {status: sum(row["status"] == status for row in rows) for status in ("holds", "breach", "failed", "not served")}
    broken = [row for row in rows if row["status"] in ("breach", "failed")]
    # A failure has no number; a breach of repeatability alone has one below 1. Both come before nothing, failures
    # first.
    worst = max(broken, key=lambda row: np.inf if row["status"] == "failed" else row["worst"]["ratio"], default=None)
    told = None if worst is None else describe_breach(worst)
    if worst is None and not counts["holds"]:
        told = "nothing was checked: no implementation served any of the cases"
    return {"holds": told is None, "counts": counts, "worst": told}


def describe_breach(row: Mapping[str, Any]) -> str:
    """One line that names a row that does not hold, and why."""
    where = f"{row['case']} {row['dtype']} {row['form']} {row['twin']}/{row['implementation']}"
    if row["status"] == "failed" or row["worst"]["ratio"] <= 1:
        return f"{where}: {row['reason']}"
    worst = row["worst"]
    told = f"{worst['kind']} {worst['value']:.3g} > bound {worst['bound']:.3g} ({worst['ratio']:.3g}x)"
    return f"{where}: {worst['tensor']}: {told}"


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status."""
    try:
        request = parse(argv)
        if request is None:
            print(__doc__, FLAGS.get_help(), sep="\n")
            return 0
        with workers.Workshop([twin.name for twin in twins.present()], request.device) as workshop:
            found = run(request, Console(stderr=True), workshop)
    except (UsageError, inputs.InputError) as error:
        print(f"validate: {error}", file=sys.stderr)
        return 2
    except BadReference as error:
        print(f"validate: does not hold: {error}", file=sys.stderr)
        return 1
    # Not at the top: every worker process imports this module, and none of them plots.
    from bridge import report

    report.show(found, Console(width=None if sys.stdout.isatty() else 160))
    path = report.write(found, request.out)
    if not found["verdict"]["holds"]:
        print(f"validate: does not hold, worst: {found['verdict']['worst']}", file=sys.stderr)
    sys.stderr.flush()
    print(os.fspath(path))
    return 0 if found["verdict"]["holds"] else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv))
