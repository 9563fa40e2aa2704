"""A process for each framework: memory is its own, threads do not mix, and a crash is a finding, not the end."""

from __future__ import annotations

import concurrent.futures
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from bridge import measure

Result = TypeVar("Result")


# prctl's option to be sent a signal when the parent ends (linux/prctl.h).
_PR_SET_PDEATHSIG = 1


def _set_up(device: str) -> None:
    """In a new process, before JAX is imported: it shall not take 75% of the GPU's memory, and use the device asked for.

    Nor shall the process go on computing for minutes when the run that wanted the result has been killed.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if device == "cpu":
        os.environ["JAX_PLATFORMS"] = "cpu"


class Workshop:
    """A process per twin, started when first needed and replaced when it dies. A context manager.

    Args:
      twins: names of the twins whose framework is installed.
      device: "cpu" or "cuda".
    """

    def __init__(self, twins: Sequence[str], device: str):
        self.twins = tuple(twins)
        self._device = device
        self._pools: dict[str, concurrent.futures.ProcessPoolExecutor] = {}

    def __enter__(self) -> Workshop:
        return self

    def __exit__(self, *error: object) -> None:
        for twin in tuple(self._pools):
            self.renew(twin)

    def call(self, twin: str, function: Callable[..., Result], *arguments: Any) -> Result:
        """`function(*arguments)` in the twin's process."""
        if twin not in self._pools:
            # Spawned, not forked: a forked child would inherit locks that the parent's threads hold.
            self._pools[twin] = concurrent.futures.ProcessPoolExecutor(
                1, multiprocessing.get_context("spawn"), initializer=_set_up, initargs=(self._device,)
            )
        return self._pools[twin].submit(function, *arguments).result()

    def compile_ahead(self, tasks: Sequence[measure.Task]) -> None:
        """`measure.compile_ahead` in the process of the tasks' twin. One that dies has compiled nothing, and `measure` will."""
        try:
            self.call(tasks[0].twin, measure.compile_ahead, tasks)
        except BrokenProcessPool:
            self.renew(tasks[0].twin)

    def measure(self, task: measure.Task) -> measure.Outcome:
        """`measure.measure` in the process of the task's twin; a process that dies makes it a failed one."""
        try:
            return self.call(task.twin, measure.measure, task)
        except BrokenProcessPool:
            self.renew(task.twin)
            return measure.Outcome("failed", "the process died (killed, out of memory, or a crash in compiled code)")

    def renew(self, twin: str) -> None:
        """End the twin's process; the next call starts a new one, with nothing allocated."""
        pool = self._pools.pop(twin, None)
        if pool is not None:
            pool.shutdown(cancel_futures=True)
