"""Conversations of all kinds with servers of trisock, each checked to the byte; ``soak.py`` holds
them by the hundred thousand.

A client asks, in a line, for what is to be done next; the server's handler does its part of it. So
a connection can be used in any order of steps: echo, then TLS, then a file, then the clear again.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import gzip
import io
import logging
import math
import os
import random
import socket
import ssl
import struct
import sys
import tempfile
import traceback
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import trio

import trisock
from hammerspoon_conversations import hammerspoon_floods, hammerspoon_peers_vanish
from helpers.authority import Authority, certificate
from trisock import ClientTLS, ServerTLS, Socket, hammerspoon, pluto

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup, ExceptionGroup

T = TypeVar("T")

LOCALHOST = "127.0.0.1"
NAME = "example.org"

# Into a connection whose peer does not read.
MORE_THAN_FITS = bytes(10_000_000)

# How many connections the narrow server serves at once.
NARROW = 2

# Seconds that the secure server waits for a handshake: there are peers that are silent in one.
HANDSHAKE_TIMEOUT = 5.0

_OVER = (trio.BrokenResourceError, trio.ClosedResourceError)


class Fault(Exception):
    """What a handler raises because it was asked to."""


class Hostile(Fault):
    """One that cannot be compared, hashed, printed or asked for anything."""

    __eq__ = __hash__ = __bool__ = __str__ = __repr__ = None  # type: ignore[assignment]

    def __getattribute__(self, name: str) -> object:
        raise LookupError(name)


class HostileGroup(ExceptionGroup[Exception]):
    """A group that cannot be taken apart."""

    split = subgroup = derive = None  # type: ignore[assignment]


class Wrong(Exception):
    """Something was not as promised."""


def check(got: object, wanted: object) -> None:
    if got != wanted:
        raise Wrong(f"got {got!r:.200}, wanted {wanted!r:.200}")


# What the log says of a handler that has left one.
OPEN_SCOPE = "a cancel scope was left open"


def leaves_of(exc: BaseException | None) -> list[BaseException]:
    if isinstance(exc, BaseExceptionGroup):
        return [leaf for each in exc.exceptions for leaf in leaves_of(each)]
    return [exc] if exc is not None else [Wrong("an error without an exception")]


class Log(logging.Handler):
    """Counts the faults that servers log, and keeps the text of whatever else is an error.

    Attributes:
      last: what was logged last, for whoever has to find out what went wrong.
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
        # Trio's word on the timeouts that handlers leave open in generators.
        logging.getLogger("trio.async_generator_errors").disabled = True

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        self.last.append(text)
        exc = record.exc_info[1] if record.exc_info else None
        if record.levelno < logging.ERROR:
            return
        logged = traceback.format_exception(exc)
        if OPEN_SCOPE in "".join(logged) or all(
            issubclass(type(each), Fault) or each.args[0].startswith("Hostile: ")
            for each in leaves_of(exc)
        ):
            self.faults += 1
        else:
            self.errors.append(text + "".join(traceback.format_exception(exc)))


class Site:
    """The servers, and what clients need to know of them.

    Attributes:
      faults: how many handlers were made to raise.
      log: what the servers have logged.
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
        self.identity = self.authority.issue(NAME)
        self.tls = self.new_tls()
        self.trusting = ClientTLS(NAME, ca=self.authority.pem)
        self.old = ssl.create_default_context(cadata=self.authority.pem.decode())
        self.old.maximum_version = ssl.TLSVersion.TLSv1_2

    def new_tls(self) -> ServerTLS:
        return ServerTLS(certificate(self.authority.ca.issue_cert(NAME, LOCALHOST)))

    @contextlib.asynccontextmanager
    async def open(self, grace: float | None) -> AsyncIterator[None]:
        """Run the servers; at the end stop them, and wait for their last connection."""
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
        """Connect to the plain server, or the one on a Unix socket."""
        if rng.random() < 0.2:
            return await trisock.connect_unix(self.path)
        return await trisock.connect(rng.choice([LOCALHOST, "::1"]), self.plain.port)

    async def dial_secure(self, rng: random.Random) -> Socket:
        """Connect to the secure server, by TLS 1.2 or 1.3."""
        if rng.random() < 0.5:
            return await trisock.connect(LOCALHOST, self.secure.port, tls=self.trusting)
        sock = await trisock.connect(LOCALHOST, self.secure.port)
        await sock.starttls(self.old, server_hostname=NAME)
        return sock

    # ---- the servers' part ----

    async def serve(self, sock: Socket) -> None:
        """Do what the client asks for, step by step."""
        async for line in sock.lines(max_bytes=100):
            command, _, argument = line.decode().partition(" ")
            if await getattr(self, f"_do_{command}")(sock, argument):
                return

    async def _do_echo(self, sock: Socket, size: str) -> None:
        left = int(size)
        while left:
            chunk = await sock.recv(left)
            if not chunk:
                return
            await sock.send(chunk)
            left -= len(chunk)

    async def _do_lines(self, sock: Socket, count: str) -> None:
        left = int(count)
        async for line in sock.lines(delimiter=b"\r\n"):
            await sock.send(line[::-1], b"\r\n")
            left -= 1
            if not left:
                return

    async def _do_file(self, sock: Socket, part: str) -> None:
        offset, count = map(int, part.split())
        with open(self.file, "rb") as file:
            check(await sock.send_file(file, offset, count), count)

    async def _do_shared(self, sock: Socket, part: str) -> None:
        """Send from a file that other connections are sent from at the same time."""
        kind, offset, count = part.split()
        sent = await sock.send_file(self.shared[kind], int(offset), int(count))
        check(sent, int(count))

    async def _do_growing(self, sock: Socket, kind: str) -> None:
        """Send a file that somebody appends to."""
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
            sent = await sock.send_file(file, progress=append)
            check(sent, len(self.content))

    async def _do_piped(self, sock: Socket, size: str) -> None:
        """Send from a pipe, which is silent at first; cancelled then, it changes nothing."""
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
        """Take all that comes, and answer when the client has ended its side."""
        await sock.send(b"".join([chunk async for chunk in sock])[::-1])
        return True

    async def _do_starttls(self, sock: Socket, role: str) -> None:
        await sock.send(b"go ahead\n")
        await sock.starttls(self.tls if role == "server" else self.trusting)

    async def _do_stoptls(self, sock: Socket, _: str) -> None:
        await sock.send(b"go ahead\n")
        await sock.stoptls()

    async def _do_give_up(self, sock: Socket, passes: str) -> bool:
        """Be cancelled in a handshake."""
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
    """Leave a cancel scope open in the task of whoever breaks off the loop."""
    while True:
        with trio.fail_after(0.01):
            yield


async def cancelled_after(
    passes: int, function: Callable[..., Awaitable[T]], *args: object
) -> T | None:
    """Cancel a call after so many passes of the scheduler; ``None`` if it was not done by then."""
    result: T | None = None
    error: Exception | None = None
    async with trio.open_nursery() as nursery:

        async def cancel() -> None:
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        nursery.start_soon(cancel)
        try:
            result = await function(*args)
        except Exception as exc:  # goes on as it is, and not in a group
            error = exc
        nursery.cancel_scope.cancel()
    if error is not None:
        raise error
    return result


def payload(rng: random.Random, most: int = 200_000) -> bytes:
    """Return some bytes: a few, most of the time."""
    return rng.randbytes(int(math.exp(rng.uniform(0, math.log(most)))))


# ---- steps: the client's part ----

Step = Callable[[Site, Socket, random.Random], Awaitable[None]]


async def echo(site: Site, sock: Socket, rng: random.Random) -> None:
    data = payload(rng)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.send, b"echo %d\n" % len(data), data)
        check(await sock.recv_exactly(len(data)), data)


async def lines(site: Site, sock: Socket, rng: random.Random) -> None:
    said = [payload(rng, 1000).replace(b"\r", b"").replace(b"\n", b"") for _ in range(20)]
    async with trio.open_nursery() as nursery:
        command = b"lines %d\n" % len(said)
        nursery.start_soon(sock.send, command, *(line + b"\r\n" for line in said))
        for line in said:
            check(await sock.recv_until(b"\r\n"), line[::-1] + b"\r\n")


async def file(site: Site, sock: Socket, rng: random.Random) -> None:
    offset = rng.randrange(len(site.content))
    count = rng.randrange(len(site.content) - offset)
    await sock.send(b"file %d %d\n" % (offset, count))
    check(await sock.recv_exactly(count), site.content[offset : offset + count])


async def shared_file(site: Site, sock: Socket, rng: random.Random) -> None:
    kind = rng.choice(["disk", "memory", "zipped"])
    offset = rng.randrange(len(site.content))
    count = rng.randrange(len(site.content) - offset)
    await sock.send(b"shared %s %d %d\n" % (kind.encode(), offset, count))
    check(await sock.recv_exactly(count), site.content[offset : offset + count])


async def growing_file(site: Site, sock: Socket, rng: random.Random) -> None:
    await sock.send(b"growing %s\n" % rng.choice([b"disk", b"memory"]))
    count = int(await sock.recv_until(b"\n"))
    check(await sock.recv_exactly(count), site.content)


async def piped(site: Site, sock: Socket, rng: random.Random) -> None:
    size = rng.randrange(1, 60_000)  # what a pipe holds
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
    """Turn to TLS, or back to the clear."""
    if sock.istls():
        await sock.send(b"stoptls\n")
        check(await sock.recv_until(b"\n"), b"go ahead\n")
        await sock.stoptls()
        return
    role = rng.choice(["server", "client"])
    await sock.send(b"starttls %s\n" % role.encode())
    check(await sock.recv_until(b"\n"), b"go ahead\n")
    if role == "client":  # that is what the server is to be
        await sock.starttls(site.tls)
        check(sock.tls and sock.tls.version, "TLSv1.3")
    elif rng.random() < 0.5:
        await sock.starttls(site.trusting)
        check(sock.tls and sock.tls.version, "TLSv1.3")
    else:
        await sock.starttls(site.old, server_hostname=NAME)
        check(sock.tls and sock.tls.version, "TLSv1.2")


STEPS: list[Step] = [
    echo,
    lines,
    file,
    shared_file,
    growing_file,
    piped,
    push_back,
    cancelled_reads,
    start_tls,
]


async def steps(site: Site, sock: Socket, rng: random.Random, most: int = 4) -> None:
    for _ in range(rng.randint(1, most)):
        await rng.choice(STEPS)(site, sock, rng)


# ---- conversations ----

Conversation = Callable[[Site, random.Random], Coroutine[Any, Any, None]]


async def in_the_clear(site: Site, rng: random.Random) -> None:
    async with await site.dial(rng) as sock:
        await echo(site, sock, rng)
        await steps(site, sock, rng)


async def half_closed(site: Site, rng: random.Random) -> None:
    data = payload(rng)
    async with await site.dial(rng) as sock:
        await sock.send(b"rest\n", data)
        await sock.send_eof()
        check(b"".join([chunk async for chunk in sock]), data[::-1])
        check(sock.isopen(), False)


async def starttls_in_mid_conversation(site: Site, rng: random.Random) -> None:
    async with await site.dial(rng) as sock:
        await rng.choice([echo, lines])(site, sock, rng)
        await start_tls(site, sock, rng)
        await steps(site, sock, rng)


async def tls_from_the_start(site: Site, rng: random.Random) -> None:
    async with await site.dial_secure(rng) as sock:
        await steps(site, sock, rng)


FAULTS = [
    *(b"plain", b"group", b"nursery", b"hostile", b"hostile_group"),
    *(b"open_scope", b"abandoned_generator"),
]


async def a_handler_raises(site: Site, rng: random.Random) -> None:
    async with await rng.choice([site.dial, site.dial_secure])(rng) as sock:
        await sock.send(b"raise %s\n" % rng.choice(FAULTS))
        check(await sock.recv_until(b"\n"), b"last words\n")
        if sock.istls():  # no close_notify says that this was all
            with contextlib.suppress(trisock.TLSError):
                raise Wrong(f"a clean end: {await sock.recv()!r}")
        else:
            check(await sock.recv(), b"")


async def another_process_has_the_descriptor(site: Site, rng: random.Random) -> None:
    """As a forked child has: the server hears of our end all the same."""
    sock = await rng.choice([site.dial, site.dial_secure])(rng)
    others = os.dup(sock.fileno())
    try:
        await echo(site, sock, rng)
        if rng.random() < 0.3:
            sock.abort()
        else:
            await cancelled_after(rng.randrange(5), sock.close)
        with trio.fail_after(10):
            while sock.getlocal() in [
                each.getpeer() for server in site.servers for each in server.connections
            ]:
                await trio.sleep(0.01)
    finally:
        os.close(others)


async def a_cancelled_send(site: Site, rng: random.Random) -> None:
    async with await rng.choice([site.dial, site.dial_secure])(rng) as sock:
        await sock.send(b"echo %d\n" % 10**9)
        await cancelled_after(rng.randrange(30), sock.send, MORE_THAN_FITS)
        if rng.random() < 0.5:
            with contextlib.suppress(trio.BrokenResourceError):
                await cancelled_after(1, sock.send, b"more")
        sock.abort()


async def a_cancelled_handshake(site: Site, rng: random.Random) -> None:
    async with await site.dial(rng) as sock:
        passes = rng.randrange(20)
        if rng.random() < 0.5:
            await sock.send(b"starttls server\n")
            check(await sock.recv_until(b"\n"), b"go ahead\n")
            if not await cancelled_after(passes, sock.starttls, site.trusting):
                check((sock.isopen(), sock.fileno()), (False, -1))
        else:
            await sock.send(b"give_up %d\n" % passes)
            check(await sock.recv_until(b"\n"), b"go ahead\n")
            with contextlib.suppress(*_OVER):
                await sock.starttls(site.trusting)
                check(await sock.recv(), b"")


async def a_cancelled_connect_or_close(site: Site, rng: random.Random) -> None:
    port = rng.choice([site.plain, site.secure]).port
    sock = await cancelled_after(rng.randrange(10), trisock.connect, LOCALHOST, port)
    if sock is not None:
        await cancelled_after(rng.randrange(5), sock.close)
        check(sock.fileno(), -1)


async def a_peer_resets(site: Site, rng: random.Random) -> None:
    sock = await rng.choice([site.dial, site.dial_secure])(rng)
    command = rng.choice([b"echo 1000000\n", b"lines 1000\n", b"file 0 700000\n"])
    await sock.send(command, payload(rng, 60_000))
    await cancelled_after(rng.randrange(5), sock.recv)
    sock.abort()


async def a_peer_truncates(site: Site, rng: random.Random) -> None:
    """It ends the connection, and not TLS."""
    sock = await site.dial_secure(rng)
    await sock.send(b"echo 5\nhello")
    check(await sock.recv_exactly(5), b"hello")
    await sock.stream.send_eof()
    with contextlib.suppress(trio.BrokenResourceError):
        check(await sock.recv(), b"")
    sock.abort()


def client_hello() -> bytes:
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.create_default_context()
    with contextlib.suppress(ssl.SSLWantReadError):
        context.wrap_bio(incoming, outgoing, server_hostname=NAME).do_handshake()
    return outgoing.read()


async def a_peer_talks_nonsense(site: Site, rng: random.Random) -> None:
    """In place of a handshake, or in the middle of one; or it says nothing at all."""
    nonsense = rng.choice([payload(rng, 1000), client_hello() + payload(rng, 1000)])
    silent = rng.random() < 0.05
    with trio.socket.socket() as raw:
        await raw.connect((LOCALHOST, site.secure.port))
        stream = trio.SocketStream(raw)
        await stream.send_all(client_hello()[:-1] if silent else nonsense)
        if not silent:
            await stream.send_eof()
        with contextlib.suppress(trio.BrokenResourceError):
            async for _ in stream:  # an alert, if anything
                pass


async def a_peer_vanishes_in_the_handshake(site: Site, rng: random.Random) -> None:
    hello = client_hello()
    with trio.socket.socket() as raw:
        await raw.connect((LOCALHOST, site.secure.port))
        await raw.send(hello[: rng.randrange(1, len(hello) + 1)])
        if rng.random() < 0.5:
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def clear_text_behind_starttls(site: Site, rng: random.Random) -> None:
    async with await trisock.connect(LOCALHOST, site.plain.port) as sock:
        await sock.send(b"starttls server\necho 5\nhello")
        with contextlib.suppress(trio.BrokenResourceError):
            check(await sock.recv_until(b"\n"), b"go ahead\n")
            check(b"hello" in b"".join([chunk async for chunk in sock]), False)


async def a_certificate_of_a_stranger(site: Site, rng: random.Random) -> None:
    try:
        sock = await trisock.connect(
            LOCALHOST, site.secure.port, tls=ClientTLS(NAME, ca=site.stranger.pem)
        )
    except trisock.TLSError:
        return
    sock.abort()
    raise Wrong("a stranger's certificate was taken")


async def a_client_certificate(site: Site, rng: random.Random) -> None:
    """Demanded by the server: who has none is turned away, and learns it after the handshake."""
    wanting = ServerTLS(
        site.identity, client_ca=site.authority.pem, require_client_certificate=True
    )
    identity = rng.choice([site.identity, None])
    tls = ClientTLS(NAME, ca=site.authority.pem, certificate=identity)

    async def handler(sock: Socket) -> None:
        check(sock.tls is not None and sock.tls.peer_certificate is not None, True)
        await site.serve(sock)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST, tls=wanting)
        async with await trisock.connect(LOCALHOST, server.port, tls=tls) as sock:
            try:
                await sock.send(b"echo 5\nhello")
                check(await sock.recv_exactly(5), b"hello")
            except trisock.TLSError:
                check(identity, None)
            else:
                check(identity is None, False)
        server.stop()
        await server.wait_closed()
        check(server.stats().failed_handshakes, int(identity is None))


async def new_certificates(site: Site, rng: random.Random) -> None:
    site.tls = site.new_tls()
    site.secure.set_tls(site.tls)
    async with await site.dial_secure(rng) as sock:
        await echo(site, sock, rng)


async def more_than_max_connections(site: Site, rng: random.Random) -> None:
    async def visit() -> None:
        async with await trisock.connect(LOCALHOST, site.narrow.port) as sock:
            await echo(site, sock, rng)
            check(len(site.narrow.connections) <= NARROW, True)

    async with trio.open_nursery() as nursery:
        for _ in range(3 * NARROW):
            nursery.start_soon(visit)


async def a_broadcast(site: Site, rng: random.Random) -> None:
    """To some that read, one that is gone, and sometimes one that never reads."""
    message = payload(rng) if rng.random() < 0.97 else MORE_THAN_FITS

    async def until_the_end(sock: Socket) -> None:
        await sock.send(b"welcome\n")
        async for _ in sock:
            pass

    async def read(sock: Socket) -> None:
        async with sock:
            check(await sock.recv_exactly(len(message)), message)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, until_the_end, host=LOCALHOST)
        socks = [await trisock.connect(LOCALHOST, server.port) for _ in range(5)]
        for sock in socks:
            check(await sock.recv_until(b"\n"), b"welcome\n")
        gone, silent, *others = socks
        gone.abort()
        async with trio.open_nursery() as readers:
            for sock in others:
                readers.start_soon(read, sock)
            delivered = await server.broadcast(message, timeout=5)
            check(3 <= delivered <= 5, True)
        silent.abort()
        server.stop()


async def a_broadcast_beside_an_upgrade(site: Site, rng: random.Random) -> None:
    """At any moment of starttls or stoptls: it goes by the layer that it was meant for, or not."""
    under_tls = rng.random() < 0.5
    passes = rng.randrange(8)
    news = b"NEWS\n"
    returned = trio.Event()

    async def handler(sock: Socket) -> None:
        check(await sock.recv_until(b"\n"), b"change\n")
        async with trio.open_nursery() as inner:

            async def broadcast() -> None:
                try:
                    await server.broadcast(news, timeout=0.02)
                finally:
                    returned.set()

            inner.start_soon(broadcast)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            if not under_tls:
                await sock.starttls(site.tls)
            else:
                try:
                    await sock.stoptls()
                except trisock.TLSError:
                    return  # news in place of the end
        await sock.send(b"done\n")

    async with trio.open_nursery() as nursery:
        tls = site.tls if under_tls else None
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST, tls=tls)
        trusting = site.trusting if under_tls else None
        async with await trisock.connect(LOCALHOST, server.port, tls=trusting) as sock:
            await sock.send(b"change\n")
            await returned.wait()  # the client is slower than the broadcast
            if under_tls:
                with contextlib.suppress(trisock.TLSError):
                    await sock.stoptls()
                    check(b"".join([chunk async for chunk in sock]), b"done\n")
            else:
                if await sock.peek() is not None:
                    check(await sock.recv_exactly(len(news)), news)
                await sock.starttls(site.trusting)
                check(await sock.recv_until(b"\n"), b"done\n")
        server.stop()
        await server.wait_closed()
        check(server.stats().handler_errors, 0)


async def a_server_starts_and_stops(site: Site, rng: random.Random) -> None:
    """With grace or without, from outside or in a handler, with clients in all states."""
    grace = rng.choice([None, 0, 0.01])

    async def handler(sock: Socket) -> None:
        await sock.send(b"welcome\n")
        if await sock.recv() == b"stop":
            server.stop(grace)
        await server.closing.wait()
        await sock.send(b"bye\n")
        if grace is not None:
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        tls = rng.choice([None, site.tls])
        server = await trisock.bind(nursery, 0, handler, host=LOCALHOST, tls=tls)
        connect = functools.partial(
            trisock.connect, LOCALHOST, server.port, tls=None if tls is None else site.trusting
        )
        may_break = () if grace is None else (trio.BrokenResourceError,)
        with trio.socket.socket() as waiting:  # in its handshake
            await waiting.connect((LOCALHOST, server.port))
            socks = [await connect() for _ in range(3)]
            for sock in socks:
                check(await sock.recv_until(b"\n"), b"welcome\n")
            if rng.random() < 0.5:
                await socks[0].send(b"stop")
                await server.closing.wait()
            else:
                server.stop(grace)
                with contextlib.suppress(*may_break):
                    await socks[0].send(b"go on")
            for sock in socks[1:]:
                with contextlib.suppress(*may_break):
                    await sock.send(b"go on")
        for sock in socks:
            with contextlib.suppress(*may_break):
                heard = b"".join([chunk async for chunk in sock])
                check(heard, b"bye\n" if grace is None or heard else b"")
            await sock.close()
        await server.wait_closed()
    try:
        (await trisock.connect(LOCALHOST, server.port)).abort()
    except OSError:
        return
    raise Wrong("a server that has stopped is listening")


async def a_stale_path(site: Site, rng: random.Random) -> None:
    path = site.directory / f"stale-{rng.randrange(10**9)}"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    async with await trisock.listen_unix(path) as listener:
        try:
            await (await trisock.listen_unix(path)).close()
        except OSError as exc:
            check(exc.errno, errno.EADDRINUSE)
        else:
            raise Wrong("two listen on one path")
        async with await trisock.connect_unix(path) as client, await listener.accept() as server:
            await client.send(b"hello")
            check(await server.recv(), b"hello")
            check(listener.hasconnection(), False)
    check(path.exists(), False)


async def a_cancelled_accept(site: Site, rng: random.Random) -> None:
    """It loses no connection."""
    async with await trisock.listen(0, LOCALHOST) as listener:
        clients = [await trisock.connect(LOCALHOST, listener.port) for _ in range(3)]
        accepted: list[Socket] = []
        while len(accepted) < len(clients):
            if rng.random() < 0.3:
                listener.hasconnection()
            sock = await cancelled_after(rng.randrange(3), listener.accept)
            if sock is not None:
                accepted.append(sock)
        check({each.getpeer() for each in accepted}, {each.getlocal() for each in clients})
        for sock in clients + accepted:
            await sock.close()


async def pluto_in_trio(site: Site, rng: random.Random) -> None:
    data = payload(rng, 10_000)
    listener = pluto.socket.listen(0)
    assert listener is not None
    check(listener.hasconnection(), False)
    client = await pluto.socket.connect(LOCALHOST, listener.port)
    server = await listener.accept()
    assert client is not None
    assert server is not None
    await client.send(data)
    check(await received(server, len(data)), data)
    secured: list[object] = []

    async def secure() -> None:
        secured.append(await server.starttls(site.tls))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(secure)
        check(await client.starttls(site.trusting), True)
    check((secured, client.istls(), await client.starttls(site.trusting)), ([True], True, None))
    await server.send(data)
    check(await received(client, len(data)), data)
    check(await client.peek(), None)
    if rng.random() < 0.5:  # else they are collected
        await client.close()
        check((await server.recv(), server.isopen()), (None, False))
        await server.close()
        await listener.close()


async def received(s: pluto.async_socket, size: int) -> bytes:
    got = b""
    while len(got) < size:
        got += await s.recv() or b"the end"
    return got


async def pluto_outside_trio(site: Site, rng: random.Random) -> None:
    """In a thread, where its calls block: its background thread does them."""
    data = payload(rng, 10_000)

    def script() -> None:
        s = pluto.socket.connect(LOCALHOST, site.plain.port)
        assert s is not None
        s.send("starttls server\n")
        check(s.recv(), b"go ahead\n")
        check(s.starttls(site.trusting), True)
        s.send(b"echo %d\n" % len(data) + data)
        got = b""
        while len(got) < len(data):
            got += s.recv() or b"the end"
        s.unrecv("x")
        check((got, s.peek(), s.recv(), s.isopen()), (data, b"x", b"x", True))
        if rng.random() < 0.5:  # else it is collected
            s.close()
        check(pluto.socket.connect(LOCALHOST, unused), None)

    with socket.socket() as bound:  # and does not listen
        bound.bind((LOCALHOST, 0))
        unused = bound.getsockname()[1]
        await trio.to_thread.run_sync(script)


async def pluto_interrupted(site: Site, rng: random.Random) -> None:
    """Calls outside Trio that an exception ends at some line of trisock lose no byte.

    A trace function of the thread raises it, as a signal handler would in the main thread.
    """
    data = payload(rng, 2000)

    def talk() -> None:
        s = pluto.socket.connect(LOCALHOST, site.plain.port)
        assert s is not None
        s.send(b"echo %d\n" % len(data) + data)
        got = b""
        while len(got) < len(data):
            got += interrupted_at(rng.randrange(1, 60), s.recv) or b""
        check(got, data)
        s.close()

    await trio.to_thread.run_sync(talk)


class InterruptedCall(BaseException):
    pass


def interrupted_at(line: int, call: Callable[[], bytes | None]) -> bytes | None:
    """Make a call that an exception ends at a line of trisock's code, if it comes so far."""
    count = 0

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal count
        if not frame.f_code.co_filename.startswith(str(Path(trisock.__file__).parent)):
            return None
        if event == "line":
            count += 1
            if count == line:
                raise InterruptedCall
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        return call()
    except InterruptedCall:
        return None
    finally:
        sys.settrace(before)


async def a_server_of_pluto(site: Site, rng: random.Random) -> None:
    async def handler(s: pluto.async_socket) -> None:
        await s.send(await s.recv() or b"")

    sched = pluto.scheduler()
    listener = pluto.socket.bind(sched, 0, handler)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sched.run)
        async with await trisock.connect(LOCALHOST, listener.port) as sock:
            await sock.send(b"hello")
            check(b"".join([chunk async for chunk in sock]), b"hello")
        await listener.close()


async def hammerspoon_sockets(site: Site, rng: random.Random) -> None:
    """A server that echoes lines, a client that turns to TLS, and what is queued meanwhile."""
    said = [payload(rng, 1000).replace(b"\n", b"") + b"\n" for _ in range(5)]
    heard: list[object] = []
    done = trio.Event()

    def serve(data: bytes, tag: int) -> None:
        if data == b"STARTTLS\n":
            server.write("go ahead\n").startTLS(site.tls)
        else:
            server.write(data)
        server.read("\n")

    def hear(data: bytes, tag: int) -> None:
        heard.append((data, tag))
        if len(heard) == len(said) + 1:
            done.set()

    async with hammerspoon.open_sockets() as hs:
        client = hs.new(hear)
        if rng.random() < 0.5:
            path = str(site.directory / f"hs-{rng.randrange(10**9)}")
            server = hs.server(path, serve)
            client.connect(path)
        else:
            server = hs.server(0, serve)
            client.connect(LOCALHOST, server.info()["localPort"])
        while not server.connections():
            await trio.lowlevel.checkpoint()
        server.read("\n")
        client.write("STARTTLS\n").read("\n", 0)
        client.startTLS(site.trusting)
        for tag, line in enumerate(said, 1):
            client.write(line, tag).read(b"\n", tag)
        await done.wait()
        check(heard, [(b"go ahead\n", 0), *((line, tag) for tag, line in enumerate(said, 1))])
        check((client.connected(), client.info()["isSecure"]), (True, True))
        if rng.random() < 0.5:
            client.disconnect()
            while server.connections():
                await trio.lowlevel.checkpoint()


# By what they have in common, for the table.
KINDS: dict[str, list[Conversation]] = {
    "clear": [in_the_clear, half_closed],
    "TLS": [starttls_in_mid_conversation, tls_from_the_start],
    "cancelled": [
        a_cancelled_send,
        a_cancelled_handshake,
        a_cancelled_connect_or_close,
        a_cancelled_accept,
    ],
    "bad peers": [
        a_peer_resets,
        a_peer_truncates,
        a_peer_talks_nonsense,
        a_peer_vanishes_in_the_handshake,
        clear_text_behind_starttls,
        a_certificate_of_a_stranger,
    ],
    "servers": [
        a_handler_raises,
        another_process_has_the_descriptor,
        a_client_certificate,
        new_certificates,
        more_than_max_connections,
        a_broadcast,
        a_broadcast_beside_an_upgrade,
        a_server_starts_and_stops,
        a_stale_path,
    ],
    "dialects": [
        *(pluto_in_trio, pluto_outside_trio, pluto_interrupted, a_server_of_pluto),
        *(hammerspoon_sockets, hammerspoon_peers_vanish, hammerspoon_floods),
    ],
}
