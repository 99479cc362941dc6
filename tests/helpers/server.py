"""A running server and its client, each for the length of a block."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import trio

import trisock
from helpers.pairs import closing
from helpers.serving import connect
from trisock import Socket


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[Socket], Awaitable[object]], **options: Any
) -> AsyncIterator[trisock.Server]:
    """Start a server. Stop it at the end, and wait for its handlers."""
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, **options)
        yield server
        server.stop()


@contextlib.asynccontextmanager
async def connected(server: trisock.Server) -> AsyncIterator[Socket]:
    """Connect, and wait until the handler runs. Abort the client at the end."""
    async with closing(client := await connect(server)):
        while not server.connections:
            await trio.lowlevel.checkpoint()
        yield client
