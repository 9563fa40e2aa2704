"""How time and memory grow with the length: the attention form against the chunked one, float32, both twins.

One sequence of real text, 4 heads, d = e = 64, p = 2, gates, forward and backward. The attention form at the longest length
takes minutes and is extrapolated unless asked for: as a·t + b·t² through the two longest measured lengths, since what is
linear in t still counts there, or by t² alone where that gives a negative a.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bridge import inputs, measure, workers

LENGTHS = (4096, 8192, 16384, 32768)
HEADS, HEAD_SIZE, DEGREE = 4, 64, 2
# The longest length at which the attention form is measured unless everything is.
ATTENTION_LENGTH = 8192

# What the contract asks for: how many times faster the chunked form is than the attention form at the longest length,
# and how much time and memory may grow there when the length doubles.
WANTED_SPEEDUP = 4.0
WANTED_GROWTH = 2.3


@dataclasses.dataclass(frozen=True)
class Point:
    """One measurement: an implementation of a twin in one form at one length."""

    twin: str
    implementation: str
    form: str
    t: int


def plan(pairs: Sequence[tuple[str, str]], lengths: Sequence[int], *, full: bool) -> list[Point]:
    """Series of rising lengths, one after another. All twins' attention forms first: they are the short ones."""
    points = []
    for form in ("attention", "chunked"):
        fitting = [t for t in lengths if full or form == "chunked" or t <= ATTENTION_LENGTH]
        points += [Point(*pair, form, t) for pair in pairs for t in fitting]
    return points


def task(point: Point, device: str) -> measure.Task:
    """What is measured at a point."""
    arrays = inputs.from_text(inputs.text(point.t), h_q=HEADS, h_kv=HEADS, d=HEAD_SIZE, e=HEAD_SIZE)
    case = inputs.given(f"growth_{point.t}", arrays, ("float32",))[0]
    return measure.Task(
        point.twin, "power", point.implementation, device, "float32", case.make("float32"),
        {"deg": DEGREE, "form": point.form}, keep_results=False, key=f"{case.name} {point.form} {point.implementation}",
    )  # fmt: skip


def run(points: Sequence[Point], workshop: workers.Workshop, device: str, done: Callable[[str], None]) -> list[dict[str, Any]]:
    """Every point measured, in order."""
    measured: list[dict[str, Any]] = []
    for point in points:
        done(f"t={point.t} {point.form} {point.twin}/{point.implementation}")
        outcome = workshop.measure(task(point, device))
        row = dataclasses.asdict(point) | {"status": outcome.status, "reason": outcome.reason}
        if outcome.status == "ran":
            row |= {
                "seconds": outcome.median_seconds,
                "cpu_seconds": outcome.cpu_seconds,
                "peak_bytes": outcome.peak_bytes,
            }
        measured.append(row)
    return measured


def summary(measured: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For every implementation: the chunked form's speed-up at the longest length, and its growth from half of it."""
    ran = {(row["twin"], row["implementation"], row["form"], row["t"]): row for row in measured if row["status"] == "ran"}
    found = []
    for twin, implementation in dict.fromkeys((row["twin"], row["implementation"]) for row in measured):
        attention, chunked = (
            {key[3]: row for key, row in ran.items() if key[:3] == (twin, implementation, form)}
            for form in ("attention", "chunked")
        )
        if not attention or not chunked:
            continue
        t = max(chunked)
        longest, half = chunked[t], chunked.get(t // 2)
        seconds, cpu_seconds = (
            extrapolate({length: row[name] for length, row in attention.items()}, t) for name in ("seconds", "cpu_seconds")
        )
        entry = {
            "twin": twin, "implementation": implementation, "t": t,
            "chunked_seconds": longest["seconds"], "attention_seconds": seconds,
            "speedup": seconds / longest["seconds"], "cpu_speedup": cpu_seconds / longest["cpu_seconds"],
            "extrapolated_from": [] if t in attention else sorted(attention)[-2:],
            "wanted_speedup": WANTED_SPEEDUP, "wanted_growth": WANTED_GROWTH,
        }  # fmt: skip
        if half is not None:
            entry["time_growth"] = longest["seconds"] / half["seconds"]
            entry["cpu_time_growth"] = longest["cpu_seconds"] / half["cpu_seconds"]
            if longest["peak_bytes"] and half["peak_bytes"]:
                entry["memory_growth"] = longest["peak_bytes"] / half["peak_bytes"]
        found.append(entry)
    return found


def extrapolate(seconds: Mapping[int, float], t: int) -> float:
    """Time of the attention form at length `t` from those at shorter ones: a·t + b·t², or b·t² if a would be negative."""
    if t in seconds:
        return seconds[t]
    *_, shorter, longer = [0, *sorted(seconds)]
    if shorter:
        b = (seconds[longer] / longer - seconds[shorter] / shorter) / (longer - shorter)
        a = seconds[longer] / longer - b * longer
        if a >= 0 and b >= 0:
            return a * t + b * t**2
    return seconds[longer] * (t / longer) ** 2
