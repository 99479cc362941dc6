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

# What the README shows: six rows, and the peers that most readers know.
OVERVIEW_ROWS = {
    "echo64": "Echo to 64 clients",
    "connections": "Connections, one message each",
    "lines": "Reading lines",
    "tls-handshakes": "TLS connections, one message each",
    "udp-echo64": "UDP echo to 64 clients",
    "memory": "Memory of an idle connection",
}
OVERVIEW_PEERS = ("trio", "trisock", "anyio-trio", "asyncio", "uvloop")


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a chart is laid out. Sizes are in inches, and fonts in points."""

    columns: int
    width: float
    panel_height: float
    font: int


WHOLE = Layout(columns=3, width=11, panel_height=2.4, font=8)
OVERVIEW = Layout(columns=2, width=8.0, panel_height=1.5, font=10)  # as wide as GitHub shows it


def draw_overview(results: list[Result], path: Path) -> None:
    """Write the README's chart as SVG."""
    shown = []
    for name in OVERVIEW_ROWS:
        (result,) = (each for each in results if each.row.name == name)
        series = {peer: result.series[peer] for peer in OVERVIEW_PEERS if peer in result.series}
        shown.append(dataclasses.replace(result, series=series))
    titles = [
        f"{title} (lower is better)" if result.row.is_memory else title
        for title, result in zip(OVERVIEW_ROWS.values(), shown, strict=True)
    ]
    _draw(
        shown,
        titles,
        path,
        OVERVIEW,
        "A server's work per CPU second, and its memory, relative to bare Trio",
    )


def draw(results: list[Result], path: Path) -> None:
    """Write the chart of all rows as SVG."""
    titles = []
    for result in results:
        row = result.row
        detail = "lower is better" if row.is_memory else amount_text(result.amount, row.unit)
        titles.append(f"{row.name}\n{row.title}; {detail}")
    heading = "Work per CPU second of the server, relative to bare Trio. "
    heading += "Bar: median of the rounds. Line: lowest to highest. Dashes: trisock's target."
    _draw(results, titles, path, WHOLE, heading, with_targets=True)


def _draw(
    results: list[Result],
    titles: list[str],
    path: Path,
    layout: Layout,
    heading: str,
    *,
    with_targets: bool = False,
) -> None:
    # The text is stored as text, not as paths.
    settings: dict[Any, Any] = {
        "svg.fonttype": "none",
        "svg.hashsalt": "trisock",  # reproducible output
        "font.size": layout.font,
        "axes.facecolor": "none",
        "text.color": TEXT,
        "axes.labelcolor": TEXT,
        "axes.edgecolor": TEXT,
        "xtick.color": TEXT,
        "ytick.color": TEXT,
    }
    lines = -(-len(results) // layout.columns)
    size = (layout.width, layout.panel_height * lines)
    with plt.rc_context(settings):
        figure, grid = plt.subplots(
            lines, layout.columns, figsize=size, squeeze=False, layout="constrained"
        )
        for panel, result, title in zip(grid.flat, results, titles, strict=False):
            _draw_row(panel, result)
            panel.set_title(title, loc="left", x=-0.42, fontsize=layout.font)
            if with_targets:
                panel.axvline(result.row.target, color=TARGET, linestyle="--", linewidth=1)
        for panel in list(grid.flat)[len(results) :]:
            panel.set_axis_off()
        figure.suptitle(heading, fontsize=layout.font + 1)
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
        cut = " (bar cut)" if ratio.median > LONGEST else ""
        _label(panel, max(bar, high), place, f"{ratio.median:.2f}{cut}")
        longest = max(longest, high)
    panel.set_xlim(0, longest * 1.25)  # with room for the last figure
    panel.set_xticks([])
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.tick_params(length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)


def _label(panel: Axes, x: float, place: int, text: str) -> None:
    panel.annotate(text, (x, place), xytext=(4, 0), textcoords="offset points", va="center")
