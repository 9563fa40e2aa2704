"""One measured call of one implementation, made for a process of its own: results, time and peak memory.

Nothing here is kept between calls but the imported frameworks and programs compiled ahead, so a `Task` gives the same `Outcome`
in any process.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import ctypes
import dataclasses
import importlib
import importlib.metadata
import os
import pathlib
import platform
import resource
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from bridge import twins, twins_sdpa

OPERATIONS = {
    "jax_power": {"power": "power_attention", "sdpa": "dot_product_attention"},
    "torch_power": {"power": "power_attention", "sdpa": "scaled_dot_product_attention"},
}


# Calls are timed until they have taken this long together (seconds), or there have been this many; there is at least one.
BUDGET = 0.2
MOST_CALLS = 9


@dataclasses.dataclass(frozen=True)
class Task:
    """A call to measure. `options` are keyword arguments of `power_attention`; for "sdpa", `case` says what is computed.

    `key` names the task for `compile_ahead`.
    """

    twin: str
    operation: str
    implementation: str | None
    device: str
    dtype: str
    arrays: Mapping[str, np.ndarray]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    case: Any = None
    keep_results: bool = True
    key: str = ""


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a task.

    Fields:
      status: "ran", "not served" (NotImplementedError) or "failed" (anything else); `reason` says why in the last two.
      results: outputs and gradients by name, empty unless kept.
      seconds: wall time of every timed call, forward and backward; `cpu_seconds` the processor time of the first of
        them.
      peak_bytes: most memory in use during a call above what was in use before it; None where it could not be told.
      repeatable: a second call gave the same bits; None if there was none.
    """

    status: str
    reason: str = ""
    results: dict[str, np.ndarray] = dataclasses.field(default_factory=dict)
    seconds: tuple[float, ...] = ()
    cpu_seconds: float = 0.0
    peak_bytes: int | None = None
    repeatable: bool | None = None

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)


def measure(task: Task) -> Outcome:
    """Run `task` in this process: once compiled, a call for memory and the first time, then calls for time."""
    twin = _twin(task.twin)
    try:
        with twin.scope(task.dtype):
            return _measure(twin, task)
    except NotImplementedError as error:
        return Outcome("not served", _one_line(error))
    except Exception as error:  # whatever an implementation raises is a finding about it
        return Outcome("failed", f"{type(error).__name__}: {_one_line(error)}"[:500])


# What `compile_ahead` has made ready in this process, by the key of the task, until it is measured.
_ready: dict[str, twins.Prepared] = {}


def compile_ahead(tasks: Sequence[Task]) -> None:
    """Compile the programs of `tasks` beside each other, for `measure` in this process: XLA takes seconds to compile one for a
    GPU, on one core.

    A task that cannot be compiled is left out: `measure` tries again, and reports what is wrong with it.
    """

    def make_ready(task: Task) -> None:
        twin = _twin(task.twin)
        with twin.scope(task.dtype), contextlib.suppress(Exception):
            prepared = _prepare(twin, task)
            prepared.compile()
            _ready[task.key] = prepared

    with concurrent.futures.ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        list(pool.map(make_ready, tasks))


def _prepare(twin: twins.Twin, task: Task) -> twins.Prepared:
    if task.operation == "power":
        return twin.prepare_power(task.arrays, task.options, task.implementation, task.device)
    return twins_sdpa.prepare(twin, task.case, task.arrays, task.implementation, task.device)


def _measure(twin: twins.Twin, task: Task) -> Outcome:
    prepared = _ready.pop(task.key, None) or _prepare(twin, task)
    compiled = prepared.compile()
    stop_meter = _meter(task, compiled)
    begin, cpu_begin = time.perf_counter(), time.process_time()
    results = prepared.forward_backward()
    first_seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - cpu_begin
    peak_bytes = stop_meter()
    first = {name: twin.numpy(x) for name, x in results.items()}
    del results
    seconds: list[float] = []
    repeatable = None
    while len(seconds) < MOST_CALLS and first_seconds + sum(seconds) < BUDGET:
        begin = time.perf_counter()
        results = prepared.forward_backward()
        seconds.append(time.perf_counter() - begin)
        if repeatable is None:
            repeatable = all(twin.numpy(x).tobytes() == first[name].tobytes() for name, x in results.items())
        del results
    # The first call also paid for what is set up once: it counts only where it is the only one.
    seconds = seconds or [first_seconds]
    return Outcome("ran", "", first if task.keep_results else {}, tuple(seconds), cpu_seconds, peak_bytes, repeatable)


def _twin(name: str) -> twins.Twin:
    return {twin.name: twin for twin in (twins.JAX, twins.TORCH)}[name]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------------------------------------
# Peak memory
# ---------------------------------------------------------------------------------------------------------------------

MEMORY_METHOD = {
    "cpu": "Peak resident memory of the process during the call less that before it. First the allocator returns what "
    "it holds free (malloc_trim) and the kernel's high-water mark is reset (/proc/self/clear_refs). Each framework has "
    "a process of its own; compilation, and the results' copies in NumPy, are not counted.",
    "cuda": "PyTorch: peak of the caching allocator during the call less what was allocated before it. JAX: temporaries and "
    "results of the compiled program as XLA assigned them (its allocator's peak cannot be reset).",
}


def _meter(task: Task, compiled: Any) -> Callable[[], int | None]:
    """Start measuring a call's memory; the function returned stops and gives bytes. `compiled`: JAX's program."""
    if task.device == "cpu":
        return _resident_memory()
    return _torch_device_memory() if task.twin == "torch_power" else lambda: program_memory(compiled)


def program_memory(compiled: Any) -> int | None:
    """Bytes of temporaries and results of a program that JAX compiled, as its compiler assigned them."""
    found = compiled.memory_analysis()
    return None if found is None else found.temp_size_in_bytes + found.output_size_in_bytes


def _resident_memory() -> Callable[[], int | None]:
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    status, clear = pathlib.Path("/proc/self/status"), pathlib.Path("/proc/self/clear_refs")
    try:
        clear.write_text("5")
    except OSError:
        # Where the mark cannot be reset it is the process's own since its start: right as long as it keeps rising.
        before = _maxrss()
        return lambda: (_maxrss() - before) or None
    before = _kilobytes(status, "VmRSS")
    return lambda: max(0, _kilobytes(status, "VmHWM") - before) * 1024


def _kilobytes(status: pathlib.Path, field: str) -> int:
    return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field + ":"))


def _maxrss() -> int:
    unit = 1 if platform.system() == "Darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _torch_device_memory() -> Callable[[], int | None]:
    torch = importlib.import_module("torch")
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    return lambda: torch.cuda.max_memory_allocated() - before


# ---------------------------------------------------------------------------------------------------------------------
# What runs here
# ---------------------------------------------------------------------------------------------------------------------


def describe(twin: str, device: str) -> dict[str, Any]:
    """Implementations of each operation and the name of `device`, as this process's framework sees them.

    Raises:
      ValueError: the framework has no such device here.
    """
    implementations = {name: _twin(twin).implementations(table) for name, table in OPERATIONS[twin].items()}
    if twin == "jax_power":
        jax = importlib.import_module("jax")
        try:
            found = jax.devices(device)[0].device_kind
        except RuntimeError as error:
            raise ValueError(f"device={device!r}: JAX finds none here") from error
    else:
        torch = importlib.import_module("torch")
        if device == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device={device!r}: PyTorch finds none here")
        found = torch.cuda.get_device_name() if device == "cuda" else "cpu"
    return {"implementations": implementations, "device": found}


def environment() -> dict[str, Any]:
    """Versions and the machine, for a report."""
    versions = {}
    for package in ("numpy", "jax", "jaxlib", "torch", "ml_dtypes", "triton"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load": round(os.getloadavg()[0], 1),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor())
