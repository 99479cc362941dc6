"""Connected pairs of sockets, and what is done with the two ends."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import AsyncIterator
from typing import Any

import trio

import trisock
from trisock import Socket

# SO_LINGER with this: a close is a reset.
RESET = struct.pack("ii", 1, 0)


async def tcp_pair() -> tuple[Socket, Socket]:
    """Return the two ends (client, server) of a TCP connection."""
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        client = await trisock.connect("127.0.0.1", listener.port)
        return client, await listener.accept()


async def tls_pair(client_tls: Any, server_tls: Any) -> tuple[Socket, Socket]:
    """Return the two ends (client, server) of a connection after starttls."""
    client, server = await tcp_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.starttls, server_tls)
        await client.starttls(client_tls)
    return client, server


@contextlib.asynccontextmanager
async def closing(*socks: Socket) -> AsyncIterator[None]:
    """Abort sockets at the end, whatever became of them."""
    try:
        yield
    finally:
        for sock in socks:
            sock.abort()


async def all_served(server: trisock.Server, accepted: int) -> None:
    """Wait until a server has accepted so many connections and has no more to do with any."""
    while server.stats().accepted < accepted or server.stats().active:
        await trio.lowlevel.checkpoint()


def raw_pair() -> tuple[Socket, socket.socket]:
    """Return a Socket and the plain, blocking socket at its other end, over TCP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        raw = socket.create_connection(listening.getsockname())
        accepted, _ = listening.accept()
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # what is sent is on its way
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(accepted))
    return Socket(stream, side="server"), raw


def unix_pair() -> tuple[Socket, Socket]:
    """Return the two ends of a Unix connection: what fills it is known exactly, unlike over TCP."""
    a, b = (trio.socket.from_stdlib_socket(each) for each in socket.socketpair())
    return Socket(trio.SocketStream(a)), Socket(trio.SocketStream(b), side="server")


async def pair(layer: str, client_tls: Any, server_tls: Any) -> tuple[Socket, Socket]:
    """Return the two ends of a TCP connection, after starttls if the layer is ``"tls"``."""
    return await (tls_pair(client_tls, server_tls) if layer == "tls" else tcp_pair())


async def small_pair(layer: str, client_tls: Any, server_tls: Any) -> tuple[Socket, Socket]:
    """Return a connected pair that holds little: what it takes before it is full is bounded."""
    a, b = unix_pair()
    if layer == "tls":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(client_tls)
    return a, b


async def clog(sock: Socket) -> None:
    """Fill a Unix connection until a send would have to wait (the peer must not be reading)."""
    while sock._connection.transport.writable_now():
        await sock.send(b"x" * 100)
    if not sock.istls():  # a plain send tries before it waits: leave it no room at all
        with contextlib.suppress(BlockingIOError):
            while True:
                os.write(sock.fileno(), b"x")


def raw_unix_pair() -> tuple[Socket, socket.socket]:
    ours, raw = socket.socketpair()
    return Socket(trio.SocketStream(trio.socket.from_stdlib_socket(ours))), raw


async def read_all(sock: Socket) -> bytes:
    return b"".join([chunk async for chunk in sock])
