"""Context managers for a server, its client and a broadcast; and the records in the log."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing
from helpers.serving import connect
from trisock import Socket


@contextlib.asynccontextmanager
async def serving(
    handler: Callable[[Socket], Awaitable[object]],
    at: int | trisock.Listener = 0,
    **options: Any,
) -> AsyncIterator[trisock.Server]:
    """Start a server. Stop it at the end, and wait for its handlers."""
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, at, handler, **options)
        yield server
        server.stop()


@contextlib.asynccontextmanager
async def connected(server: trisock.Server) -> AsyncIterator[Socket]:
    """Connect, and wait until the handler runs. Abort the client at the end."""
    async with closing(client := await connect(server)):
        while not server.connections:
            await trio.lowlevel.checkpoint()
        yield client


@contextlib.asynccontextmanager
async def broadcasting(
    server: trisock.Server, data: bytes, **options: Any
) -> AsyncIterator[list[int]]:
    """Run the block once a broadcast has started. Wait for the broadcast at the end.

    The list receives the number of connections that took all of the data.
    """
    delivered: list[int] = []

    async def broadcast() -> None:
        delivered.append(await server.broadcast(data, **options))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcast)
        await trio.testing.wait_all_tasks_blocked()
        yield delivered


def logged(log: pytest.LogCaptureFixture, level: int) -> list[logging.LogRecord]:
    """Return the records at this level and above."""
    return [each for each in log.records if each.levelno >= level]
