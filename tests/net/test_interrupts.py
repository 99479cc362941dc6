"""Ctrl-C in a call that waits in its own nursery raises no exception group."""

from __future__ import annotations

import signal
import socket
from collections.abc import Awaitable, Callable

import pytest
import trio

import trisock
from trisock.testing import check_handler, socket_pair


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


async def check_a_silent_handler() -> None:
    async def handler(sock: trisock.Socket) -> None:
        await trio.sleep_forever()

    await check_handler(handler)


CALLS = [
    connect_to_a_full_backlog,
    accept_from_two_sockets,
    relay_silent_peers,
    check_a_silent_handler,
]


@pytest.mark.parametrize("call", CALLS)
def test_ctrl_c_is_raised_outside_a_group(call: Callable[[], Awaitable[None]]) -> None:
    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        trio.lowlevel.spawn_system_task(interrupt)  # no Ctrl-C is raised in a system task
        await call()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


def test_ctrl_c_before_a_cancellation_is_raised_outside_a_group() -> None:
    scope = trio.CancelScope()

    async def interrupt() -> None:
        await trio.testing.wait_all_tasks_blocked(0.01)
        signal.raise_signal(signal.SIGINT)
        for _ in range(2):  # Trio wakes the relay in the first scheduler pass
            await trio.lowlevel.checkpoint()
        scope.cancel()

    async def main() -> None:
        trio.lowlevel.spawn_system_task(interrupt)
        with scope:
            await relay_silent_peers()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main)


class InterruptAt(trio.abc.Instrument):
    """Press Ctrl-C after a given number of task steps."""

    def __init__(self, number: int) -> None:
        self._left = number

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self._left -= 1
        if self._left == 0:
            signal.raise_signal(signal.SIGINT)


def test_ctrl_c_at_each_step_is_raised_outside_a_group() -> None:
    async def make_pair() -> None:
        client, server = await socket_pair(tls=True)
        client.abort()
        server.abort()

    trio.run(make_pair)  # the first call makes the certificates
    for number in range(1, 21):
        with pytest.raises(KeyboardInterrupt):
            trio.run(make_pair, instruments=[InterruptAt(number)])
