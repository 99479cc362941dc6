"""A chart of all ratios to bare Trio: a panel for each row, and a bar for each peer."""

from __future__ import annotations

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


def draw(results: list[Result], path: Path) -> None:
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
        for panel in list(grid.flat)[len(results) :]:
            panel.set_axis_off()
        figure.suptitle(
            "Work per CPU second of the server, relative to bare Trio "
            "(bar: median of the rounds; line: lowest to highest; dashes: trisock's target)",
            fontsize=9,
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(
            path, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None}
        )
        plt.close(figure)


def _draw_row(panel: Axes, result: Result) -> None:
    row = result.row
    names = list(result.series)
    beyond = panel.get_yaxis_transform()  # x in axes coordinates, y in data coordinates
    longest = row.target
    for place, name in enumerate(names):
        ratio = result.ratio(name)
        if ratio is None:
            panel.text(1.02, place, "no figure", transform=beyond, va="center", style="italic")
            continue
        low, bar, high = (min(each, LONGEST) for each in (ratio.low, ratio.median, ratio.high))
        panel.barh(place, bar, color=HIGHLIGHT.get(name, OTHERS), height=0.7)
        panel.plot([low, high], [place, place], color=TEXT, linewidth=1.2)
        cut = " (cut)" if ratio.median > LONGEST else ""
        panel.text(1.02, place, f"{ratio.median:.2f}{cut}", transform=beyond, va="center")
        longest = max(longest, high)
    panel.axvline(row.target, color=TARGET, linestyle="--", linewidth=1)
    panel.set_xlim(0, longest * 1.03)
    panel.set_xticks([])
    panel.set_yticks(range(len(names)), names)
    panel.invert_yaxis()
    panel.tick_params(length=0)
    panel.spines[["top", "right", "bottom"]].set_visible(False)
    detail = "lower is better" if row.is_memory else amount_text(result.amount, row.unit)
    panel.set_title(f"{row.name}\n{row.title}; {detail}", loc="left", x=-0.42, fontsize=8)
