"""The hostile clients of ``check_handler``.

Each is a function of a ``Session``. It returns when the client has left, and raises
``AssertionError`` if an answer of the handler is wrong. Whether the handler ends, what it raises
and what it leaves behind is checked by the caller.
"""

from __future__ import annotations

import contextlib
import gc
import random
import re
import socket
import sys
import time
import tracemalloc
from collections.abc import Callable, Iterator

import trio
import trio.testing

from .. import ClientTLS, Server, Socket, TLSArgument, TLSError
from ._watched_handler import Watchdog, WatchedHandler

# How long nothing must happen until we take the handler to be waiting for the client, in seconds.
# What is sent over loopback arrives at once, but a busy machine may be late.
_QUIET = 0.005
_CERTAINLY_QUIET = 0.05  # an acknowledgement may be delayed by 40 ms

_HOST = "127.0.0.1"

_MANY = 20  # connections at the same time

_MIB = 1024 * 1024

# The most that a handler may hold for one client, in MiB: of a line, and of answers. A line may be
# a message, which may be large. Answers to short lines are small, and a queue of them is slow to
# fill.
MAX_LINE, MAX_ANSWERS = 8, 2

_ROUND = 64 * 1024  # bytes to send before the next look at how much the handler holds
_FILL = 640 * 1024  # bytes of lines, whose answers are more than the kernel takes
_PIECE = 16 * 1024
_SMALL_WINDOW = 16384

_ALERT = re.compile(rb"\x15\x03[\x00-\x04]\x00\x02..", re.DOTALL)  # an unencrypted TLS alert


class Session:
    """What a client needs: connections to one server, and what is known about its protocol.

    Args:
      server: runs the handler.
      watched: the handler.
      watchdog: limits the time of the client.
      greeting, starttls, timeout: as in ``check_handler``.
      tls: the client's role.
      secure: whether ``open`` starts TLS.

    Attributes:
      line: a line, which most protocols answer.
      waiting: what the client waits for, as the start of an error message.
    """

    def __init__(
        self,
        server: Server,
        watched: WatchedHandler,
        watchdog: Watchdog,
        *,
        greeting: bytes | None,
        starttls: bytes | None,
        tls: TLSArgument | None,
        secure: bool,
        timeout: float,
    ) -> None:
        self.server = server
        self.watched = watched
        self._watchdog = watchdog
        self.starttls = starttls or b""
        self.secure = secure
        self.timeout = timeout
        self._greeting = greeting or b""
        self._tls = tls
        self._end_of_line = b"\n" if self.starttls[-2:] not in (b"", b"\r\n") else b"\r\n"
        self._socks: list[Socket] = []
        self.line = b"NOOP" + self._end_of_line
        self.waiting = ""

    async def connect(self) -> Socket:
        """Connect, and wait until the handler has the connection and has greeted."""
        sock = await self.connect_only()
        self.expect("the handler has not sent its greeting")
        greeting = await _read(sock, len(self._greeting))
        if greeting != self._greeting:
            raise AssertionError(f"the greeting is {greeting!r}, not {self._greeting!r}")
        return sock

    async def connect_only(self) -> Socket:
        """Connect, and wait until the handler has the connection."""
        self.expect("the handler has not started")
        number = self.watched.started + 1
        raw = trio.socket.socket()
        with contextlib.ExitStack() as stack:
            stack.enter_context(raw)
            if self.watched.narrow:
                _narrow(raw)
            await raw.connect((_HOST, self.server.port))
            sock = Socket(trio.SocketStream(raw))
            stack.pop_all()
        self._socks.append(sock)
        await self.watched.until(lambda: self.watched.started >= number)
        return sock

    async def open(self) -> Socket:
        """Connect, and start TLS if the session is secure."""
        sock = await self.connect()
        if self.secure:
            if self.starttls and not await self.ask_for_tls(sock):
                raise AssertionError(f"the handler ended the connection after {self.starttls!r}")
            try:
                await self.start_tls(sock)
            except TLSError as exc:
                raise AssertionError(f"TLS did not start: {exc}") from exc
        return sock

    async def ask_for_tls(self, sock: Socket, injected: bytes = b"") -> bool:
        """Send the STARTTLS command, and drop the answer. Return whether the stream goes on."""
        if not self._greeting:
            await self.quiet()
            await _drop_arrived(sock)
        await _send(sock, self.starttls + injected)
        await self.wait_for_answer(sock)
        return await _drop_arrived(sock)

    async def wait_for_answer(self, sock: Socket) -> None:
        """Wait until the answer to the STARTTLS command, or the end, has arrived."""
        self.expect(f"the handler has not answered {self.starttls!r}")
        with contextlib.suppress(trio.BrokenResourceError):
            await sock.peek(wait=True)
        await self.quiet()

    async def start_tls(self, sock: Socket) -> None:
        self.expect("the TLS handshake has not ended")
        role = self._tls
        assert role is not None
        has_name = isinstance(role, str) or (isinstance(role, ClientTLS) and role.server_hostname)
        await sock.starttls(role, server_hostname=None if has_name else _HOST)

    def expect(self, what: str, seconds: float | None = None) -> None:
        """Give the handler time from now on: ``timeout`` seconds by default.

        Args:
          what: says, at the start of an error message, what is wrong if this time passes.
        """
        self.waiting = what
        self._watchdog.renew(self.timeout if seconds is None else seconds)

    async def quiet(self) -> None:
        """Wait until the handler waits: for the client, or for anything else."""
        with trio.move_on_after(self.timeout / 2):
            await trio.testing.wait_all_tasks_blocked(_QUIET)

    async def finish(
        self,
        sock: Socket,
        waiting: str = "the handler is still running after the client has sent EOF",
    ) -> bytes:
        """Send FIN (under TLS, without ``close_notify``). Return what arrives until the end."""
        self.expect(waiting)
        with contextlib.suppress(OSError):
            sock.stream.socket.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in sock:
                received += chunk
        sock.abort()
        return received

    async def answers(self, data: bytes = b"") -> bytes:
        """Open a connection, send data and FIN, and return what arrives until the end."""
        sock = await self.open()
        await _send(sock, data)
        return await self.finish(sock)

    async def all_ended(self) -> None:
        """Abort the connections that are left, and wait until the handler has ended for each."""
        self.abort()
        await self.quiet()
        self.expect("the handler is still running after the client has left")
        await self.watched.until(lambda: not self.watched.running)

    def abort(self) -> None:
        for sock in self._socks:
            sock.abort()


def _narrow(raw: trio.socket.SocketType) -> None:
    """Let the peer send only a little that is not read. Call it before the connect."""
    if sys.platform == "linux":
        # With a small SO_RCVBUF, Linux also drops acknowledgements now and then. Then what we send
        # gets stuck.
        raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_WINDOW_CLAMP, _SMALL_WINDOW)
    else:  # pragma: no cover (tests run on Linux)
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_WINDOW)


async def _read(sock: Socket, n: int) -> bytes:
    """Return n bytes, or fewer if the stream ends."""
    data = b""
    with contextlib.suppress(trio.BrokenResourceError):
        while len(data) < n and (chunk := await sock.recv(n - len(data))):
            data += chunk
    return data


async def _send(sock: Socket, data: bytes) -> None:
    """Send data. The handler may have ended the connection, and its answer is still unread."""
    with contextlib.suppress(trio.BrokenResourceError):
        await sock.send(data)


async def _drop_arrived(sock: Socket) -> bool:
    """Drop what has arrived. Return whether the stream goes on."""
    while chunk := await sock.peek():
        await sock.recv()
    return chunk is None


def _added(answer: bytes, usual: set[bytes]) -> bytes:
    """Return what an answer has in addition to the usual answers, or ``b""``.

    If the usual answers differ (they may contain the time), only a longer answer counts.
    """
    if answer in usual or (len(usual) > 1 and len(answer) <= max(map(len, usual))):
        return b""
    return answer[max(_shared(answer, each) for each in usual) :]


def _shared(one: bytes, other: bytes) -> int:
    """Return the length of the common start."""
    differ = (number for number, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))


# ---- clients that leave ----


async def silent(session: Session) -> None:
    """Say nothing, and leave."""
    sock = await session.open()
    await session.quiet()
    session.expect("the handler is still running after the client has closed the connection")
    await sock.close()


async def half_close(session: Session) -> None:
    """Send a line and EOF, and read until the handler closes the connection."""
    await session.answers(session.line)


async def reset_at_once(session: Session) -> None:
    sock = await session.connect_only()
    sock.abort()


async def reset_after_greeting(session: Session) -> None:
    sock = await session.open()
    await session.quiet()
    sock.abort()


async def reset_in_line(session: Session) -> None:
    sock = await session.open()
    await _send(sock, session.line[:2])
    await session.quiet()
    sock.abort()


async def reset_after_line(session: Session) -> None:
    sock = await session.open()
    await _send(sock, session.line)
    await session.quiet()
    sock.abort()


async def cancellation(session: Session) -> None:
    """Say nothing while the server cancels the handler."""
    await session.open()
    await session.quiet()
    session.server.stop(grace=0)
    session.expect("the handler is still running after it was cancelled")
    await session.watched.until(lambda: not session.watched.running)


# ---- clients whose answers are compared ----


async def truncation(session: Session) -> None:
    """End the stream in the middle of a line. The line must not be answered like a whole one."""
    nothing = await session.answers()
    whole = await session.answers(session.line)
    sock = await session.open()
    await _send(sock, session.line.rstrip())
    await session.quiet()
    if await sock.peek() is not None:
        return  # the handler does not wait for the end of a line
    answer = await session.finish(sock)
    if answer == whole != nothing:
        raise AssertionError(f"the handler took half a line for a whole one: it sent {answer!r}")


async def byte_by_byte(session: Session) -> None:
    """Send a line in pieces of one byte. The answer must be that to a line in one piece."""
    answer = whole = b""
    for _ in range(3):  # an answer may depend on other things, such as the time
        whole = await session.answers(session.line)
        sock = await session.open()
        for number in range(len(session.line)):
            await _send(sock, session.line[number : number + 1])
            await session.quiet()
        answer = await session.finish(sock)
        if answer == whole or whole != await session.answers(session.line):
            return
    raise AssertionError(f"the handler sent {answer!r}, but to a whole line it sends {whole!r}")


# ---- clients that send nonsense ----


def _nonsense() -> list[bytes]:
    rng = random.Random(1)  # noqa: S311 (these numbers are no secrets)
    lines = [b"", b" ", b"\0", b"\xff\xfe\xfd", b"NOOP \xff", b"-1", b"9" * 5000, b"%s{0}:", b":"]
    text = bytes(rng.choice(b"az09 :;,.<>()[]{}=%$\\\"'\t\r\n") for _ in range(5000))
    binary = rng.randbytes(20_000)
    return [*(line + b"\r\n" for line in lines), bytes(64), b"\xff" * 64, text, binary]


async def garbage(session: Session) -> None:
    """Send what no client of any protocol sends."""
    for nonsense in _nonsense():
        await session.answers(nonsense)


# ---- clients that send much ----


async def endless_line(session: Session) -> None:
    """Send a line that does not end, and read the answers."""
    sock = await session.open()
    fault: AssertionError | None = None
    async with trio.open_nursery() as nursery:

        async def read() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                while await sock.recv():
                    pass

        nursery.start_soon(read)
        try:
            await _flood(session, sock, b"x" * _PIECE, MAX_LINE)
        except AssertionError as exc:
            fault = exc  # raised behind the nursery, which would put it into a group
        nursery.cancel_scope.cancel()
    if fault is not None:
        raise fault


async def slow_reader(session: Session) -> None:
    """Send lines and read nothing. Another client must be served meanwhile."""
    lines = (b"NOOP 0123456" + session.line[4:]) * (_PIECE // 14)
    # With small buffers in the kernel, the answers soon have to wait for the client.
    session.watched.narrow = True
    sock = await session.open()
    session.watched.narrow = False
    await _send(sock, lines)
    if not await _is_answered(sock) or not await _fill(session, sock, lines):
        await _flood(session, sock, lines, MAX_ANSWERS)
    other = await session.open()
    await _send(other, session.line)
    await session.finish(other, "the handler serves no other client while one client does not read")
    await session.quiet()
    sock.abort()


async def _is_answered(sock: Socket) -> bool:
    """Return whether an answer has arrived, and leave it in the kernel."""
    answered = False
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await trio.testing.wait_all_tasks_blocked(_QUIET)
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        await trio.lowlevel.wait_readable(sock.stream.socket)
        answered = True
        nursery.cancel_scope.cancel()
    return answered


async def _fill(session: Session, sock: Socket, piece: bytes) -> bool:
    """Send so much that the kernel's buffers are full of answers.

    Returns whether the handler reads no more, because its answers wait for the client.
    """
    with _time_to_send(session) as has_time:
        for _ in range(_FILL // len(piece)):
            if not has_time() or not await _send_unless_stuck(sock, piece, _CERTAINLY_QUIET):
                return True
    return False


async def _flood(session: Session, sock: Socket, piece: bytes, most: int) -> None:
    """Send until the handler reads no more, or clearly holds little of what it has read.

    Raises AssertionError if the handler holds more than ``most`` MiB.
    """
    sent = 0
    with _memory() as memory, _time_to_send(session) as has_time:
        await _send_unless_stuck(sock, piece)
        await session.quiet()
        before = memory()

        def held() -> int:
            if memory() - before > most * _MIB:
                gc.collect()
            return memory() - before

        while has_time() and await _send_unless_stuck(sock, piece):
            sent += len(piece)
            if held() > most * _MIB:
                raise AssertionError(f"the handler holds more than {most} MiB for one client")
            if sent % _ROUND < len(piece):
                await session.quiet()
                if held() < sent / 8:
                    return


@contextlib.contextmanager
def _time_to_send(session: Session) -> Iterator[Callable[[], bool]]:
    """Cancel the block after ``timeout`` seconds: a handler may read slowly.

    The value returns whether that much real time has not passed yet.
    """
    session.expect("the handler reads slowly", 2 * session.timeout)
    end = time.monotonic() + session.timeout
    with trio.move_on_after(session.timeout):
        yield lambda: time.monotonic() < end


async def _send_unless_stuck(sock: Socket, data: bytes, quiet: float = _QUIET) -> bool:
    """Send data. Return False if the peer does not read, or if the connection has ended."""
    sent = False
    async with trio.open_nursery() as nursery:

        async def give_up() -> None:
            await trio.testing.wait_all_tasks_blocked(quiet)
            nursery.cancel_scope.cancel()

        nursery.start_soon(give_up)
        with contextlib.suppress(trio.BrokenResourceError):
            await sock.send(data)
            sent = True
        nursery.cancel_scope.cancel()
    return sent


@contextlib.contextmanager
def _memory() -> Iterator[Callable[[], int]]:
    """Measure memory. The value returns how many bytes Python's objects take."""
    was_tracing = tracemalloc.is_tracing()
    if not was_tracing:
        tracemalloc.start()
    try:
        yield lambda: tracemalloc.get_traced_memory()[0]
    finally:
        if not was_tracing:
            tracemalloc.stop()


async def many_connections(session: Session) -> None:
    """Open many connections at the same time."""
    faults: list[AssertionError] = []

    async def exchange() -> None:
        try:
            await session.answers(session.line)
        except AssertionError as exc:
            faults.append(exc)

    async with trio.open_nursery() as nursery:
        for _ in range(_MANY):
            nursery.start_soon(exchange)
    if faults:
        raise faults[0]


# ---- clients that attack STARTTLS ----


async def injection(session: Session) -> None:
    """Add a line behind STARTTLS, as an attacker can do. It must not be answered under TLS."""
    usual = {await session.answers(), await session.answers()}
    for injected in (session.line, session.starttls):
        answer = b""
        sock = await session.connect()
        with contextlib.suppress(TLSError):  # the handshake fails, as it must with a line in it
            if await session.ask_for_tls(sock, injected):
                await session.start_tls(sock)
                answer = await session.finish(sock)
        if answer and (added := _added(answer, usual)):
            raise AssertionError(
                f"the handler answered a line under TLS that was sent in plain text behind "
                f"{session.starttls!r}: it sent {added!r}"
            )


async def plain_text(session: Session) -> None:
    """Send STARTTLS, and then a line in plain text. It must not be answered."""
    usual = {
        _ALERT.sub(b"", await _plain_answers(session, b"")),
        _ALERT.sub(b"", await _plain_answers(session, b"")),
    }
    answer = _ALERT.sub(b"", await _plain_answers(session, session.line))
    if added := _added(answer, usual):
        raise AssertionError(f"the handler went on in plain text: it sent {added!r}")


async def _plain_answers(session: Session, data: bytes) -> bytes:
    """Send STARTTLS and, after the answer, data in plain text. Return all answers."""
    sock = await session.connect()
    await _send(sock, session.starttls)
    if data:
        await session.wait_for_answer(sock)
        await _send(sock, data)
    return await session.finish(sock)


async def reset_after_starttls(session: Session) -> None:
    sock = await session.connect()
    await session.ask_for_tls(sock)
    sock.abort()


# A ClientHello begins like this: a record of 512 bytes, of which only the header arrives.
_HALF_HELLO = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"


async def reset_in_handshake(session: Session) -> None:
    sock = await session.connect()
    if session.starttls:
        await session.ask_for_tls(sock)
    await _send(sock, _HALF_HELLO)
    await session.quiet()
    sock.abort()


async def truncated_handshake(session: Session) -> None:
    sock = await session.connect()
    if session.starttls:
        await session.ask_for_tls(sock)
    await _send(sock, _HALF_HELLO)
    await session.finish(sock)


async def starttls_twice(session: Session) -> None:
    """Send STARTTLS under TLS."""
    await session.answers(session.starttls)
