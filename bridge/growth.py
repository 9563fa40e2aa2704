"""How time and memory grow with the length: the attention form against the chunked one, float32, both twins.

One sequence of real text, 4 heads, d = e = 64, p = 2, gates, forward and backward. The attention form at the longest
length takes minutes and is extrapolated unless asked for: its time is quadratic in t, so the longest measured one is
  multiplied by
the square of the ratio of lengths (the two longest measured ones say how well that law holds).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

from bridge import inputs, measure, workers

LENGTHS = (2048, 4096, 8192, 16384, 32768)
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


def run(
    points: Sequence[Point], workshop: workers.Workshop, device: str, done: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every point measured, a series in a process that has allocated nothing before it."""
    measured: list[dict[str, Any]] = []
    series = None
    for point in points:
        if series != (point.twin, point.implementation, point.form):
            workshop.renew(point.twin)
        series = (point.twin, point.implementation, point.form)
        done(f"t={point.t} {point.form} {point.twin}/{point.implementation}")
        arrays = inputs.from_text(inputs.text(point.t), h_q=HEADS, h_kv=HEADS, d=HEAD_SIZE, e=HEAD_SIZE)
        case = inputs.given(f"growth_{point.t}", arrays, ("float32",))[0]
        outcome = workshop.measure(
            measure.Task(
                point.twin, "power", point.implementation, device, "float32", case.make("float32"),
                {"deg": DEGREE, "form": point.form}, keep_results=False,
            )
        )  # fmt: skip
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
    ran = {
        (row["twin"], row["implementation"], row["form"], row["t"]): row for row in measured if row["status"] == "ran"
    }
    found = []
    for twin, implementation in dict.fromkeys((row["twin"], row["implementation"]) for row in measured):
        of_form = {
            form: {key[3]: row for key, row in ran.items() if key[:3] == (twin, implementation, form)}
            for form in ("attention", "chunked")
        }
        if not of_form["attention"] or not of_form["chunked"]:
            continue
        t = max(of_form["chunked"])
        longest, half = of_form["chunked"][t], of_form["chunked"].get(t // 2)
        base = max(of_form["attention"])
        law = (t / base) ** 2
        entry = {
            "twin": twin, "implementation": implementation, "t": t, "chunked_seconds": longest["seconds"],
            "attention_seconds": of_form["attention"][base]["seconds"] * law,
            "speedup": of_form["attention"][base]["seconds"] * law / longest["seconds"],
            "cpu_speedup": of_form["attention"][base]["cpu_seconds"] * law / longest["cpu_seconds"],
            "extrapolated_from": None if base == t else base,
            "wanted_speedup": WANTED_SPEEDUP, "wanted_growth": WANTED_GROWTH,
        }  # fmt: skip
        if base // 2 in of_form["attention"]:
            entry["attention_exponent"] = _exponent(of_form["attention"][base // 2], of_form["attention"][base])
        if half is not None:
            entry["time_growth"] = longest["seconds"] / half["seconds"]
            entry["cpu_time_growth"] = longest["cpu_seconds"] / half["cpu_seconds"]
            if longest["peak_bytes"] and half["peak_bytes"]:
                entry["memory_growth"] = longest["peak_bytes"] / half["peak_bytes"]
        found.append(entry)
    return found


def _exponent(shorter: dict[str, Any], longer: dict[str, Any]) -> float:
    """The power of t that time grew with between two lengths, one twice the other."""
    return math.log2(longer["seconds"] / shorter["seconds"])
