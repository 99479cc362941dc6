"""Handlers in ``Socket.idle``: the stop of their server, and their timeouts."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import socket
import ssl
import sys
import weakref
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.peers import Peer
from helpers.reads import ITEM, READS, waits
from helpers.server import bound, connect, logged
from trisock import IdleTimeoutError, ServerClosing, Socket
from trisock.testing import Authority, serving

if sys.version_info < (3, 11):
    from exceptiongroup import ExceptionGroup

Handler = Callable[[Socket], Awaitable[object]]


async def echo_lines(sock: Socket) -> None:
    async for line in sock.lines(idle=True):
        await sock.send(line, b"\n")


async def until_idle(server: trisock.Server) -> None:
    """Wait until a handler's read waits in an idle block."""
    while not any(each.in_idle_read for each in server._connections):
        await trio.lowlevel.checkpoint()
    await trio.testing.wait_all_tasks_blocked()


async def used(client: Socket) -> None:
    """Send a line and receive its answer: the connection then counts as used."""
    await client.send(b"first\n")
    assert await client.recv_line() == b"first"


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("read", list(filter(waits, READS)))
async def test_a_stop_ends_a_waiting_read(read: str, tls: bool, authority: Authority) -> None:
    caught = []

    async def handler(sock: Socket) -> None:
        await sock.send(await sock.recv_until(b"\n"))
        try:
            with sock.idle():
                await READS[read](sock)
        except ServerClosing as exc:
            caught.append(str(exc))
            raise

    role = authority.server_tls() if tls else None
    async with serving(handler, tls=role) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        s.server.stop()
        assert await client.recv() == b""
        await s.server.wait_closed()
    assert s.server.stats() == trisock.ServerStats(accepted=1)
    assert "the server is stopping, and no request has begun" in caught[0]


@pytest.mark.parametrize("tls", [False, True])
async def test_requests_that_have_arrived_are_answered(tls: bool, authority: Authority) -> None:
    role = authority.server_tls() if tls else None
    async with serving(echo_lines, tls=role) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        await client.send(b"one\ntwo\nthree\n")
        s.server.stop()
        assert [line async for line in client.lines()] == [b"one", b"two", b"three"]


@pytest.mark.parametrize("tls", [False, True])
async def test_a_request_that_arrives_just_before_the_stop_is_answered(
    tls: bool, authority: Authority
) -> None:
    """The kernel has received the request, but the handler's read is not awake yet."""
    role = authority.server_tls() if tls else None
    async with serving(echo_lines, tls=role) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        request = b"last\n"
        if tls:
            engine = client._connection.tls.engine  # type: ignore[union-attr]
            engine.write(request)
            request = engine.data_to_send()
        os.write(client.fileno(), request)
        s.server.stop()
        assert [line async for line in client.lines()] == [b"last"]


@pytest.mark.parametrize("tls", [False, True])
async def test_a_request_that_has_begun_may_be_completed(tls: bool, authority: Authority) -> None:
    role = authority.server_tls() if tls else None
    async with serving(echo_lines, tls=role) as s, await s.connect() as client:
        await used(client)
        await client.send(b"ha")
        while not any(len(each.buffer) == 2 for each in s.server._connections):
            await trio.lowlevel.checkpoint()
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"lf\n")
        assert await client.recv_line() == b"half"
        assert await client.recv() == b""


async def test_a_block_that_has_consumed_bytes_continues_after_a_stop() -> None:
    async def handler(sock: Socket) -> None:
        with sock.idle():
            size = int(await sock.recv_line())
            await sock.send(await sock.recv_exactly(size))

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"4\n")
        await until_idle(s.server)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"body")
        assert await client.recv() == b"body"


async def test_bytes_pushed_back_in_a_block_are_a_request_that_has_begun() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_line()
        with sock.idle():
            sock.unrecv(b"ha")
            await sock.send(await sock.recv_line())

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"go\n")
        await until_idle(s.server)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"lf\n")
        assert await client.recv() == b"half"


@pytest.mark.parametrize("idle", [True, False])
@pytest.mark.parametrize("iterator", ["lines", "batches", "frames"])
async def test_an_iterator_ends_at_a_stop_only_if_idle(iterator: str, idle: bool) -> None:
    async def handler(sock: Socket) -> None:
        options = {"idle": True} if idle else {}
        items = {
            "lines": lambda: sock.lines(**options),
            "batches": lambda: sock.lines(**options).batches(),
            "frames": lambda: sock.frames(1, **options),
        }
        async for _ in items[iterator]():
            await sock.send(b"x")

    async with serving(handler) as s, await s.connect() as client:
        for _ in range(2):  # each wait is a separate block
            await client.send(ITEM)
            assert await client.recv() == b"x"
        await trio.testing.wait_all_tasks_blocked()
        s.server.stop(grace=None)  # the end of a grace would also close the connection
        if not idle:
            await trio.testing.wait_all_tasks_blocked()
            await client.send(ITEM)
            assert await client.recv() == b"x"
            await client.send_eof()
        assert await client.recv() == b""


async def test_half_a_tls_record_is_no_request(authority: Authority) -> None:
    async with serving(echo_lines, tls=authority.server_tls()) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        engine = client._connection.tls.engine  # type: ignore[union-attr]
        engine.write(b"request\n")
        record = engine.data_to_send()
        await client.stream.send_all(record[:-1])
        await trio.testing.wait_all_tasks_blocked()
        s.server.stop()
        assert await client.recv() == b""


async def test_a_block_entered_after_the_stop_raises_when_it_must_wait() -> None:
    order = []

    async def handler(sock: Socket) -> None:
        await sock.recv_line()
        sock.server.stop()  # type: ignore[union-attr]
        with sock.idle():
            order.append(await sock.recv_line())
        with pytest.raises(ServerClosing), sock.idle():
            await sock.recv_line()
        order.append(b"ended")

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"stop\npipelined\n")
        assert await client.recv() == b""
    assert order == [b"pipelined", b"ended"]


async def test_only_reads_of_this_socket_are_ended(mock_clock: trio.testing.MockClock) -> None:
    ended: list[str] = []

    async def handler(sock: Socket) -> None:
        async def note(name: str, call: Callable[[], Awaitable[object]]) -> None:
            await call()
            ended.append(name)

        await sock.recv_line()
        async with await trisock.connect("127.0.0.1", other.port) as elsewhere:
            async with trio.open_nursery() as nursery:
                with sock.idle():
                    nursery.start_soon(note, "sleep", lambda: trio.sleep(10))
                    nursery.start_soon(note, "another socket", elsewhere.recv)
                    with pytest.raises(ServerClosing):
                        await sock.recv()
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()

    other = trisock.listen_nowait(0, host="127.0.0.1")
    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"go\n")
        await until_idle(s.server)
        s.server.stop()
        assert await client.recv() == b""
    other.abort()
    assert ended == []


async def test_a_read_outside_a_block_may_use_the_grace() -> None:
    async def handler(sock: Socket) -> None:
        with sock.idle():
            await sock.recv_line()
        await sock.send(await sock.recv_line())

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"idle\n")
        while not s.server.connections:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"late\n")
        assert await client.recv() == b"late"


@pytest.mark.parametrize("own_block", [False, True])
@pytest.mark.parametrize("tls", [False, True])
async def test_another_tasks_block_limits_reads_only_until_its_end(
    tls: bool, own_block: bool, jumping_clock: trio.testing.MockClock, authority: Authority
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_line()

        async def read() -> None:
            with sock.idle(timeout=30) if own_block else contextlib.nullcontext():
                await sock.send(await sock.recv_line())

        async with trio.open_nursery() as nursery:
            with sock.idle(timeout=10):
                nursery.start_soon(read)
                await trio.sleep(5)
            if not own_block:
                sock.server.stop(grace=30)  # type: ignore[union-attr]

    role = authority.server_tls() if tls else None
    async with serving(handler, tls=role) as s, await s.connect() as client:
        await client.send(b"go\n")
        await trio.sleep(20)
        await client.send(b"late\n")
        assert await client.recv() == b"late"


async def test_a_blocked_send_continues_when_a_stop_ends_the_read() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv_line()

        async def read() -> None:
            with pytest.raises(ServerClosing), sock.idle():
                await sock.recv()
            read_ended.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await sock.send(bytes(20_000_000))

    read_ended = trio.Event()
    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"go\n")
        await until_idle(s.server)
        s.server.stop()
        await read_ended.wait()
        received = 0
        while chunk := await client.recv():
            received += len(chunk)
    assert received == 20_000_000


async def test_a_handler_can_say_goodbye() -> None:
    async def handler(sock: Socket) -> None:
        try:
            await echo_lines(sock)
        except ServerClosing:
            await sock.send(b"421 closing\n")

    async with serving(handler) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        s.server.stop()
        assert await client.recv() == b"421 closing\n"


@pytest.mark.parametrize("tls", [False, True])
async def test_server_closing_in_a_group_is_a_normal_end(tls: bool, authority: Authority) -> None:
    async def handler(sock: Socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(echo_lines, sock)

    role = authority.server_tls() if tls else None
    async with serving(handler, tls=role) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        s.server.stop()
        assert await client.recv() == b""
    assert s.server.stats() == trisock.ServerStats(accepted=1)


async def test_an_error_beside_server_closing_is_logged(log: pytest.LogCaptureFixture) -> None:
    async def handler(sock: Socket) -> None:
        try:
            await echo_lines(sock)
        except ServerClosing as exc:
            raise ExceptionGroup("both", [exc, ValueError("mine")]) from None

    async with bound(handler, host="127.0.0.1") as server:
        async with await connect(server) as client:
            await used(client)
            await until_idle(server)
            server.stop()
            assert await client.recv() == b""
            await server.wait_closed()
    assert server.stats().handler_errors == 1
    assert logged(log, logging.ERROR)


async def test_an_idle_timeout_is_a_peer_error(log: pytest.LogCaptureFixture) -> None:
    async def handler(sock: Socket) -> None:
        with sock.idle(timeout=0.01):
            await sock.recv()

    async with bound(handler, host="127.0.0.1") as server:
        async with await connect(server) as client:
            assert await client.recv() == b""
            while server.stats().active:
                await trio.lowlevel.checkpoint()
    assert server.stats() == trisock.ServerStats(accepted=1, peer_errors=1)
    (record,) = log.records
    assert record.levelno == logging.INFO
    assert record.getMessage().endswith(": the peer sent nothing for 0.01 seconds")
    assert record.exc_info is None


async def test_each_connection_of_a_server_has_its_own_timeout(
    mock_clock: trio.testing.MockClock,
) -> None:
    ended = []

    async def handler(sock: Socket) -> None:
        timeout = int(await sock.recv_line())
        with pytest.raises(IdleTimeoutError), sock.idle(timeout):
            await sock.recv()
        ended.append(timeout)

    async with serving(handler) as s:
        clients = [await s.connect() for _ in range(4)]
        for client, timeout in zip(clients, (5, 2, 9, 2), strict=True):
            await client.send(b"%d\n" % timeout)
        while sum(each.in_idle_read for each in s.server._connections) < 4:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(9):
            mock_clock.jump(1)
            await trio.testing.wait_all_tasks_blocked()
    assert ended == [2, 2, 5, 9]


async def test_a_new_connection_has_five_seconds_for_its_request(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with serving(echo_lines) as s:
        slow, silent = [await s.connect() for _ in range(2)]
        while len(s.server.connections) < 2:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(1)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(3)
        await slow.send(b"request\n")
        assert await slow.recv_line() == b"request"
        assert await slow.recv() == b""  # it has had a request, and is idle
        assert await silent.peek() is None
        mock_clock.jump(1)
        assert await silent.recv() == b""


async def test_a_short_grace_leaves_a_new_connection_time_for_a_goodbye(
    mock_clock: trio.testing.MockClock,
) -> None:
    async def handler(sock: Socket) -> None:
        try:
            with sock.idle():
                await sock.recv_line()
        except ServerClosing:
            await sock.send(b"goodbye\n")

    async with serving(handler) as s, await s.connect() as client:
        while not s.server.connections:
            await trio.lowlevel.checkpoint()
        s.server.stop(grace=100)
        s.server.stop(grace=3)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(2.5)
        assert await client.peek() is None
        mock_clock.jump(0.2)
        assert await client.recv_line() == b"goodbye"
        assert await client.recv() == b""
        assert s.server.stats().cancelled == 0


@pytest.mark.parametrize(("grace", "delay"), [(1, 0), (0, 1)])
async def test_a_second_stop_leaves_the_same_time_for_a_goodbye(
    mock_clock: trio.testing.MockClock, grace: float, delay: float
) -> None:
    async def handler(sock: Socket) -> None:
        with contextlib.suppress(ServerClosing), sock.idle():
            await sock.recv_line()

    async with serving(handler) as s, await s.connect() as client:
        while not s.server.connections:
            await trio.lowlevel.checkpoint()
        s.server.stop(grace, delay=delay)
        s.server.stop(grace=None)
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(0.85)
        s.server.stop(grace=None)  # changes nothing
        await trio.testing.wait_all_tasks_blocked()
        assert await client.peek() is None
        mock_clock.jump(0.1)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await client.peek() == b""
        assert s.server.stats().cancelled == 0


async def test_the_five_seconds_count_from_the_end_of_the_handshake(
    authority: Authority, mock_clock: trio.testing.MockClock
) -> None:
    async with serving(echo_lines, tls=authority.server_tls()) as s:
        client = await s.connect(tls=None)
        while not s.server.stats().active:
            await trio.lowlevel.checkpoint()
        mock_clock.jump(20)
        await client.starttls(authority.client_tls())
        await until_idle(s.server)
        s.server.stop()
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(4)
        await client.send(b"request\n")
        assert await client.recv_line() == b"request"
        assert await client.recv() == b""


async def test_data_that_comes_with_the_handshake_counts_as_a_request(
    authority: Authority,
) -> None:
    """The client's Finished and first line arrive together. The answered connection is idle."""
    async with serving(echo_lines, tls=authority.server_tls()) as s:
        with Peer(socket.create_connection(("127.0.0.1", s.server.port))) as peer:
            context = ssl.create_default_context(cadata=authority.ca.decode())
            peer.start_tls(context, server_side=False, server_hostname="localhost")
            peer.greeting = b"first\n"
            while peer.heard != b"first\n":
                peer.act()
                await trio.lowlevel.checkpoint()
            await until_idle(s.server)
            s.server.stop()
            while not peer.finished:
                peer.act()
                await trio.lowlevel.checkpoint()
        await s.server.wait_closed()


async def test_servers_and_their_sockets_refer_to_each_other() -> None:
    found = []

    async def handler(sock: Socket) -> None:
        found.append(sock.server)
        await sock.send(b"x")

    async with serving(handler) as s, await s.connect() as client:
        await client.recv()
    assert found == [s.server]
    assert client.server is None


async def test_an_idle_end_leaves_no_garbage() -> None:
    references: list[weakref.ref[object]] = []

    async def handler(sock: Socket) -> None:
        references.append(weakref.ref(sock))
        await echo_lines(sock)

    gc.collect()
    gc.disable()
    try:
        async with serving(handler) as s, await s.connect() as client:
            await used(client)
            await until_idle(s.server)
            s.server.stop()
            assert await client.recv() == b""
            await s.server.wait_closed()
            assert [each() for each in references] == [None]
    finally:
        gc.enable()


async def test_a_broadcast_continues_during_idle_reads() -> None:
    async with serving(echo_lines) as s, await s.connect() as client:
        await used(client)
        await until_idle(s.server)
        assert await s.server.broadcast(b"news\n") == 1
        s.server.stop()
        assert [line async for line in client.lines()] == [b"news"]
