"""Peers that close or reset a connection, and connections to a server in the same process."""

from __future__ import annotations

import contextlib
import errno
import select
import socket

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
    close_by,
    connect_to,
    raw_client,
    tcp_and_unix_client,
    unix_server,
    until,
)
from helpers.pairs import closing
from trisock import ClientTLS, ServerTLS, hammerspoon
from trisock.hammerspoon import Socket, Sockets, operations

fin_and_rst = pytest.mark.parametrize("how", ["FIN", "RST"])
read_before_and_after = pytest.mark.parametrize(
    "before", [True, False], ids=["read before", "read after"]
)


@pytest.fixture
def half_closed_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the timeout of operations on half-closed connections from 60 to 6 seconds."""
    monkeypatch.setattr(operations, "HALF_OPEN_SECONDS", 6)
    monkeypatch.setattr(operations, "_BYTES_PER_SECOND", 1_000_000)


# ---- dead connections, which the peer has closed or reset ----


@fin_and_rst
@pytest.mark.parametrize("chunks", [1, 10])
async def test_dead_clients_with_unread_data_are_dropped(
    autojump_clock: MockClock, server: Socket, how: str, chunks: int
) -> None:
    peers = [raw_client(server) for _ in range(20)]
    with raw_client(server) as silent:
        await until(lambda: server.connections() == 21)
        for peer in [*peers, silent]:
            for _ in range(chunks):
                peer.sendall(bytes(10_000))
        await wait_all_tasks_blocked(0.01)
        for peer in peers:
            close_by(how, peer)
        await trio.sleep(1.9)
        assert server.connections() == 21
        await trio.sleep(0.6)
        assert server.connections() == 1
        await trio.sleep(10)
        assert server.connections() == 1


@fin_and_rst
async def test_a_client_that_closes_right_after_sending_is_dropped(
    autojump_clock: MockClock, server: Socket, how: str
) -> None:
    with raw_client(server) as leaving:
        await until(server.connected)
        leaving.sendall(bytes(100_000))  # the kernel buffers all of it
        close_by(how, leaving)
        await trio.sleep(3)
        assert not server.connected()


async def test_a_closed_client_with_many_unfinished_reads_is_dropped(
    server: Socket, raw: socket.socket, calls: Calls
) -> None:
    for _ in range(100):
        server.read(10)
    raw.sendall(b"too few")
    raw.close()
    await until(lambda: not server.connected())
    assert await calls.none()


@pytest.mark.parametrize("system", ["linux", "darwin"])
async def test_a_dead_client_is_dropped_even_if_epoll_is_unavailable(
    autojump_clock: MockClock,
    server: Socket,
    raw: socket.socket,
    monkeypatch: pytest.MonkeyPatch,
    system: str,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    raw.sendall(b"x")
    with monkeypatch.context() as patched:
        if system == "linux":
            patched.setattr(select, "epoll", fail)
        else:
            patched.setattr("trisock.hammerspoon.hangup.sys.platform", system)
        await trio.sleep(0.2)
    await trio.sleep(3)
    assert server.connected()
    raw.close()
    await trio.sleep(3.5)
    assert not server.connected()


@tcp_and_unix_client
async def test_a_client_object_with_a_dead_server_disconnects(
    autojump_clock: MockClock, client: Socket, peer: trisock.Socket
) -> None:
    await peer.send(b"x")
    await wait_all_tasks_blocked(0.01)
    peer.abort()
    await check_disconnects(client, after=1.5, before=2.5)
    assert client.info()["isDisconnected"]


@fin_and_rst
async def test_a_dead_client_without_unread_data_is_dropped_immediately(
    server: Socket, raw: socket.socket, calls: Calls, how: str
) -> None:
    server.read(1)
    raw.sendall(b"x")
    assert await calls.next() == (b"x", -1)
    with trio.fail_after(1):
        close_by(how, raw)
        await until(lambda: not server.connected())


async def test_a_dead_client_is_dropped_after_its_data_is_read(
    autojump_clock: MockClock, server: Socket, raw: socket.socket, calls: Calls
) -> None:
    raw.sendall(b"one\ntwo\n")
    raw.close()
    await trio.sleep(1.5)
    for line in (b"one\n", b"two\n"):
        assert server.connected()
        server.read("\n")
        assert await calls.next() == (line, -1)
    with trio.fail_after(1):
        await until(lambda: not server.connected())


async def test_each_read_restarts_the_two_second_timeout(
    autojump_clock: MockClock, server: Socket, raw: socket.socket, calls: Calls
) -> None:
    raw.sendall(b"a\nb\nc\nd\n")
    raw.close()
    for line in (b"a\n", b"b\n", b"c\n"):
        await trio.sleep(1.5)
        server.read("\n")
        assert await calls.next() == (line, -1)
    await trio.sleep(2.5)
    assert not server.connected()


async def test_a_slow_callback_may_still_read_from_a_dead_client(
    autojump_clock: MockClock, server: Socket, raw: socket.socket
) -> None:
    lines: list[bytes] = []

    async def slow(data: bytes, tag: int) -> None:
        lines.append(data)
        await trio.sleep(10)
        server.read("\n")

    server.setCallback(slow).read("\n")
    raw.sendall(b"one\ntwo\nthree\n")
    raw.close()
    await trio.sleep(35)
    assert lines == [b"one\n", b"two\n", b"three\n"]
    assert not server.connected()


@pytest.mark.parametrize("abort", [False, True])
async def test_a_dead_tls_client_with_unread_data_is_dropped(
    autojump_clock: MockClock,
    server: Socket,
    server_tls: ServerTLS,
    client_tls: ClientTLS,
    abort: bool,
) -> None:
    async with clients_of(server) as [peer]:
        server.startTLS(server_tls)
        await peer.starttls(client_tls)
        await peer.send(b"unread")
        await wait_all_tasks_blocked(0.05)
        if abort:
            peer.abort()
        else:
            await peer.close()
        await trio.sleep(3)
        assert not server.connected()


@unix_server
async def test_a_half_closed_client_that_reads_nothing_is_dropped(
    autojump_clock: MockClock, half_closed_limit: None, server: Socket, raw: socket.socket
) -> None:
    server.write(MORE_THAN_FITS)
    raw.shutdown(socket.SHUT_WR)
    await check_disconnects(server, after=9.5, before=10.5)


# ---- failed writes ----


async def write_to_lost_client(
    server: Socket, calls: Calls, *, before: bool, writes: int
) -> tuple[object, ...]:
    """Let a client send a line and close. Then queue the server's writes, and a read of the line.

    If ``before`` is true, queue the read before the writes. Return the arguments of the read
    callback.
    """
    with raw_client(server) as raw:
        await until(server.connected)
        raw.sendall(b"last words\n")
    if before:
        server.read("\n")
    for _ in range(writes):
        server.write("to all\n")
        if writes > 1:
            await wait_all_tasks_blocked()  # so that the next write finds a reset connection
    if not before:
        server.read("\n")
    got = await calls.next()
    with trio.fail_after(1):
        await until(lambda: not server.connected())
    return got


@pytest.mark.parametrize("writes", [1, 2, 5])
@read_before_and_after
async def test_a_failed_write_loses_no_received_line(
    server: Socket, calls: Calls, before: bool, writes: int
) -> None:
    for _ in range(10):
        with trio.fail_after(5):
            got = await write_to_lost_client(server, calls, before=before, writes=writes)
        assert got == (b"last words\n", -1)


@tcp_and_unix_client
@read_before_and_after
async def test_a_client_object_keeps_received_lines_after_a_failed_write(
    client: Socket, peer: trisock.Socket, calls: Calls, before: bool
) -> None:
    await peer.send(b"one\ntwo\n")
    peer.stream.socket.close()  # so that a write causes a reset
    if before:
        client.read("\n").read("\n")  # type: ignore[union-attr]
    for _ in range(3):
        client.write("x")
        await wait_all_tasks_blocked()
    if not before:
        client.read("\n").read("\n")  # type: ignore[union-attr]
    with trio.fail_after(3):
        assert await calls.next() == (b"one\n", -1)
        assert await calls.next() == (b"two\n", -1)
        await until(lambda: client.info()["isDisconnected"])


async def test_a_failed_write_under_tls_loses_no_received_line(
    server: Socket, server_tls: ServerTLS, client_tls: ClientTLS, calls: Calls
) -> None:
    async with clients_of(server) as [peer]:
        server.startTLS(server_tls)
        await peer.starttls(client_tls)
        await peer.send(b"last words\n")
        await peer.close()
        for _ in range(3):
            server.write("to all\n")
            await wait_all_tasks_blocked()
        server.read("\n")
        with trio.fail_after(3):
            assert await calls.next() == (b"last words\n", -1)
            await until(lambda: not server.connected())


async def test_unread_data_is_kept_two_seconds_after_a_failed_write(
    autojump_clock: MockClock, server: Socket, raw: socket.socket
) -> None:
    raw.sendall(b"unread\n")
    raw.close()
    for _ in range(3):
        server.write("to all\n")
        await wait_all_tasks_blocked()
    await check_disconnects(server, after=1, before=2.5)


@unix_server
async def test_reads_have_a_timeout_after_a_failed_write(
    autojump_clock: MockClock,
    half_closed_limit: None,
    server: Socket,
    raw: socket.socket,
    calls: Calls,
) -> None:
    raw.shutdown(socket.SHUT_RD)
    server.read("\n")
    server.read("\n")
    server.write("fails\n", calls)
    await trio.sleep(5)
    raw.sendall(b"still sending\n")
    assert await calls.next() == (b"still sending\n", -1)
    await check_disconnects(server, after=5, before=7)


@unix_server
async def test_a_write_that_times_out_disconnects_immediately(
    autojump_clock: MockClock, server: Socket, raw: socket.socket
) -> None:
    raw.sendall(b"unread")
    server.setTimeout(5).write(MORE_THAN_FITS)
    await check_disconnects(server, after=4.9, before=5.1)


async def test_a_failed_write_is_logged_once(server: Socket, calls: Calls, caplog: Log) -> None:
    caplog.set_level("INFO", "trisock.hammerspoon")
    await write_to_lost_client(server, calls, before=False, writes=3)
    assert len(caplog.records) == 1


# ---- connects to a server in the same process ----


@pytest.mark.parametrize("others", [0, 100])
async def test_the_connect_callback_runs_after_the_server_has_accepted(
    port_or_path: int | str, others: int, calls: Calls
) -> None:
    def greet() -> None:
        calls(server.connections())
        server.write("hello\n")

    for _ in range(3):
        async with hammerspoon.open_sockets() as hs:
            server = hs.server(port_or_path)
            with contextlib.ExitStack() as stack:
                for _ in range(others):  # these clients come first in the backlog
                    stack.enter_context(raw_client(server))
                connect_to(server, hs.new(calls), greet).read("\n")
                with trio.fail_after(5):
                    assert await calls.next() == (others + 1,)
                    assert await calls.next() == (b"hello\n", -1)


async def test_the_connect_callback_does_not_wait_for_other_servers(
    hs: Sockets, calls: Calls
) -> None:
    port = hs.server(0).info()["localPort"]
    async with await trisock.listen(0, host="127.0.0.2") as other:
        assert other.port != port
        hs.new().connect("127.0.0.2", other.port, calls)
        async with closing(await other.accept()):
            with trio.fail_after(0.5):
                assert await calls.next() == ()


async def test_connected_is_True_right_after_a_connect_to_a_path(  # noqa: N802
    hs: Sockets, path: str, calls: Calls
) -> None:
    server = hs.server(path, calls)
    client = connect_to(server, hs.new())
    assert client.connected()
    info = client.info()
    assert (info["isConnected"], info["connections"], info["connectedURL"]) == (True, 1, path)
    client.write("hello\n")
    await until(server.connected)
    server.read("\n")
    assert await calls.next() == (b"hello\n", -1)
    client.disconnect()
    assert not client.connected()
    await until(lambda: not server.connected())


async def test_disconnect_works_right_after_a_connect_to_a_path(hs: Sockets, path: str) -> None:
    client = connect_to(hs.server(path), hs.new())
    assert client.connected()
    client.disconnect()
    assert client.info()["isDisconnected"]
