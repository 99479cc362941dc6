"""Server.stop loses no client: those that wait are served, and later ones are not reset."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import NOBODY, child, run_in_child
from helpers.pairs import closing, read_all
from helpers.server import bound, connect, echo
from trisock import ClientTLS, Listener, ServerTLS, Socket
from trisock._server import draining

# SO_LOCK_FILTER: from then on, SO_ATTACH_FILTER fails with EPERM, even for root.
LOCK_FILTER = 44

# Linux sends a SYN again after one second.
RETRIED = 0.5


def lock_filter(listener: Listener) -> None:
    """Allow no filter on the sockets of a listener."""
    for sock in listener._listening.sockets:
        sock.setsockopt(socket.SOL_SOCKET, LOCK_FILTER, 1)


@pytest.fixture(params=["a filter drops SYNs", "the backlog is full"])
def prepare(request: pytest.FixtureRequest) -> Callable[[Listener], None]:
    """How the door of a TCP listener is closed."""
    if request.param == "the backlog is full":
        return lock_filter
    if os.geteuid() != 0:
        pytest.skip("the filter may need root")
    return lambda listener: None


@contextlib.asynccontextmanager
async def listening(kind: str, directory: Path) -> AsyncIterator[Listener]:
    if kind == "unix":
        listener = await trisock.listen_unix(directory / "socket")
    else:
        listener = await trisock.listen(0, host=kind)
    async with listener:
        yield listener


async def connect_to(listener: Listener | trisock.Server) -> Socket:
    host, port = listener.addresses[0]
    return await (trisock.connect(host, port) if port else trisock.connect_unix(host))


async def greet(sock: Socket) -> None:
    await sock.send(b"hello")


@pytest.mark.parametrize("kind", ["127.0.0.1", "::1", "unix"])
async def test_clients_in_the_backlog_are_served(
    kind: str, prepare: Callable[[Listener], None], tmp_path: Path
) -> None:
    async with listening(kind, tmp_path) as listener:
        prepare(listener)
        clients = [await connect_to(listener) for _ in range(20)]
        async with closing(*clients), bound(greet, listener) as server:
            server.stop()
            await server.wait_closed()
            assert [await read_all(client) for client in clients] == [b"hello"] * 20
        assert server.stats().accepted == 20


async def test_a_backlog_longer_than_the_slots_is_served(
    prepare: Callable[[Listener], None],
) -> None:
    running = most = 0

    async def handler(sock: Socket) -> None:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.testing.wait_all_tasks_blocked()
        await sock.send(b"hello")
        running -= 1

    listener = await trisock.listen(0)
    prepare(listener)
    hosts = ["127.0.0.1", "::1"] * 10
    clients = [await trisock.connect(host, listener.port) for host in hosts]
    async with closing(*clients), bound(handler, listener, max_connections=2) as server:
        server.stop()
        assert [await read_all(client) for client in clients] == [b"hello"] * 20
        await server.wait_closed()
    assert most == 2


async def test_the_end_of_the_grace_resets_the_backlog(
    prepare: Callable[[Listener], None],
) -> None:
    """Even if a handler goes on: it has shielded its cleanup."""
    may_end = trio.Event()

    async def handler(sock: Socket) -> None:
        with trio.CancelScope(shield=True):
            await may_end.wait()

    listener = await trisock.listen(0, host="127.0.0.1")
    prepare(listener)
    first, second = [await connect_to(listener) for _ in range(2)]
    async with closing(first, second), bound(handler, listener, max_connections=1) as server:
        while not server.connections:
            await trio.lowlevel.checkpoint()
        server.stop(grace=0.05)
        with pytest.raises(trio.BrokenResourceError):
            await second.recv()
        assert server.connections
        may_end.set()
        await server.wait_closed()
    assert server.stats().accepted == 1


async def test_without_a_grace_the_backlog_is_reset_at_once() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    client = await connect_to(listener)
    async with closing(client), bound(echo, listener) as server:
        server.stop(grace=0)
        with pytest.raises(trio.BrokenResourceError):
            await client.recv()


async def test_a_stop_with_a_client_accepted_in_advance() -> None:
    """``hasconnection`` accepts in advance. This client is served, or reset if no grace is left."""
    for grace, expected in [(30, b"hello"), (0, None)]:
        listener = await trisock.listen(0, host="127.0.0.1")
        client = await connect_to(listener)
        assert listener.hasconnection()
        async with closing(client), bound(greet, listener, max_connections=1) as server:
            server.stop(grace)
            if expected:
                assert await read_all(client) == expected
            else:
                with pytest.raises(trio.BrokenResourceError):
                    await client.recv()
            await server.wait_closed()
