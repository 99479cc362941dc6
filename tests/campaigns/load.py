"""Load and exhaustion: many connections, fast, slow, silent and failing ones, and no room for more.

    python tests/campaigns/load.py [--quick] [SCENARIO ...]

The server is a process of its own, so that its memory and its descriptors are its own; it is told
what to do, and asked how it is, by lines of JSON. The clients are in this process, and are bare
Trio. Each scenario is done once as a warm-up, which leaves the allocator where it will be, and
then measured: what was offered and what became of it, and what the server holds before,
at most, and after. ``test_load.py`` asserts on the same scenarios, smaller.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import gc
import json
import logging
import os
import resource
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

sys.path.append(str(Path(__file__).parents[1]))  # for helpers, when this is run as a program

import trisock
from helpers.programs import lines_of, running
from trisock import Certificate, ServerTLS, Socket
from trisock.pluto.blocking import run_trio  # a Ctrl-C comes out as such

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

if TYPE_CHECKING:
    from helpers.authority import Authority

NAME = "localhost"

# Seconds after which a client has waited long enough, and its connection has failed.
PATIENCE = 60

# Seconds between two looks at a server that has not got there yet.
_LOOK = 0.01

# The server's addresses: one has room for 28,000 connections, counting those in TIME_WAIT.
_ADDRESSES = [f"127.0.0.{number}" for number in range(1, 9)]

# How many connections are opened at a time where no rate is asked for.
_AT_ONCE = 100

# Python has caches for isinstance: so many objects may come once. (One that stayed with each
# connection would be more, in each scenario.)
_OBJECTS = 15

MIB = 1024 * 1024


# ---- the server's process ----


class Gauge:
    """What a process holds. It opens nothing: there may be no descriptor left."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._clear = os.open("/proc/self/clear_refs", os.O_WRONLY)

    def read(self) -> dict[str, int | float]:
        gc.collect()
        with contextlib.suppress(AttributeError):  # not glibc
            ctypes.CDLL(None).malloc_trim(0)  # what is kept for the next time is not held
        status = dict(
            line.split(":", 1) for line in os.pread(self._status, 8192, 0).decode().splitlines()
        )
        return {
            "resident": int(status["VmRSS"].split()[0]) * 1024,
            "peak": int(status["VmHWM"].split()[0]) * 1024,
            "descriptors": sum(map(_is_open, range(resource.getrlimit(resource.RLIMIT_NOFILE)[0]))),
            "tasks": trio.lowlevel.current_statistics().tasks_living,
            "objects": len(gc.get_objects()),
            "blocks": sys.getallocatedblocks(),
            "cpu": time.process_time(),
        }

    def reset_peak(self) -> None:
        os.write(self._clear, b"5")


def _is_open(descriptor: int) -> bool:
    try:
        fcntl.fcntl(descriptor, fcntl.F_GETFD)
    except OSError:
        return False
    return True


class _Log(logging.Handler):
    """Counts what is logged, by its text before the arguments are put in."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def emit(self, record: logging.LogRecord) -> None:
        self.counts[f"{record.levelname} {record.msg}"] += 1


class Subject:
    """The server that is loaded. Its handler answers each line with the same line."""

    def __init__(self) -> None:
        self._log = _Log()
        logging.getLogger("trisock").addHandler(self._log)
        logging.getLogger("trisock").setLevel(logging.INFO)
        self._gauge = Gauge()
        self._at_once = self._most_at_once = 0
        gc.freeze()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery, trio.lowlevel.FdStream(os.dup(0)) as stdin:
            async with contextlib.aclosing(lines_of(stdin)) as lines:
                self._server = await self._bind(nursery, **json.loads(await anext(lines)))
                print(json.dumps(self._server.port), flush=True)
                async for line in lines:
                    command, *arguments = json.loads(line)
                    answer = await getattr(self, f"_do_{command}")(*arguments)
                    print(json.dumps(answer), flush=True)
            nursery.cancel_scope.cancel()

    async def _bind(
        self,
        nursery: trio.Nursery,
        certificate: tuple[str, str] | None = None,
        descriptors: int | None = None,
        **options: Any,
    ) -> trisock.Server:
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors or hard, hard))
        tls = None if certificate is None else ServerTLS(Certificate(*certificate))
        return await trisock.bind(nursery, 0, self._handle, tls=tls, **options)

    async def _handle(self, sock: Socket) -> None:
        self._at_once += 1
        self._most_at_once = max(self._most_at_once, self._at_once)
        try:
            async for line in sock.lines():
                if line.startswith(b"raise "):
                    await self._raise(sock, line.split()[1].decode())
                if line == b"bye":
                    return
                await sock.send(line, b"\n")
        finally:
            self._at_once -= 1

    async def _raise(self, sock: Socket, kind: str) -> None:
        if kind == "error":
            raise ValueError(kind)
        if kind == "group":
            raise ExceptionGroup(kind, [ValueError("one"), KeyError("two")])
        if kind == "nursery":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise ValueError(kind)
        await sock.send(b"reset it now\n")
        try:
            await sock.recv()
        except trio.BrokenResourceError as exc:
            if kind == "both":
                raise ExceptionGroup(kind, [exc, ValueError("and more")]) from None
            raise

    # ---- what it is told to do ----

    async def _do_report(self) -> dict[str, object]:
        return {
            "stats": dataclasses.asdict(self._server.stats()),
            "logged": self._log.counts,
            "most_at_once": self._most_at_once,
            **self._gauge.read(),
        }

    async def _do_stats(self) -> dict[str, int]:
        return dataclasses.asdict(self._server.stats())

    async def _do_reset_peak(self) -> None:
        self._gauge.reset_peak()

    async def _do_broadcast(self, size: int, timeout: float) -> int:
        return await self._server.broadcast(_message(size), timeout=timeout)


def _message(size: int) -> bytes:
    return bytes(range(256)) * (size // 256)


# ---- the server, as the clients see it ----


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
            await trio.sleep(_LOOK)

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
            *(sys.executable, __file__, "--serve"), stdin=subprocess.PIPE, stdout=subprocess.PIPE
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


# ---- scenarios ----


async def idle(ground: Ground, count: int, *, tls: bool = False) -> Result:
    """Many connections that do nothing, until each asks something after all."""

    async def work(server: Server, outcome: Outcome) -> None:
        streams: list[trio.abc.Stream] = []

        async def open_one(number: int) -> None:
            streams.append(await server.connect(number))

        async def ask_and_close(number: int) -> None:
            async with streams[number] as stream:
                await ask(stream, number)

        try:
            await many(count, open_one)
            await server.until(lambda stats: stats["active"] == count)
            outcome.facts["idle at once"] = (await server.report()).stats["active"]
            await server.visit()
            await many(count, functools.partial(outcome.count, ask_and_close))
        finally:
            for stream in streams:
                await trio.aclose_forcefully(stream)

    name = f"{count:,} idle {'TLS ' if tls else ''}connections"
    return await ground.measure(name, work, **ground.tls(tls))


async def rate(ground: Ground, per_second: int, seconds: float, *, tls: bool = False) -> Result:
    """So many new connections each second, whether the last ones are done or not."""

    async def offer(server: Server, outcome: Outcome, seconds: float) -> None:
        count = round(per_second * seconds)
        begin = trio.current_time()
        async with trio.open_nursery() as nursery:
            for number in range(count):
                await trio.sleep_until(begin + number / per_second)
                nursery.start_soon(outcome.count, server.visit, number)
            outcome.facts["offered each second"] = round(count / (trio.current_time() - begin))
        outcome.tell_times()

    return await ground.measure(
        f"{per_second:,} {'TLS ' if tls else ''}connections a second, {seconds:g} s",
        functools.partial(offer, seconds=seconds),
        warm_up=functools.partial(offer, seconds=min(seconds, 10)),
        **ground.tls(tls),
    )


async def slowloris(
    ground: Ground, slow: int, others: int, *, handshake_timeout: float | None, every: float
) -> Result:
    """Clients that send a byte of their handshake now and then, while others are served.

    They go on until they are dropped; where there is no timeout, until the others are served.
    """

    async def work(server: Server, outcome: Outcome) -> None:
        dropped = 0

        async def dribble(stream: trio.SocketStream) -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                for byte in hello:
                    await stream.send_all(bytes([byte]))
                    await trio.sleep(every)

        async def be_slow(number: int, *, task_status: trio.TaskStatus[None]) -> None:
            nonlocal dropped
            async with await server.dial(number) as stream, trio.open_nursery() as nursery:
                nursery.start_soon(dribble, stream)
                task_status.started()
                with contextlib.suppress(trio.BrokenResourceError):
                    async for _ in stream:  # an alert
                        pass
                nursery.cancel_scope.cancel()
            dropped += 1

        hello = client_hello()
        accepted = (await server.report()).stats["accepted"]
        async with trio.open_nursery() as nursery:
            for number in range(slow):
                await nursery.start(be_slow, number)
            await server.until(lambda stats: stats["accepted"] == accepted + slow)
            await many(others, functools.partial(outcome.count, server.visit), at_once=10)
            outcome.facts["dropped meanwhile"] = dropped
            outcome.tell_times()
            if handshake_timeout is None:
                nursery.cancel_scope.cancel()
        outcome.facts["dropped"] = dropped

    return await ground.measure(
        f"{slow} slow handshakes, {others} others",
        work,
        **ground.tls(True),
        handshake_timeout=handshake_timeout,
    )


def client_hello() -> bytes:
    outgoing = ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        ssl.create_default_context().wrap_bio(
            ssl.MemoryBIO(), outgoing, server_hostname=NAME
        ).do_handshake()
    return outgoing.read()


async def out_of_descriptors(ground: Ground, limit: int, clients: int, look: float = 0) -> Result:
    """More clients than the server has descriptors; they stay until no more can come in."""

    async def work(server: Server, outcome: Outcome) -> None:
        leave = trio.Event()
        room = limit - (await server.report()).descriptors
        inside = 0

        async def stay(number: int) -> None:
            nonlocal inside
            async with await server.dial(number) as stream:
                await ask(stream, number)
                inside += 1
                await leave.wait()

        async with trio.open_nursery() as nursery:
            for number in range(clients):
                nursery.start_soon(outcome.count, stay, number)
            out_of_them = await at_its_limit(server, limit)
            while inside < room:
                await trio.sleep(_LOOK)
            await trio.sleep(look)
            report = await server.report()
            outcome.facts["descriptors then"] = report.descriptors
            outcome.facts["inside"] = inside
            if look:
                used = report.cpu - out_of_them.cpu
                outcome.facts["CPU while there is none"] = f"{used / look:.1%}"
            leave.set()

    return await ground.measure(
        f"{clients:,} clients, {limit:,} descriptors", work, descriptors=limit
    )


async def at_its_limit(server: Server, limit: int) -> Report:
    """Wait until a server has used all of its descriptors."""
    while (report := await server.report()).descriptors < limit:
        await trio.sleep(_LOOK)
    return report


async def full(ground: Ground, clients: int, max_connections: int) -> Result:
    """More clients than ``max_connections``; the others wait, and none is lost."""

    async def work(server: Server, outcome: Outcome) -> None:
        await many(clients, functools.partial(outcome.count, server.visit), at_once=clients)
        outcome.facts["at most at once"] = (await server.report()).most_at_once
        outcome.tell_times()

    return await ground.measure(
        f"{clients:,} clients, max_connections {max_connections}",
        work,
        max_connections=max_connections,
    )


async def lingering(ground: Ground, others: int, max_connections: int) -> Result:
    """Clients that send too much and never close, one for each slot, while others are served."""

    async def work(server: Server, outcome: Outcome) -> None:
        async def linger(number: int, *, task_status: trio.TaskStatus[None]) -> None:
            async with await server.dial(number) as stream:
                await stream.send_all(b"bye\n" + bytes(200_000))
                assert await stream.receive_some() == b""
                task_status.started()
                await trio.sleep_forever()

        async with trio.open_nursery() as nursery:
            for number in range(max_connections):
                await nursery.start(linger, number)
            await many(others, functools.partial(outcome.count, server.visit), at_once=1)
            await server.until(lambda stats: stats["active"] <= max_connections)
            outcome.facts["still closing"] = (await server.report()).stats["active"]
            nursery.cancel_scope.cancel()
        outcome.tell_times()

    return await ground.measure(
        f"{max_connections} lingering closes, {others} others",
        work,
        max_connections=max_connections,
    )


async def broadcast(
    ground: Ground, readers: int, size: int, messages: int, timeout: float
) -> Result:
    """Broadcasts to clients that read, and one that never does."""

    async def work(server: Server, outcome: Outcome) -> None:
        message = _message(size)
        stats = (await server.report()).stats
        delivered: list[int] = []

        async def read(number: int) -> None:
            async with await server.dial(number) as stream:
                for _ in range(messages):
                    left = memoryview(message)
                    while left:
                        chunk = await stream.receive_some(len(left))
                        if not chunk:
                            raise trio.BrokenResourceError("the end, in a broadcast")
                        if left[: len(chunk)] != chunk:
                            raise Wrong("not what was broadcast")
                        left = left[len(chunk) :]

        async with await server.dial(), trio.open_nursery() as nursery:
            for number in range(readers):
                nursery.start_soon(outcome.count, read, number)
            await server.until(lambda now: now["active"] == readers + 1)
            for _ in range(messages):
                delivered.append(await server.broadcast(size, timeout))
            await server.until(lambda now: now["aborted"] > stats["aborted"])
        outcome.facts["delivered"] = delivered if messages < 4 else sum(delivered)

    return await ground.measure(
        f"{messages} broadcasts of {size / MIB:g} MiB to {readers} and a silent one", work
    )


async def raising(ground: Ground, count: int) -> Result:
    """Handlers that raise: an error, a group, out of a nursery, because the connection broke."""
    kinds = ["error", "group", "nursery", "broken", "both"]

    async def work(server: Server, outcome: Outcome) -> None:
        async def provoke(number: int) -> None:
            kind = kinds[number % len(kinds)]
            async with await server.dial(number) as stream:
                await stream.send_all(b"raise %s\n" % kind.encode())
                answer = await stream.receive_some()
                if bool(answer) != (kind in ("broken", "both")):
                    raise Wrong(f"{answer!r} from a handler that raises ({kind})")
                reset = struct.pack("ii", 1, 0)
                stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)

        await many(count, functools.partial(outcome.count, provoke))

    return await ground.measure(f"{count:,} handlers that raise", work)


SCENARIOS: dict[str, Callable[[Ground, bool], Awaitable[Result]]] = {
    "idle": lambda ground, quick: idle(ground, 300 if quick else 10_000),
    "tls-idle": lambda ground, quick: idle(ground, 100 if quick else 2000, tls=True),
    "rate": lambda ground, quick: rate(ground, 200 if quick else 1000, 2 if quick else 60),
    "tls-rate": lambda ground, quick: rate(
        ground, 30 if quick else 100, 2 if quick else 60, tls=True
    ),
    "slowloris": lambda ground, quick: slowloris(
        ground,
        50 if quick else 500,
        20 if quick else 300,
        handshake_timeout=2 if quick else 15,
        every=0.1 if quick else 1,
    ),
    "descriptors": lambda ground, quick: out_of_descriptors(
        ground, 64 if quick else 1024, 100 if quick else 2000, look=0.5 if quick else 5
    ),
    "full": lambda ground, quick: full(ground, 100 if quick else 2000, 10 if quick else 50),
    "lingering": lambda ground, quick: lingering(ground, 20, 10 if quick else 50),
    "broadcast": lambda ground, quick: broadcast(
        ground,
        10 if quick else 200,
        8 * MIB if quick else MIB,
        2 if quick else 20,
        3 if quick else 10,
    ),
    "raising": lambda ground, quick: raising(ground, 100 if quick else 1000),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=", ".join(SCENARIOS))
    parser.add_argument("--quick", action="store_true", help="small sizes, for a look")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends when its orders do
        trio.run(Subject().run)
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    run_trio(functools.partial(show, args.scenarios or list(SCENARIOS), args.quick))


async def show(names: list[str], quick: bool) -> None:
    from helpers.authority import Authority  # which the server's process has no use for

    wrongs = []
    ground = Ground(Authority())
    print("| " + " | ".join(HEAD) + " |")
    print("| " + " | ".join("---" for _ in HEAD) + " |", flush=True)
    for name in names:
        result = await SCENARIOS[name](ground, quick)
        print("| " + " | ".join(result.cells()) + " |", flush=True)
        wrongs += [f"{name}: {wrong}" for wrong in result.wrongs()]
    if wrongs:
        sys.exit("\n".join(wrongs))


if __name__ == "__main__":
    main()
