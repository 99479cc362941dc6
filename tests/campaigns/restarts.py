"""Restart a server again and again under load. No request may be lost.

    python tests/campaigns/restarts.py [--quick] [WAY ...]

Clients send requests without pause, and the server restarts meanwhile. ``restart_ways.py`` has the
ways to restart the server. Each way runs in plain text and with TLS, with one request for each
connection and with persistent connections.

A request is lost if its client sees a reset, a refused connect, or an answer that is cut short. A
persistent connection may also end cleanly, without a byte of the answer. This is no loss if no
handler has read the request, because the client can try again. (The server logs each request that a
handler reads.) On a fresh connection, even a clean end is a loss.

``test_restarts.py`` runs this program with fewer requests.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import os
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import trio

sys.path.append(str(Path(__file__).parents[1]))  # a program needs this to import tests/helpers

os.environ.setdefault("REQUEST_LOG", os.devnull)  # restart_server opens it when it is imported

import trisock
from helpers.pem import pems
from restart_server import answer
from restart_ways import WAYS
from trisock.pluto.blocking import run_trio  # raises a bare KeyboardInterrupt, not a group
from trisock.testing import Authority

_CLIENTS = 200
_PATIENCE = 60  # seconds until a client gives up


class Lost(Exception):
    """A request was lost."""


@dataclass
class Result:
    """The outcome of one run.

    Attributes:
      in_flight: the number of unanswered requests at the moment of each restart.
      retried: how many requests were sent again after a clean end.
      lost: how requests were lost, and how many.
    """

    name: str
    answered: int = 0
    in_flight: list[int] = field(default_factory=list)
    retried: int = 0
    lost: Counter[str] = field(default_factory=Counter)
    seconds: float = 0

    HEAD = ("restarts", "requests", "restarts", "in flight", "retried", "lost", "seconds")

    def cells(self) -> list[str]:
        least = min(self.in_flight, default=0)
        return [
            self.name,
            f"{self.answered:,}",
            f"{len(self.in_flight)}",
            f"at least {least}",
            f"{self.retried:,}",
            "none" if not self.lost else f"{self.lost.total()}: {dict(self.lost)}",
            f"{self.seconds:.0f}",
        ]


class Load:
    """Clients that send requests, one after the other, until enough are answered.

    Args:
      requests: how many requests to send.
      stay: whether a client keeps its connection for all its requests.
    """

    def __init__(
        self, port: int, tls: trisock.ClientTLS | None, result: Result, requests: int, stay: bool
    ) -> None:
        self._port = port
        self._tls = tls
        self._result = result
        self._numbers = iter(range(requests))
        self._stay = stay
        self._progress = trio.Condition()
        self.in_flight = 0
        self.dropped: set[bytes] = set()  # requests whose connection ended without an answer

    async def run(self, clients: int) -> None:
        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(self._client, f"127.0.0.{1 + number % 8}")

    async def _client(self, local_address: str) -> None:
        sock: trisock.Socket | None = None
        for number in self._numbers:
            try:
                with trio.fail_after(_PATIENCE):
                    sock = await self._ask(sock, number, local_address)
            except Lost as exc:
                self._result.lost[str(exc)] += 1
                sock = None
            except (OSError, trio.BrokenResourceError, trio.TooSlowError) as exc:
                self._result.lost[f"{type(exc).__name__}: {exc}"] += 1
                sock = None
            else:
                self._result.answered += 1
            async with self._progress:
                self._progress.notify_all()
        if sock is not None:
            await sock.close()

    async def _ask(
        self, sock: trisock.Socket | None, number: int, local_address: str
    ) -> trisock.Socket | None:
        """Send a request until it is answered. Return the connection if it is persistent."""
        for attempt in itertools.count():
            fresh = sock is None
            if sock is None:
                sock = await trisock.connect(
                    "127.0.0.1", self._port, tls=self._tls, local_address=local_address
                )
            request = b"request %d.%d" % (number, attempt)
            self.in_flight += 1
            async with self._progress:
                self._progress.notify_all()
            try:
                answered = await _exchange(sock, request)
            except BaseException:
                sock.abort()
                raise
            finally:
                self.in_flight -= 1
            if answered and self._stay:
                return sock
            await sock.close()
            if answered:
                return None
            if fresh:
                raise Lost("a fresh connection ended without an answer")
            self.dropped.add(request)
            self._result.retried += 1
            sock = None
        raise AssertionError

    async def until(self, answered: int, in_flight: int) -> None:
        """Wait for ``answered`` answered or lost requests, and ``in_flight`` requests in flight."""
        result = self._result
        async with self._progress:
            while result.answered + result.lost.total() < answered or self.in_flight < in_flight:
                await self._progress.wait()


async def _exchange(sock: trisock.Socket, request: bytes) -> bool:
    """Send a request. Return whether it was answered. False means EOF before the first byte."""
    expected = answer(request)
    with contextlib.suppress(trio.BrokenResourceError):  # the read shows how the connection ended
        await sock.send(request, b"\n")
    try:
        received = await sock.recv_exactly(len(expected))
    except trisock.IncompleteReadError as exc:
        if exc.at_boundary:
            return False
        raise Lost("an answer was cut short") from None
    if received != expected:
        raise Lost("a wrong answer")
    return True


async def run(
    way: str,
    authority: Authority,
    *,
    tls: bool,
    stay: bool,
    requests: int,
    restarts: int,
    clients: int = _CLIENTS,
) -> Result:
    """Restart a server under load, in one of the ways of ``WAYS``."""
    kind = "connections that stay" if stay else "one request each"
    result = Result(f"{way}, {'TLS' if tls else 'plain'}, {kind}")
    begin = trio.current_time()
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        log = directory / "requests"
        environment = {"REQUEST_LOG": str(log)}
        if tls:
            environment |= _write_certificate(authority, directory)
        async with WAYS[way](directory, environment) as (port, restart):
            role = authority.client_tls("localhost") if tls else None
            load = Load(port, role, result, requests, stay)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(load.run, clients)
                for number in range(1, restarts + 1):
                    await load.until(requests * number // (restarts + 1), clients // 4)
                    result.in_flight.append(load.in_flight)
                    await restart()
        read = set(log.read_bytes().splitlines())
    if served := len(load.dropped & read):
        result.lost["a clean end after a handler has read the request"] += served
    result.seconds = trio.current_time() - begin
    return result


def _write_certificate(authority: Authority, directory: Path) -> dict[str, str]:
    paths = {}
    for variable, text in zip(["CERTIFICATE", "KEY"], pems(authority, "localhost"), strict=True):
        path = directory / f"{variable.lower()}.pem"
        path.touch(mode=0o600)
        path.write_bytes(text)
        paths[variable] = str(path)
    return paths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ways", nargs="*", metavar="WAY", help=", ".join(WAYS))
    parser.add_argument("--quick", action="store_true", help="2 restarts, 2,000 requests")
    args = parser.parse_args()
    run_trio(functools.partial(show, args.ways or list(WAYS), args.quick))


async def show(ways: list[str], quick: bool) -> None:
    authority = Authority()
    requests, restarts = (2000, 2) if quick else (20_000, 20)
    lost = 0
    print("| " + " | ".join(Result.HEAD) + " |\n|" + " --- |" * len(Result.HEAD), flush=True)
    for way, tls, stay in itertools.product(ways, [False, True], [False, True]):
        result = await run(way, authority, tls=tls, stay=stay, requests=requests, restarts=restarts)
        print("| " + " | ".join(result.cells()) + " |", flush=True)
        lost += result.lost.total()
    if lost:
        sys.exit(f"{lost} requests were lost")


if __name__ == "__main__":
    main()
