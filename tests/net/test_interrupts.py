"""Ctrl-C in a call that waits in a nursery of its own."""

from __future__ import annotations

import signal
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio

import trisock
from trisock.testing import socket_pair


async def connect_to_a_full_backlog() -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            await trisock.connect("127.0.0.1", port)


async def accept_from_two_sockets() -> None:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    async with trisock.Listener(sockets) as listener:
        await listener.accept()


async def relay_silent_peers() -> None:
    (client, a), (b, server) = await socket_pair(), await socket_pair()
    try:
        await trisock.relay(a, b)
    finally:
        client.abort()
        server.abort()


CALLS = [connect_to_a_full_backlog, accept_from_two_sockets, relay_silent_peers]


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_is_no_group(call: Callable[[], Awaitable[None]]) -> None:
    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        trio.lowlevel.spawn_system_task(interrupt)  # no Ctrl-C is raised in a system task
        await call()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


def test_ctrl_c_in_a_call_that_is_then_cancelled_is_no_group() -> None:
    scope = trio.CancelScope()

    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):  # in the first pass of the scheduler, Trio wakes the relay
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def main() -> None:
        trio.lowlevel.spawn_system_task(interrupt)
        with scope:
            await relay_silent_peers()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)
