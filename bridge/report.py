"""The report of an agreement run: a table in the terminal, `report.json`, and `report.html` with its plots inside."""

from __future__ import annotations

import base64
import html
import io
import json
import math
import os
import pathlib
import tempfile
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]

COLORS = {"jax_power": "#3b6fb6", "torch_power": "#d1572a"}
MARKERS = "osD^vP*X"
GROUP = ("operation", "case", "form", "dtype")

COLUMNS = (
    "case", "t", "form", "dtype", "implementation", "worst", "error", "bound", "error/bound", "JAX↔torch", "time",
    "peak memory",
)  # fmt: skip

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2em auto; max-width: 76em; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums }
th, td { padding: .2em .6em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap }
th:nth-child(-n+1), td:nth-child(-n+1), .text { text-align: left }
.breach td, .failed td { background: #fbdcd6 } .not-served td { color: #888 }
.verdict { font-size: 1.3em; padding: .5em .8em; border-radius: .3em; background: #dcf1dc } .verdict.bad { background:
#fbdcd6 } img { max-width: 100% } .wide { overflow-x: auto }
"""


# ---------------------------------------------------------------------------------------------------------------------
# Numbers as text
# ---------------------------------------------------------------------------------------------------------------------


def seconds_text(seconds: float | None) -> str:
    if seconds is None:
        return "–"
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.3g} ms" if seconds >= 1e-3 else f"{1e6 * seconds:.3g} µs"


def bytes_text(count: int | None) -> str:
    if count is None:
        return "–"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.3g} {unit}" if count < 999.5 else f"{count:.0f} {unit}"
        count /= 1024  # type: ignore[assignment]
    return f"{count:.3g} GiB"


def number_text(x: float | None) -> str:
    return "–" if x is None else f"{x:.2e}" if math.isfinite(x) else "inf"


def cells(row: Row) -> tuple[str, ...]:
    """One row of the table, a text for each of `COLUMNS`: the tensor whose error is largest beside its bound."""
    where = (row["case"], str(row["t"]), row["form"], row["dtype"], f"{row['twin']}/{row['implementation']}")
    if not row["tensors"]:
        return (*where, row["status"], *[""] * (len(COLUMNS) - 6))
    name, tensor = max(row["tensors"].items(), key=lambda item: item[1]["error"] / item[1]["bound"])
    difference = max((x["difference"] for x in row["tensors"].values() if x["difference"] is not None), default=None)
    ratio = f"{tensor['error'] / tensor['bound']:.3f}"
    errors = name, number_text(tensor["error"]), number_text(tensor["bound"]), ratio, number_text(difference)
    return (*where, *errors, seconds_text(row["seconds"]), bytes_text(row["peak_bytes"]))


def growth_lines(summary: Sequence[Row]) -> list[str]:
    """The contract's numbers about length, one line an implementation."""
    lines = []
    for entry in summary:
        how = "measured"
        if entry["extrapolated_from"]:
            how = f"extrapolated from t = {', '.join(map(str, entry['extrapolated_from']))} by a·t + b·t²"
        line = (
            f"{entry['twin']}/{entry['implementation']}, t = {entry['t']}: "
            f"chunked {seconds_text(entry['chunked_seconds'])}, "
            f"attention {seconds_text(entry['attention_seconds'])} ({how}): {entry['speedup']:.1f}x faster "
            f"(wanted {entry['wanted_speedup']:.0f}x; {entry['cpu_speedup']:.1f}x in processor time)"
        )
        if "time_growth" in entry:
            line += f"; from t = {entry['t'] // 2}: time {entry['time_growth']:.2f}x "
            line += f"({entry['cpu_time_growth']:.2f}x processor)"
            line += f", memory {entry['memory_growth']:.2f}x" if "memory_growth" in entry else ""
            line += f" (wanted at most {entry['wanted_growth']}x)"
        lines.append(line)
    return lines


def verdict_line(found: Mapping[str, Any]) -> str:
    verdict = found["verdict"]
    counts = ", ".join(f"{count} {status}" for status, count in verdict["counts"].items() if count)
    return f"All hold: {counts}" if verdict["holds"] else f"Does not hold: {counts or 'nothing ran'}. Worst: {verdict['worst']}"


# ---------------------------------------------------------------------------------------------------------------------
# Terminal
# ---------------------------------------------------------------------------------------------------------------------


def show(found: Mapping[str, Any], console: Console) -> None:
    """Print the table, what was not served and why, the growth with length, and the verdict."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in COLUMNS:
        numeric = column in ("t", "error", "bound", "error/bound", "JAX↔torch", "time", "peak memory")
        table.add_column(column, justify="right" if numeric else "left", no_wrap=True)
    styles = {"breach": "bold red", "failed": "bold red", "not served": "dim"}
    for row in found["rows"]:
        table.add_row(*cells(row), style=styles.get(row["status"]))
    console.print(table)
    for line in _reasons(found) + found["notes"] + growth_lines(found["growth"]["summary"]):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    style = "bold green" if found["verdict"]["holds"] else "bold red"
    console.print(verdict_line(found), style=style, markup=False, highlight=False, soft_wrap=True)


def _reasons(found: Mapping[str, Any]) -> list[str]:
    rows = [*found["rows"], *found["growth"]["measured"]]
    told = {
        f"{row['twin']}/{row['implementation']} {row['form']} {row['status']}: {row['reason']}": None
        for row in rows
        if row["reason"]
    }
    return list(told)


# ---------------------------------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------------------------------


def write(found: Mapping[str, Any], out: pathlib.Path) -> pathlib.Path:
    """Write `report.json` and `report.html`, each whole or not at all; return the latter's path.

    `report.json` is what `validate.run` returns: {schema, verdict {holds, counts, worst}, inputs {source, digests},
    device, environment, memory_method, rows [{operation, case, form, dtype, twin, implementation, status, reason,
    tensors {name: {error, bound, difference}}, worst, seconds, all_seconds, cpu_seconds, peak_bytes, repeatable,
    sizes}], growth {measured, summary}, notes, seconds}. Infinite numbers are the text "inf".
    """
    write_whole(out / "report.json", json.dumps(plain(found), indent=1, allow_nan=False))
    write_whole(out / "report.html", page(found))
    return out / "report.html"


def write_whole(path: pathlib.Path, text: str) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def plain(x: Any) -> Any:
    """`x` in what JSON has."""
    if isinstance(x, Mapping):
        return {str(name): plain(value) for name, value in x.items()}
    if isinstance(x, list | tuple):
        return [plain(value) for value in x]
    if isinstance(x, float):
        return float(x) if math.isfinite(x) else "inf"
    return x


def page(found: Mapping[str, Any]) -> str:
    """The whole HTML page: nothing is loaded from elsewhere."""
    environment, verdict = found["environment"], found["verdict"]
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    names = ", ".join(f"{twin}: {name}" for twin, name in found["device"]["names"].items())
    digests = ", ".join(f"{name} {digest}" for name, digest in found["inputs"]["digests"].items()) or "random numbers only"
    facts = (
        ("Inputs", found["inputs"]["source"]),
        ("SHA-256 of the given inputs", digests),
        ("Device", f"{found['device']['kind']} ({names})"),
        ("Machine", f"{environment['processor']}, {environment['cores']} cores, load {environment['load']} at the end"),
        ("Versions", f"Python {environment['python']}, {versions}; {environment['platform']}"),
        ("Took", f"{found['seconds']:.0f} s"),
        ("Peak memory", found["memory_method"]),
        (
            "Time",
            "Median wall time of forward and backward together, compiled before; nothing else of this run computes.",
        ),
        (
            "Error",
            "Relative L2 per tensor to a float64 O(t²) oracle on the same rounded inputs; random upstream gradients.",
        ),
    )
    parts = [
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>Agreement of jax_power and torch_power</title>",
        f"<style>{STYLE}</style><h1>Agreement of jax_power and torch_power</h1>",
        f"<p class='verdict{'' if verdict['holds'] else ' bad'}'>{html.escape(verdict_line(found))}</p>",
        _list([f"<b>{html.escape(name)}.</b> {html.escape(value)}" for name, value in facts]),
    ]
    if any(row["tensors"] for row in found["rows"]):
        parts += ["<h2>Error against bound</h2>", _image(_plot_errors, found["rows"])]
    if any(row["status"] == "ran" for row in found["growth"]["measured"]):
        parts += [
            "<h2>Time and memory against length</h2>",
            "<p>One sequence of text, 4 heads, d = e = 64, p = 2, gates, float32, forward and backward.</p>",
            _image(_plot_growth, found["growth"]),
            _list(map(html.escape, growth_lines(found["growth"]["summary"]))),
        ]
    said = _list(map(html.escape, _reasons(found) + found["notes"]))
    return "\n".join([*parts, "<h2>Every case</h2>", said, _html_table(found["rows"])])


def _list(items: Any) -> str:
    return "<ul>" + "".join(f"<li>{item}</li>" for item in items) + "</ul>"


def _html_table(rows: Sequence[Row]) -> str:
    head = "".join(f"<th>{html.escape(column)}</th>" for column in COLUMNS)
    body = "".join(
        f"<tr class='{row['status'].replace(' ', '-')}'>" + "".join(f"<td>{html.escape(x)}</td>" for x in cells(row)) + "</tr>"
        for row in rows
    )
    return f"<div class='wide'><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"


# ---------------------------------------------------------------------------------------------------------------------
# Plots
# ---------------------------------------------------------------------------------------------------------------------


def _image(draw: Callable[[Any], Figure], data: Any) -> str:
    """A figure as an <img> that holds its own SVG."""
    buffer = io.BytesIO()
    # Text as text; the same figure gives the same bytes.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "report"}):
        draw(data).savefig(buffer, format="svg", bbox_inches="tight", metadata={"Date": None})
    return f"<img alt='plot' src='data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}'>"


def _plot_errors(rows: Sequence[Row]) -> Figure:
    """Every tensor's error over its bound, a line for each case, form and dtype; right of 1 is a breach."""
    ran = [row for row in rows if row["tensors"]]
    groups = list(dict.fromkeys(tuple(row[name] for name in GROUP) for row in ran))
    kinds = list(dict.fromkeys((row["twin"], row["implementation"]) for row in ran))
    figure = Figure(figsize=(11, 1.5 + 0.22 * len(groups)))
    axes = figure.subplots()
    for index, (twin, implementation) in enumerate(kinds):
        own = [row for row in ran if (row["twin"], row["implementation"]) == (twin, implementation)]
        points = [
            (max(tensor["error"] / tensor["bound"], 1e-6), groups.index(tuple(row[name] for name in GROUP)))
            for row in own
            for tensor in row["tensors"].values()
            if math.isfinite(tensor["error"])
        ]
        x, y = zip(*points, strict=True) if points else ((), ())
        offset = 0.3 * (index - (len(kinds) - 1) / 2) / max(len(kinds), 1)
        color = COLORS.get(twin, "#555")
        style: dict[str, Any] = {"color": color, "marker": MARKERS[index % len(MARKERS)], "markersize": 4, "alpha": 0.6}
        axes.plot(x, [at + offset for at in y], linestyle="none", label=f"{twin}/{implementation}", **style)
    axes.axvline(1, color="#b00020", linewidth=1)
    axes.set(xscale="log", xlabel="error / bound, every output and gradient", ylim=(len(groups) - 0.5, -0.5))
    axes.set_yticks(range(len(groups)), [" ".join(group[1:]) for group in groups], fontsize=8)
    axes.grid(axis="x", color="#ddd")
    axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=4, frameon=False)
    return figure


def _plot_growth(growth: Mapping[str, Any]) -> Figure:
    """Time and peak memory against t, a line for each implementation and form; hollow: extrapolated."""
    figure = Figure(figsize=(11, 4.2))
    time_axes, memory_axes = figure.subplots(1, 2)
    ran = [row for row in growth["measured"] if row["status"] == "ran"]
    series = list(dict.fromkeys((row["twin"], row["implementation"], row["form"]) for row in ran))
    for index, key in enumerate(series):
        own = [row for row in ran if (row["twin"], row["implementation"], row["form"]) == key]
        style: dict[str, Any] = {
            "color": COLORS.get(key[0], "#555"), "linestyle": "--" if key[2] == "attention" else "-",
            "marker": MARKERS[index % len(MARKERS)], "label": f"{key[0]}/{key[1]} {key[2]}",
        }  # fmt: skip
        time_axes.plot([row["t"] for row in own], [row["seconds"] for row in own], **style)
        with_memory = [row for row in own if row["peak_bytes"] is not None]
        memory_axes.plot([row["t"] for row in with_memory], [row["peak_bytes"] / 2**20 for row in with_memory], **style)
    for entry in growth["summary"]:
        if entry["extrapolated_from"]:
            color = COLORS.get(entry["twin"], "#555")
            time_axes.plot(entry["t"], entry["attention_seconds"], "o", markerfacecolor="none", color=color)
    _log_axes(time_axes, "seconds, forward and backward", ran)
    _log_axes(memory_axes, "peak memory, MiB", ran)
    time_axes.legend(fontsize=8)
    return figure


def _log_axes(axes: Axes, label: str, rows: Sequence[Row]) -> None:
    lengths = sorted({row["t"] for row in rows})
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel=label)
    axes.set_xticks(lengths, [str(t) for t in lengths], fontsize=8)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.grid(color="#ddd")
