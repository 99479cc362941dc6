"""Helpers for the tests of ``trisock.hammerspoon``: a callback that records calls, and peers."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import socket
import sys
import tracemalloc
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import RESET, closing
from trisock.hammerspoon import Socket, Sockets

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

Log = pytest.LogCaptureFixture

LOCALHOST = "127.0.0.1"
MORE_THAN_FITS = b"x" * 4_000_000  # more than fits in the buffers of a Unix connection

unix_server = pytest.mark.parametrize("port_or_path", ["Unix"], indirect=True)
unix_client = pytest.mark.parametrize("pair", ["Unix"], indirect=True)
tcp_and_unix_client = pytest.mark.parametrize("pair", ["TCP", "Unix"], indirect=True)

# The result of info() on an object that is not connected.
UNCONNECTED: dict[str, object] = {
    "connectedAddress": b"",
    "connectedHost": "",
    "connectedPort": 0,
    "connectedURL": "",
    "connections": 0,
    "isConnected": False,
    "isDisconnected": True,
    "isIPv4": False,
    "isIPv4Enabled": True,
    "isIPv4PreferredOverIPv6": False,
    "isIPv6": False,
    "isIPv6Enabled": True,
    "isSecure": False,
    "localAddress": b"",
    "localHost": "",
    "localPort": 0,
    "timeout": -1,
    "unixSocketPath": "",
    "userData": "",
}


class Calls:
    """A callback that records its calls."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[object, ...]](math.inf)

    def __call__(self, *arguments: object) -> None:
        self._send.send_nowait(arguments)

    async def next(self) -> tuple[object, ...]:
        """Wait for the next call, and return its arguments."""
        return await self._receive.receive()

    async def take(self, number: int) -> list[tuple[object, ...]]:
        """Wait for the next calls, and return the arguments of each."""
        return [await self.next() for _ in range(number)]

    async def none(self) -> bool:
        """Wait until all tasks are blocked. Return whether there are no more calls."""
        await trio.testing.wait_all_tasks_blocked(0.01)
        return not self._receive.statistics().current_buffer_used


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.sleep(0.001)


async def check_disconnects(sock: Socket, *, after: float, before: float) -> None:
    """Check that a connection ends between ``after`` and ``before`` seconds from now."""
    await trio.sleep(after)
    assert sock.connected()
    await trio.sleep(before - after)
    assert not sock.connected()


def raw_client(server: Socket) -> socket.socket:
    """Return a blocking socket that is connected to a server."""
    info = server.info()
    if info["unixSocketPath"]:
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(info["unixSocketPath"])
        return raw
    return socket.create_connection((LOCALHOST, info["localPort"]))


def connect_to(server: Socket, client: Socket, fn: Callable[[], object] | None = None) -> Socket:
    """Connect an object to a server; return the object."""
    info = server.info()
    if info["unixSocketPath"]:
        connecting = client.connect(info["unixSocketPath"], fn)
    else:
        connecting = client.connect(LOCALHOST, info["localPort"], fn)
    assert connecting is client
    return client


def close_by(how: str, raw: socket.socket) -> None:
    """Close a TCP connection with a FIN or RST, or close a Unix socket (which has neither)."""
    if how == "RST" and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    raw.close()


@contextlib.asynccontextmanager
async def connected(
    hs: Sockets, path: str = "", fn: Any = None, host: str = LOCALHOST
) -> AsyncIterator[tuple[Socket, trisock.Socket]]:
    """Yield a connected object and its peer. They use the Unix path if it is given, else TCP."""
    listening = trisock.listen_unix(path) if path else trisock.listen(0, host=host)
    async with await listening as listener:
        ready = trio.Event()
        client = hs.new(fn)
        if path:
            client.connect(path, ready.set)
        else:
            client.connect(host, listener.port, ready.set)
        peer = await listener.accept()
        async with closing(peer):
            await ready.wait()
            yield client, peer


@contextlib.asynccontextmanager
async def clients_of(server: Socket, number: int = 1) -> AsyncIterator[list[trisock.Socket]]:
    """Connect to a server. Yield the connections once the server has accepted all of them."""
    async with contextlib.AsyncExitStack() as stack:
        peers = []
        for _ in range(number):
            path = server.info()["unixSocketPath"]
            if path:
                peer = await trisock.connect_unix(path)
            else:
                peer = await trisock.connect(LOCALHOST, server.info()["localPort"])
            await stack.enter_async_context(closing(peer))
            peers.append(peer)
        await until(lambda: server.connections() == number)
        yield peers


@contextlib.asynccontextmanager
async def full_backlog(path: str) -> AsyncIterator[None]:
    """Listen on a Unix path with a full backlog, so that new connections must wait."""
    async with await trisock.listen_unix(path, backlog=1):
        with contextlib.ExitStack() as stack, contextlib.suppress(BlockingIOError):
            while True:
                waiting = stack.enter_context(socket.socket(socket.AF_UNIX))
                waiting.setblocking(False)
                try:
                    waiting.connect(path)
                except BlockingIOError:
                    break
            yield


def errors_in(log: pytest.LogCaptureFixture) -> list[str]:
    """Return the messages logged as errors. Each message reports a mistake in the program."""
    return [each.getMessage() for each in log.records if each.levelno >= logging.ERROR]


@contextlib.contextmanager
def measured() -> Iterator[list[int]]:
    """Yield a list. On exit, add the peak growth of traced memory (in bytes) to the list."""
    grown: list[int] = []
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        yield grown
        grown.append(tracemalloc.get_traced_memory()[1] - before)
    finally:
        tracemalloc.stop()


# ---- callbacks that fail ----


def fail(*_: object) -> None:
    raise ZeroDivisionError("plain")


async def fail_later(*_: object) -> None:
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError("async")


async def fail_in_a_group(*_: object) -> None:
    raise ExceptionGroup("group", [ZeroDivisionError("in a group")])
