"""Server.stop loses no client: waiting clients are served, and later clients are not reset."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import child
from helpers.pairs import closing, read_all
from helpers.server import bound, echo
from helpers.stopping import ConnectingAtEachStep, connect_to, greet, listening
from trisock import ClientTLS, Listener, ServerTLS, Socket


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
    """The backlog is reset even while a handler continues with a shielded cleanup."""
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


@pytest.mark.parametrize("shared", [False, True])
async def test_a_stop_with_a_client_accepted_in_advance(shared: bool) -> None:
    """A client that ``hasconnection`` accepted is served, or is reset if there is no grace."""
    for grace, expected in [(30, b"hello"), (0, None)]:
        listener = await trisock.listen(0, host="127.0.0.1")
        assert not shared or listener.sockets  # reading the property makes the sockets shared
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


# ---- later clients ----


async def test_late_clients_reach_the_next_server(prepare: Callable[[Listener], None]) -> None:
    may_end = trio.Event()
    answers: list[bytes] = []

    async def slow(sock: Socket) -> None:
        await may_end.wait()
        await sock.send(b"old")

    async def new(sock: Socket) -> None:
        await sock.send(b"new")

    async def ask(host: str) -> None:
        async with await trisock.connect(host, port) as client:
            answers.append(await read_all(client))

    listener = await trisock.listen(0)
    port = listener.port
    prepare(listener)
    hosts = ["127.0.0.1", "::1"]
    early = [await trisock.connect(host, port) for host in hosts * 2]
    async with closing(*early), trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, listener, slow, max_connections=1)
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        for host in hosts:
            nursery.start_soon(ask, host)
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert answers == []
        may_end.set()
        await server.wait_closed()
        assert [await read_all(client) for client in early] == [b"old"] * 4
        async with bound(new, port):
            while len(answers) < 2:
                await trio.sleep(0.01)
    assert answers == [b"new"] * 2


async def test_late_clients_of_a_unix_socket_are_refused(tmp_path: Path) -> None:
    may_end = trio.Event()

    async def slow(sock: Socket) -> None:
        await may_end.wait()
        await sock.send(b"hello")

    path = tmp_path / "socket"
    listener = await trisock.listen_unix(path)
    early = [await trisock.connect_unix(path) for _ in range(3)]
    async with closing(*early), bound(slow, listener, max_connections=1) as server:
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect_unix(path)
        may_end.set()
        await server.wait_closed()
        assert [await read_all(client) for client in early] == [b"hello"] * 3
    assert not path.exists()


@pytest.mark.parametrize("with_tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize("kind", ["127.0.0.1", "::1", "unix"])
async def test_clients_at_each_moment_of_a_stop_are_served(
    kind: str,
    with_tls: bool,
    prepare: Callable[[Listener], None],
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    tmp_path: Path,
) -> None:
    async with listening(kind, tmp_path) as listener:
        prepare(listener)
        host, port = listener.addresses[0]
        clients = ConnectingAtEachStep((host, port) if port else str(host))
        async with bound(greet, listener, tls=server_tls if with_tls else None) as server:
            trio.lowlevel.add_instrument(clients)
            for _ in range(3):
                await trio.lowlevel.checkpoint()
            server.stop()
            for _ in range(30):
                await trio.lowlevel.checkpoint()
            trio.lowlevel.remove_instrument(clients)
            assert len(clients.connected) >= 3
            for raw in clients.connected:
                sock = Socket(trio.SocketStream(trio.socket.from_stdlib_socket(raw)))
                async with closing(sock):
                    if with_tls:
                        await sock.starttls(client_tls)
                    assert await read_all(sock) == b"hello"
            await server.wait_closed()
        for raw in clients.others:
            raw.close()
        assert server.stats().accepted == len(clients.connected)


async def test_no_client_is_refused_during_the_delay(
    prepare: Callable[[Listener], None], jumping_clock: trio.testing.MockClock
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    prepare(listener)
    async with bound(greet, listener) as server:
        server.stop(delay=10)
        clients = ConnectingAtEachStep(server.addresses[0])
        trio.lowlevel.add_instrument(clients)
        while not server.closing.is_set():
            assert not clients.others
            await trio.sleep(1)
        await server.wait_closed()
        trio.lowlevel.remove_instrument(clients)
        for raw in clients.connected:
            with raw:
                raw.setblocking(True)
                assert raw.recv(10) == b"hello"
        for raw in clients.others:
            raw.close()
    assert server.stats().accepted == len(clients.connected) > 10


# ---- shared listening sockets ----


async def share_adopted(directory: Path) -> tuple[Listener, socket.socket]:
    raw = socket.create_server(("127.0.0.1", 0))
    other = raw.dup()
    return Listener([raw]), other


async def share_sockets(directory: Path) -> tuple[Listener, socket.socket]:
    listener = await trisock.listen(0, host="127.0.0.1")
    return listener, listener.sockets[0].dup()


async def share_unix(directory: Path) -> tuple[Listener, socket.socket]:
    listener = await trisock.listen_unix(directory / "socket")
    return listener, listener.sockets[0].dup()


@pytest.mark.parametrize("share", [share_adopted, share_sockets, share_unix])
async def test_other_holders_of_a_shared_socket_get_its_clients(
    share: Callable[[Path], Awaitable[tuple[Listener, socket.socket]]], tmp_path: Path
) -> None:
    listener, other = await share(tmp_path)
    async with closing(early := await connect_to(listener)):
        async with bound(greet, listener) as server:
            server.stop()
            await server.wait_closed()
        assert server.stats().accepted == 0
        clients = [early]
        if server.port:  # a Unix socket has no port, and its path is removed
            clients.append(await connect_to(server))
        async with bound(echo, Listener([other])), closing(*clients):
            for client in clients:
                await client.send(b"hello")
                assert await client.recv() == b"hello"


async def test_a_forked_child_gets_the_clients_of_its_socket() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    reading, writing = os.pipe()

    def serve_two() -> None:
        (raw,) = listener._listening.sockets
        os.read(reading, 1)
        for _ in range(2):
            select.select([raw], [], [])
            raw.accept()[0].sendall(b"child")

    with child(serve_two):
        async with closing(early := await connect_to(listener)):
            async with bound(greet, listener) as server:
                server.stop()
                await server.wait_closed()
                assert server.stats().accepted == 0
            async with closing(late := await connect_to(server)):
                os.write(writing, b"x")
                assert await early.recv() == await late.recv() == b"child"
    os.close(reading)
    os.close(writing)


async def test_a_fork_before_listen_shares_nothing() -> None:
    with child(lambda: select.select([], [], [])):
        listener = await trisock.listen(0, host="127.0.0.1")
        async with closing(client := await connect_to(listener)), bound(greet, listener) as server:
            server.stop()
            assert await read_all(client) == b"hello"
