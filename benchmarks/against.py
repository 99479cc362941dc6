"""Compare two builds of trisock, and distinguish slower rows from noise.

    python -m benchmarks.against ../before/src

Three servers do each row's work in the same rounds: this build, this build again, and the other
build. The first two servers are equal, so the spread of their ratio is the machine's current noise.
A row is slower (or faster) if the median ratio of this build to the other build is outside that
spread. We make the spread symmetric, because either of two equal servers may be faster by chance.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from .contest import Result, compete, prepare
from .peers import PEERS, SUBJECT, Peer
from .rows import ROWS

_HERE = str(Path(__file__).parents[1] / "src")


def main() -> int:
    """Run the comparison. Return 1 if a row is slower or a server failed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.against")
    parser.add_argument(
        "before", type=Path, help="the other build: the directory that contains trisock"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--rows", default=",".join(ROWS), help="ROW,...")
    parser.add_argument("--quick", action="store_true", help="less work in each round")
    args = parser.parse_args()
    # Imported here, because rich is not installed for the tests.
    from rich import box
    from rich.console import Console
    from rich.table import Table

    if not (args.before / "trisock").is_dir():
        parser.error(f"no trisock in {args.before}")
    peers = [
        _build("now", _HERE),
        _build("now again", _HERE),
        _build("before", str(args.before.resolve())),
    ]
    table = Table(box=box.MARKDOWN, title="this build relative to the other build")
    for column in ("row", "equal builds", "now / before", "spread", "verdict"):
        table.add_column(column)
    slower = False
    with tempfile.TemporaryDirectory() as directory:
        setup = prepare(Path(directory))
        for row in [ROWS[name] for name in args.rows.split(",")]:
            amount = row.quick if args.quick else row.amount
            result = compete(row, peers, setup, amount=amount, rounds=args.rounds)
            cells, verdict = compare(result)
            slower |= verdict not in ("equal", "faster")
            table.add_row(row.name, *cells, verdict)
            print(row.name, *cells, verdict, flush=True)
    console = Console(width=100)
    console.print(table)
    return int(slower)


def _build(name: str, source: str) -> Peer:
    return replace(PEERS[SUBJECT], name=name, source=source, packages=())


def compare(result: Result) -> tuple[list[str], str]:
    """Return the cells of a row, and the verdict: equal, faster, slower or failed."""
    equal = result.ratio("now again", to="now")
    change = result.ratio("now", to="before")
    if equal is None or change is None:
        failures = {name: each.failure for name, each in result.series.items() if each.failure}
        return ["", "", ""], f"failed: {failures}"
    noise = max(equal.high, 1 / equal.low)
    # A higher figure is better, except for memory.
    gain = 1 / change.median if result.row.is_memory else change.median
    verdict = "slower" if gain < 1 / noise else "faster" if gain > noise else "equal"
    cells = [
        f"{equal.low:.2f} to {equal.high:.2f}",
        f"{change.median:.2f}",
        f"{change.low:.2f} to {change.high:.2f}",
    ]
    return cells, verdict


if __name__ == "__main__":
    sys.exit(main())
