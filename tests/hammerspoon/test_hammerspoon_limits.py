"""Timeouts, and limits on the memory that a peer can consume."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import errno
import os

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import trisock
from helpers.hammerspoon import (
    MORE_THAN_FITS,
    Calls,
    Log,
    check_disconnects,
    clients_of,
    errors_in,
    full_backlog,
    unix_client,
    unix_server,
    until,
)
from helpers.pairs import read_all
from trisock import _connect
from trisock._server.listening import ListeningSockets
from trisock.hammerspoon import Socket, Sockets, callbacks, queues

# ---- setTimeout ----


async def test_setTimeout_returns_self(hs: Sockets) -> None:
    created = hs.new()
    assert created.setTimeout(2.5) is created
    assert created.info()["timeout"] == 2.5


async def test_setTimeout_disconnects_if_a_read_takes_too_long(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket, calls: Calls, log: Log
) -> None:
    client.setTimeout(5).read("\n")
    assert await read_all(peer) == b""
    assert 5 <= trio.current_time() < 6
    assert client.info()["isDisconnected"]
    assert "a read took more than 5 s" in log.text
    assert not errors_in(log)
    assert await calls.none()


@unix_client
async def test_setTimeout_disconnects_if_a_write_takes_too_long(
    autojump_clock: MockClock, client: Socket, calls: Calls
) -> None:
    client.setTimeout(5).write(MORE_THAN_FITS, calls)
    await check_disconnects(client, after=4.9, before=5.1)
    assert client.info()["isDisconnected"]
    assert await calls.none()


async def test_setTimeout_aborts_a_connect_that_takes_too_long(
    autojump_clock: MockClock,
    hs: Sockets,
    path: str,
    calls: Calls,
    log: Log,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_connect, "_MIN_RETRY_INTERVAL", 1)
    monkeypatch.setattr(_connect, "_MAX_RETRY_INTERVAL", 1)
    async with full_backlog(path):
        client = hs.new().setTimeout(5).connect(path, calls)
        assert client is not None
        await trio.sleep(4.9)
        assert not client.info()["isDisconnected"]
        await trio.sleep(0.2)
        assert client.info()["isDisconnected"]
        assert "the connect took more than 5 s" in log.text
        assert await calls.none()


async def test_setTimeout_disconnects_if_a_handshake_takes_too_long(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket
) -> None:
    client.setTimeout(5).startTLS(False)
    client.write("secret")
    assert b"secret" not in await read_all(peer)
    assert 5 <= trio.current_time() < 6
    await trio.sleep(1)
    assert client.info()["isDisconnected"]


async def test_every_handshake_has_a_timeout(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert queues._HANDSHAKE_TIMEOUT == 60
    monkeypatch.setattr(queues, "_HANDSHAKE_TIMEOUT", 30)
    client.startTLS(False)
    await read_all(peer)
    assert 30 <= trio.current_time() < 31


async def test_setTimeout_keeps_the_timeout_of_queued_operations(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket
) -> None:
    client.setTimeout(5).read("\n")
    client.setTimeout(-1)
    await read_all(peer)
    assert 5 <= trio.current_time() < 6


async def test_setTimeout_adds_no_timeout_to_queued_operations(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.setTimeout(-1).read("\n")
    client.setTimeout(1)
    await trio.sleep(40)
    await peer.send(b"line\n")
    assert await calls.next() == (b"line\n", -1)


async def test_a_timeout_starts_when_its_operation_starts(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.setTimeout(5).read("\n")
    client.read("\n")
    await trio.sleep(4)
    await peer.send(b"line\n")
    await read_all(peer)
    assert 9 <= trio.current_time() < 10
    assert await calls.next() == (b"line\n", -1)


@unix_client
async def test_a_negative_timeout_means_no_timeout(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket, calls: Calls
) -> None:
    client.setTimeout(-1).read("\n")
    client.write(MORE_THAN_FITS, calls)
    await trio.sleep(50)
    assert client.connected()
    await peer.send(b"line\n")
    assert await calls.next() == (b"line\n", -1)
    await peer.recv_exactly(len(MORE_THAN_FITS))
    assert await calls.next() == (-1,)


# ---- limits for peers ----


async def test_no_delimiter_within_MAX_READ_bytes_disconnects_the_client(
    server: Socket, monkeypatch: pytest.MonkeyPatch, calls: Calls, log: Log
) -> None:
    monkeypatch.setattr(queues, "MAX_READ", 100)
    async with clients_of(server, 2) as [endless, good]:
        server.read("\n")
        await endless.send(b"x" * 100)
        await until(lambda: server.connections() == 1)
        assert "no delimiter within 100 bytes" in log.text
        await good.send(b"x" * 99 + b"\n")
        assert await calls.next() == (b"x" * 99 + b"\n", -1)
    assert not errors_in(log)


@unix_server
async def test_MAX_UNSENT_drops_only_clients_that_never_read(
    server: Socket, monkeypatch: pytest.MonkeyPatch, calls: Calls, log: Log
) -> None:
    monkeypatch.setattr(queues, "MAX_UNSENT", callbacks.cost(MORE_THAN_FITS))
    async with clients_of(server, 2) as [good, stuck]:
        for tag in (1, 2):
            server.write(MORE_THAN_FITS, tag, calls)
            await good.recv_exactly(len(MORE_THAN_FITS))
            await wait_all_tasks_blocked(0.01)
        # The second write may exceed the limit, because the first write alone does not.
        assert server.connections() == 2
        server.write("the last", 3, calls)
        assert await good.recv_exactly(8) == b"the last"
        await until(lambda: server.connections() == 1)
        assert await calls.take(3) == [(1,), (2,), (3,)]
        assert "the peer reads too slowly: " in log.text
        assert b"the last" not in await read_all(stuck)
    assert not errors_in(log)


@unix_server
async def test_at_most_MAX_READS_reads_are_queued_for_a_client(
    server: Socket, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(queues, "MAX_READS", 3)
    async with clients_of(server) as [client]:
        for tag in range(5):
            server.read("\n", tag)
        await client.send(b"a\nb\nc\nd\n")
        assert await calls.take(3) == [(b"a\n", 0), (b"b\n", 1), (b"c\n", 2)]
        server.read("\n", 5)
        assert await calls.next() == (b"d\n", 5)


@unix_client
async def test_MAX_UNSENT_does_not_limit_a_client_object(
    client: Socket, peer: trisock.Socket, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(queues, "MAX_UNSENT", 1)
    client.write(MORE_THAN_FITS).write(MORE_THAN_FITS).write("the last", calls)
    await peer.recv_exactly(2 * len(MORE_THAN_FITS) + 8)
    await calls.next()


async def test_a_server_can_listen_again_after_accept_fails(
    hs: Sockets, port_or_path: int | str, path: str, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EINVAL, "broken")

    monkeypatch.setattr(ListeningSockets, "accept_from", fail)
    server = hs.server(port_or_path)
    await until(lambda: server.info()["isDisconnected"])
    assert f"the server on {port_or_path or '0.0.0.0:'}" in log.text
    assert server.listen(0) is server
    await until(lambda: server.info()["isDisconnected"])
    assert not os.path.exists(path)
