"""Connected pairs of sockets, and operations on their two ends."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator

import trio

import trisock
from trisock import Socket

# If SO_LINGER has this value, closing a TCP socket resets the connection.
RESET = struct.pack("ii", 1, 0)


@contextlib.asynccontextmanager
async def closing(*socks: Socket) -> AsyncIterator[None]:
    """Abort sockets at the end of the block, whatever their state."""
    try:
        yield
    finally:
        for sock in socks:
            sock.abort()


async def all_served(server: trisock.Server, accepted: int) -> None:
    """Wait until a server has accepted this many connections, and no connection is active."""
    while server.stats().accepted < accepted or server.stats().active:
        await trio.lowlevel.checkpoint()


def reset(raw: socket.socket) -> None:
    """Close a raw socket so that its peer receives a reset."""
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    raw.close()


def raw_pair() -> tuple[Socket, socket.socket]:
    """Return the two ends of a TCP connection: a Socket (server), and a blocking stdlib socket."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        raw = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # send immediately
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
    return Socket(stream, side="server"), raw


def unix_pair() -> tuple[Socket, Socket]:
    """Return the two ends of a Unix connection. Unlike TCP's, its capacity is predictable."""
    a, b = (trio.socket.from_stdlib_socket(each) for each in socket.socketpair())
    return Socket(trio.SocketStream(a)), Socket(trio.SocketStream(b), side="server")


async def clog(sock: Socket) -> None:
    """Fill a Unix connection until a send has to wait. The peer must not be reading."""
    while sock._connection.transport.writable_now():
        await sock.send(b"x" * 100)
    if not sock.istls():  # without TLS, a send can use any free byte, so fill every byte
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(sock.fileno(), b"x")


async def until_full(sock: Socket) -> None:
    """Wait until another task has filled the kernel's send buffer."""
    while sock._connection.transport.writable_now():
        await trio.lowlevel.checkpoint()


def raw_unix_pair() -> tuple[Socket, socket.socket]:
    ours, raw = socket.socketpair()
    return Socket(trio.SocketStream(trio.socket.from_stdlib_socket(ours))), raw


async def read_all(sock: Socket) -> bytes:
    return b"".join([chunk async for chunk in sock])
