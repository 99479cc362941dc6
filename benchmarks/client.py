"""The client, the same for all servers: what it asks of them, and the check of what it gets.

Every method returns when the server has done all of its work, and raises ``Wrong`` where
a server did something else.
"""

from __future__ import annotations

import itertools
import os
import socket
import ssl
from collections.abc import Generator, Iterator
from pathlib import Path

from .loop import READABLE, WRITABLE, Job, Loop

MESSAGE_SIZE = 64
LINE = b"x" * 63 + b"\n"

# A read takes whole records of TLS (16 KiB), so that none is left in OpenSSL where epoll does not
# see it. Larger pieces than the servers' 64 KiB keep the client ahead of them.
_READ_SIZE = 262_144
_BLOCK = bytes(262_144)
_LINES = LINE * 4096

# A server that is silent for so long, in seconds, has lost something.
PATIENCE = 20

_WAITS = (BlockingIOError, ssl.SSLWantReadError)


class Wrong(Exception):
    """The server did not do what it was asked for."""


class Client:
    """Talks to one server.

    Args:
      port: where it listens.
      authority: the certificate of the authority that has signed its own; ``None`` without TLS.
    """

    def __init__(self, port: int, authority: Path | None) -> None:
        self._address = ("127.0.0.1", port)
        self._context: ssl.SSLContext | None = None
        if authority is not None:
            self._context = ssl.create_default_context(cafile=authority)
            self._context.minimum_version = ssl.TLSVersion.TLSv1_3
        self._socks: list[socket.socket] = []

    def open(self, count: int) -> None:
        """Open connections, one after another, with one message echoed over each."""
        for _ in range(count):
            sock = socket.create_connection(self._address, timeout=PATIENCE)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname="localhost")
            self._socks.append(sock)
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.setblocking(False)

    def close(self) -> None:
        """Close the connections, without any word: after the server has ended."""
        for sock in self._socks:
            sock.close()

    def echo(self, count: int) -> None:
        """Send so many messages over all connections together; on each one at a time."""
        self._run(
            (sock, _echo(sock, count // len(self._socks))) for sock in self._socks
        )

    def _run(self, jobs: Iterator[tuple[socket.socket, Job]]) -> None:
        loop = Loop(PATIENCE)
        try:
            for sock, job in jobs:
                loop.start(sock.fileno(), job)
            loop.run()
        finally:
            loop.close()


def _echo(sock: socket.socket, count: int) -> Job:
    message = os.urandom(MESSAGE_SIZE)
    for _ in range(count):
        sock.send(message)  # so little is never too much for the kernel
        yield READABLE
        yield from _expect(sock, message)


def _expect(sock: socket.socket, message: bytes) -> Job:
    received = yield from _receive(sock)
    while len(received) < len(message):
        received += yield from _receive(sock)
    if received != message:
        raise Wrong(f"{received[:100]!r} came where {message[:100]!r} was expected")


def _receive(sock: socket.socket) -> Generator[int, None, bytes]:
    """Return what has arrived, which is not nothing."""
    while True:
        try:
            received = sock.recv(_READ_SIZE)
        except _WAITS:
            yield READABLE
        else:
            if not received:
                raise Wrong("the server has ended the connection too early")
            return received
