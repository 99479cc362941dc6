"""Run a server in another process and measure it, for load.py."""

from __future__ import annotations

import contextlib
import json
import ssl
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import trio

from helpers.programs import lines_of, running

if TYPE_CHECKING:
    from trisock.testing import Authority

NAME = "localhost"

PATIENCE = 60  # seconds until a client gives up
POLL_INTERVAL = 0.01  # seconds
MIB = 1024 * 1024

# The clients need several addresses: each has only 28,000 ports, and TIME_WAIT occupies some.
_ADDRESSES = [f"127.0.0.{number}" for number in range(1, 9)]

_SERVER = str(Path(__file__).with_name("load_server.py"))
_AT_ONCE = 100  # connections opened at a time, by default

# Python's caches for isinstance may add this many objects once. A leak of one object in each
# connection exceeds this number in every scenario.
_EXTRA_OBJECTS = 15


@dataclass(frozen=True)
class Report:
    """The state of the server. Its counters are zero when the server starts."""

    stats: dict[str, int]
    logged: dict[str, int]
    most_handlers: int
    resident: int
    peak: int
    descriptors: int
    tasks: int
    objects: int
    blocks: int
    cpu: float


class Server:
    """A server in its own process, and its clients."""

    port: int

    def __init__(
        self, requests: trio.abc.SendStream, responses: AsyncIterator[bytes], ca: str
    ) -> None:
        self._requests = requests
        self._responses = responses
        self._context = ssl.create_default_context(cadata=ca)
        self._uses_tls = False

    async def begin(self, options: dict[str, object]) -> None:
        self._uses_tls = "certificate" in options
        self.port = await self._request(options)

    async def _request(self, request: object) -> Any:
        await self._requests.send_all(json.dumps(request).encode() + b"\n")
        return json.loads(await anext(self._responses))

    async def report(self) -> Report:
        return Report(**await self._request(["report"]))

    async def reset_peak(self) -> None:
        await self._request(["reset_peak"])

    async def broadcast(self, size: int, timeout: float) -> int:
        delivered: int = await self._request(["broadcast", size, timeout])
        return delivered

    async def until(self, condition: Callable[[dict[str, int]], bool]) -> None:
        """Wait until the counters meet a condition."""
        while not condition(await self._request(["stats"])):
            await trio.sleep(POLL_INTERVAL)

    async def at_rest(self) -> None:
        await self.until(lambda stats: not stats["active"])

    # ---- clients ----

    async def dial(self, number: int = 0) -> trio.SocketStream:
        sock = trio.socket.socket()
        try:
            await sock.connect((_ADDRESSES[number % len(_ADDRESSES)], self.port))
            return trio.SocketStream(sock)
        except BaseException:
            sock.close()
            raise

    async def connect(self, number: int = 0) -> trio.abc.Stream:
        """Connect, and start TLS if the server uses TLS."""
        stream = await self.dial(number)
        if not self._uses_tls:
            return stream
        secure = trio.SSLStream(stream, self._context, server_hostname=NAME)
        try:
            await secure.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return secure

    async def visit(self, number: int = 0) -> None:
        """Connect, send a line, and check the response."""
        async with await self.connect(number) as stream:
            await check_echo(stream, number)


async def check_echo(stream: trio.abc.Stream, number: int) -> None:
    line = b"hello %d\n" % number
    await stream.send_all(line)
    got = b""
    while len(got) < len(line):
        chunk = await stream.receive_some()
        if not chunk:
            raise trio.BrokenResourceError("the connection ended before the response")
        got += chunk
    if got != line:
        raise WrongResponse(f"{got!r} instead of {line!r}")


class WrongResponse(Exception):
    """A client received an unexpected response."""


async def many(
    count: int, function: Callable[[int], Awaitable[object]], at_once: int = _AT_ONCE
) -> None:
    """Call a function with each number below ``count``, at most ``at_once`` calls at a time."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await function(number)

    async with trio.open_nursery() as nursery:
        for _ in range(min(at_once, count)):
            nursery.start_soon(work)


@dataclass
class Outcome:
    """The results of the offered connections. ``facts`` are shown in the table."""

    offered: int = 0
    served: int = 0
    refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    async def count(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Run one connection and count its result."""
        self.offered += 1
        begin = trio.current_time()
        try:
            with trio.fail_after(PATIENCE):
                await function(*arguments)
        except ConnectionRefusedError:
            self.refused += 1
        except (OSError, WrongResponse, trio.BrokenResourceError, trio.TooSlowError) as exc:
            self.failed[type(exc).__name__] += 1
        else:
            self.served += 1
            self.seconds.append(trio.current_time() - begin)

    def add_times(self) -> None:
        """Add the median and the longest time of a connection to the facts."""
        if self.seconds:
            self.facts["median"] = f"{statistics.median(self.seconds) * 1000:.1f} ms"
            self.facts["slowest"] = f"{max(self.seconds) * 1000:.0f} ms"


@dataclass(frozen=True)
class Result:
    """A scenario's outcome, and three reports of the idle server.

    Attributes:
      fresh: the report right after the server started.
      before: the report before the run.
      after: the report after the run.
    """

    name: str
    outcome: Outcome
    fresh: Report
    before: Report
    after: Report

    def problems(self) -> list[str]:
        """List connections that were not served, and resources that leaked."""
        found = []
        outcome = self.outcome
        if outcome.served != outcome.offered:
            found.append(
                f"{outcome.served} of {outcome.offered} served, {outcome.refused} refused, "
                f"failed: {dict(outcome.failed)}"
            )
        for name, bound in (("descriptors", 0), ("tasks", 0), ("objects", _EXTRA_OBJECTS)):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if abs(after - before) > bound:
                found.append(f"{before} {name} before, {after} after")
        return found

    def counted(self, name: str) -> int:
        """Return the growth of one of the server's counters."""
        return self.after.stats[name] - self.before.stats[name]

    def logged(self, text: str) -> int:
        """Return the number of new log entries that contain a text."""
        return sum(
            count - self.before.logged.get(each, 0)
            for each, count in self.after.logged.items()
            if text in each
        )

    HEAD: ClassVar = [
        *("scenario", "offered", "accepted", "served", "refused", "failed"),
        "RSS in MiB: new / peak and end of the warm-up / peak and end of the run",
        *("descriptors", "tasks", "objects", "blocks", "CPU of the server", "other facts"),
    ]

    def cells(self) -> list[str]:
        outcome, before, after = self.outcome, self.before, self.after
        fresh = self.fresh.resident
        memory = [(fresh,), (before.peak, before.resident), (after.peak, after.resident)]
        accepted, failed = self.counted("accepted"), outcome.failed.total()
        counts = (outcome.offered, accepted, outcome.served, outcome.refused, failed)
        return [
            self.name,
            *(f"{each:,}" for each in counts),
            " / ".join(", ".join(f"{each / MIB:.1f}" for each in times) for times in memory),
            *(
                f"{getattr(before, name):,} / {getattr(after, name):,}"
                for name in ("descriptors", "tasks", "objects", "blocks")
            ),
            f"{after.cpu - before.cpu:.1f} s",
            ", ".join(f"{name} {value}" for name, value in outcome.facts.items()),
        ]


Work = Callable[[Server, Outcome], Coroutine[Any, Any, None]]


class Runner:
    """Runs scenarios, each with a new server."""

    def __init__(self, authority: Authority) -> None:
        self._ca = authority.ca.decode()
        issued = authority.certificate(NAME)
        self._certificate = (issued._chain.decode(), issued._private_key.decode())

    def tls(self, wanted: bool) -> dict[str, Any]:
        """Return a server's options for TLS, or no options if TLS is not wanted."""
        return {"certificate": self._certificate} if wanted else {}

    @contextlib.asynccontextmanager
    async def server(self, **options: object) -> AsyncIterator[Server]:
        """Run a server until the block ends."""
        async with running(
            *(sys.executable, _SERVER), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            async with process.stdin, process.stdout:
                async with contextlib.aclosing(lines_of(process.stdout)) as responses:
                    server = Server(process.stdin, responses, self._ca)
                    await server.begin(options)
                    yield server

    async def measure(
        self, name: str, work: Work, *, warm_up: Work | None = None, **options: object
    ) -> Result:
        """Do the work twice with one server, first as a warm-up. Report on the second run."""
        async with self.server(**options) as server:
            fresh = await server.report()
            await (warm_up or work)(server, Outcome())
            await server.at_rest()
            before = await server.report()
            await server.reset_peak()
            outcome = Outcome()
            await work(server, outcome)
            await server.at_rest()
            await server.visit()  # check that the server still works
            await server.at_rest()
            return Result(name, outcome, fresh, before, await server.report())
