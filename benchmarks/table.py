"""Markdown tables of a GPU benchmark's result:  python -m benchmarks.table FILE.json > FILE.md"""

from __future__ import annotations

import json
import pathlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


def markdown(result: Mapping[str, Any]) -> str:
    """The table that fits the result, under a line that says where its numbers are from."""
    first, about = result["rows"][0], result["about"]
    rows = workloads if "workload" in first else softmax if "s" in first else lengths
    origin = f"{about['device']}, torch {about['torch']}, CUDA {about['cuda']}, commit {(about['commit'] or 'unknown')[:12]}."
    head, *body = rows(result["rows"])
    lines = [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *body)]
    return "\n".join([f"{origin} Milliseconds; kernels alone in brackets.", "", *lines, ""])


def number(ms: float | None) -> str:
    return "–" if ms is None else f"{ms:.2f}" if ms >= 1 else f"{ms:.3f}"


def time(row: Row | None, pass_: str) -> str:
    """A pass as called and, in brackets, its kernels."""
    if row is None:
        return ""
    called, alone = (milliseconds(row, pass_, column) for column in ("ms", "graph_ms"))
    return number(called) + ("" if alone is None else f" ({number(alone)})")


def milliseconds(row: Row, pass_: str, column: str) -> float | None:
    if pass_ in ("forward", "both"):
        return row[f"{pass_}_{column}"]
    forward, both = row[f"forward_{column}"], row[f"both_{column}"]
    return None if forward is None or both is None else both - forward


def grouped(rows: Sequence[Row], *columns: str) -> Iterator[tuple[tuple[Any, ...], dict[str, Row]]]:
    """Rows that agree in `columns`, by contestant."""
    found: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[column] for column in columns), {})[row["contestant"]] = row
    yield from found.items()


def lengths(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Power attention beside the others: forward, and both passes, at each length."""
    ours_first = sorted(rows, key=lambda row: not row["contestant"].startswith("power"))
    names = list(dict.fromkeys(row["contestant"] for row in ours_first))
    keys = ("d", "t", "t_kv", "causal") if "t_kv" in rows[0] else ("d", "t")
    yield [*keys, *(f"{name}: {pass_}" for name in names for pass_ in ("forward", "both"))]
    for where, found in grouped(rows, *keys):
        yield [*map(str, where), *(time(found.get(name), pass_) for name in names for pass_ in ("forward", "both"))]


def softmax(rows: Sequence[Row]) -> Iterator[list[str]]:
    """Softmax attention: ours, how many times faster than the peers, and why a cell is below its bar."""
    peers = [name for name in dict.fromkeys(row["contestant"] for row in rows) if name != "torch_power"]
    columns = [column for name in peers for column in (name, f"{name} / ours")]
    yield ["d", "t", "mask", "pass", "ours", *columns, "why it is below its bar"]
    for (d, t, causal), found in grouped(rows, "d", "t", "causal"):
        for pass_ in ("forward", "backward"):
            judged = {x["peer"]: x for x in found["torch_power"]["bars"] if x["pass"] == pass_}
            missed = [f"{x['peer']} (bar {x['bar']}): {x['why']}" for x in judged.values() if not x["reached"]]
            cells = [cell for name in peers for cell in (time(found.get(name), pass_), ratio(judged.get(name)))]
            own = time(found["torch_power"], pass_)
            yield [str(d), str(t), "causal" if causal else "full", pass_, own, *cells, "; ".join(missed)]


def ratio(judged: Mapping[str, Any] | None) -> str:
    return "–" if judged is None or judged["ratio"] is None else f"{judged['ratio']:.2f}"


def workloads(rows: Sequence[Row]) -> Iterator[list[str]]:
    """The diffusion workloads: each contestant as it is and through torch.compile."""
    yield ["workload", "contestant", "forward", "both", "compiled: forward", "both", "peak MiB"]
    plain = {(row["workload"], row["contestant"], row["compiled"]): row for row in rows}
    for workload, name in dict.fromkeys((row["workload"], row["contestant"]) for row in rows):
        both = [plain.get((workload, name, compiled)) for compiled in (False, True)]
        peak = "–" if both[0] is None or both[0].get("peak_mib") is None else f"{both[0]['peak_mib']:.0f}"
        yield [workload, name, *(time(row, pass_) for row in both for pass_ in ("forward", "both")), peak]


if __name__ == "__main__":
    print(markdown(json.loads(pathlib.Path(sys.argv[1]).read_text())), end="")
