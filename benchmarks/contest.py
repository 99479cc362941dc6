"""All peers at one row: in rounds, one after another, so that what the machine does hits all."""

from __future__ import annotations

import contextlib
import os
import resource
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from .measure import Failed, Measurement, measure
from .peers import BASE, Peer
from .rows import ROWS, Row
from .server import Server


@dataclass(frozen=True)
class Spread:
    """The median of some rounds, with the lowest and the highest."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Return the spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass
class Series:
    """What one peer did at one row, round by round; or why it did not, in ``failure``."""

    measurements: list[Measurement] = field(default_factory=list)
    failure: str | None = None


@dataclass(frozen=True)
class Result:
    """One row's, with a series for each peer."""

    row: Row
    amount: int
    series: dict[str, Series]

    def figure(self, peer: str) -> Spread:
        """Return the row's figure: work per CPU second, or bytes per connection."""
        return Spread.of([each.figure(self.row) for each in self.series[peer].measurements])

    def per_second(self, peer: str) -> Spread:
        """Return the work that was done in a second of time."""
        return Spread.of([each.amount / each.wall for each in self.series[peer].measurements])

    def busy(self, peer: str) -> float:
        """Return the share of the time in which the server was running."""
        return statistics.median(each.cpu / each.wall for each in self.series[peer].measurements)

    def ratio(self, peer: str, to: str = BASE) -> Spread | None:
        """Return the figure relative to another peer's in the same round, if there are both."""
        base = self.series.get(to)
        if base is None or base.failure or self.series[peer].failure:
            return None
        rounds = zip(self.series[peer].measurements, base.measurements, strict=True)
        return Spread.of([ours.figure(self.row) / its.figure(self.row) for ours, its in rounds])


@dataclass(frozen=True)
class Place:
    """Where it happens.

    Attributes:
      server_core: which core the servers have for themselves.
      client_core: which one the client has; the same where there is only one.
      certificates: a directory with ``chain.pem``, ``key.pem``, and the authority's ``ca.pem``.
    """

    server_core: int
    client_core: int
    certificates: Path

    @property
    def cores(self) -> str:
        """Say which core does what."""
        if self.server_core == self.client_core:
            return f"{self.server_core} only: servers and client share it"
        return f"{self.server_core} for the servers, {self.client_core} for the client"

    @property
    def authority(self) -> Path:
        """Who has signed the servers' certificate."""
        return self.certificates / "ca.pem"


def prepare(directory: Path) -> Place:
    """Take a core for the client, leave one to the servers, and make a certificate for them."""
    _allow_connections()
    cores = sorted(os.sched_getaffinity(0))
    place = Place(cores[0], cores[-1], directory)
    os.sched_setaffinity(0, {place.client_core})
    authority = trustme.CA()
    leaf = authority.issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
    authority.cert_pem.write_to_path(place.authority)
    leaf.private_key_pem.write_to_path(directory / "key.pem")
    for blob in leaf.cert_chain_pems:
        blob.write_to_path(directory / "chain.pem", append=True)
    return place


def _allow_connections() -> None:
    """Let this process, and the servers, have as many connections as the memory rows open."""
    wanted = 2 * max(max(row.amount, row.connections) for row in ROWS.values() if row.is_memory)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))


def compete(
    row: Row,
    peers: Sequence[Peer],
    place: Place,
    *,
    amount: int,
    rounds: int,
) -> Result:
    """Let each peer do a row's work in each round; who fails once is out of it."""
    series = {peer.name: Series() for peer in peers}
    for peer in peers:
        if peer.missing:
            series[peer.name].failure = f"not installed: {', '.join(peer.missing)}"
    for number in range(rounds):
        shift = number % len(peers)
        order = [each for each in [*peers[shift:], *peers[:shift]] if not series[each.name].failure]
        with contextlib.ExitStack() as stack:
            # Interpreters start slowly: let them do it together, before anything is measured.
            servers = [start(row, peer, place) for peer in order]
            for server in servers:
                stack.callback(server.stop)
            for server in servers:
                server.wait_ready()
            for peer, server in zip(order, servers, strict=True):
                try:
                    measured = measure(row, server, amount, place.authority)
                except Failed as exc:
                    series[peer.name].failure = str(exc)
                else:
                    series[peer.name].measurements.append(measured)
    return Result(row, amount, series)


def start(row: Row, peer: Peer, place: Place, *arguments: str) -> Server:
    """Start a peer's server for a row."""
    command = [peer.module, row.work, *arguments]
    if peer.flavour:
        command.append(f"--flavour={peer.flavour}")
    if row.tls:
        command.append(f"--tls={place.certificates}")
    return Server(command, place.server_core, peer.source)
