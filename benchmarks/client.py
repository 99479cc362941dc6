"""The client, which is the same for all servers. It generates load and checks every response.

A load is a method of ``Client``. It returns when the server has done all the work. It raises
``Wrong`` if a response of the server is wrong.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import socket
import ssl
from collections.abc import Callable, Generator
from pathlib import Path

from .loop import READABLE, WRITABLE, Job, Loop

MESSAGE_SIZE = 64
LINE_SIZE = 64
FRAME_SIZE = 64  # including the 4-byte header

# Seconds to wait for the server. If it is silent for longer, it has probably lost data.
PATIENCE = 20

# The number of short-lived connections in progress at the same time.
VISITORS = 16

# The number of ports that send datagrams.
UDP_CLIENTS = 64

# The size of the client's reads and writes. The servers read and write at most 64 KiB at a
# time, so the client is faster than the server. A TLS record has at most 16 KiB, so each read
# empties OpenSSL's buffer: epoll cannot see data that is pending in that buffer.
_PIECE = 262_144
# The size of a read that expects a short response. When each of these reads allocated a large
# buffer (mmap, page faults), the allocation took five times as long as the rest of an echo.
_ANSWER = 4096
_BYTES = b"x" * _PIECE
_LINE = b"x" * (LINE_SIZE - 1) + b"\n"
_LINES = _LINE * (_PIECE // LINE_SIZE)
_FRAME = (FRAME_SIZE - 4).to_bytes(4, "big") + b"x" * (FRAME_SIZE - 4)
_FRAMES = _FRAME * (_PIECE // FRAME_SIZE)
_NAME = "localhost"  # the name in the certificate

_NOTHING_YET = (BlockingIOError, ssl.SSLWantReadError)
_FULL = (BlockingIOError, ssl.SSLWantWriteError)


@functools.cache
def upstream() -> socket.socket:
    """Return the listening socket to which relays connect."""
    listening = socket.create_server(("127.0.0.1", 0))
    listening.settimeout(PATIENCE)
    return listening


class Wrong(Exception):
    """The server's response is wrong."""


class Client:
    """Talks to one server.

    Args:
      port: the server's port.
      authority: the CA file (PEM) to verify the server with, or ``None`` for plain TCP.
    """

    def __init__(self, port: int, authority: Path | None) -> None:
        self._address = ("127.0.0.1", port)
        self._context: ssl.SSLContext | None = None
        if authority is not None:
            self._context = ssl.create_default_context(cafile=authority)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._socks: list[socket.socket] = []

    def open(self, count: int) -> None:
        """Open ``count`` more connections, one after another."""
        for _ in range(count):
            sock = socket.create_connection(self._address, timeout=PATIENCE)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=_NAME)
            self._socks.append(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)

    def close(self) -> None:
        """Close the connections without close_notify, because the server has exited."""
        for sock in self._socks:
            sock.close()

    # ---- loads ----

    def echo(self, count: int) -> None:
        """Send ``count`` messages, spread over all connections.

        Each connection waits for an echo before it sends its next message.
        """
        share, rest = divmod(count, len(self._socks))
        with Loop(PATIENCE) as loop:
            for number, sock in enumerate(self._socks):
                loop.start(sock.fileno(), _echo(sock, share + (number < rest)))
            loop.run()

    def visit(self, count: int) -> None:
        """Open ``count`` short-lived connections. On each, exchange one echo and wait for EOF.

        Up to ``VISITORS`` connections are open at a time. With TLS, each connection has a full
        handshake.
        """
        self._visit(count, VISITORS)

    def visit_singly(self, count: int) -> None:
        """Do the same as ``visit``, one connection at a time."""
        self._visit(count, 1)

    def _visit(self, count: int, visitors: int) -> None:
        with Loop(PATIENCE) as loop:
            visits = iter(range(count))

            def next_visit() -> None:
                for _ in visits:
                    sock = socket.socket()
                    loop.start(sock.fileno(), visiting(sock))
                    return

            def visiting(sock: socket.socket) -> Job:
                yield from _visit(sock, self._address, self._context)
                next_visit()

            for _ in range(visitors):
                next_visit()
            loop.run()

    def upload(self, count: int) -> None:
        """Send ``count`` bytes."""
        self._run(_upload, count)

    def download(self, count: int) -> None:
        """Receive ``count`` bytes."""
        self._run(_download, count)

    def idle(self, count: int) -> None:
        """Open ``count`` more connections, exchange one echo on each, and keep them open."""
        self.open(count)
        self.echo(len(self._socks))

    def lines(self, count: int) -> None:
        """Send ``count`` lines on a new connection, then FIN. Check the server's count."""
        self.open(1)
        self._run(_lines, count)

    def relay(self, count: int) -> None:
        """Send ``count`` bytes through a new relay. Check that all bytes and EOF arrive."""
        near, far = self._open_relay()
        with Loop(PATIENCE) as loop:
            loop.start(near.fileno(), _send_and_end(near, count))
            loop.start(far.fileno(), _receive_all(far, count))
            loop.run()

    def idle_relays(self, count: int) -> None:
        """Open ``count`` more relays, test each one in both directions, and keep them open."""
        for _ in range(count):
            ends = self._open_relay()
            for sock, other in (ends, ends[::-1]):
                message = _message()
                sock.send(message)
                with Loop(PATIENCE) as loop:
                    loop.start(other.fileno(), _expect(other, message))
                    loop.run()

    def udp_echo(self, count: int) -> None:
        """Send ``count`` datagrams from ``UDP_CLIENTS`` ports. Each port waits for its echoes."""
        self._udp_echo(count, UDP_CLIENTS)

    def udp_echo_singly(self, count: int) -> None:
        """Do the same as ``udp_echo``, from one port."""
        self._udp_echo(count, 1)

    def _udp_echo(self, count: int, clients: int) -> None:
        while len(self._socks) < clients:
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._socks.append(sock)
            sock.connect(self._address)
            sock.setblocking(False)
        self.echo(count)

    def _open_relay(self) -> tuple[socket.socket, socket.socket]:
        """Connect to the relay, and accept the relay's connection."""
        self.open(1)
        far, _ = upstream().accept()
        far.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        far.setblocking(False)
        self._socks.append(far)
        return self._socks[-2], far

    def frames(self, count: int) -> None:
        """Send ``count`` frames on a new connection, then FIN. Check the server's count."""
        self.open(1)
        self._run(_frames, count)

    def _run(self, load: Callable[[socket.socket, int], Job], count: int) -> None:
        """Run a load on the newest connection."""
        sock = self._socks[-1]
        with Loop(PATIENCE) as loop:
            loop.start(sock.fileno(), load(sock, count))
            loop.run()


# ---- one connection ----


def _message() -> bytes:
    """Return random bytes that are one line."""
    return os.urandom(MESSAGE_SIZE).hex().encode()[: MESSAGE_SIZE - 1] + b"\n"


def _echo(sock: socket.socket, count: int) -> Job:
    message = _message()
    for _ in range(count):
        sock.send(message)  # so short that the kernel never refuses or splits it
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
            yield from _handshake(sock)
        yield from _echo(sock, 1)
        # The server may end its side with close_notify, with FIN only, or with a reset. Close our
        # side first, so that TIME-WAIT occupies our port and not the server's. EOF from the server
        # shows that it has finished its work.
        if isinstance(sock, ssl.SSLSocket):
            with contextlib.suppress(ssl.SSLError):  # raised if no close_notify has arrived
                sock.unwrap()  # sends close_notify
        with contextlib.suppress(OSError):
            sock.shutdown(socket.SHUT_WR)
            while (yield from _receive(sock)):
                pass


def _handshake(sock: ssl.SSLSocket) -> Job:
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
                raise Wrong(f"the server closed the connection with {left} bytes missing")
            left -= size
    if left:
        raise Wrong(f"the server sent {-left} excess bytes")


def _send_and_end(sock: socket.socket, count: int) -> Job:
    left = count
    data = memoryview(_BYTES)
    with sock:
        while left:
            left -= yield from _send_some(sock, data[:left])
        sock.shutdown(socket.SHUT_WR)
        if (yield from _receive(sock)):
            raise Wrong("the relay sent data, but the other end has sent none")


def _receive_all(sock: socket.socket, count: int) -> Job:
    received = 0
    buffer = bytearray(_PIECE)
    with sock:
        while True:
            try:
                size = sock.recv_into(buffer)
            except _NOTHING_YET:
                yield READABLE
                continue
            if not size:
                break
            received += size
    if received != count:
        raise Wrong(f"the relay passed on {received} of {count} bytes")


def _lines(sock: socket.socket, count: int) -> Job:
    # The first line is half the length of the others. So the server's 64 KiB reads end in the
    # middle of a line.
    yield from _send(sock, _LINE[LINE_SIZE // 2 :])
    yield from _repeat(sock, _LINES, LINE_SIZE, count - 1)
    yield from _expect(sock, b"%d" % count)


def _frames(sock: socket.socket, count: int) -> Job:
    # The first frame is half the length of the others, for the reason given in _lines.
    body = _FRAME[FRAME_SIZE // 2 + 4 :]
    yield from _send(sock, len(body).to_bytes(4, "big") + body)
    yield from _repeat(sock, _FRAMES, FRAME_SIZE, count - 1)
    yield from _expect(sock, b"%d" % count)


def _repeat(sock: socket.socket, items: bytes, size: int, count: int) -> Job:
    """Send ``count`` items of the given size, then FIN. ``items`` consists of many such items."""
    left = count * size
    view = memoryview(items)
    sent = 0
    while sent < left:
        start = sent % size
        sent += yield from _send_some(sock, view[start : start + left - sent])
    sock.shutdown(socket.SHUT_WR)


# ---- socket calls ----


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
            raise Wrong(f"expected {message[:100]!r}, got {received!r} and EOF")
        received += chunk
    if received != message:
        raise Wrong(f"expected {message[:100]!r}, got {received[:100]!r}")


def _receive(sock: socket.socket) -> Generator[int, None, bytes]:
    while True:
        try:
            return sock.recv(_ANSWER)
        except _NOTHING_YET:
            yield READABLE
