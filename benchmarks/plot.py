"""Plots result files:  python -m benchmarks.plot FILE... [--out FIGURE.svg]

Of the runner (`benchmarks.run`): time against length, a line for each contestant (and file, if there are several), a band from
the 10th to the 90th percentile. Of a GPU benchmark (`benchmarks.gpu_*`), one file: time a token against length, a panel for
each head size; of the diffusion workloads: bars. An SVG carries the digest of the files that it was drawn from.
"""

from __future__ import annotations

import hashlib
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
import matplotlib.ticker
from absl import flags
from matplotlib.axes import Axes
from matplotlib.figure import Figure

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "figure, .svg, .png or .pdf (default: the first file's name with .svg)", flag_values=FLAGS)
flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=FLAGS)

SUFFIXES = (".svg", ".png", ".pdf")

Result = Mapping[str, Any]


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(result, dict) or not result.get("rows") or not ("device" in result or "about" in result):
        raise ValueError(f"{path}: not a result of benchmarks.run or of a GPU benchmark")
    return result


def digest(files: Sequence[pathlib.Path]) -> str:
    """SHA-256 of the files, as a figure carries it."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def draw(results: Mapping[str, Result]) -> Figure:
    """The figure for results by file name.

    Raises:
      ValueError: results of different kinds, or several of a GPU benchmark.
    """
    if all("about" not in result for result in results.values()):
        return draw_runs(results)
    if len(results) > 1:
        raise ValueError("expected one file of a GPU benchmark, or several of benchmarks.run")
    (result,) = results.values()
    return draw_workloads(result) if "workload" in result["rows"][0] else draw_lengths(result)


# ---------------------------------------------------------------------------------------------------------------------
# The runner's results
# ---------------------------------------------------------------------------------------------------------------------


def draw_runs(results: Mapping[str, Result]) -> Figure:
    """Milliseconds against t, both logarithmic. Ours are drawn solid, the others dashed."""
    figure = Figure(figsize=(8, 5))
    axes = figure.subplots()
    lengths = set()
    for file, result in results.items():
        timed = [row for row in result["rows"] if row["status"] == "timed"]
        for name in dict.fromkeys(row["contestant"] for row in timed):
            own = sorted((row for row in timed if row["contestant"] == name), key=lambda row: row["t"])
            t = [row["t"] for row in own]
            lengths |= set(t)
            label = f"{name} ({file})" if len(results) > 1 else name
            style = "-" if "_power/" in name else "--"
            (line,) = axes.plot(t, [1e3 * row["seconds"] for row in own], style, marker="o", markersize=4, label=label)
            low, high = ([1e3 * row[end] for row in own] for end in ("low", "high"))
            axes.fill_between(t, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
    first = next(iter(results.values()))
    row = first["rows"][0]
    what = {"forward": "forward", "both": "forward and backward"}[row["pass"]]
    device = ", ".join(sorted(set(first["device"]["names"].values())))
    axes.set_title(f"{what}, {row['dtype']}, b = {row['b']}, h = {row['h_q']}, d = {row['d']} on {device}", fontsize=10)
    _log_axes(axes, lengths, "milliseconds")
    return figure


def _log_axes(axes: Axes, lengths: set[int], label: str) -> None:
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel=label)
    axes.set_xticks(sorted(lengths), [str(t) for t in sorted(lengths)], rotation=45 if len(lengths) > 8 else 0)
    axes.minorticks_off()
    axes.yaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    axes.grid(color="#ddd")
    axes.legend(fontsize=8)


# ---------------------------------------------------------------------------------------------------------------------
# GPU benchmarks
# ---------------------------------------------------------------------------------------------------------------------


def is_ours(name: str) -> bool:
    return name.startswith(("power", "torch_power"))


def draw_lengths(result: Result) -> Figure:
    """Microseconds a token of both passes against t, causal self-attention. Ours are drawn solid, the others dashed."""
    rows = [row for row in result["rows"] if row["both_ms"] is not None and row.get("causal", True)]
    rows = [row for row in rows if row.get("t_kv", row.get("s", row["t"])) == row["t"]]
    sizes = sorted({row["d"] for row in rows})
    figure = Figure(figsize=(5.5 * len(sizes), 4.5), layout="constrained")
    for d, axes in zip(sizes, figure.subplots(1, len(sizes), squeeze=False)[0], strict=True):
        of_size = [row for row in rows if row["d"] == d]
        for name in sorted({row["contestant"] for row in of_size}, key=lambda name: (not is_ours(name), name)):
            own = sorted((row for row in of_size if row["contestant"] == name), key=lambda row: row["t"])
            times = [1e3 * row["both_ms"] / (row["b"] * row["t"]) for row in own]
            axes.plot([row["t"] for row in own], times, "-" if is_ours(name) else "--", marker="o", markersize=4, label=name)
        heads = ", ".join(map(str, sorted({row["h"] for row in of_size})))
        axes.set_title(f"d = {d}, h = {heads}", fontsize=10)
        _log_axes(axes, {row["t"] for row in of_size}, "microseconds a token, forward and backward")
    figure.suptitle(f"bfloat16, causal, at least 16384 tokens a call, {result['about']['device']}", fontsize=10)
    return figure


def draw_workloads(result: Result) -> Figure:
    """Milliseconds of forward (dark) and backward (light), each contestant as it is and through torch.compile."""
    rows = result["rows"]
    workloads = list(dict.fromkeys(row["workload"] for row in rows))
    names = list(dict.fromkeys(row["contestant"] for row in rows))
    figure = Figure(figsize=(5.5 * len(workloads), 1.6 + 0.5 * len(names)), layout="constrained")
    for workload, axes in zip(workloads, figure.subplots(1, len(workloads), squeeze=False)[0], strict=True):
        for compiled, (offset, color, label) in enumerate(((-0.2, "#3b6fb6", "as it is"), (0.2, "#d1572a", "torch.compile"))):
            own = [row for row in rows if (row["workload"], row["compiled"]) == (workload, bool(compiled))]
            timed = [row for row in own if row["both_ms"] is not None]
            at = [names.index(row["contestant"]) + offset for row in timed]
            forward = [row["forward_ms"] for row in timed]
            backward = [row["both_ms"] - row["forward_ms"] for row in timed]
            axes.barh(at, forward, 0.38, color=color, label=f"{label}: forward")
            axes.barh(at, backward, 0.38, left=forward, color=color, alpha=0.4, label=f"{label}: backward")
        row = next(row for row in rows if row["workload"] == workload)
        axes.set_title(f"{workload}-attention: {row['t']} queries, {row['s']} keys", fontsize=10)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
        axes.set_xlabel("milliseconds")
        axes.grid(axis="x", color="#ddd")
        axes.set_axisbelow(True)
    row = rows[0]
    figure.legend(*axes.get_legend_handles_labels(), fontsize=8, ncols=4, loc="outside lower center")
    figure.suptitle(f"b = {row['b']}, h = {row['h']}, d = {row['d']}, bfloat16, {result['about']['device']}", fontsize=10)
    return figure


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status: 0, or 2 if a file cannot be used (one line says why)."""
    FLAGS.unparse_flags()
    try:
        files = [pathlib.Path(file) for file in FLAGS(argv)[1:]]
        if FLAGS.help:
            print(__doc__, FLAGS.get_help(), sep="\n")
            return 0
        if not files:
            raise ValueError("expected result files")
        results = {path.stem: _read(path) for path in files}
        out = pathlib.Path(FLAGS.out or files[0].with_suffix(".svg"))
        if out.suffix not in SUFFIXES:
            raise ValueError(f"--out={out}: expected a name ending in {', '.join(SUFFIXES)}")
        # Text as text; the same results give the same bytes.
        metadata = {"Date": None, "Identifier": digest(files)} if out.suffix == ".svg" else None
        with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "plot"}):
            draw(results).savefig(out, bbox_inches="tight", metadata=metadata)
    except (flags.Error, OSError, ValueError) as error:
        print(f"plot: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
