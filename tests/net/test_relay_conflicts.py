"""relay beside other users of its sockets: broadcasts, other tasks, and tasks that close them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, read_all, unix_pair, until_full
from helpers.relaying import assert_reset, flood, relaying
from trisock import Socket
from trisock._net.relay import connection_of
from trisock._server.broadcast import broadcast_to
from trisock.testing import serving, socket_pair

BIG = b"b" * 5_000_000  # a send of BIG blocks until the peer reads


@contextlib.asynccontextmanager
async def broadcasting_to(sock: Socket, timeout: float) -> AsyncIterator[list[object]]:
    """Broadcast to a socket during the block. The outcome is appended to the yielded list."""
    outcome: list[object] = []

    async def broadcast() -> None:
        connection = connection_of(sock)
        try:
            outcome.append(await broadcast_to(connection, BIG, connection.generation, timeout))
        except (trio.TooSlowError, trio.ClosedResourceError) as exc:
            outcome.append(exc)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcast)
        await until_full(sock)
        yield outcome


async def until_reserved(sock: Socket) -> None:
    """Wait until a task has called ``relay`` with this socket."""
    while not connection_of(sock).is_reserved():
        await trio.lowlevel.checkpoint()


async def assert_connected(sock: Socket, peer: Socket) -> None:
    for sender, receiver in ((sock, peer), (peer, sock)):
        await sender.send(b"hello")
        assert await receiver.recv_exactly(5) == b"hello"


@pytest.fixture
def still_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock()


# ---- broadcasts ----


@pytest.mark.parametrize("busy", ["a", "b"])
async def test_relay_reserves_both_sockets_while_it_waits_for_a_broadcast(busy: str) -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    target, reader = (a, x) if busy == "a" else (b, y)
    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        async with broadcasting_to(target, math.inf) as outcome:
            nursery.start_soon(trisock.relay, a, b)
            await until_reserved(target)
            for sock in a, b:
                for call in sock.recv, sock.send_eof, lambda sock=sock: sock.send(b"x"):
                    with pytest.raises(trio.BusyResourceError):
                        await call()
            assert await reader.recv_exactly(len(BIG)) == BIG
        assert outcome == [True]
        await assert_connected(x, y)
        nursery.cancel_scope.cancel()


async def test_a_slow_broadcast_aborts_its_socket_and_ends_the_relay() -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    async with closing(x, a, b, y), broadcasting_to(a, 0.05) as outcome:
        with pytest.raises(trio.ClosedResourceError):
            await trisock.relay(a, b)
        assert isinstance(outcome[0], trio.TooSlowError)
        assert (a.fileno(), b.fileno()) == (-1, -1)


async def test_a_relay_cancelled_while_it_waits_aborts_both_sockets() -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    async with closing(x, a, b, y), broadcasting_to(a, math.inf), trio.open_nursery() as nursery:
        nursery.start_soon(trisock.relay, a, b)
        await until_reserved(b)
        nursery.cancel_scope.cancel()
    assert (a.fileno(), b.fileno()) == (-1, -1)


@pytest.mark.parametrize("timeout", [10, math.inf])
async def test_a_broadcast_skips_relayed_connections_without_waiting(timeout: float) -> None:
    b, y = await socket_pair()

    async def handler(sock: Socket) -> None:
        if await sock.recv_line() == b"RELAY":
            await trisock.relay(sock, b)
        await s.server.closing.wait()

    async with closing(b, y), serving(handler) as s:
        relayed, other = await s.connect(), await s.connect()
        await relayed.send(b"RELAY\nhello")
        await other.send(b"STAY\n")
        assert await y.recv() == b"hello"
        while connection_of(other).buffer or len(s.server.connections) < 2:
            await trio.lowlevel.checkpoint()
        with trio.fail_after(5):
            assert await s.server.broadcast(b"news", timeout=timeout) == 1
        assert await other.recv() == b"news"
        await y.send(b"answer")
        assert await relayed.recv() == b"answer"
        y.abort()
        relayed.abort()


async def test_a_waiting_broadcast_skips_a_relay_that_begins_meanwhile() -> None:
    b, y = await socket_pair()
    sending = trio.Event()

    async def handler(sock: Socket) -> None:
        sending.set()
        await sock.send(BIG)
        await trisock.relay(sock, b)

    async with closing(b, y), serving(handler) as s, trio.open_nursery() as nursery:
        client = await s.connect()
        delivered = []

        async def broadcast() -> None:
            delivered.append(await s.server.broadcast(b"news", timeout=math.inf))

        await sending.wait()
        nursery.start_soon(broadcast)
        while not connection_of(s.server.connections[0]).sending.waiters:
            await trio.lowlevel.checkpoint()
        assert await client.recv_exactly(len(BIG)) == BIG
        await y.send(b"answer")
        assert await client.recv_exactly(6) == b"answer"
        await client.send_eof()
        await y.send_eof()
        assert await read_all(client) == b""
        assert delivered == [0]


# ---- other tasks ----


@pytest.mark.parametrize("busy", ["a", "b"])
@pytest.mark.parametrize("use", [Socket.recv, flood], ids=["recv", "send"])
async def test_relay_refuses_a_socket_in_use_and_changes_nothing(
    use: Callable[[Socket], Awaitable[object]], busy: str
) -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    in_use, peer, idle, idle_peer = (a, x, b, y) if busy == "a" else (b, y, a, x)
    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        nursery.start_soon(use, in_use)
        await trio.lowlevel.checkpoint()
        if use is flood:
            await until_full(in_use)
        else:
            while not connection_of(in_use).reading.in_use:
                await trio.lowlevel.checkpoint()
        with pytest.raises(trio.BusyResourceError):
            await trisock.relay(a, b)
        await assert_connected(idle, idle_peer)
        if use is flood:
            assert await peer.recv_exactly(1_000_000) == b"x" * 1_000_000
            await peer.send(b"hello")
            assert await in_use.recv() == b"hello"
        nursery.cancel_scope.cancel()


async def test_a_socket_whose_read_was_cancelled_can_be_relayed_later() -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        with trio.CancelScope() as reading:
            async with trio.open_nursery() as readers:
                readers.start_soon(a.recv)
                while not connection_of(a).reading.in_use:
                    await trio.lowlevel.checkpoint()
                with pytest.raises(trio.BusyResourceError):
                    await trisock.relay(a, b)
                reading.cancel()
        await assert_connected(x, a)
        nursery.start_soon(trisock.relay, a, b)
        await assert_connected(x, y)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("state", ["idle", "blocked"])
async def test_other_tasks_cannot_use_relayed_sockets(state: str) -> None:
    async with relaying(("plain", "plain"), small=True) as relayed:
        async with trio.open_nursery() as nursery:
            await until_reserved(relayed.a)
            if state == "blocked":
                nursery.start_soon(flood, relayed.x)
                await until_full(relayed.b)
            for sock in relayed.a, relayed.b:
                for call in sock.recv, sock.send_eof, lambda sock=sock: sock.send(b"x"):
                    with pytest.raises(trio.BusyResourceError):
                        await call()
            relayed.y.abort()
            relayed.x.abort()


# ---- closing from other tasks ----


async def abort(sock: Socket) -> None:
    sock.abort()


@pytest.mark.parametrize("state", ["idle", "blocked"])
@pytest.mark.parametrize("end_it", [abort, Socket.close], ids=["abort", "close"])
@pytest.mark.parametrize("closed", ["a", "b"])
async def test_closing_one_socket_aborts_the_other_socket(
    closed: str,
    end_it: Callable[[Socket], Awaitable[None]],
    state: str,
) -> None:
    async with relaying(("plain", "plain")) as relayed, trio.open_nursery() as nursery:
        await until_reserved(relayed.a)
        if state == "blocked":
            nursery.start_soon(flood, relayed.x)
            await until_full(relayed.b)
        sock, peer, other = (
            (relayed.a, relayed.x, relayed.y)
            if closed == "a"
            else (relayed.b, relayed.y, relayed.x)
        )
        await end_it(sock)
        error = await relayed.result()
        assert isinstance(error, trio.ClosedResourceError)
        assert f"already closed the connection with {peer.getlocal()}" in str(error)
        await assert_reset(other)


@pytest.mark.parametrize("closed", ["a", "b"])
async def test_relay_of_a_closed_socket_aborts_the_other_socket(closed: str) -> None:
    (x, a), (b, y) = await socket_pair(), await socket_pair()
    ours, other, peer = (a, b, y) if closed == "a" else (b, a, x)
    async with closing(x, a, b, y):
        ours.unrecv(b"data")
        await ours.close()
        with pytest.raises(trio.ClosedResourceError):
            await trisock.relay(a, b)
        assert other.fileno() == -1
        await assert_reset(peer)


async def test_relay_of_a_closing_socket_aborts_the_other_socket() -> None:
    """The task that reads from the socket has not yet noticed that the socket is closed."""
    (x, a), (b, y) = await socket_pair(), await socket_pair()

    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError):
            await a.recv()

    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        nursery.start_soon(read)
        while not connection_of(a).reading.in_use:
            await trio.lowlevel.checkpoint()
        a.abort()
        with pytest.raises(trio.ClosedResourceError):
            await trisock.relay(a, b)
        await assert_reset(y)


async def test_relay_sends_nothing_more_from_a_closed_sockets_buffer() -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    async with closing(x, a, b, y), trio.open_nursery() as nursery:

        async def relay() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await trisock.relay(a, b)

        a.unrecv(b"secret")
        a.unrecv(b"x" * 1_000_000)
        nursery.start_soon(relay)
        await until_full(b)
        await trio.testing.wait_all_tasks_blocked()  # relay checks again a second later
        a.abort()
        received = bytearray()
        with contextlib.suppress(trio.BrokenResourceError):
            async for chunk in y:
                received += chunk
        assert not received.strip(b"x")


async def test_a_sink_may_be_closed_when_its_send_is_checked(
    still_clock: trio.testing.MockClock,
) -> None:
    for _ in range(12):  # Trio wakes the tasks of one pass in random order
        async with relaying(("plain", "plain"), small=True) as relayed:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flood, relayed.x)
                await until_full(relayed.b)
                await trio.testing.wait_all_tasks_blocked()
                relayed.b.abort()
                still_clock.jump(1)
                assert isinstance(await relayed.result(), trio.ClosedResourceError)
                nursery.cancel_scope.cancel()


async def test_lines_that_an_iterator_has_not_returned_are_relayed() -> None:
    (x, a), (b, y) = unix_pair(), unix_pair()
    async with closing(x, a, b, y), trio.open_nursery() as nursery:
        await x.send(b"CONNECT\nhello\nworld\n")
        async for line in a.lines():
            assert line == b"CONNECT"
            nursery.start_soon(trisock.relay, a, b)
            break
        assert await y.recv_exactly(12) == b"hello\nworld\n"
        nursery.cancel_scope.cancel()
