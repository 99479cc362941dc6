"""What load.py's scenarios need: the server as its clients see it, and what became of these."""

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
from typing import TYPE_CHECKING, Any

import trio

from helpers.programs import lines_of, running

if TYPE_CHECKING:
    from helpers.authority import Authority

NAME = "localhost"

# Seconds after which a client has waited long enough, and its connection has failed.
PATIENCE = 60

# Seconds between two looks at a server that has not got there yet.
LOOK = 0.01

# The server's addresses: one has room for 28,000 connections, counting those in TIME_WAIT.
_ADDRESSES = [f"127.0.0.{number}" for number in range(1, 9)]

# The program that is the server.
_SERVER = str(Path(__file__).with_name("load_server.py"))

# How many connections are opened at a time where no rate is asked for.
_AT_ONCE = 100

# Python has caches for isinstance: so many objects may come once. (One that stayed with each
# connection would be more, in each scenario.)
_OBJECTS = 15

MIB = 1024 * 1024


@dataclass(frozen=True)
class Report:
    """How the server is; counts are since it was started."""

    stats: dict[str, int]
    logged: dict[str, int]
    most_at_once: int
    resident: int
    peak: int
    descriptors: int
    tasks: int
    objects: int
    blocks: int
    cpu: float


class Server:
    """A server in its own process, and what its clients need."""

    port: int

    def __init__(self, orders: trio.abc.SendStream, answers: AsyncIterator[bytes], ca: str) -> None:
        self._orders = orders
        self._answers = answers
        self._context = ssl.create_default_context(cadata=ca)
        self._uses_tls = False

    async def begin(self, options: dict[str, object]) -> None:
        self._uses_tls = "certificate" in options
        self.port = await self._ask(options)

    async def _ask(self, question: object) -> Any:
        await self._orders.send_all(json.dumps(question).encode() + b"\n")
        return json.loads(await anext(self._answers))

    async def report(self) -> Report:
        return Report(**await self._ask(["report"]))

    async def reset_peak(self) -> None:
        await self._ask(["reset_peak"])

    async def broadcast(self, size: int, timeout: float) -> int:
        delivered: int = await self._ask(["broadcast", size, timeout])
        return delivered

    async def until(self, condition: Callable[[dict[str, int]], bool]) -> None:
        """Wait until the counters are as wanted."""
        while not condition(await self._ask(["stats"])):
            await trio.sleep(LOOK)

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
        """Dial, and shake hands where the server does."""
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
        """Connect, ask something, and check the answer."""
        async with await self.connect(number) as stream:
            await ask(stream, number)


async def ask(stream: trio.abc.Stream, number: int) -> None:
    question = b"hello %d\n" % number
    await stream.send_all(question)
    got = b""
    while len(got) < len(question):
        chunk = await stream.receive_some()
        if not chunk:
            raise trio.BrokenResourceError("the end, in place of an answer")
        got += chunk
    if got != question:
        raise Wrong(f"{got!r} in place of {question!r}")


class Wrong(Exception):
    """An answer that is not the one to the question."""


async def many(
    count: int, function: Callable[[int], Awaitable[object]], at_once: int = _AT_ONCE
) -> None:
    """Call a function with each number, so many at a time."""
    numbers = iter(range(count))

    async def work() -> None:
        for number in numbers:
            await function(number)

    async with trio.open_nursery() as nursery:
        for _ in range(min(at_once, count)):
            nursery.start_soon(work)


@dataclass
class Outcome:
    """What became of what clients have offered; ``facts`` is what else there is to tell."""

    offered: int = 0
    served: int = 0
    refused: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    facts: dict[str, object] = field(default_factory=dict)

    async def count(self, function: Callable[..., Awaitable[object]], *arguments: object) -> None:
        """Call what serves one connection."""
        self.offered += 1
        begin = trio.current_time()
        try:
            with trio.fail_after(PATIENCE):
                await function(*arguments)
        except ConnectionRefusedError:
            self.refused += 1
        except (OSError, Wrong, trio.BrokenResourceError, trio.TooSlowError) as exc:
            self.failed[type(exc).__name__] += 1
        else:
            self.served += 1
            self.seconds.append(trio.current_time() - begin)

    def tell_times(self) -> None:
        """Add how long it has taken to serve one."""
        if self.seconds:
            self.facts["median"] = f"{statistics.median(self.seconds) * 1000:.1f} ms"
            self.facts["slowest"] = f"{max(self.seconds) * 1000:.0f} ms"


@dataclass(frozen=True)
class Result:
    """A scenario's outcome, and the server at rest: new, before and after."""

    name: str
    outcome: Outcome
    fresh: Report
    before: Report
    after: Report

    def wrongs(self) -> list[str]:
        """Say who was not served, and what the server holds that it has not held before."""
        found = []
        outcome = self.outcome
        if outcome.served != outcome.offered:
            found.append(
                f"{outcome.served} of {outcome.offered} served, {outcome.refused} refused, "
                f"failed: {dict(outcome.failed)}"
            )
        for name, bound in (("descriptors", 0), ("tasks", 0), ("objects", _OBJECTS)):
            before, after = getattr(self.before, name), getattr(self.after, name)
            if abs(after - before) > bound:
                found.append(f"{before} {name} before, {after} after")
        return found

    def counted(self, name: str) -> int:
        """How much one of the server's counters has grown."""
        return self.after.stats[name] - self.before.stats[name]

    def logged(self, text: str) -> int:
        """How many entries of the log have such a text."""
        return sum(
            count - self.before.logged.get(each, 0)
            for each, count in self.after.logged.items()
            if text in each
        )

    def cells(self) -> list[str]:
        outcome, before, after = self.outcome, self.before, self.after
        fresh = self.fresh.resident
        memory = [(fresh,), (before.peak, before.resident), (after.peak, after.resident)]
        return [
            self.name,
            f"{outcome.offered:,}",
            f"{self.counted('accepted'):,}",
            f"{outcome.served:,}",
            f"{outcome.refused:,}",
            f"{outcome.failed.total():,}",
            " / ".join(", ".join(f"{each / MIB:.1f}" for each in times) for times in memory),
            f"{before.descriptors} / {after.descriptors}",
            f"{before.tasks} / {after.tasks}",
            f"{before.objects:,} / {after.objects:,}",
            f"{before.blocks:,} / {after.blocks:,}",
            f"{after.cpu - before.cpu:.1f} s",
            ", ".join(f"{name} {value}" for name, value in outcome.facts.items()),
        ]


HEAD = [
    *("scenario", "offered", "accepted", "served", "refused", "failed"),
    "RSS in MiB: new / peak and end of the warm-up / peak and end",
    *("descriptors", "tasks", "objects", "blocks", "CPU of the server", "besides"),
]

Work = Callable[[Server, Outcome], Coroutine[Any, Any, None]]


class Ground:
    """Where scenarios take place: it starts servers, and has certificates for them."""

    def __init__(self, authority: Authority) -> None:
        self._ca = authority.pem.decode()
        issued = authority.issue(NAME)
        self._certificate = (issued._chain.decode(), issued._private_key.decode())

    def tls(self, wanted: bool) -> dict[str, Any]:
        """Return what a server needs for TLS, where that is wanted."""
        return {"certificate": self._certificate} if wanted else {}

    @contextlib.asynccontextmanager
    async def server(self, **options: object) -> AsyncIterator[Server]:
        """Run a server for as long as the context lasts; it ends when its orders do, too."""
        async with running(
            *(sys.executable, _SERVER), stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as process:
            assert process.stdin is not None
            assert process.stdout is not None
            async with process.stdin, process.stdout:
                async with contextlib.aclosing(lines_of(process.stdout)) as answers:
                    server = Server(process.stdin, answers, self._ca)
                    await server.begin(options)
                    yield server

    async def measure(
        self, name: str, work: Work, *, warm_up: Work | None = None, **options: object
    ) -> Result:
        """Do some work with a server twice, and report on the second time."""
        async with self.server(**options) as server:
            fresh = await server.report()
            await (warm_up or work)(server, Outcome())
            await server.at_rest()
            before = await server.report()
            await server.reset_peak()
            outcome = Outcome()
            await work(server, outcome)
            await server.at_rest()
            await server.visit()  # it lives
            await server.at_rest()
            return Result(name, outcome, fresh, before, await server.report())
