"""Peers of hs.socket's objects that go away, and what becomes of the connections."""

from __future__ import annotations

import contextlib
import errno
import logging
import select
import socket
import sys
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.hammerspoon_kit import LOCALHOST, Calls, connected, raw_client, until, vanish
from helpers.pairs import closing
from trisock import ClientTLS, ServerTLS, hammerspoon
from trisock.hammerspoon import Socket, Sockets
from trisock.hammerspoon import queues as _queued

MORE_THAN_FITS = b"x" * 4_000_000


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def clock() -> trio.testing.MockClock:
    return trio.testing.MockClock(autojump_threshold=0.05)


@pytest.fixture(params=["TCP", "Unix"])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> int | str:
    """A free port, or a path."""
    return 0 if request.param == "TCP" else str(tmp_path / "socket")


@pytest.fixture
def half_open(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let one direction wait for 6 seconds when the other one is over, and not for 60."""
    operations = sys.modules.get("trisock.hammerspoon.operations", _queued)
    monkeypatch.setattr(operations, "HALF_OPEN_SECONDS", 6, raising=False)
    monkeypatch.setattr(operations, "_BYTES_PER_SECOND", 1_000_000, raising=False)


# ---- dead connections ----


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_dead_clients_with_data_unread_are_dropped(
    clock: trio.testing.MockClock, where: int | str, how: str
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, print)
        peers = [raw_client(server) for _ in range(20)]
        stays = raw_client(server)
        await until(lambda: server.connections() == 21)
        for peer in [*peers, stays]:
            peer.sendall(b"x")
        await trio.testing.wait_all_tasks_blocked(0.01)
        for peer in peers:
            vanish(peer, how)
        begin = trio.current_time()
        while server.connections() > 1 and trio.current_time() < begin + 10:
            await trio.sleep(0.1)
        assert server.connections() == 1  # the one that is silent is there
        assert 1.9 < trio.current_time() - begin < 2.5
        stays.close()


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_dead_client_with_more_unread_than_one_chunk_is_dropped(
    clock: trio.testing.MockClock, where: int | str, how: str
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, print)
        peer = raw_client(server)
        await until(server.connected)
        for _ in range(10):  # what the kernels hold, and a FIN behind it
            peer.sendall(bytes(10_000))
        vanish(peer, how)
        begin = trio.current_time()
        while server.connected() and trio.current_time() < begin + 10:
            await trio.sleep(0.1)
        assert not server.connected()


async def test_reads_that_the_end_has_left_undone_disconnect_once(calls: Calls) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, calls)
        peer = raw_client(server)
        await until(server.connected)
        for _ in range(100):
            server.read(10)
        peer.sendall(b"too few")
        peer.close()
        await until(lambda: not server.connected())
        assert await calls.none()


@pytest.mark.parametrize("system", ["linux", "darwin"])
async def test_a_dead_client_is_dropped_where_no_epoll_can_be_had(
    clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch, system: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, print)
        peer = raw_client(server)
        await until(server.connected)
        peer.sendall(b"x")
        with monkeypatch.context() as patched:
            if system == "linux":
                patched.setattr(select, "epoll", fail)
            else:
                patched.setattr("trisock.hammerspoon.hangup.sys.platform", system)
            await trio.sleep(0.2)
        await trio.sleep(3)
        assert server.connected()
        peer.close()
        await trio.sleep(3.5)
        assert not server.connected()


async def test_a_client_object_whose_server_is_gone_is_disconnected(
    clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    for path in ("", str(tmp_path / "socket")):
        async with hammerspoon.open_sockets() as hs, connected(hs, path, print) as (client, peer):
            await peer.send(b"x")
            await trio.testing.wait_all_tasks_blocked(0.01)
            peer.abort()
            await trio.sleep(1.5)
            assert client.connected()
            await trio.sleep(1)
            assert client.info()["isDisconnected"]


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_dead_client_with_nothing_unread_is_dropped_at_once(
    where: int | str, how: str, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, calls)
        peer = raw_client(server)
        await until(server.connected)
        server.read(1)
        peer.sendall(b"x")
        assert await calls.next() == (b"x", -1)
        with trio.fail_after(1):
            vanish(peer, how)
            await until(lambda: not server.connected())


async def test_a_dead_client_is_dropped_once_its_data_was_read(where: int | str) -> None:
    calls = Calls()
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, calls)
        peer = raw_client(server)
        await until(server.connected)
        peer.sendall(b"one\ntwo\n")
        peer.close()
        await trio.sleep(0.2)
        for line in (b"one\n", b"two\n"):
            assert server.connected()
            server.read("\n")
            assert await calls.next() == (line, -1)
        with trio.fail_after(1):
            await until(lambda: not server.connected())


async def test_a_read_within_two_seconds_gives_the_next_one_as_long(
    clock: trio.testing.MockClock, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, calls)
        peer = raw_client(server)
        await until(server.connected)
        peer.sendall(b"a\nb\nc\nd\n")
        peer.close()
        for line in (b"a\n", b"b\n", b"c\n"):
            await trio.sleep(1.5)
            server.read("\n")
            assert await calls.next() == (line, -1)
        await trio.sleep(2.5)
        assert not server.connected()


async def test_a_slow_callback_may_still_read_from_a_dead_client(
    clock: trio.testing.MockClock,
) -> None:
    lines: list[bytes] = []

    async def slow(data: bytes, tag: int) -> None:
        lines.append(data)
        await trio.sleep(10)
        server.read("\n")

    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, slow)
        peer = raw_client(server)
        await until(server.connected)
        server.read("\n")
        peer.sendall(b"one\ntwo\nthree\n")
        peer.close()
        await trio.sleep(35)
        assert lines == [b"one\n", b"two\n", b"three\n"]
        assert not server.connected()


async def test_a_dead_client_under_tls_with_data_unread_is_dropped(
    clock: trio.testing.MockClock, server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, print)
        for how in (trisock.Socket.close, trisock.Socket.abort):
            sock = await trisock.connect(LOCALHOST, server.info()["localPort"])
            await until(server.connected)
            server.startTLS(server_tls)
            await sock.starttls(client_tls)
            await sock.send(b"unread")
            await trio.testing.wait_all_tasks_blocked(0.05)
            begin = trio.current_time()
            ending = how(sock)
            if ending is not None:
                await ending
            while server.connected() and trio.current_time() < begin + 10:
                await trio.sleep(0.1)
            assert not server.connected()


async def test_a_half_closed_client_that_takes_nothing_has_a_time_limit(
    clock: trio.testing.MockClock, half_open: None, tmp_path: Path
) -> None:
    """It has ended its side, and never takes the answer."""
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(str(tmp_path / "socket"), print)
        with raw_client(server) as peer:
            await until(server.connected)
            server.write(MORE_THAN_FITS)
            peer.shutdown(socket.SHUT_WR)
            await trio.sleep(9.5)
            assert server.connected()
            await trio.sleep(1)
            assert not server.connected()


# ---- a write that fails ----


async def line_behind_a_failed_write(
    server: Socket, calls: Calls, *, before: bool, writes: int, how: str
) -> tuple[object, ...]:
    """Have a client send a line and go; write to it, and read; return what the callback got."""
    peer = raw_client(server)
    await until(server.connected)
    peer.sendall(b"last words\n")
    vanish(peer, how)
    if before:
        server.read("\n")
    for _ in range(writes):
        server.write("to all\n")
        if writes > 1:
            await trio.sleep(0.01)  # the reset comes back
    if not before:
        server.read("\n")
    got = await calls.next()
    with trio.fail_after(1):
        await until(lambda: not server.connected())
    return got


@pytest.mark.parametrize("writes", [1, 2, 5])
@pytest.mark.parametrize("before", [True, False], ids=["read before", "read after"])
async def test_a_failed_write_loses_no_received_line(
    where: int | str, before: bool, writes: int, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, calls)
        for _ in range(10):
            with trio.fail_after(5):
                got = await line_behind_a_failed_write(
                    server, calls, before=before, writes=writes, how="FIN"
                )
            assert got == (b"last words\n", -1)


@pytest.mark.parametrize("before", [True, False], ids=["read before", "read after"])
async def test_a_failed_write_of_a_client_loses_no_received_line(
    tmp_path: Path, before: bool, calls: Calls
) -> None:
    for path in ("", str(tmp_path / "socket")):
        async with hammerspoon.open_sockets() as hs, connected(hs, path, calls) as (client, peer):
            await peer.send(b"one\ntwo\n")
            peer.stream.socket.close()  # without reading anything first
            if before:
                client.read("\n").read("\n")  # type: ignore[union-attr]
            for _ in range(3):
                client.write("x")
                await trio.sleep(0.01)
            if not before:
                client.read("\n").read("\n")  # type: ignore[union-attr]
            with trio.fail_after(3):
                assert await calls.next() == (b"one\n", -1)
                assert await calls.next() == (b"two\n", -1)
                await until(lambda: client.info()["isDisconnected"])


async def test_a_failed_write_under_tls_loses_no_received_line(
    server_tls: ServerTLS, client_tls: ClientTLS, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0, calls)
        sock = await trisock.connect(LOCALHOST, server.info()["localPort"])
        await until(server.connected)
        server.startTLS(server_tls)
        await sock.starttls(client_tls)
        await sock.send(b"last words\n")
        await sock.close()
        for _ in range(3):
            server.write("to all\n")
            await trio.sleep(0.01)
        server.read("\n")
        with trio.fail_after(3):
            assert await calls.next() == (b"last words\n", -1)
            await until(lambda: not server.connected())


async def test_a_failed_write_with_data_unread_and_no_read_ends_in_two_seconds(
    clock: trio.testing.MockClock, where: int | str, calls: Calls
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, print)
        peer = raw_client(server)
        await until(server.connected)
        peer.sendall(b"unread\n")
        peer.close()
        for _ in range(3):
            server.write("to all\n", calls)
            await trio.sleep(0.01)
        await trio.sleep(1)
        assert server.connected()
        await trio.sleep(1.5)
        assert not server.connected()


async def test_a_write_that_nobody_takes_leaves_what_is_read_a_time_limit(
    clock: trio.testing.MockClock, half_open: None, tmp_path: Path, calls: Calls
) -> None:
    """The peer has ended its receiving half: writes fail, and it may say more, or nothing."""
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(str(tmp_path / "socket"), calls)
        with raw_client(server) as peer:
            await until(server.connected)
            peer.shutdown(socket.SHUT_RD)
            server.read("\n")
            server.read("\n")
            server.write("nobody hears it\n", calls)
            await trio.sleep(5)
            peer.sendall(b"still talking\n")
            assert await calls.next() == (b"still talking\n", -1)
            await trio.sleep(5)
            assert server.connected()
            await trio.sleep(2)
            assert not server.connected()


async def test_a_write_that_times_out_disconnects_at_once(
    clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(str(tmp_path / "socket"), print)
        with raw_client(server) as peer:
            await until(server.connected)
            peer.sendall(b"unread")
            server.setTimeout(5).write(MORE_THAN_FITS)
            await trio.sleep(4.9)
            assert server.connected()
            await trio.sleep(0.2)
            assert not server.connected()


async def test_a_failed_write_is_logged_once(
    where: int | str, caplog: pytest.LogCaptureFixture, calls: Calls
) -> None:
    caplog.set_level(logging.INFO, "trisock.hammerspoon")
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(where, calls)
        await line_behind_a_failed_write(server, calls, before=False, writes=3, how="FIN")
    assert len(caplog.records) == 1


# ---- the order over the two kinds of sockets ----


@pytest.mark.parametrize("others", [0, 100])
async def test_the_server_has_the_connection_when_the_connect_callback_runs(
    where: int | str, others: int
) -> None:
    for _ in range(10):
        heard = Calls()
        async with hammerspoon.open_sockets() as hs:
            server = hs.server(where)
            with contextlib.ExitStack() as stack:
                for _ in range(others):  # ahead of it in the listener's queue
                    stack.enter_context(raw_client(server))
                connects_and_greets(hs, server, heard)
                with trio.fail_after(5):
                    assert await heard.next() == (others + 1,)
                    assert await heard.next() == (b"hello\n", -1)


def connects_and_greets(hs: Sockets, server: Socket, heard: Calls) -> None:
    def greet() -> None:
        heard(server.connections())
        server.write("hello\n")

    info = server.info()
    client = hs.new(heard)
    if info["unixSocketPath"]:
        client.connect(info["unixSocketPath"], greet)
    else:
        client.connect("localhost", info["localPort"], greet)
    client.read("\n")


async def test_the_connect_callback_runs_where_a_foreign_server_has_the_same_port(
    calls: Calls,
) -> None:
    """Our server listens on the port, but the connection is to another one."""
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(0)
        port = server.info()["localPort"]
        async with await trisock.listen(0, host="127.0.0.2") as other:
            assert other.port != port
            hs.new().connect("127.0.0.2", other.port, calls)
            async with closing(await other.accept()):
                with trio.fail_after(0.5):
                    assert await calls.next() == ()


async def test_connected_is_True_right_after_a_connect_to_a_path(tmp_path: Path) -> None:  # noqa: N802
    path = str(tmp_path / "socket")
    async with hammerspoon.open_sockets() as hs:
        server = hs.server(path)
        client = hs.new().connect(path)
        assert client is not None
        assert client.connected()
        info = client.info()
        assert (info["isConnected"], info["connections"], info["connectedURL"]) == (True, 1, path)
        client.write("hello\n")
        await until(server.connected)
        client.disconnect()
        assert not client.connected()
        await until(lambda: not server.connected())
        # Disconnected before its task has begun: nothing is left behind.
        client.connect(path)
        assert client.connected()
        client.disconnect()
        assert client.info()["isDisconnected"]
