"""What the tests of ``trisock.hammerspoon`` share: a callback that can be waited for, peers."""

from __future__ import annotations

import contextlib
import math
import socket
import struct
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio
import trio.testing

import trisock
from helpers.pairs import closing
from trisock.hammerspoon import Socket, Sockets

LOCALHOST = "127.0.0.1"


class Calls:
    """A callback that keeps what it is called with, and can be waited for."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[tuple[object, ...]](math.inf)

    def __call__(self, *arguments: object) -> None:
        self._send.send_nowait(arguments)

    async def next(self) -> tuple[object, ...]:
        return await self._receive.receive()

    async def none(self) -> bool:
        """Whether there is no call, when everything has come to rest."""
        await trio.testing.wait_all_tasks_blocked(0.01)
        return not self._receive.statistics().current_buffer_used


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await trio.sleep(0.001)


def raw_client(server: Socket) -> socket.socket:
    """Return a blocking socket that is connected to a server, over TCP or a Unix path."""
    info = server.info()
    if info["unixSocketPath"]:
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(info["unixSocketPath"])
        return raw
    return socket.create_connection((LOCALHOST, info["localPort"]))


def vanish(raw: socket.socket, how: str) -> None:
    """Go away, by FIN or by RST (over a Unix path: by closing)."""
    if how == "RST" and raw.family != socket.AF_UNIX:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    raw.close()


@contextlib.asynccontextmanager
async def connected(
    hs: Sockets, path: str = "", fn: Any = None
) -> AsyncIterator[tuple[Socket, trisock.Socket]]:
    """Give an object that is connected, over TCP or a Unix path, and the other end."""
    listening = trisock.listen_unix(path) if path else trisock.listen(0, LOCALHOST)
    async with await listening as listener:
        ready = trio.Event()
        client = hs.new(fn)
        if path:
            client.connect(path, ready.set)
        else:
            client.connect(LOCALHOST, listener.port, ready.set)
        peer = await listener.accept()
        async with closing(peer):
            await ready.wait()
            yield client, peer
