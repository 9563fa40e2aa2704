"""The README's examples run as they stand, and its numbers are the library's."""

from __future__ import annotations

import importlib
import importlib.util
import json
import pathlib
import re
import subprocess
import sys

import pytest

from bridge import cases, spec, twins

ROOT = pathlib.Path(__file__).resolve().parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


def cells(heading: str) -> list[list[str]]:
    """The rows of the first table after `heading`, without its head."""
    table = re.search(r"(?:^\|.*\n)+", TEXT[TEXT.index(heading) :], flags=re.MULTILINE)
    assert table is not None
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines()[2:]]


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_example_runs(number):
    for framework in ("jax", "torch"):
        if f"import {framework}" in BLOCKS[number] and importlib.util.find_spec(framework) is None:
            pytest.skip(f"needs {framework}, which is not installed")
    command = [sys.executable, "-W", "error::DeprecationWarning:__main__", "-c", BLOCKS[number]]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=240, check=False)
    assert result.returncode == 0, result.stderr


def test_there_are_examples_for_everyone():
    for name in ("jax_power", "torch_power", "bridge", "torch_power.compat"):
        assert any(re.search(rf"(import|from) {re.escape(name)}\b", block) for block in BLOCKS), name


def test_state_sizes():
    rows = cells("## How large the state is")
    assert [int(row[0]) for row in rows] == [2, 4, 6]
    for p, exact, tiled, total in rows:
        size = spec.state_size(64, 65, int(p), itemsize=2)
        assert int(exact.replace(",", "")) == size.exact_rows
        assert tiled == (f"{size.rows:,}" if int(p) in spec.POWER_TILE else "–")
        number, unit = total.split()
        printed = f"{12 * 12 * size.exact_bytes / {'MB': 1e6, 'GB': 1e9, 'TB': 1e12}[unit]:.2g}"
        assert number == printed


def test_implementations():
    """Every implementation that the README names is in the package's tables."""
    rows = cells("## Forms and implementations")
    for twin in twins.present():
        column = 1 if twin.framework == "jax" else 2
        named = {name for row in rows for name in re.findall(r'`"(\w+)"`', row[column])}
        assert named and named <= set(importlib.import_module(f"{twin.name}.choice").CHOICE.names())


def test_speed():
    """The table of times is the committed result, rounded."""
    rows = json.loads((ROOT / "benchmarks/results/gpu_power_h100.json").read_text())["rows"]
    measured = {(row["contestant"], row["d"], row["t"]): row for row in rows}
    for d, t, *printed, ratio in cells("## Speed"):
        ours, theirs = (measured[name, int(d), int(t)] for name in ("power chunked", "cudnn"))
        times = [x for row in (ours, theirs) for x in (row["forward_ms"], row["forward_ms"] + row["backward_ms"])]
        assert printed == [f"{x:.2f}" for x in times], (d, t)
        assert ratio == f"{times[3] / times[1]:.1f}", (d, t)


def test_speed_on_cpu_threads():
    """The table of seconds is the committed result, rounded: of each implementation its faster form."""
    rows = json.loads((ROOT / "benchmarks/results/cpu_speed.json").read_text())["rows"]
    for t, *printed, ratio in cells("### On CPU threads"):
        timed = [row for row in rows if row["operation"] == "power" and row["gates"] and row["t"] == int(t)]
        seconds = [min(r["seconds"] for r in timed if f"/{name}/" in r["contestant"]) for name in ("cpp", "eager", "xla")]
        assert printed == [f"{x:.3f}" for x in seconds], t
        assert ratio == f"{seconds[1] / seconds[0]:.1f}", t


def test_bounds():
    """The table of errors is the one that the tests hold the portable implementations to."""
    for dtype, y, gradients, dlog_g, state in cells("## Errors and accuracy"):
        bounds = cases.bounds(dtype, "xla")
        table = {"y": y, **dict.fromkeys(("dq", "dk", "dv"), gradients), "dlog_g": dlog_g, **dict.fromkeys("sz", state)}
        for name, printed in table.items():
            assert float(printed) == bounds[name], (dtype, name)
