"""The client, the same for all servers: what it asks of them, and the check of what it gets.

Each load returns when the server has done all of its work, and raises ``Wrong`` where the
server did something else.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import ssl
from collections.abc import Callable, Generator
from pathlib import Path

from .loop import READABLE, WRITABLE, Job, Loop

MESSAGE_SIZE = 64
LINE_SIZE = 64

# A server that is silent for so long, in seconds, has lost something.
PATIENCE = 20

# How many connections are being opened and closed at the same time.
VISITORS = 16

# Larger pieces than the servers' 64 KiB, to stay ahead of them. (A read takes whole records of TLS,
# 16 KiB, so that nothing is left in OpenSSL where epoll would not see it.)
_PIECE = 262_144
# Answers are short, and a large buffer made anew for each (mmap, page faults) cost the client five
# times as much as all else that it does for an echo.
_ANSWER = 4096
_BYTES = b"x" * _PIECE
_LINE = b"x" * (LINE_SIZE - 1) + b"\n"
_LINES = _LINE * (_PIECE // LINE_SIZE)
_NAME = "localhost"  # which the certificate is for

_NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError)
_FULL = (BlockingIOError, ssl.SSLWantWriteError)


class Wrong(Exception):
    """The server did not do what it was asked for."""


class Client:
    """Talks to one server.

    Args:
      port: where it listens.
      authority: who has signed its certificate, as a PEM file; ``None`` without TLS.
    """

    def __init__(self, port: int, authority: Path | None) -> None:
        self._address = ("127.0.0.1", port)
        self._context: ssl.SSLContext | None = None
        if authority is not None:
            self._context = ssl.create_default_context(cafile=authority)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._socks: list[socket.socket] = []

    def open(self, count: int) -> None:
        """Open so many more connections, one after another."""
        for _ in range(count):
            sock = socket.create_connection(self._address, timeout=PATIENCE)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=_NAME)
            self._socks.append(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)

    def close(self) -> None:
        """Close the connections, without a word: the server has ended."""
        for sock in self._socks:
            sock.close()

    # ---- loads ----

    def echo(self, count: int) -> None:
        """Send so many messages over all connections together; each waits for its echo."""
        share, rest = divmod(count, len(self._socks))
        with Loop(PATIENCE) as loop:
            for number, sock in enumerate(self._socks):
                loop.start(sock.fileno(), _echo(sock, share + (number < rest)))
            loop.run()

    def visit(self, count: int) -> None:
        """Connect, send one message, wait for its echo and then for the end, so many times.

        Several are on their way at a time. Each is a full handshake under TLS.
        """
        with Loop(PATIENCE) as loop:
            turns = iter(range(count))

            def next_visit() -> None:
                for _ in turns:
                    sock = socket.socket()
                    loop.start(sock.fileno(), visiting(sock))
                    return

            def visiting(sock: socket.socket) -> Job:
                yield from _visit(sock, self._address, self._context)
                next_visit()

            for _ in range(VISITORS):
                next_visit()
            loop.run()

    def upload(self, count: int) -> None:
        """Send so many bytes."""
        self._run(_upload, count)

    def download(self, count: int) -> None:
        """Get so many bytes."""
        self._run(_download, count)

    def idle(self, count: int) -> None:
        """Open so many connections more, with one message echoed over each, and keep them."""
        self.open(count)
        self.echo(len(self._socks))

    def lines(self, count: int) -> None:
        """Send so many lines, over a connection of their own, to its end."""
        self.open(1)
        self._run(_lines, count)

    def _run(self, load: Callable[[socket.socket, int], Job], count: int) -> None:
        """Run a load over the newest connection."""
        sock = self._socks[-1]
        with Loop(PATIENCE) as loop:
            loop.start(sock.fileno(), load(sock, count))
            loop.run()


# ---- what happens on one connection ----


def _echo(sock: socket.socket, count: int) -> Job:
    message = os.urandom(MESSAGE_SIZE)
    for _ in range(count):
        sock.send(message)  # so little is never too much for the kernel
        yield READABLE
        yield from _expect(sock, message)


def _visit(sock: socket.socket, address: tuple[str, int], context: ssl.SSLContext | None) -> Job:
    with contextlib.ExitStack() as closing:
        closing.enter_context(sock)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if sock.connect_ex(address) == errno.EINPROGRESS:
            yield WRITABLE
        if context is not None:
            sock = context.wrap_socket(sock, server_hostname=_NAME, do_handshake_on_connect=False)
            closing.enter_context(sock)
            yield from _shake_hands(sock)
        yield from _echo(sock, 1)
        # The echo has come; how the server ends its side, with close_notify, without it or by a
        # reset, is its own affair. Our end goes first: ours is the port in TIME-WAIT, then. When
        # the server's has come, all of its work is done.
        if isinstance(sock, ssl.SSLSocket):
            with contextlib.suppress(ssl.SSLError):  # SSLWantReadError, if its own is not there yet
                sock.unwrap()  # sends close_notify
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while (yield from _receive(sock)):
                pass


def _shake_hands(sock: ssl.SSLSocket) -> Job:
    while True:
        try:
            sock.do_handshake()
        except ssl.SSLWantReadError:
            yield READABLE
        else:
            return


def _upload(sock: socket.socket, count: int) -> Job:
    request = b"%d" % count
    yield from _send(sock, request)
    yield from _expect(sock, request)
    left = count
    data = memoryview(_BYTES)
    while left:
        left -= yield from _send_some(sock, data[:left])
    yield from _expect(sock, request)


def _download(sock: socket.socket, count: int) -> Job:
    yield from _send(sock, b"%d" % count)
    left = count
    buffer = bytearray(_PIECE)
    while left > 0:
        try:
            size = sock.recv_into(buffer)
        except _NOTHING_YET:
            yield READABLE
        else:
            if not size:
                raise Wrong(f"the server ended the connection {left} bytes too early")
            left -= size
    if left:
        raise Wrong(f"the server sent {-left} bytes too many")


def _lines(sock: socket.socket, count: int) -> Job:
    # The first one is shorter: else each line of those behind it would be whole in one read.
    yield from _send(sock, _LINE[LINE_SIZE // 2 :])
    left = (count - 1) * LINE_SIZE
    lines = memoryview(_LINES)
    sent = 0
    while sent < left:
        start = sent % LINE_SIZE
        sent += yield from _send_some(sock, lines[start : start + left - sent])
    sock.shutdown(socket.SHUT_WR)
    yield from _expect(sock, b"%d" % count)


# ---- the socket's own ----


def _send(sock: socket.socket, data: bytes) -> Job:
    rest = memoryview(data)
    while rest:
        rest = rest[(yield from _send_some(sock, rest)) :]


def _send_some(sock: socket.socket, data: memoryview) -> Generator[int, None, int]:
    while True:
        try:
            return sock.send(data)
        except _FULL:
            yield WRITABLE


def _expect(sock: socket.socket, message: bytes) -> Job:
    received = b""
    while len(received) < len(message):
        chunk = yield from _receive(sock)
        if not chunk:
            raise Wrong(f"the end came where {message[:100]!r} was expected, after {received!r}")
        received += chunk
    if received != message:
        raise Wrong(f"{received[:100]!r} came where {message[:100]!r} was expected")


def _receive(sock: socket.socket) -> Generator[int, None, bytes]:
    while True:
        try:
            return sock.recv(_ANSWER)
        except _NOTHING_YET:
            yield READABLE
