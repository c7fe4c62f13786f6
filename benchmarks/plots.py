# SPDX-License-Identifier: MIT
"""Draws what was measured, from the JSON of a run: as PNG and as SVG.

The colours are those of Okabe and Ito, which people tell apart whatever colours they see; curves
differ in their markers, too. The ground is white, for light and for dark pages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

OURS, LIMIT, PLAIN, PEER = "#D55E00", "#999999", "#0072B2", "#56B4E9"
CURVES = (("#D55E00", "o"), ("#0072B2", "s"), ("#009E73", "^"), ("#CC79A7", "D"))
#: How the bars of a kind of case are called, and coloured.
KINDS = {
    "postage": OURS,
    "plain pika": PLAIN,
    "other packages": PEER,
    "the broker's ceiling": LIMIT,
}
#: Workloads with bars, and what the first figure of theirs means.
BARS = {
    "batch": "Confirmed publishing, many at once\nmessages per second",
    "consume": "Handling with JSON and ack\nmessages per second",
    "rpc100": "RPC, 100 calls in flight\ncalls per second",
    "rpc": "RPC, one call in flight\np50 in ms, less is better",
}
#: Workloads with curves, and what is drawn of them.
GROWTH = {
    "handlers": "CPU us/message",
    "bindings": "CPU us/message",
    "backlog": "CPU us/message",
    "inflight": "CPU us/call",
    "pairs": "CPU us/publishing",
    "publish-sizes": "CPU us/message",
    "handle-sizes": "CPU us/message",
    "fanout": "broker us/copy",
}
#: The ratio of two bars above which their axis is logarithmic.
WIDE = 50
#: What is ours, in the names of cases.
_OURS = ("batch()", "MessageProcessor", "rpc_x", "message_x")
#: Cases that only their table shows.
_LEFT_OUT = re.compile(r" beside |acks singly|a number|cores apart|prefetch 1$")


def draw(results: Mapping[str, Any], folder: Path) -> Iterator[Path]:
    """Draw what the results have, and yield the files.

    Raises:
        ModuleNotFoundError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ModuleNotFoundError as error:
        message = "plots need matplotlib: pip install -e '.[bench]'"
        raise ModuleNotFoundError(message, name=error.name) from error
    matplotlib.use("agg")
    # A file whose results are the same shall be the same.
    matplotlib.rcParams.update({"svg.hashsalt": "postage", "font.size": 9})
    workloads = results["workloads"]
    for name, make in (("peers", _bars), ("growth", _growth), ("processes", _processes)):
        figure = make(workloads)
        if figure is None:
            continue
        for ending, metadata in (("png", {"Software": None}), ("svg", {"Date": None})):
            path = folder / f"{name}.{ending}"
            figure.savefig(path, dpi=120, facecolor="white", metadata=metadata)
            yield path


def _panels(count: int, columns: int, width: float, height: float) -> tuple[Any, list[Any]]:
    from matplotlib.figure import Figure

    rows = -(-count // columns)
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for spare in panels[count:]:
        spare.set_axis_off()
    for panel in panels:
        panel.spines[["top", "right"]].set_visible(False)
    return figure, panels[:count]


def _plain(value: float, _place: object = None) -> str:
    """Return a number as people write it."""
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.2g}"


# --------------------------------------------------------------------------------- bars


def kind_of(case: str) -> str:
    """Return which kind of bar a case gets."""
    if case.startswith(_OURS):
        return "postage"
    if "ceiling" in case:
        return "the broker's ceiling"
    return "plain pika" if case.startswith(("pika ", "RabbitMQ")) else "other packages"


def bars_of(workload: Mapping[str, Any]) -> list[tuple[str, float]]:
    """Return the bars of a workload, the best first."""
    bars = [
        (each["case"], next(iter(each["medians"].values())))
        for each in workload["cases"]
        if each["medians"] and not _LEFT_OUT.search(each["case"])
    ]
    figure = next(iter(workload["cases"][0]["medians"]), "")
    return sorted(bars, key=lambda bar: bar[1], reverse=figure.endswith("/s"))


def _bars(workloads: Mapping[str, Any]) -> Any:
    from matplotlib.patches import Patch

    drawn = [name for name in BARS if name in workloads]
    if not drawn:
        return None
    most = max(len(bars_of(workloads[name])) for name in drawn)
    figure, panels = _panels(len(drawn), 2, 6.2, 1.2 + 0.24 * most)
    for panel, name in zip(panels, drawn, strict=True):
        bars = bars_of(workloads[name])
        values = [value for _case, value in bars]
        colours = [KINDS[kind_of(case)] for case, _value in bars]
        places = range(len(bars), 0, -1)
        panel.barh(places, values, color=colours, height=0.72)
        panel.margins(y=0.02)
        panel.set_yticks(places, [case for case, _value in bars])
        if max(values) / min(values) > WIDE:
            panel.set_xscale("log")
            panel.set_xlim(10 ** math.floor(math.log10(min(values)) - 0.3), max(values) * 4)
        else:
            panel.set_xlim(0, max(values) * 1.18)
            panel.locator_params(axis="x", nbins=5)
        panel.xaxis.set_major_formatter(_plain)
        panel.set_title(BARS[name], loc="left", fontsize=10)
        for place, value in zip(places, values, strict=True):
            panel.text(value, place, f" {_plain(value)}", va="center", fontsize=8)
    handles = [Patch(color=colour, label=kind) for kind, colour in KINDS.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(KINDS), frameon=False)
    return figure


# ------------------------------------------------------------------------------- curves


def curves_of(
    workload: Mapping[str, Any], figure: str
) -> dict[str, list[tuple[float, float]]]:
    """Return the points of each curve of a workload."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for each in workload["cases"]:
        if each["point"] and figure in each["medians"]:
            curve, x = each["point"]
            curves.setdefault(curve, []).append((x, each["medians"][figure]))
    return curves


def _growth(workloads: Mapping[str, Any]) -> Any:
    drawn = [
        name
        for name, figure in GROWTH.items()
        if name in workloads and curves_of(workloads[name], figure)
    ]
    if not drawn:
        return None
    figure, panels = _panels(len(drawn), 4 if len(drawn) > 4 else len(drawn), 3.3, 2.7)
    for panel, name in zip(panels, drawn, strict=True):
        curves = curves_of(workloads[name], GROWTH[name])
        _draw_curves(panel, curves)
        xs = sorted({x for points in curves.values() for x, _y in points})
        highest = max(y for points in curves.values() for _x, y in points)
        panel.set_xscale("log")
        panel.minorticks_off()
        panel.set_xlabel(workloads[name]["axis"])
        if "sizes" in name:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(_plain)
            panel.set_xticks(xs, [f"{x / 1024:,g} KiB" for x in xs])
        else:
            panel.set_ylim(0, 1.4 * highest)
            panel.set_xticks(xs, [_plain(x) for x in xs])
            panel.tick_params(axis="x", labelrotation=30 if len(xs) > 4 else 0)
        panel.set_ylabel(GROWTH[name].replace("us/", "µs a "))
        panel.set_title(workloads[name]["title"], loc="left", fontsize=9)
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
        if len(curves) > 1:
            panel.legend(frameon=False, fontsize=8)
    return figure


def _draw_curves(panel: Any, curves: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    looks = iter(CURVES)
    for name, points in curves.items():
        colour, marker = (LIMIT, "x") if name == "ceiling" else next(looks)
        xs, ys = zip(*sorted(points), strict=True)
        panel.plot(xs, ys, color=colour, marker=marker, markersize=4.5, label=name)


def _processes(workloads: Mapping[str, Any]) -> Any:
    if "processes" not in workloads:
        return None
    workload = workloads["processes"]
    figure, (left, right) = _panels(2, 2, 4.6, 3.4)
    rates = curves_of(workload, "messages/s")
    relative = {
        name: [(x, y / points[0][1]) for x, y in points] for name, points in rates.items()
    }
    _draw_curves(left, relative)
    most = max(x for points in rates.values() for x, _y in points)
    left.plot([1, most], [1, most], color=LIMIT, linestyle=":", label="in proportion")
    left.set_title("Messages handled, beside one process", loc="left", fontsize=10)
    left.set_ylabel("times as many")
    left.set_ylim(bottom=0)
    _draw_curves(right, curves_of(workload, "broker, % of a core"))
    right.set_title("Processor time of the broker", loc="left", fontsize=10)
    right.set_ylabel("% of a core")
    right.set_ylim(bottom=0)
    for panel in (left, right):
        panel.set_xlabel("processes that share the queue")
        panel.set_xticks(sorted({x for points in rates.values() for x, _y in points}))
        panel.grid(axis="y", color="#dddddd", linewidth=0.6)
    left.legend(frameon=False, fontsize=8)
    return figure
