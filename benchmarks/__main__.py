"""Compare trisock with other libraries: work per CPU second of the server."""

from __future__ import annotations

import argparse
import pstats
import sys
import tempfile
from collections.abc import Callable, Container
from pathlib import Path

from .contest import Result, Setup, compete, prepare, start
from .measure import Failed, measure
from .peers import PEERS, SUBJECT, Peer
from .rows import ROWS, Row

FULL_ROUNDS = 5
QUICK_ROUNDS = 3
JSON = Path("benchmarks/results/latest.json")
WIDTH = 120  # the console has at least this width, because the widest table needs 120 columns
SVG = Path("docs/benchmark.svg")
OVERVIEW = Path("docs/benchmark-overview.svg")  # the README's


def main() -> None:
    """Parse the command line, and run the command."""
    args = _parse()
    if args.list:
        _list()
        return
    if not sys.platform.startswith("linux"):
        sys.exit("the benchmarks need Linux: epoll, /proc, and the CPU clocks of other processes")
    with tempfile.TemporaryDirectory() as directory:
        setup = prepare(Path(directory))
        if args.profile:
            peers = [PEERS[each] for each in args.peers or [SUBJECT]]
            _profile(ROWS[args.profile], peers, setup, quick=args.quick)
        else:
            _compare(args, setup)


def _compare(args: argparse.Namespace, setup: Setup) -> None:
    # Imported here, because rich and matplotlib are not installed for the tests.
    from rich.console import Console

    from . import record, report

    console = Console(highlight=False)
    console.width = max(console.width, WIDTH)
    about = record.machine(setup)
    console.print(", ".join(f"{name} {value}" for name, value in about.items()), "\n")
    peers = [PEERS[name] for name in args.peers or PEERS]
    rounds = args.rounds or (QUICK_ROUNDS if args.quick else FULL_ROUNDS)
    results: list[Result] = []
    for row in [ROWS[name] for name in args.rows or ROWS]:
        with console.status(f"{row.name}, {rounds} rounds"):
            amount = row.quick if args.quick else row.amount
            results.append(compete(row, peers, setup, amount=amount, rounds=rounds))
        report.show_row(results[-1], console)
    report.show_summary(results, console)
    # Only a full run may replace the recorded results.
    full = not (args.quick or args.rows or args.peers)
    if path := args.json or (JSON if full else None):
        record.write(results, about, path)
    if path := args.svg or (SVG if full else None):
        from . import chart

        chart.draw(results, path)
        if full:
            chart.draw_overview(results, OVERVIEW)


def _profile(row: Row, peers: list[Peer], setup: Setup, *, quick: bool) -> None:
    path = setup.certificates / "profile"
    for peer in peers:
        server = start(row, peer, setup, f"--profile={path}")
        try:
            measure(row, server, row.quick if quick else row.amount, setup.authority)
        except Failed as exc:
            sys.exit(f"{peer.name} failed: {exc}")
        print(f"{row.name}, {peer.name}: profile of the server since its start")
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
    parser.add_argument("--quick", action="store_true", help="less work and fewer rounds")
    parser.add_argument(
        "--rounds", type=int, help=f"default: {FULL_ROUNDS}, or {QUICK_ROUNDS} with --quick"
    )
    parser.add_argument("--rows", type=_names(ROWS), metavar="ROW,...", help="run only these rows")
    parser.add_argument(
        "--peers", type=_names(PEERS), metavar="PEER,...", help="run only these peers"
    )
    parser.add_argument(
        "--json", type=Path, help=f"write all figures to this file (default of a full run: {JSON})"
    )
    parser.add_argument(
        "--svg", type=Path, help=f"draw the chart in this file (default of a full run: {SVG})"
    )
    parser.add_argument("--list", action="store_true", help="list rows and peers")
    parser.add_argument(
        "--profile",
        metavar="ROW",
        choices=ROWS,
        help=f"profile the server of {SUBJECT}, or the servers of --peers",
    )
    args = parser.parse_args()
    if args.rounds is not None and args.rounds < 1:
        parser.error("--rounds must be at least 1")
    return args


def _names(known: Container[str]) -> Callable[[str], list[str]]:
    def names(text: str) -> list[str]:
        found = text.split(",")
        for name in found:
            if name not in known:
                raise argparse.ArgumentTypeError(f"unknown name {name!r}: see --list")
        return found

    return names


if __name__ == "__main__":
    main()
