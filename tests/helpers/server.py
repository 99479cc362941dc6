"""Handlers, clients, broadcasts, servers whose handlers may fail, and a filter for log records."""

from __future__ import annotations

import contextlib
import logging
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing
from trisock import Socket
from trisock._net.connection import Connection


async def echo(sock: Socket) -> None:
    async for chunk in sock:
        await sock.send(chunk)


async def chat(sock: Socket) -> None:
    await sock.send(b"hi\n")
    await sock.recv()


async def connect(server: trisock.Server, **options: Any) -> Socket:
    return await trisock.connect("127.0.0.1", server.port, **options)


@contextlib.asynccontextmanager
async def bound(
    handler: Callable[[Socket], Awaitable[object]],
    at: int | trisock.Listener = 0,
    **options: Any,
) -> AsyncIterator[trisock.Server]:
    """Start a server whose handlers may fail. When the block ends, wait for its handlers.

    Where a handler must not fail, use ``trisock.testing.serving``.
    """
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, at, handler, **options)
        yield server
        server.stop()


def limit_of_the_backlog(sock: socket.socket) -> int:
    """Return a listening socket's limit of the backlog: tcpi_sacked in struct tcp_info."""
    info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 32)
    return int.from_bytes(info[28:], sys.byteorder)


def opening(server: trisock.Server) -> list[Connection]:
    """Return the connections that wait for a PROXY header or are in the TLS handshake."""
    by_timeout = server._opening.deadlines._by_timeout
    return [connection for each in by_timeout.values() for connection in each]


async def until_refused(port: int) -> None:
    """Connect again and again, until the port refuses connections."""
    while True:
        try:
            sock = await trisock.connect("127.0.0.1", port)
        except ConnectionRefusedError:
            return
        await sock.close()


@contextlib.asynccontextmanager
async def connected(server: trisock.Server) -> AsyncIterator[Socket]:
    """Connect to a server, and wait until its handler runs. Abort the client at the end."""
    async with closing(client := await connect(server)):
        while not server.connections:
            await trio.lowlevel.checkpoint()
        yield client


@contextlib.asynccontextmanager
async def broadcasting(
    server: trisock.Server, data: bytes, **options: Any
) -> AsyncIterator[list[int]]:
    """Start a broadcast and run the block. When the block ends, wait for the broadcast.

    After the block, the yielded list contains the number of connections that accepted all data.
    """
    delivered: list[int] = []

    async def broadcast() -> None:
        delivered.append(await server.broadcast(data, **options))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcast)
        await trio.testing.wait_all_tasks_blocked()
        yield delivered


def logged(log: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    """Return the log records at this level and above."""
    return [each for each in log.records if each.levelno >= level]
