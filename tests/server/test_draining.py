"""A stopping server serves clients that are still connecting, and no clients that come later."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import NOBODY, run_in_child
from helpers.pairs import closing, read_all
from helpers.server import bound, echo
from helpers.stopping import (
    DROP_ACK,
    connect_to,
    greet,
    hold_handshakes,
    lock_filter,
    needs_filter,
)
from trisock import Listener, Socket
from trisock._server import draining, half_open

SO_DETACH_FILTER = 27


@needs_filter
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("filtered", [True, False], ids=["filter", "full backlog"])
async def test_clients_in_the_tcp_handshake_are_served(
    host: str, filtered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = await trisock.listen(0, host=host)
    hold_handshakes(listener)
    (sock,) = listener._listening.sockets
    async with bound(echo, listener) as server, await connect_to(server) as client:
        if not filtered:
            monkeypatch.setattr(draining, "_SO_ATTACH_FILTER", 9999)  # ENOPROTOOPT
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 0
        if not filtered:
            sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        await client.send(b"hello")
        assert await client.recv() == b"hello"
        await client.close()
        await server.wait_closed()
    assert server.stats().accepted == 1


def deny_netlink(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forbid netlink sockets, as systemd's RestrictAddressFamilies does."""
    monkeypatch.setattr(half_open, "_NETLINK_SOCK_DIAG", 31)  # EPROTONOSUPPORT


def deny_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    """Refuse the query, as a kernel without sock_diag for TCP does."""
    monkeypatch.setattr(half_open, "_SOCK_DIAG_BY_FAMILY", 2000)  # NLMSG_ERROR: EINVAL


def deny_proc(monkeypatch: pytest.MonkeyPatch) -> None:
    deny_netlink(monkeypatch)
    monkeypatch.setattr(half_open, "Path", lambda path: Path("/missing"))


@needs_filter
@pytest.mark.parametrize("deny", [None, deny_netlink, deny_dump, deny_proc])
async def test_a_stop_waits_one_second_for_half_open_clients(
    deny: Callable[[pytest.MonkeyPatch], None] | None,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: trio.testing.MockClock,
) -> None:
    """The stop also waits if the system does not report whether there are half-open clients."""
    if deny is not None:
        deny(monkeypatch)
    listener = await trisock.listen(0, host="127.0.0.1")
    async with bound(echo, listener) as server:
        if deny is not deny_proc:
            hold_handshakes(listener)
            raw = socket.create_connection(("127.0.0.1", server.port))
            # Keep dropping the client's ACK, so that the handshake stays incomplete.
            monkeypatch.setattr(draining, "_DROP_SYN", DROP_ACK)
        else:
            raw = socket.socket()
        with raw:
            await trio.testing.wait_all_tasks_blocked()
            server.stop()
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(0.99)
            await trio.testing.wait_all_tasks_blocked(0.01)
            assert server._listening.sockets[0].fileno() >= 0
            mock_clock.jump(0.02)
            await server.wait_closed()


@needs_filter
async def test_the_wait_for_half_open_clients_is_within_the_grace() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    hold_handshakes(listener)
    async with bound(echo, listener) as server, await connect_to(server):
        begin = trio.current_time()
        server.stop(grace=0.1)
        await server.wait_closed()
        assert trio.current_time() - begin < 0.9


@pytest.mark.parametrize("deny", [None, deny_netlink, deny_dump])
async def test_a_stop_without_clients_takes_no_time(
    prepare: Callable[[Listener], None],
    deny: Callable[[pytest.MonkeyPatch], None] | None,
    monkeypatch: pytest.MonkeyPatch,
    mock_clock: trio.testing.MockClock,
) -> None:
    if deny is not None:
        deny(monkeypatch)
    listener = await trisock.listen(0)
    prepare(listener)
    async with bound(echo, listener) as server:
        await trio.testing.wait_all_tasks_blocked()
        server.stop()
        await server.wait_closed()  # the clock stands still, so a timed wait would never end
    assert trio.current_time() == 0


async def test_without_a_filter_a_flood_delays_a_stop_only_briefly(
    mock_clock: trio.testing.MockClock,
) -> None:
    class Flood(trio.abc.Instrument):
        def before_task_step(self, task: trio.lowlevel.Task) -> None:
            raw = socket.socket()
            raw.setblocking(False)
            raw.connect_ex(("127.0.0.1", server.port))
            clients.append(raw)
            if len(clients) == 100:
                mock_clock.jump(1)

    clients: list[socket.socket] = []
    listener = await trisock.listen(0, host="127.0.0.1")
    lock_filter(listener)
    flood = Flood()
    async with bound(greet, listener) as server:
        trio.lowlevel.add_instrument(flood)
        server.stop()
        await server.wait_closed()
        trio.lowlevel.remove_instrument(flood)
    assert 100 <= len(clients) < 1000
    for raw in clients:
        with raw, contextlib.suppress(BlockingIOError, ConnectionRefusedError, OSError):
            connected = raw.getpeername()
            assert connected
            assert raw.recv(10) == b"hello"


async def test_a_handshake_that_ends_between_two_checks_is_served(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clients: list[socket.socket] = []

    def finish_handshake(sock: socket.socket) -> bool:
        if not clients:
            clients.append(socket.create_connection(sock.getsockname()))
        return False

    monkeypatch.setattr(draining, "may_be_half_open", finish_handshake)
    listener = await trisock.listen(0, host="127.0.0.1")
    lock_filter(listener)
    async with bound(greet, listener) as server:
        server.stop()
        await server.wait_closed()
    with clients[0] as client:
        assert client.recv(10) == b"hello"


async def test_a_drain_ends_when_its_socket_is_closed() -> None:
    accepts = 0

    async def accept_one() -> bool:
        nonlocal accepts
        accepts += 1
        sock.close()
        return True

    with socket.create_server(("127.0.0.1", 0)) as sock:
        with socket.create_connection(sock.getsockname()):
            await draining.drain(sock, accept_one)
    assert accepts == 1


# ---- as an ordinary user ----


async def stop_with_clients(kind: str) -> None:
    """Stop a server with more clients in its backlog than slots, while other clients connect."""
    if kind == "unix":
        listener = await trisock.listen_unix(f"\0trisock-{os.getpid()}")
    else:
        listener = await trisock.listen(0, host=kind)
    clients = [await connect_to(listener) for _ in range(20)]
    may_end = trio.Event()

    async def handler(sock: Socket) -> None:
        await may_end.wait()
        await sock.send(b"hello")

    async with closing(*clients), bound(handler, listener, max_connections=2) as server:
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        with trio.move_on_after(0.05) as waited:
            with pytest.raises(ConnectionRefusedError):
                await connect_to(server)
        assert waited.cancelled_caught == (kind != "unix")
        may_end.set()
        assert [await read_all(client) for client in clients] == [b"hello"] * 20
        await server.wait_closed()
    assert server.stats().accepted == 20
    with pytest.raises(ConnectionRefusedError):
        await connect_to(server)


@pytest.mark.parametrize("kind", ["127.0.0.1", "::1", "unix"])
@pytest.mark.parametrize("user", [0, NOBODY], ids=["root", "nobody"])
def test_a_stop_under_any_user_loses_no_client(kind: str, user: int) -> None:
    if os.geteuid() == 0:
        run_in_child(lambda: trio.run(stop_with_clients, kind), user=user)
    else:
        trio.run(stop_with_clients, kind)


# ---- exhausted resources ----


async def test_without_descriptors_the_backlog_is_served_later(
    prepare: Callable[[Listener], None],
    monkeypatch: pytest.MonkeyPatch,
    jumping_clock: trio.testing.MockClock,
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    prepare(listener)
    clients = [await connect_to(listener) for _ in range(3)]
    accept = listener._listening.accept_from
    tries = 0

    def accept_later(sock: socket.socket) -> object:
        nonlocal tries
        tries += 1
        if tries <= 12:  # for longer than the drain waits for half-open clients
            raise OSError(errno.EMFILE, "too many open files")
        return accept(sock)

    monkeypatch.setattr(listener._listening, "accept_from", accept_later)
    async with closing(*clients), bound(greet, listener) as server:
        server.stop()
        assert [await read_all(client) for client in clients] == [b"hello"] * 3
        await server.wait_closed()
    assert tries >= 15


async def test_a_drained_socket_does_not_wait_for_another_socket() -> None:
    """While the socket is open, a client could connect, and no server would accept it."""
    may_end = trio.Event()

    async def handler(sock: Socket) -> None:
        await may_end.wait()

    listener = await trisock.listen(0)
    lock_filter(listener)
    clients = [await trisock.connect("::1", listener.port) for _ in range(2)]
    async with closing(*clients), bound(handler, listener, max_connections=1) as server:
        server.stop()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", server.port)
        may_end.set()
        await server.wait_closed()
    assert server.stats().accepted == 2


async def test_a_stop_without_grace_ends_a_drain(
    prepare: Callable[[Listener], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stop comes at each step of the drain."""
    monkeypatch.setattr(draining, "may_be_half_open", lambda sock: sock.getsockname())
    for steps in range(8):
        listener = await trisock.listen(0, host="127.0.0.1")
        prepare(listener)
        client = await connect_to(listener)
        async with closing(client), bound(echo, listener) as server:
            server.stop()
            for _ in range(steps):
                await trio.lowlevel.checkpoint()
            server.stop(grace=0)
            with trio.fail_after(1):
                await server.wait_closed()


# ---- reuse_port ----


async def test_a_stop_on_a_reused_port_serves_its_own_clients(
    prepare: Callable[[Listener], None],
) -> None:
    """The kernel has distributed the clients: those in the first server's backlog stay there."""
    listeners = [await trisock.listen(0, host="127.0.0.1", reuse_port=True)]
    port = listeners[0].port
    listeners.append(await trisock.listen(port, host="127.0.0.1", reuse_port=True))
    prepare(listeners[0])
    clients = [await connect_to(listeners[0]) for _ in range(30)]
    async with (
        closing(*clients),
        bound(greet, listeners[0]) as first,
        bound(greet, listeners[1]) as second,
    ):
        first.stop()
        assert [await read_all(client) for client in clients] == [b"hello"] * 30
        await first.wait_closed()
        late = [await connect_to(second) for _ in range(10)]
        async with closing(*late):
            assert [await read_all(client) for client in late] == [b"hello"] * 10
    assert 0 < first.stats().accepted < 30
    assert first.stats().accepted + second.stats().accepted == 40
