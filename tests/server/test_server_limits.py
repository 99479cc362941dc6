"""How many connections a server takes, and what is bounded."""

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
from helpers.pairs import all_served, closing
from helpers.serving import chat, connect, echo
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net.connection import Connection


async def test_max_connections_keeps_the_excess_in_the_backlog() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(b"in")
        await sock.recv()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, max_connections=2)
        clients = [await connect(server) for _ in range(3)]
        for client in clients[:2]:
            assert await client.recv() == b"in"
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 2
        assert await clients[2].peek() is None
        await clients[0].close()
        assert await clients[2].recv() == b"in"
        for client in clients[1:]:
            await client.close()
        # No slot was lost.
        for _ in range(5):
            pair = [await connect(server), await connect(server)]
            for client in pair:
                assert await client.recv() == b"in"
                client.abort()
        server.stop()


async def test_what_a_full_server_leaves_waiting_another_one_can_take() -> None:
    """As processes do that share a listening socket."""
    listening = socket.create_server(("127.0.0.1", 0))
    async with trisock.Listener([listening.dup()]) as other, trio.open_nursery() as nursery:
        listener = trisock.Listener([listening])
        server = await trisock.bind(nursery, listener, chat, max_connections=1)
        first = await connect(server)
        assert await first.recv() == b"hi\n"
        second = await connect(server)
        await trio.testing.wait_all_tasks_blocked()
        assert other.hasconnection()
        async with closing(first, second, await other.accept()):
            server.stop()


async def test_a_close_keeps_its_slot_beside_as_many_others() -> None:
    async def handler(sock: Socket) -> None:
        await trio.lowlevel.wait_readable(sock.fileno())
        await sock.send(b"bye")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, max_connections=1)
        first = await connect(server)
        await first.send(b"unread, so that the close has to linger")
        assert await first.recv() == b"bye"
        second, third = await connect(server), await connect(server)
        await second.send(b"unread, too")
        assert await second.recv() == b"bye"
        await third.send(b"unread, too")
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 2
        await first.close()
        assert await third.recv() == b"bye"
        second.abort()
        third.abort()
        server.stop()


async def test_a_slot_covers_the_handshake(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat, tls=server_tls, max_connections=1)
        silent, second = await connect(server), await connect(server)
        while not server.stats().active:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 1
        silent.abort()
        await second.starttls(client_tls)
        assert await second.recv() == b"hi\n"
        second.abort()
        server.stop()


async def test_the_close_of_a_failed_handshake_keeps_no_slot(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    active: list[int] = []

    async def handler(sock: Socket) -> None:
        active.append(server.stats().active)
        await sock.send(b"hi\n")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, tls=server_tls, max_connections=1)
        async with await connect(server) as plain, await connect(server) as second:
            await plain.send(b"GET / HTTP/1.1\r\n\r\n" + bytes(200_000))
            while not server.stats().failed_handshakes:
                await trio.lowlevel.checkpoint()
            await second.starttls(client_tls)
            assert await second.recv() == b"hi\n"
            assert active == [2]  # the first one is still closing: its peer says nothing
            plain.abort()
        server.stop()


@pytest.mark.parametrize("limit", [None, 100])
async def test_running_out_of_descriptors_never_kills_the_server(
    limit: int | None, log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, echo, host="127.0.0.1", max_connections=limit)
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
        with few_descriptors(5):
            while not any("EMFILE" in each.getMessage() for each in log.records):
                await trio.sleep(0.01)
            assert server.stats().accepted == 5
        while server.stats().accepted < 10:
            await trio.sleep(0.01)
        for client in clients:
            with trio.socket.from_stdlib_socket(client) as talking:
                await talking.send(b"hello")
                assert await talking.recv(5) == b"hello"
        server.stop()
    assert {each.name for each in log.records if each.levelno > logging.INFO} == {"trisock.server"}


async def test_a_full_backlog_does_not_keep_other_tasks_from_running() -> None:
    accepted = []

    async def handler(_: Socket) -> None:
        accepted.append(server.stats().accepted)

    async with trio.open_nursery() as nursery:
        listener = await trisock.listen(0, host="127.0.0.1")
        clients = [socket.create_connection(("127.0.0.1", listener.port)) for _ in range(200)]
        server = await trisock.bind(nursery, listener, handler)
        await all_served(server, 200)
        for client in clients:
            client.close()
        server.stop()
    assert min(accepted) <= 64 < max(accepted) == 200


async def test_connections_that_die_before_accept_kill_nobody() -> None:
    async with trio.open_nursery() as nursery:
        listener = await trisock.listen(0, host="127.0.0.1")
        for _ in range(3):
            reset_in_the_backlog(listener.port)
        server = await trisock.bind(nursery, listener, echo, max_connections=1)
        async with await connect(server) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
        assert server.stats().dropped == 3
        server.stop()


async def test_an_unexpected_error_of_accept_ends_the_server(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")

    def fail(_: socket.socket) -> None:
        raise OSError(errno.EIO, "unheard of")

    monkeypatch.setattr(listener._listening, "accept_from", fail)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="unheard of"), flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await trisock.bind(nursery, listener, echo)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS])
async def test_an_accept_that_fails_gives_its_slot_back(
    number: int, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    listening = listener._listening
    real, failures = listening.accept_from, [number] * 3

    def accept(sock: socket.socket) -> Connection | None:
        if failures:
            raise OSError(failures.pop(), "no")
        return real(sock)

    monkeypatch.setattr(listening, "accept_from", accept)
    autojump_clock.autojump_threshold = 0.05  # not while bytes are on their way

    async def hello(sock: Socket) -> None:
        await sock.send(b"hi")

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, listener, hello, max_connections=1)
        async with await connect(server) as client:
            assert await client.recv() == b"hi"
        assert not failures
        server.stop()


def test_what_is_bounded_by_default() -> None:
    def default(function: object, name: str) -> object:
        return inspect.signature(function).parameters[name].default  # type: ignore[arg-type]

    assert default(Socket.starttls, "handshake_timeout") == 60
    assert default(trisock.bind, "handshake_timeout") == 60
    assert default(trisock.Server.broadcast, "timeout") == 10
    assert default(Socket.recv_until, "max_bytes") == 65536
    assert default(Socket.lines, "max_bytes") == 65536
