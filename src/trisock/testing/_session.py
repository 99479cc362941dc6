"""A session of a hostile client: its connections to one server, and its time limit."""

from __future__ import annotations

import contextlib
import socket
import sys
from dataclasses import dataclass

import trio
import trio.testing

from .. import ClientTLS, Server, Socket, TLSArgument, TLSError
from ._expectation import shown
from ._watchdog import Watchdog
from ._watched_handler import WatchedHandler

# If nothing has happened for this long (seconds), we assume that the handler waits for the client.
# Data over loopback arrives at once, but a busy machine may delay it.
QUIET = 0.005

_HOST = "127.0.0.1"

_SMALL_WINDOW = 16384  # bytes


@dataclass(frozen=True)
class Profile:
    """What is known about a handler.

    Attributes:
      greeting: the start of what the handler sends first, or ``b""``.
      request: a valid request.
      starttls: the command that starts TLS, or ``b""``.
      tls: the client's role, or ``None`` if the handler does not start TLS.
      server_tls: the server's role, or ``None`` if the server does not start TLS by itself.
      timeout: as in ``check_handler``.
    """

    greeting: bytes
    request: bytes
    starttls: bytes
    tls: TLSArgument | None
    server_tls: TLSArgument | None
    timeout: float


class Session:
    """What a client needs: connections to one server, and what is known about its protocol.

    Args:
      server: runs the handler.
      watched: the handler.
      watchdog: limits the time of the client.
      profile: what is known about the handler.
      secure: whether ``open`` starts TLS.

    Attributes:
      request: a valid request of the protocol.
      is_line: whether the request is the default line, ``NOOP``.
      cut_request: the request without its line end or, if it has none, without its last byte.
      waiting: the error message of a timeout: what the handler has not done.
    """

    def __init__(
        self,
        server: Server,
        watched: WatchedHandler,
        watchdog: Watchdog,
        profile: Profile,
        *,
        secure: bool,
    ) -> None:
        self.server = server
        self.watched = watched
        self._watchdog = watchdog
        self._greeting = profile.greeting
        self.starttls = profile.starttls
        self._tls = profile.tls
        self.timeout = profile.timeout
        self.secure = secure
        self._socks: list[Socket] = []
        self._server_starts_tls = profile.server_tls is not None
        self.request = profile.request
        self.is_line = self.request.rstrip() == b"NOOP"
        without_line_end = self.request.rstrip(b"\r\n")
        is_text = without_line_end != self.request
        self.cut_request = without_line_end if is_text else self.request[:-1]
        self.waiting = ""

    async def connect(self) -> Socket:
        """Connect, and wait until the handler has started and has sent its greeting."""
        sock = await self.connect_only()
        self.expect("the handler has not sent its greeting")
        greeting = await _read(sock, len(self._greeting))
        if greeting != self._greeting:
            raise AssertionError(f"the greeting is {shown(greeting)}, not {shown(self._greeting)}")
        return sock

    async def connect_only(self) -> Socket:
        """Connect, and wait until the handler has started."""
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
                hint = "" if self._server_starts_tls else "; the handler itself must call starttls"
                raise AssertionError(f"TLS did not start: {exc}{hint}") from exc
        return sock

    async def ask_for_tls(self, sock: Socket, injected: bytes = b"") -> bool:
        """Send the STARTTLS command, and drop the answer. Return whether the stream is open."""
        if not self._greeting:
            await self.quiet()
            await _drop_arrived(sock)
        await send(sock, self.starttls + injected)
        await self.wait_for_answer(sock)
        return await _drop_arrived(sock)

    async def wait_for_answer(self, sock: Socket) -> None:
        """Wait until the handler answers the STARTTLS command or the connection ends."""
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
        """Restart the handler's time limit. By default, it is ``timeout`` seconds.

        Args:
          what: the start of the error message if the limit is exceeded.
        """
        self.waiting = what
        self._watchdog.renew(self.timeout if seconds is None else seconds)

    async def quiet(self) -> None:
        """Wait until the handler is blocked, on the client or on anything else."""
        with trio.move_on_after(self.timeout / 2):
            await trio.testing.wait_all_tasks_blocked(QUIET)

    async def finish(
        self,
        sock: Socket,
        waiting: str = "the handler is still running after the client has sent EOF",
    ) -> bytes:
        """Send FIN (under TLS, without ``close_notify``). Return all data until EOF."""
        self.expect(waiting)
        with contextlib.suppress(OSError):
            sock.stream.socket.shutdown(socket.SHUT_WR)
        received = b""
        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in sock:
                received += chunk
        sock.abort()
        return received

    async def answers(self, data: bytes = b"", *, late_fin: bool = False) -> bytes:
        """Open a connection, send data and FIN, and return all data until EOF.

        Args:
          late_fin: whether to send FIN only when the handler is blocked.
        """
        sock = await self.open()
        await send(sock, data)
        if late_fin:
            await self.quiet()
        return await self.finish(sock)

    async def all_ended(self) -> None:
        """Abort all connections, and wait until all calls of the handler have ended."""
        self.abort()
        await self.quiet()
        self.expect("the handler is still running after the client has left")
        await self.watched.until(lambda: not self.watched.running)

    def abort(self) -> None:
        for sock in self._socks:
            sock.abort()


def _narrow(raw: trio.socket.SocketType) -> None:
    """Limit how much the peer can send before we read. Call this before the connect."""
    if sys.platform == "linux":
        # With a small SO_RCVBUF, Linux sometimes drops acknowledgements too. Our own data then gets
        # stuck.
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


async def send(sock: Socket, data: bytes) -> None:
    """Send data. Ignore a broken connection, because the handler's answer may still be unread."""
    with contextlib.suppress(trio.BrokenResourceError):
        await sock.send(data)


async def _drop_arrived(sock: Socket) -> bool:
    """Drop the data that has arrived. Return whether the stream is open."""
    while chunk := await sock.peek():
        await sock.recv()
    return chunk is None
