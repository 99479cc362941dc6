"""Charts of the ratios to bare Trio: a panel for each row, and a bar for each peer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from .contest import Result
from .peers import BASE, SUBJECT
from .rows import amount_text

# These colours are legible on both light and dark pages.
TEXT = "#7a7f87"
OTHERS = "#b4bcc6"
HIGHLIGHT = {SUBJECT: "#2f81d6", BASE: "#7a7f87"}
TARGET = "#d2691e"

# A bar longer than this is cut and labelled, so that it does not shrink all other bars.
LONGEST = 5.0

COLUMNS = 3

# What the README shows: six rows, and the peers that most readers know.
OVERVIEW_ROWS = ("echo64", "connections", "lines", "tls-handshakes", "udp-echo64", "memory")
OVERVIEW_PEERS = ("trio", "trisock", "anyio-trio", "asyncio", "uvloop")


def draw_overview(results: list[Result], path: Path) -> None:
    """Write the README's chart as SVG."""
    shown = []
    for name in OVERVIEW_ROWS:
        (result,) = (each for each in results if each.row.name == name)
        series = {peer: result.series[peer] for peer in OVERVIEW_PEERS if peer in result.series}
        shown.append(dataclasses.replace(result, series=series))
    draw(shown, path, with_targets=False)


def draw(results: list[Result], path: Path, *, with_targets: bool = True) -> None:
    """Write the chart as SVG. Its text is stored as text, not as paths."""
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "trisock",  # reproducible output
        "font.size": 8,
        "axes.facecolor": "none",
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    lines = -(-len(results) // COLUMNS)
    with plt.rc_context(settings):
        figure, grid = plt.subplots(
            lines, COLUMNS, figsize=(11, 2.4 * lines), squeeze=False, layout="constrained"
        )
        for panel, result in zip(grid.flat, results, strict=False):
            _draw_row(panel, result)
            if with_targets:
                panel.axvline(result.row.target, color=TARGET, linestyle="--", linewidth=1)
        for panel in list(grid.flat)[len(results) :]:
            panel.set_axis_off()
        title = "Work per CPU second of the server, relative to bare Trio. "
        title += "Bar: median of the rounds. Line: lowest to highest."
        if with_targets:
            title += " Dashes: trisock's target."
        figure.suptitle(title, fontsize=9)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
        plt.close(figure)


def _draw_row(panel: Axes, result: Result) -> None:
    row = result.row
    names = list(result.series)
    longest = row.target
    for place, name in enumerate(names):
        ratio = result.ratio(name)
        if ratio is None:
            _label(panel, 0, place, "no figure")
            continue
        low, bar, high = (min(each, LONGEST) for each in (ratio.low, ratio.median, ratio.high))
        panel.barh(place, bar, color=HIGHLIGHT.get(name, OTHERS), height=0.7)
        panel.plot([low, high], [place, place], color=TEXT, linewidth=1.2)
        cut = " (cut)" if ratio.median > LONGEST else ""
        _label(panel, max(bar, high), place, f"{ratio.median:.2f}{cut}")
        longest = max(longest, high)
    panel.set_xlim(0, longest * 1.25)  # with room for the last figure
    panel.set_xticks([])
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.tick_params(length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    detail = "lower is better" if row.is_memory else amount_text(result.amount, row.unit)
    panel.set_title(f"{row.name}\n{row.title}; {detail}", loc="left", x=-0.42, fontsize=8)


def _label(panel: Axes, x: float, place: int, text: str) -> None:
    panel.annotate(text, (x, place), xytext=(4, 0), textcoords="offset points", va="center")
