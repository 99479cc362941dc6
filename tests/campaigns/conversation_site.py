"""The servers for ``conversations.py``, and the steps of a conversation.

A client requests each step with a line of text, then the client and the server's handler each do
their part of the step. Steps can have any order: for example echo, start TLS, a file, stop TLS.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import io
import logging
import math
import os
import random
import ssl
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

import trio

import trisock
from helpers.authority import issue
from helpers.exceptions import leaves_of
from trisock import ServerTLS, Socket
from trisock.testing import Authority

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

T = TypeVar("T")

LOCALHOST = "127.0.0.1"
NAME = "example.org"

MORE_THAN_FITS = bytes(10_000_000)  # More than the kernel's buffers hold for an idle peer.
NARROW = 2  # The max_connections of the narrow server.
HANDSHAKE_TIMEOUT = 5.0  # Seconds until a silent peer is dropped.


class Fault(Exception):
    """Raised by a handler at the client's request."""


class Hostile(Fault):
    """An error that cannot be compared, hashed, printed or inspected."""

    __eq__ = __hash__ = __bool__ = __str__ = __repr__ = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> object:
        raise LookupError(name)


class HostileGroup(ExceptionGroup[Exception]):
    """An exception group that cannot be split."""

    split = subgroup = derive = None  # type: ignore[assignment]


class BrokenPromise(Exception):
    """Trisock did not do what it promises."""


def check(got: object, expected: object) -> None:
    if got != expected:
        raise BrokenPromise(f"got {got!r:.200}, expected {expected!r:.200}")


# The text of the error that is logged when a handler leaves a cancel scope open.
OPEN_SCOPE = "a cancel scope was left open"


def is_fault(exc: BaseException) -> bool:
    """Return whether a logged error is a ``Fault``, or was logged in place of a ``Hostile``."""
    return issubclass(type(exc), Fault) or exc.args[0].startswith("Hostile: ")


class Log(logging.Handler):
    """Counts the faults that servers log, and keeps the text of other errors.

    Attributes:
      last: the last log entries, which help to explain a failure.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.faults = 0
        self.errors: list[str] = []
        self.last: deque[str] = deque(maxlen=20)

    def attach(self) -> None:
        logger = logging.getLogger("trisock")
        logger.addHandler(self)
        logger.setLevel(self.level)
        logger.propagate = False
        # Some handlers abandon a generator inside a timeout, which makes Trio log an error.
        logging.getLogger("trio.async_generator_errors").disabled = True

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.last.append(text)
        exc = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.ERROR:
            return
        logged = "".join(traceback.format_exception(exc))
        if OPEN_SCOPE in logged or (exc is not None and all(map(is_fault, leaves_of(exc)))):
            self.faults += 1
        else:
            self.errors.append(text + logged)


class Site:
    """The servers, and the data that clients need.

    Attributes:
      faults: the number of handlers that raised at a client's request.
    """

    plain: trisock.Server
    secure: trisock.Server
    narrow: trisock.Server
    unix: trisock.Server

    def __init__(self, directory: Path) -> None:
        self.authority, self.stranger = Authority(), Authority()
        self.directory = directory
        self.file = directory / "file"
        self.content = random.Random(0).randbytes(700_000)
        self.file.write_bytes(self.content)
        self.zipped = directory / "zipped"
        self.zipped.write_bytes(gzip.compress(self.content, 0))
        self.path = directory / "sock"
        self.faults = 0
        self.log = Log()
        self.identity = self.authority.certificate(NAME)
        self.tls = self.new_tls()
        self.trusting = self.authority.client_tls(NAME)
        self.old = ssl.create_default_context(cadata=self.authority.ca.decode())
        self.old.maximum_version = ssl.TLSVersion.TLSv1_2

    def new_tls(self) -> ServerTLS:
        return ServerTLS(issue(self.authority, NAME, LOCALHOST))

    @contextlib.asynccontextmanager
    async def open(self, grace: float | None) -> AsyncIterator[None]:
        """Run the servers during the block. Then stop them and wait until all connections end."""
        async with trio.open_nursery() as nursery:
            bind = functools.partial(trisock.bind, nursery)
            self.plain = await bind(0, self.serve)
            self.secure = await bind(
                0, self.serve, host=LOCALHOST, tls=self.tls, handshake_timeout=HANDSHAKE_TIMEOUT
            )
            self.narrow = await bind(0, self.serve, host=LOCALHOST, max_connections=NARROW)
            self.unix = await bind(await trisock.listen_unix(self.path, mode=0o600), self.serve)
            with (
                open(self.file, "rb") as on_disk,
                io.BytesIO(self.content) as in_memory,
                gzip.open(self.zipped) as zipped,
            ):
                self.shared = {"disk": on_disk, "memory": in_memory, "zipped": zipped}
                yield
            for server in self.servers:
                server.stop(grace)
                await server.wait_closed()
        for server in self.servers:
            check(server.stats().active, 0)
            check(server.connections, ())
        check(self.path.exists(), False)

    @property
    def servers(self) -> list[trisock.Server]:
        return [self.plain, self.secure, self.narrow, self.unix]

    async def dial(self, rng: random.Random) -> Socket:
        """Connect in plain text, over TCP or a Unix socket."""
        if rng.random() < 0.2:
            return await trisock.connect_unix(self.path)
        return await trisock.connect(rng.choice([LOCALHOST, "::1"]), self.plain.port)

    async def dial_secure(self, rng: random.Random) -> Socket:
        """Connect to the secure server with TLS 1.2 or 1.3."""
        if rng.random() < 0.5:
            return await trisock.connect(LOCALHOST, self.secure.port, tls=self.trusting)
        sock = await trisock.connect(LOCALHOST, self.secure.port)
        await sock.starttls(self.old, server_hostname=NAME)
        return sock

    async def dial_any(self, rng: random.Random) -> Socket:
        return await rng.choice([self.dial, self.dial_secure])(rng)

    # ---- steps: the server's part ----

    async def serve(self, sock: Socket) -> None:
        """Do the steps that the client requests."""
        async for line in sock.lines(max_bytes=100):
            command, _, argument = line.decode().partition(" ")
            if await getattr(self, f"_do_{command}")(sock, argument):
                return

    async def _do_echo(self, sock: Socket, size: str) -> None:
        left = int(size)
        while left and (chunk := await sock.recv(left)):
            await sock.send(chunk)
            left -= len(chunk)

    async def _do_lines(self, sock: Socket, count: str) -> None:
        left = int(count)
        async for line in sock.lines(delimiter=b"\r\n"):
            await sock.send(line[::-1], b"\r\n")
            left -= 1
            if not left:
                return

    async def _do_frames(self, sock: Socket, count: str) -> None:
        for _ in range(int(count)):
            body = await sock.recv_frame(3, max_bytes=100_000)
            await sock.send_frame(body[::-1], header=3)

    async def _do_skip(self, sock: Socket, limit: str) -> None:
        """Skip a line that is over the limit, and say how many bytes were skipped."""
        try:
            await sock.recv_line(max_bytes=int(limit))
        except trisock.LimitExceededError:
            await sock.send(b"%d\n" % await sock.skip_until(b"\n"))

    async def _do_file(self, sock: Socket, part: str) -> None:
        offset, count = map(int, part.split())
        with open(self.file, "rb") as file:
            check(await sock.send_file(file, offset, count), count)

    async def _do_shared(self, sock: Socket, part: str) -> None:
        """Send from a file that other connections also use."""
        kind, offset, count = part.split()
        file = self.shared[kind]
        check(await sock.send_file(file, int(offset), int(count)), int(count))

    async def _do_growing(self, sock: Socket, kind: str) -> None:
        """Send a file that grows during the send."""
        with io.BytesIO() if kind == "memory" else tempfile.TemporaryFile() as file:
            file.write(self.content)
            file.flush()
            left = [b"more" * 1000] * 5

            def append(_: int) -> None:
                if left:
                    file.seek(0, os.SEEK_END)
                    file.write(left.pop())
                    file.flush()

            await sock.send(b"%d\n" % len(self.content))
            check(await sock.send_file(file, progress=append), len(self.content))

    async def _do_piped(self, sock: Socket, size: str) -> None:
        """Cancel a send while the pipe is empty, then send from the pipe.

        The cancelled send must lose no data.
        """
        reading, writing = os.pipe()
        with open(reading, "rb") as pipe, open(writing, "wb", buffering=0) as end:
            await cancelled_after(5, sock.send_file, pipe)
            end.write(self.content[: int(size)])
            check(await sock.send_file(pipe, count=int(size)), int(size))

    async def _do_pushback(self, sock: Socket, size: str) -> None:
        got = b""
        while len(got) < int(size):
            chunk = await sock.recv(int(size) - len(got))
            if not chunk:
                return
            half = len(chunk) // 2
            sock.unrecv(chunk[half:])
            check(await sock.peek(), chunk[half:])
            sock.unrecv(chunk[:half])
            check(await sock.recv_exactly(len(chunk)), chunk)
            got += chunk
        await sock.send(got)

    async def _do_rest(self, sock: Socket, _: str) -> bool:
        """Read until EOF, then respond."""
        await sock.send((await read_all(sock))[::-1])
        return True

    async def _do_starttls(self, sock: Socket, role: str) -> None:
        await sock.send(b"go ahead\n")
        await sock.starttls(self.tls if role == "server" else self.trusting)

    async def _do_stoptls(self, sock: Socket, _: str) -> None:
        await sock.send(b"go ahead\n")
        await sock.stoptls()

    async def _do_give_up(self, sock: Socket, passes: str) -> bool:
        """Cancel the server's part of the handshake."""
        await sock.send(b"go ahead\n")
        await cancelled_after(int(passes), sock.starttls, self.tls)
        return True

    async def _do_raise(self, sock: Socket, kind: str) -> None:
        await sock.send(b"last words\n")
        self.faults += 1
        if kind == "group":
            raise ExceptionGroup("several", [Fault("one"), Fault("two")])
        if kind == "nursery":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                raise Fault("in a nursery")
        if kind == "hostile":
            raise Hostile
        if kind == "hostile_group":
            raise HostileGroup("several", [Fault("one"), ExceptionGroup("in it", [Hostile()])])
        if kind == "open_scope":
            trio.CancelScope(deadline=trio.current_time() + 0.01).__enter__()
            await trio.sleep_forever()
        if kind == "abandoned_generator":
            async for _ in within_a_timeout():
                break
            await trio.sleep_forever()
        raise Fault("plain")


async def within_a_timeout() -> AsyncIterator[None]:
    """Yield inside a cancel scope, which stays open if the caller breaks out of its loop."""
    while True:
        with trio.fail_after(0.01):
            yield


async def cancelled_after(
    passes: int, function: Callable[..., Awaitable[T]], *args: object
) -> T | None:
    """Call a function, and cancel the call after ``passes`` scheduler passes.

    Returns ``None`` if the call was cancelled.
    """
    result: T | None = None
    error: Exception | None = None

    async def cancel() -> None:
        for _ in range(passes):
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(cancel)
        try:
            result = await function(*args)
        except Exception as exc:  # raise it below: the nursery would wrap it in a group
            error = exc
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    return result


def payload(rng: random.Random, most: int = 200_000) -> bytes:
    """Return random bytes. Short payloads are more likely."""
    return rng.randbytes(int(math.exp(rng.uniform(0, math.log(most)))))


async def read_all(sock: Socket) -> bytes:
    return b"".join([chunk async for chunk in sock])


async def check_line(sock: Socket, expected: bytes) -> None:
    check(await sock.recv_until(b"\n"), expected)


async def request(sock: Socket, command: bytes) -> None:
    await sock.send(command)
    await check_line(sock, b"go ahead\n")


# ---- steps: the client's part ----

Step = Callable[[Site, Socket, random.Random], Awaitable[None]]


async def echo(site: Site, sock: Socket, rng: random.Random) -> None:
    data = payload(rng)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.send, b"echo %d\n" % len(data), data)
        check(await sock.recv_exactly(len(data)), data)


async def lines(site: Site, sock: Socket, rng: random.Random) -> None:
    sent = [payload(rng, 1000).replace(b"\r", b"").replace(b"\n", b"") for _ in range(20)]
    async with trio.open_nursery() as nursery:
        command = b"lines %d\n" % len(sent)
        nursery.start_soon(sock.send, command, *(line + b"\r\n" for line in sent))
        for line in sent:
            check(await sock.recv_line(delimiter=b"\r\n"), line[::-1])


async def frames(site: Site, sock: Socket, rng: random.Random) -> None:
    bodies = [payload(rng, rng.choice([10, 1000, 100_000])) for _ in range(20)]
    got: list[bytes] = []

    async def send() -> None:
        await sock.send(b"frames %d\n" % len(bodies))
        for body in bodies:
            await sock.send_frame(body[:10], body[10:], header=3)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for body in sock.frames(3):
            got.append(body[::-1])
            if len(got) == len(bodies):
                break
    check(got, bodies)


async def skipped_line(site: Site, sock: Socket, rng: random.Random) -> None:
    line = payload(rng).replace(b"\n", b"") + b"\n"
    if len(line) < 10:
        return
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.send, b"skip %d\n" % rng.randrange(1, len(line)), line)
        check(await sock.recv_line(), b"%d" % len(line))


async def file(site: Site, sock: Socket, rng: random.Random, command: bytes = b"file") -> None:
    offset = rng.randrange(len(site.content))
    count = rng.randrange(len(site.content) - offset)
    await sock.send(b"%s %d %d\n" % (command, offset, count))
    check(await sock.recv_exactly(count), site.content[offset : offset + count])


async def shared_file(site: Site, sock: Socket, rng: random.Random) -> None:
    await file(site, sock, rng, b"shared " + rng.choice([b"disk", b"memory", b"zipped"]))


async def growing_file(site: Site, sock: Socket, rng: random.Random) -> None:
    await sock.send(b"growing %s\n" % rng.choice([b"disk", b"memory"]))
    count = int(await sock.recv_line())
    check(await sock.recv_exactly(count), site.content)


async def piped(site: Site, sock: Socket, rng: random.Random) -> None:
    size = rng.randrange(1, 60_000)  # fits into a pipe
    await sock.send(b"piped %d\n" % size)
    check(await sock.recv_exactly(size), site.content[:size])


async def push_back(site: Site, sock: Socket, rng: random.Random) -> None:
    data = payload(rng, 20_000)
    await sock.send(b"pushback %d\n" % len(data), data)
    check(await sock.recv_exactly(len(data)), data)


async def cancelled_reads(site: Site, sock: Socket, rng: random.Random) -> None:
    data = payload(rng)
    got = b""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.send, b"echo %d\n" % len(data), data)
        while left := len(data) - len(got):
            read: Callable[[], Awaitable[bytes]] = sock.recv
            if rng.random() < 0.5:
                read = functools.partial(sock.recv_exactly, min(left, 500))
            chunk = await cancelled_after(rng.randrange(6), read)
            got += chunk or b""
    check(got, data)


async def start_tls(site: Site, sock: Socket, rng: random.Random) -> None:
    """Start TLS. If the connection already uses TLS, return to plain text."""
    if sock.istls():
        await request(sock, b"stoptls\n")
        await sock.stoptls()
        return
    role = rng.choice(["server", "client"])
    await request(sock, b"starttls %s\n" % role.encode())
    version = "TLSv1.3"
    if role == "client":  # the server acts as the TLS client
        await sock.starttls(site.tls)
    elif rng.random() < 0.5:
        await sock.starttls(site.trusting)
    else:
        await sock.starttls(site.old, server_hostname=NAME)
        version = "TLSv1.2"
    check(sock.tls and sock.tls.version, version)


STEPS: list[Step] = [
    *(echo, lines, file, shared_file, growing_file, piped),
    *(push_back, cancelled_reads, start_tls, frames, skipped_line),
]


async def steps(site: Site, sock: Socket, rng: random.Random, most: int = 4) -> None:
    for _ in range(rng.randint(1, most)):
        await rng.choice(STEPS)(site, sock, rng)


Conversation = Callable[[Site, random.Random], Coroutine[Any, Any, None]]
