"""Results as a table on the terminal."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from .contest import Result, Spread
from .peers import BASE
from .rows import Row

SUBJECT = "trisock"


def show(result: Result, console: Console) -> None:
    """Print one row's results."""
    row = result.row
    relation, better = ("<=", "less") if row.is_memory else (">=", "more")
    table = Table(
        title=f"{row.name}: {row.title} ({amount(result.amount, row.unit)})",
        title_justify="left",
        caption=f"trisock's target: {relation} {row.target} x {BASE} ({better} is better)",
        caption_justify="left",
    )
    table.add_column("peer")
    table.add_column(f"x {BASE}", justify="right")
    table.add_column("low - high", justify="right")
    if row.is_memory:
        table.add_column("KiB a connection", justify="right")
    else:
        table.add_column(f"{unit(row)} a CPU second", justify="right")
        table.add_column("a second", justify="right")
        table.add_column("busy", justify="right")
    table.add_column("target")
    for name, series in result.series.items():
        if series.failure:
            table.add_row(name, "failed", "", "", *[""] * (0 if row.is_memory else 2), series.failure)
            continue
        ratio = result.ratio(name)
        cells = [name, *_ratio(ratio), _number(result.figure(name).median, row)]
        if not row.is_memory:
            cells += [_number(result.per_wall_second(name).median, row), f"{result.busy(name):.0%}"]
        table.add_row(*cells, verdict(row, ratio) if name == SUBJECT and ratio else "")
    console.print(table)
    console.print()


def verdict(row: Row, ratio: Spread) -> str:
    """Say whether trisock has reached what it is meant to."""
    return "met" if row.meets_target(ratio.median) else "missed"


def amount(number: int, unit: str) -> str:
    """Write an amount of work: 256 MiB, 60,000 messages."""
    return f"{number / (1 << 20):,g} MiB" if unit == "bytes" else f"{number:,} {unit}"


def unit(row: Row) -> str:
    """Return the unit that figures of a row are shown in."""
    return "MiB" if row.unit == "bytes" else row.unit


def _ratio(ratio: Spread | None) -> tuple[str, str]:
    if ratio is None:
        return "", ""
    return f"{ratio.median:.2f}", f"{ratio.low:.2f} - {ratio.high:.2f}"


def _number(figure: float, row: Row) -> str:
    if row.is_memory:
        return f"{figure / 1024:,.1f}"
    return f"{figure / (1 << 20):,.0f}" if row.unit == "bytes" else f"{figure:,.0f}"
