"""Compare trisock with others: work per CPU second of the server, row by row."""

from __future__ import annotations

import argparse
import pstats
import sys
import tempfile
from collections.abc import Callable, Container
from pathlib import Path

from .contest import Place, Result, compete, prepare, start
from .measure import Failed, measure
from .peers import PEERS, SUBJECT, Peer
from .rows import ROWS, Row

FULL_ROUNDS = 5
QUICK_ROUNDS = 3
JSON = Path("benchmarks/results/latest.json")
WIDTH = 120  # what the widest table needs, also where the output is a file
SVG = Path("docs/benchmark.svg")


def main() -> None:
    """Do what the command line says."""
    args = _parse()
    if args.list:
        _list()
        return
    if not sys.platform.startswith("linux"):
        sys.exit("the benchmarks need Linux: epoll, /proc, and the clocks of other processes")
    with tempfile.TemporaryDirectory() as directory:
        place = prepare(Path(directory))
        if args.profile:
            peers = [PEERS[each] for each in args.peers or [SUBJECT]]
            _profile(ROWS[args.profile], peers, place, quick=args.quick)
        else:
            _compare(args, place)


def _compare(args: argparse.Namespace, place: Place) -> None:
    # Imported here, as the chart is: the tests have no use for what these need.
    from rich.console import Console

    from . import record, report

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    about = record.machine(place)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), "\n")
    peers = [PEERS[name] for name in args.peers or PEERS]
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else FULL_ROUNDS)
    results: list[Result] = []
    for row in [ROWS[name] for name in args.rows or ROWS]:
        with console.status(f"{row.name}, {rounds} rounds"):
            amount = row.quick if args.quick else row.amount
            results.append(compete(row, peers, place, amount=amount, rounds=rounds))
        report.show_row(results[-1], console)
    report.show_summary(results, console)
    # What is kept is a whole run. A look at a part of it must not take its place.
    whole = not (args.quick or args.rows or args.peers)
    if path := args.json or (JSON if whole else None):
        record.write(results, about, path)
    if path := args.svg or (SVG if whole else None):
        from . import chart

        chart.draw(results, path)


def _profile(row: Row, peers: list[Peer], place: Place, *, quick: bool) -> None:
    path = place.certificates / "profile"
    for peer in peers:
        server = start(row, peer, place, f"--profile={path}")
        try:
            measure(row, server, row.quick if quick else row.amount, place.authority)
        except Failed as exc:
            sys.exit(f"{peer.name} failed: {exc}")
        print(f"{row.name}, {peer.name}: the server, from its start")
        pstats.Stats(str(path)).strip_dirs().sort_stats("tottime").print_stats(30)


def _list() -> None:
    print("rows:")
    for row in ROWS.values():
        print(f"  {row.name:15} {row.title}")
    print("peers:")
    for peer in PEERS.values():
        missing = f"(not installed: {', '.join(peer.missing)})" if peer.missing else ""
        print(f"  {peer.name:15} {peer.title} {missing}")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="less work, fewer rounds: for a look")
    parser.add_argument("--rounds", type=int, help=f"{FULL_ROUNDS}, or {QUICK_ROUNDS} if quick")
    parser.add_argument("--rows", type=_names(ROWS), metavar="ROW,...", help="only these")
    parser.add_argument("--peers", type=_names(PEERS), metavar="PEER,...", help="only these")
    parser.add_argument(
        "--json", type=Path, help=f"where to write all figures (whole runs: {JSON})"
    )
    parser.add_argument("--svg", type=Path, help=f"where to draw the chart (whole runs: {SVG})")
    parser.add_argument("--list", action="store_true", help="list rows and peers")
    parser.add_argument(
        "--profile", metavar="ROW", choices=ROWS, help=f"profile {SUBJECT}'s (or --peers') server"
    )
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error("at least one round is needed")
    return args


def _names(known: Container[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is not known: see --list")
        return found

    return names


if __name__ == "__main__":
    main()
