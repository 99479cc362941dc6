"""Limits of hs.socket's objects: how long an operation takes, what a peer makes them hold."""

# ruff: noqa: N802 (tests are named after hs.socket's names)

from __future__ import annotations

import errno
import os

import pytest
import trio
import trio.testing

from helpers.hammerspoon import (
    MORE_THAN_FITS,
    Calls,
    clients_of,
    connected,
    errors_in,
    full_backlog,
    until,
)
from helpers.pairs import read_all
from trisock._server.listening import ListeningSockets
from trisock.hammerspoon import Sockets
from trisock.hammerspoon import callbacks as _callbacks
from trisock.hammerspoon import queues as _queued

# ---- setTimeout ----


async def test_setTimeout_returns_self(hs: Sockets) -> None:
    created = hs.new()
    assert created.setTimeout(2.5) is created
    assert created.info()["timeout"] == 2.5


async def test_setTimeout_a_read_that_takes_longer_disconnects(
    autojump_clock: trio.testing.MockClock,
    hs: Sockets,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.setTimeout(5).read("\n")
        assert await read_all(peer) == b""
        assert 5 <= trio.current_time() < 6
        assert client.info()["isDisconnected"]
        assert "a read took more than 5 s" in log.text
        assert not errors_in(log)
        assert await calls.none()


async def test_setTimeout_a_write_that_takes_longer_disconnects(
    autojump_clock: trio.testing.MockClock, hs: Sockets, path: str, calls: Calls
) -> None:
    async with connected(hs, path) as (client, _peer):
        client.setTimeout(5).write(MORE_THAN_FITS, calls)
        await trio.sleep(4.9)
        assert client.connected()
        await trio.sleep(0.2)
        assert client.info()["isDisconnected"]
        assert await calls.none()


async def test_setTimeout_a_connect_that_takes_longer_is_given_up(
    autojump_clock: trio.testing.MockClock,
    hs: Sockets,
    path: str,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    async with full_backlog(path):
        client = hs.new().setTimeout(5).connect(path, calls)
        assert client is not None
        await trio.sleep(4.9)
        assert not client.info()["isDisconnected"]
        await trio.sleep(0.2)
        assert client.info()["isDisconnected"]
        assert "the connect took more than 5 s" in log.text
        assert await calls.none()


async def test_setTimeout_a_handshake_that_takes_longer_disconnects(
    autojump_clock: trio.testing.MockClock, hs: Sockets
) -> None:
    async with connected(hs) as (client, peer):
        client.setTimeout(5).startTLS(False)
        client.write("secret")
        assert b"secret" not in await read_all(peer)
        assert 5 <= trio.current_time() < 6
        await trio.sleep(1)
        assert client.info()["isDisconnected"]


async def test_setTimeout_no_handshake_is_without_a_limit(
    autojump_clock: trio.testing.MockClock, hs: Sockets, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _queued._HANDSHAKE_TIMEOUT == 60
    monkeypatch.setattr(_queued, "_HANDSHAKE_TIMEOUT", 30)
    async with connected(hs) as (client, peer):
        client.startTLS(False)
        await read_all(peer)
        assert 30 <= trio.current_time() < 31


async def test_setTimeout_is_for_what_is_queued_from_then_on(
    autojump_clock: trio.testing.MockClock, hs: Sockets, calls: Calls
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.setTimeout(5).read("\n")
        client.setTimeout(-1)
        await read_all(peer)
        assert 5 <= trio.current_time() < 6
    async with connected(hs, fn=calls) as (client, peer):
        client.setTimeout(-1).read("\n")
        client.setTimeout(1)
        await trio.sleep(40)
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)


async def test_setTimeout_counts_from_the_operations_turn(
    autojump_clock: trio.testing.MockClock, hs: Sockets, calls: Calls
) -> None:
    async with connected(hs, fn=calls) as (client, peer):
        client.setTimeout(5).read("\n")
        client.read("\n")
        await trio.sleep(4)
        await peer.send(b"line\n")
        await read_all(peer)
        assert 9 <= trio.current_time() < 10
        assert await calls.next() == (b"line\n", -1)


async def test_setTimeout_negative_means_none(
    autojump_clock: trio.testing.MockClock, hs: Sockets, path: str, calls: Calls
) -> None:
    async with connected(hs, path, calls) as (client, peer):
        client.setTimeout(-1).read("\n")
        client.write(MORE_THAN_FITS, calls)
        await trio.sleep(50)
        assert client.connected()
        await peer.send(b"line\n")
        assert await calls.next() == (b"line\n", -1)
        await peer.recv_exactly(len(MORE_THAN_FITS))
        assert await calls.next() == (-1,)


# ---- bounds on peers ----


async def test_a_read_that_finds_no_delimiter_within_MAX_READ_disconnects(
    hs: Sockets,
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_queued, "MAX_READ", 100)
    server = hs.server(0, calls)
    async with clients_of(server, 2) as [endless, good]:
        server.read("\n")
        await endless.send(b"x" * 100)
        await until(lambda: server.connections() == 1)
        assert "no delimiter within 100 bytes" in log.text
        await good.send(b"x" * 99 + b"\n")
        assert await calls.next() == (b"x" * 99 + b"\n", -1)
    assert not errors_in(log)


async def test_only_a_client_that_never_reads_is_dropped_at_MAX_UNSENT(
    hs: Sockets,
    path: str,
    monkeypatch: pytest.MonkeyPatch,
    calls: Calls,
    log: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(_queued, "MAX_UNSENT", _callbacks.cost(MORE_THAN_FITS))
    server = hs.server(path)
    async with clients_of(server, 2) as [good, stuck]:
        for tag in (1, 2):
            server.write(MORE_THAN_FITS, tag, calls)
            await good.recv_exactly(len(MORE_THAN_FITS))
            await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.connections() == 2  # it may wait until there is more than the limit
        server.write("the last", 3, calls)
        assert await good.recv_exactly(8) == b"the last"
        await until(lambda: server.connections() == 1)
        assert [await calls.next() for _ in range(3)] == [(1,), (2,), (3,)]
        assert "bytes are already queued for it" in log.text
        assert b"the last" not in await read_all(stuck)
    assert not errors_in(log)


async def test_reads_waiting_for_a_client_are_MAX_READS_at_most(
    hs: Sockets, path: str, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(_queued, "MAX_READS", 3)
    server = hs.server(path, calls)
    async with clients_of(server, 1) as [client]:
        for tag in range(5):
            server.read("\n", tag)
        await client.send(b"a\nb\nc\nd\n")
        assert [await calls.next() for _ in range(3)] == [(b"a\n", 0), (b"b\n", 1), (b"c\n", 2)]
        server.read("\n", 5)
        assert await calls.next() == (b"d\n", 5)


async def test_a_client_object_writes_as_much_as_the_program_wants(
    hs: Sockets, path: str, monkeypatch: pytest.MonkeyPatch, calls: Calls
) -> None:
    monkeypatch.setattr(_queued, "MAX_UNSENT", 1)
    async with connected(hs, path) as (client, peer):
        client.write(MORE_THAN_FITS).write(MORE_THAN_FITS).write("the last", calls)
        await peer.recv_exactly(2 * len(MORE_THAN_FITS) + 8)
        await calls.next()


async def test_a_server_whose_accept_fails_is_logged_and_free_again(
    hs: Sockets, path: str, monkeypatch: pytest.MonkeyPatch, log: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise OSError(errno.EINVAL, "broken")

    monkeypatch.setattr(ListeningSockets, "accept_from", fail)
    for port_or_path, words in [(0, "the server on 0.0.0.0:"), (path, f"the server on {path}")]:
        server = hs.server(port_or_path)
        await until(lambda: server.info()["isDisconnected"])  # noqa: B023
        assert words in log.text
        assert server.listen(0) is server
        await until(lambda: server.info()["isDisconnected"])  # noqa: B023
    assert not os.path.exists(path)
