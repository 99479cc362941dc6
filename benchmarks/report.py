"""The results as Markdown tables on the terminal, ready for the docs."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table

from .contest import Result
from .peers import BASE, SUBJECT
from .rows import Row, amount_text


def show_row(result: Result, console: Console) -> None:
    """Print the results of one row."""
    row = result.row
    table = _table(f"{row.name}: {row.title}, {amount_text(result.amount, row.unit)}")
    table.add_column("peer")
    unit = "MiB" if row.unit == "bytes" else row.unit
    columns = ["KiB / connection"] if row.is_memory else [f"{unit} / CPU s", f"{unit} / s", "busy"]
    for column in [f"x {BASE}", "spread", *columns]:
        table.add_column(column, justify="right")
    failures = []
    for name, series in result.series.items():
        if series.failure:
            table.add_row(name, "failed")
            failures.append(f"{name} failed: {series.failure}")
            continue
        cells = [name, "", "", _figure(result.figure(name).median, row)]
        if ratio := result.ratio(name):
            cells[1:3] = [f"{ratio.median:.2f}", f"{ratio.low:.2f} to {ratio.high:.2f}"]
        if not row.is_memory:
            cells += [_figure(result.per_second(name).median, row), f"{result.busy(name):.0%}"]
        table.add_row(*cells)
    console.print(table)
    for failure in failures:
        console.print(failure, markup=False)
    console.print()


def show_summary(results: list[Result], console: Console) -> None:
    """Print the ratios of every row, and whether trisock meets its targets."""
    peers = dict.fromkeys(each for result in results for each in result.series if each != BASE)
    table = _table("work per CPU second of the server, bare Trio = 1; memory: lower is better")
    table.add_column("row")
    for peer in peers:
        table.add_column(peer, justify="right")
    table.add_column(f"{SUBJECT}'s target")
    for result in results:
        cells = [result.row.name]
        for peer in peers:
            ratio = result.ratio(peer)
            cells.append(f"{ratio.median:.2f}" if ratio else _absence(result, peer))
        table.add_row(*cells, _target(result))
    console.print(table)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.MARKDOWN)


def _target(result: Result) -> str:
    row = result.row
    text = f"{'<=' if row.is_memory else '>='} {row.target}"
    ratio = result.ratio(SUBJECT) if SUBJECT in result.series else None
    if ratio:
        text += ": met" if row.meets_target(ratio.median) else ": missed"
    return text


def _absence(result: Result, peer: str) -> str:
    return "failed" if peer in result.series else ""


def _figure(figure: float, row: Row) -> str:
    if row.is_memory:
        return f"{figure / 1024:,.1f}"
    return f"{figure / (1 << 20):,.0f}" if row.unit == "bytes" else f"{figure:,.0f}"
