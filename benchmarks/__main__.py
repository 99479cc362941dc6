"""The command line of the benchmarks."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from .contest import Result, compete, prepare
from .peers import BASE, PEERS
from .rows import ROWS


def main() -> None:
    args = parse()
    rounds = args.rounds or (3 if args.quick else 5)
    from rich.console import Console

    from .report import show

    console = Console()
    results: list[Result] = []
    with tempfile.TemporaryDirectory() as directory:
        place = prepare(Path(directory))
        for name in args.rows:
            row = ROWS[name]
            with console.status("") as status:
                result = compete(
                    row,
                    [PEERS[each] for each in args.peers],
                    place,
                    amount=row.quick if args.quick else row.amount,
                    rounds=rounds,
                    on_round=lambda number: status.update(f"{name}, round {number + 1}"),
                )
            results.append(result)
            show(result, console)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work in fewer rounds: for a look")
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--rows", type=names_of(ROWS), default=list(ROWS), metavar="ROW,...")
    parser.add_argument("--peers", type=names_of(PEERS), default=list(PEERS), metavar="PEER,...")
    return parser.parse_args()


def names_of(known):
    def parse(text: str) -> list[str]:
        names = text.split(",")
        for name in names:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}")
        return names

    return parse


main()
