"""Measure all peers in one row. Each round measures all peers, so noise affects all equally."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from .client import upstream
from .measure import Failed, Measurement, measure
from .peers import BASE, Peer
from .rows import ROWS, Row
from .server import Server


@dataclass(frozen=True)
class Spread:
    """The median, lowest and highest value of several rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of one or more values."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Series:
    """One peer's measurements in one row (one per round), and the reason if the peer failed."""

    measurements: list[Measurement] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Result:
    """The result of one row, with a series for each peer."""

    row: Row
    amount: int
    series: dict[str, Series]

    def figure(self, peer: str) -> Spread:
        """Return the row's figure: work per CPU second, or bytes per connection."""
        return Spread.of([each.figure(self.row) for each in self.series[peer].measurements])

    def per_second(self, peer: str) -> Spread:
        """Return the work per second of wall-clock time."""
        return Spread.of([each.amount / each.wall for each in self.series[peer].measurements])

    def busy(self, peer: str) -> float:
        """Return the server's CPU time as a fraction of the wall-clock time."""
        return statistics.median(each.cpu / each.wall for each in self.series[peer].measurements)

    def ratio(self, peer: str, to: str = BASE) -> Spread | None:
        """Divide ``peer``'s figure by ``to``'s figure in each round, and return the spread.

        Returns None if either of them failed or is not in this row.
        """
        own, base = self.series.get(peer), self.series.get(to)
        if own is None or base is None or own.failure or base.failure:
            return None
        rounds = zip(own.measurements, base.measurements, strict=True)
        return Spread.of([ours.figure(self.row) / its.figure(self.row) for ours, its in rounds])


@dataclass(frozen=True)
class Setup:
    """The cores and certificates of a run.

    Attributes:
      server_core: the CPU core that the servers run on.
      client_core: the client's core (also the servers' core, if the machine has only one).
      certificates: the directory that contains ``chain.pem``, ``key.pem`` and ``ca.pem``.
    """

    server_core: int
    client_core: int
    certificates: Path

    @property
    def cores(self) -> str:
        """Describe which cores the servers and the client use."""
        if self.server_core == self.client_core:
            return f"{self.server_core} only: servers and client share it"
        return f"{self.server_core} for the servers, {self.client_core} for the client"

    @property
    def authority(self) -> Path:
        """The CA that signed the servers' certificate."""
        return self.certificates / "ca.pem"


def prepare(directory: Path) -> Setup:
    """Pin this process to a core, reserve another core for servers, and create certificates."""
    _allow_connections()
    cores = sorted(os.sched_getaffinity(0))
    setup = Setup(cores[0], cores[-1], directory)
    os.sched_setaffinity(0, {setup.client_core})
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
    authority.cert_pem.write_to_path(setup.authority)
    leaf.private_key_pem.write_to_path(directory / "key.pem")
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(directory / "chain.pem", append=True)
    return setup


def _allow_connections() -> None:
    """Raise the descriptor limit for the memory rows. The servers inherit the limit."""
    wanted = 4 * max(max(row.amount, row.connections) for row in ROWS.values() if row.is_memory)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def compete(
    row: Row,
    peers: Sequence[Peer],
    setup: Setup,
    *,
    amount: int,
    rounds: int,
) -> Result:
    """Measure every peer in every round. After a peer has failed, skip it in later rounds.

    A peer that has no server for the row's work is omitted.
    """
    peers = [each for each in peers if row.work in each.works]
    series = {peer.name: Series() for peer in peers}
    for peer in peers:
        if peer.missing:
            series[peer.name].failure = f"not installed: {', '.join(peer.missing)}"
    for number in range(rounds if peers else 0):
        shift = number % len(peers)
        order = [each for each in [*peers[shift:], *peers[:shift]] if not series[each.name].failure]
        with contextlib.ExitStack() as stack:
            # Interpreters start slowly: start all of them together, before any measurement.
            servers = [start(row, peer, setup) for peer in order]
            for server in servers:
                stack.callback(server.stop)
            for server in servers:
                server.wait_ready()
            for peer, server in zip(order, servers, strict=True):
                try:
                    measured = measure(row, server, amount, setup.authority)
                except Failed as exc:
                    series[peer.name].failure = str(exc)
                else:
                    series[peer.name].measurements.append(measured)
    return Result(row, amount, series)


def start(row: Row, peer: Peer, setup: Setup, *arguments: str) -> Server:
    """Start a peer's server for a row."""
    command = [peer.module, row.work, *arguments]
    if peer.flavour:
        command.append(f"--flavour={peer.flavour}")
    if row.tls:
        command.append(f"--tls={setup.certificates}")
    if row.work == "relay":
        command.append(f"--upstream={upstream().getsockname()[1]}")
    return Server(command, setup.server_core, peer.source)
