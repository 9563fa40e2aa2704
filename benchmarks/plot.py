"""Plots time against length from result files of the runner:  python -m benchmarks.plot FILE... [--out FIGURE.svg]

One line for each contestant (and file, if there are several), a band from the 10th to the 90th percentile.
"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib.ticker
from absl import flags
from matplotlib.figure import Figure

FLAGS = flags.FlagValues()
flags.DEFINE_string("out", None, "figure, .svg, .png or .pdf (default: the first file's name with .svg)", flag_values=FLAGS)
flags.DEFINE_bool("help", False, "show this help", short_name="h", flag_values=FLAGS)

SUFFIXES = (".svg", ".png", ".pdf")


def _read(path: pathlib.Path) -> dict[str, Any]:
    try:
        result = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(result, dict) or not result.get("rows") or "device" not in result:
        raise ValueError(f"{path}: not a result of benchmarks.run")
    return result


def draw(results: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Milliseconds against t, both logarithmic, for results by file name. Ours are drawn solid, the others dashed."""
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
    axes.set(xscale="log", yscale="log", xlabel="t", ylabel="milliseconds")
    axes.set_xticks(sorted(lengths), [str(t) for t in sorted(lengths)])
    axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    axes.grid(color="#ddd")
    axes.legend(fontsize=8)
    return figure


def main(argv: Sequence[str]) -> int:
    """The command; returns the exit status: 0, or 2 if a file cannot be used (one line says why)."""
    FLAGS.unparse_flags()
    try:
        files = FLAGS(argv)[1:]
        if FLAGS.help:
            print(__doc__, FLAGS.get_help(), sep="\n")
            return 0
        if not files:
            raise ValueError("expected result files")
        results = {path.stem: _read(path) for path in map(pathlib.Path, files)}
        out = pathlib.Path(FLAGS.out or pathlib.Path(files[0]).with_suffix(".svg"))
        if out.suffix not in SUFFIXES:
            raise ValueError(f"--out={out}: expected a name ending in {', '.join(SUFFIXES)}")
        draw(results).savefig(out, bbox_inches="tight")
    except (flags.Error, OSError, ValueError) as error:
        print(f"plot: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
