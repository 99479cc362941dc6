"""The limits of a server: connections, descriptors, and default timeouts and sizes."""

from __future__ import annotations

import errno
import inspect
import logging
import socket

import pytest
import trio
import trio.testing

import trisock
from helpers.failures import few_descriptors, reset_in_the_backlog
from helpers.pairs import all_served
from helpers.server import bound, chat, connect, echo, logged
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net.connection import Connection
from trisock._server.draining import _backlog
from trisock.testing import serving


async def test_connections_over_max_connections_stay_in_the_backlog() -> None:
    async with serving(chat, max_connections=2) as s:
        clients = [await s.connect() for _ in range(3)]
        for client in clients[:2]:
            assert await client.recv() == b"hi\n"
        await trio.testing.wait_all_tasks_blocked()
        assert s.server.stats().accepted == 2
        assert await clients[2].peek() is None
        await clients[0].close()
        assert await clients[2].recv() == b"hi\n"
        for client in clients[1:]:
            await client.close()
        # No slot was lost: two clients at a time are served.
        for _ in range(5):
            pair = [await s.connect(), await s.connect()]
            for client in pair:
                assert await client.recv() == b"hi\n"
                client.abort()


async def test_a_full_server_leaves_connections_to_other_processes() -> None:
    """Two listeners share a listening socket here, as two processes can."""
    listening = socket.create_server(("127.0.0.1", 0))
    async with (
        trisock.Listener([listening.dup()]) as other,
        serving(chat, port_or_listener=trisock.Listener([listening]), max_connections=1) as s,
    ):
        first = await s.connect()
        assert await first.recv() == b"hi\n"
        await s.connect()
        await trio.testing.wait_all_tasks_blocked()
        assert other.hasconnection()
        (await other.accept()).abort()


async def test_the_number_of_closing_connections_without_a_slot_is_bounded() -> None:
    """At most ``max_connections`` connections may be closing without a slot at the same time.

    All other closing connections keep their slots.
    """

    async def handler(sock: Socket) -> None:
        await trio.lowlevel.wait_readable(sock.fileno())
        await sock.send(b"bye")

    async with serving(handler, max_connections=1) as s:
        first = await s.connect()
        await first.send(b"unread: the close has to linger")
        assert await first.recv() == b"bye"
        second, third = await s.connect(), await s.connect()
        await second.send(b"unread")
        assert await second.recv() == b"bye"
        await third.send(b"unread")
        await trio.testing.wait_all_tasks_blocked()
        assert s.server.stats().accepted == 2
        await first.close()
        assert await third.recv() == b"bye"


async def test_a_handshake_occupies_a_connection_slot(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with serving(chat, tls=server_tls, max_connections=1) as s:
        silent, second = await s.connect(tls=None), await s.connect(tls=None)
        while not s.server.stats().active:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert s.server.stats().accepted == 1
        silent.abort()
        await second.starttls(client_tls)
        assert await second.recv() == b"hi\n"


async def test_a_failed_handshake_frees_its_slot_before_the_connection_closes(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    active: list[int] = []

    async def handler(sock: Socket) -> None:
        active.append(s.server.stats().active)
        await sock.send(b"hi\n")

    async with serving(handler, tls=server_tls, max_connections=1) as s:
        async with await s.connect(tls=None) as plain, await s.connect(tls=None) as second:
            await plain.send(b"GET / HTTP/1.1\r\n\r\n" + bytes(200_000))
            while not s.server.stats().failed_handshakes:
                await trio.lowlevel.checkpoint()
            await second.starttls(client_tls)
            assert await second.recv() == b"hi\n"
            assert active == [2]  # the server still waits for the close of ``plain``
            plain.abort()


@pytest.mark.parametrize("limit", [None, 100])
async def test_a_server_survives_running_out_of_descriptors(
    limit: int | None, log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with bound(echo, host="127.0.0.1", max_connections=limit) as server:
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
        with few_descriptors(5):
            while not any("EMFILE" in each.getMessage() for each in log.records):
                await trio.sleep(0.01)
            assert server.stats().accepted == 5
        begin = trio.current_time()
        while server.stats().accepted < 10:
            await trio.sleep(0.01)
        assert (
            trio.current_time() - begin < 0.15
        )  # the retry interval is that of trio.serve_listeners
        for client in clients:
            with trio.socket.from_stdlib_socket(client) as talking:
                await talking.send(b"hello")
                assert await talking.recv(5) == b"hello"
    assert {each.name for each in logged(log, logging.WARNING)} == {"trisock.server"}


async def test_a_full_backlog_does_not_starve_other_tasks() -> None:
    waiting = []

    async def handler(_: Socket) -> None:
        waiting.append(_backlog(listener._listening.sockets[0]))

    listener = await trisock.listen(0, host="127.0.0.1")
    clients = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(200)]
    async with serving(handler, port_or_listener=listener) as s:
        await all_served(s.server, 200)
        for client in clients:
            client.close()
    assert waiting[0] == 200 - 64  # the first handlers run before the other clients are accepted


async def test_a_server_survives_connections_that_die_before_accept() -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    for _ in range(3):
        reset_in_the_backlog(listener.port)
    async with serving(echo, port_or_listener=listener, max_connections=1) as s:
        async with await s.connect() as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
        assert s.server.stats().dropped == 3


async def test_an_unexpected_error_of_accept_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")

    def fail(_: socket.socket) -> None:
        raise OSError(errno.EIO, "unexpected")

    monkeypatch.setattr(listener._listening, "accept_from", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="unexpected"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await trisock.bind(nursery, listener, echo)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_a_failed_accept_frees_its_connection_slot(
    number: int, monkeypatch: pytest.MonkeyPatch, jumping_clock: trio.testing.MockClock
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    listening = listener._listening
    real, failures = listening.accept_from, [number] * 3

    def accept(sock: socket.socket) -> Connection | None:
        if failures:
            raise OSError(failures.pop(), "no")
        return real(sock)

    monkeypatch.setattr(listening, "accept_from", accept)
    async with (
        bound(chat, listener, max_connections=1) as server,
        await connect(server) as client,
    ):
        assert await client.recv() == b"hi\n"
        assert not failures


def test_default_timeouts_and_size_limits_are_finite() -> None:
    def default(function: object, name: str) -> object:
        return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]

    assert default(Socket.starttls, "handshake_timeout") == 60
    assert default(trisock.bind, "handshake_timeout") == 60
    assert default(trisock.Server.broadcast, "timeout") == 10
    for stop in (trisock.Server.stop, trisock.run, trisock.open_service):
        assert (default(stop, "grace"), default(stop, "delay")) == (30, 0)
    assert default(Socket.recv_until, "max_bytes") == 65536
    assert default(Socket.lines, "max_bytes") == 65536
