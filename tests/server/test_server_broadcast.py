"""Server.broadcast: which connections it reaches, and what it waits for."""

from __future__ import annotations

import contextlib
import io
import logging
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.server import broadcasting, chat, logged
from trisock import ClientTLS, ServerTLS, Socket
from trisock.testing import serving

BIG = b"b" * 5_000_000  # A send of BIG blocks until the client reads.
HUGE = b"b" * 50_000_000  # HUGE exceeds the maximum size of the kernel's buffers.


# ---- the recipients ----


async def test_broadcast_reaches_all_open_connections() -> None:
    async with serving(chat) as s:
        assert await s.server.broadcast(b"nobody") == 0
        clients = [await s.connect() for _ in range(5)]
        for client in clients:
            assert await client.recv() == b"hi\n"
        assert await s.server.broadcast(bytearray(b"news")) == 5
        for client in clients:
            assert await client.recv() == b"news"
        clients[0].abort()
        await clients[1].close()
        while len(s.server.connections) > 3:
            await trio.lowlevel.checkpoint()
        assert await s.server.broadcast(memoryview(b"more")) == 3
        with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview"):
            await s.server.broadcast("text")  # type: ignore[arg-type]


async def test_broadcast_reaches_half_closed_clients() -> None:
    """``printf 'SUBSCRIBE\\n' | nc -N`` half-closes the connection and keeps reading."""

    async def handler(sock: Socket) -> None:
        await sock.recv_until(b"\n")
        assert await sock.recv() == b""
        await s.server.closing.wait()

    async with serving(handler) as s, await s.connect() as client:
        await client.send(b"SUBSCRIBE\n")
        await client.send_eof()
        while s.server.connections[0].isopen():
            await trio.lowlevel.checkpoint()
        assert await s.server.broadcast(b"news") == 1
        assert await client.recv() == b"news"


async def test_a_broadcast_survives_clients_that_leave_and_join() -> None:
    async with serving(chat) as s:
        staying, leaving = await s.connect(), await s.connect()
        assert await staying.recv() == await leaving.recv() == b"hi\n"
        async with broadcasting(s.server, BIG) as delivered:
            leaving.abort()
            late = await s.connect()
            assert await late.recv() == b"hi\n"
            assert await staying.recv_exactly(len(BIG)) == BIG
        assert delivered == [1]
        assert await s.server.broadcast(b"news") == 2
        assert await staying.recv() == await late.recv() == b"news"


@pytest.mark.parametrize("how", ["reset by the client", "closed by the handler"])
async def test_a_broadcast_skips_closed_connections(how: str) -> None:
    async def handler(sock: Socket) -> None:
        if how == "closed by the handler" and await sock.recv() == b"QUIT":
            await sock.close()
        await s.server.closing.wait()

    async with serving(handler) as s:
        async with await s.connect() as leaving, await s.connect() as staying:
            await staying.send(b"STAY")
            if how == "closed by the handler":
                await leaving.send(b"QUIT")
                assert await leaving.recv() == b""
            else:
                leaving.abort()
            while all(each.isopen() for each in s.server.connections):
                await trio.lowlevel.checkpoint()
            assert await s.server.broadcast(b"news") == 1
            assert await staying.recv() == b"news"


@pytest.mark.parametrize("tls_from_the_start", [False, True])
async def test_a_broadcast_skips_connections_in_a_handshake(
    tls_from_the_start: bool,
    server_tls: ServerTLS,
    client_tls: ClientTLS,
    jumping_clock: trio.testing.MockClock,
) -> None:
    async def upgrade(sock: Socket) -> None:
        await sock.starttls(server_tls)
        await sock.recv()

    async with (
        serving(chat, tls=server_tls) if tls_from_the_start else serving(upgrade) as s,
        await s.connect(tls=None) as client,
    ):
        while s.server.stats().active < 1:
            await trio.lowlevel.checkpoint()
        await trio.testing.wait_all_tasks_blocked()
        start = trio.current_time()
        assert await s.server.broadcast(b"PLAIN") == 0
        assert trio.current_time() == start  # the broadcast did not wait for the handshake
        await client.starttls(client_tls)
        if tls_from_the_start:
            assert await client.recv() == b"hi\n"
        while not (s.server.connections and s.server.connections[0].istls()):
            await trio.lowlevel.checkpoint()
        assert await s.server.broadcast(b"SECRET") == 1
        assert await client.recv() == b"SECRET"


async def test_broadcast_sends_to_all_concurrently(jumping_clock: trio.testing.MockClock) -> None:
    async with serving(chat) as s:
        slow = [await s.connect() for _ in range(3)]
        for each in slow:
            assert await each.recv() == b"hi\n"
        start = trio.current_time()
        assert await s.server.broadcast(HUGE, timeout=5) == 0
        assert trio.current_time() - start == pytest.approx(5, abs=1)


async def test_a_broadcast_aborts_a_slow_client_and_no_other(
    jumping_clock: trio.testing.MockClock, log: pytest.LogCaptureFixture
) -> None:
    async with serving(chat) as s:
        slow, fast = await s.connect(), await s.connect()
        assert await slow.recv() == await fast.recv() == b"hi\n"
        async with broadcasting(s.server, HUGE, timeout=5) as delivered:
            assert await fast.recv_exactly(len(HUGE)) == HUGE
        assert delivered == [1]
        with pytest.raises(trio.BrokenResourceError):
            while await slow.recv():
                pass
        assert s.server.stats().aborted == 1
    assert s.server.stats().handler_errors == 0  # an abort by the server is not a handler's error
    assert not logged(log, logging.WARNING)
    assert ": it was aborted" in log.text


@pytest.mark.parametrize("tls", [False, True])
async def test_a_broadcast_with_a_timeout_of_0_makes_one_attempt(
    tls: bool, server_tls: ServerTLS
) -> None:
    role = server_tls if tls else None
    async with serving(chat, tls=role) as s, await s.connect() as client:
        assert await client.recv() == b"hi\n"
        assert await s.server.broadcast(b"news", timeout=0) == 1
        assert await client.recv() == b"news"
        assert await s.server.broadcast(HUGE, timeout=0) == 0
        assert s.server.stats().aborted == 1


async def test_a_broadcast_without_a_timeout_can_be_cancelled(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with serving(chat) as s, await s.connect() as client:
        assert await client.recv() == b"hi\n"
        with trio.move_on_after(1) as scope:
            await s.server.broadcast(HUGE, timeout=math.inf)
        assert scope.cancelled_caught


async def test_a_broadcast_copies_its_data_at_the_call() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(BIG)
        await sock.recv()

    async with serving(handler) as s, await s.connect() as client:
        await trio.testing.wait_all_tasks_blocked()
        news = bytearray(b"old")
        async with broadcasting(s.server, news):
            news[:] = b"new"
            assert await client.recv_exactly(len(BIG) + 3) == BIG + b"old"


# ---- during a handler's sends ----


@contextlib.asynccontextmanager
async def behind_a_broadcast(
    handler: Callable[[Socket], Awaitable[None]], data: bytes = BIG, **options: float
) -> AsyncIterator[Socket]:
    """Connect a client, and start a broadcast that waits for the client to read."""
    async with serving(handler) as s, await s.connect() as client:
        async with broadcasting(s.server, data, **options):
            yield client


async def test_a_broadcast_never_splits_a_handlers_send() -> None:
    async def handler(sock: Socket) -> None:
        await sock.send(BIG)
        await sock.send(b"after")
        await sock.recv()

    async with serving(handler) as s, await s.connect() as client:
        await trio.testing.wait_all_tasks_blocked()  # the handler is still sending
        async with broadcasting(s.server, b"NEWS"), broadcasting(s.server, b"MORE"):
            assert await client.recv_exactly(len(BIG)) == BIG
            # The handler's next send waits for the broadcasts.
            assert await client.recv_exactly(13) == b"NEWSMOREafter"


async def test_only_one_send_can_wait_for_a_broadcast() -> None:
    results = []

    async def handler(sock: Socket) -> None:
        await sock.recv()

        async def second() -> None:
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await sock.send(b"x")
            with trio.CancelScope() as scope:
                scope.cancel()
                with pytest.raises(trio.BusyResourceError):
                    await sock.send(b"x")
            results.append("busy")

        async with trio.open_nursery() as inner:
            inner.start_soon(second)
            await sock.send(b"mine")
        await sock.recv()

    async with behind_a_broadcast(handler) as client:
        await client.send(b"go")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await client.recv_exactly(len(BIG) + 4) == BIG + b"mine"
        assert results == ["busy"]


async def test_a_cancelled_send_behind_a_broadcast_sends_nothing() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv()
        with trio.move_on_after(0):
            await sock.send(b"never")
        await sock.send(b"later")
        await sock.recv()

    async with behind_a_broadcast(handler) as client:
        await client.send(b"go")
        assert await client.recv_exactly(len(BIG) + 5) == BIG + b"later"


async def test_send_file_behind_a_broadcast_can_be_cancelled(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv()
        with trio.move_on_after(5) as scope:
            await sock.send_file(io.BytesIO(b"never"))
        assert scope.cancelled_caught
        async with trio.open_nursery() as inner:
            inner.start_soon(sock.recv)  # Receives "continue".
            await sock.send(b"mine")  # Waits for the broadcast, not for the cancelled send_file.

    async with behind_a_broadcast(handler) as client:
        await client.send(b"file, please")
        await trio.sleep(6)
        await client.send(b"continue")
        assert await client.recv_exactly(len(BIG) + 4) == BIG + b"mine"


# ---- during starttls ----


async def test_starttls_waits_for_an_earlier_broadcast(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def handler(sock: Socket) -> None:
        assert await sock.recv() == b"STARTTLS"
        await sock.starttls(server_tls)
        await sock.send(b"secret")

    async with behind_a_broadcast(handler) as client:
        await client.send(b"STARTTLS")
        assert await client.recv_exactly(len(BIG)) == BIG
        await client.starttls(client_tls)
        assert await client.recv() == b"secret"


@pytest.mark.parametrize("how", ["timeout", "cancelled", "aborted"])
async def test_starttls_can_end_while_it_waits_for_a_broadcast(
    how: str, server_tls: ServerTLS, jumping_clock: trio.testing.MockClock
) -> None:
    done = []

    async def handler(sock: Socket) -> None:
        await sock.recv()
        if how == "timeout":
            with pytest.raises(
                trisock.TLSError, match=r"blocked by a broadcast for [0-9.]+ seconds"
            ):
                await sock.starttls(server_tls, handshake_timeout=5)
        elif how == "aborted":
            async with trio.open_nursery() as inner:

                async def abort() -> None:
                    await trio.sleep(5)
                    sock.abort()

                inner.start_soon(abort)
                with pytest.raises(trio.ClosedResourceError):
                    await sock.starttls(server_tls)
        else:
            with trio.move_on_after(5) as scope:
                await sock.starttls(server_tls)
            assert scope.cancelled_caught
        assert not sock.isopen()
        done.append(how)

    async with behind_a_broadcast(handler, HUGE, timeout=100) as client:
        await client.send(b"STARTTLS")
    assert done == [how]


async def test_starttls_fails_if_the_broadcast_before_it_is_cut_short(
    server_tls: ServerTLS, jumping_clock: trio.testing.MockClock
) -> None:
    done = []

    async def handler(sock: Socket) -> None:
        await sock.recv()
        with pytest.raises(trio.BrokenResourceError, match="an earlier send was cut short"):
            await sock.starttls(server_tls)
        done.append("failed")

    async with behind_a_broadcast(handler, HUGE, timeout=5) as client:
        await client.send(b"STARTTLS")
    assert done == ["failed"]


async def test_a_broadcast_just_before_starttls_is_sent_whole_or_dropped(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    """The broadcast waits for the reply to STARTTLS. The handler calls starttls after the reply."""
    reply = b"go ahead " * 500_000

    async def handler(sock: Socket) -> None:
        await sock.send(reply)
        await sock.starttls(server_tls)
        await sock.send(b"secret")

    async with serving(handler) as s, await s.connect() as client:
        await trio.testing.wait_all_tasks_blocked()
        async with broadcasting(s.server, b"NEWS") as delivered:
            assert await client.recv_exactly(len(reply)) == reply
            # The broadcast is sent whole before starttls begins, or not at all.
            news = await client.peek()
            if news is not None:
                assert await client.recv_exactly(4) == b"NEWS"
            await client.starttls(client_tls)
            assert await client.recv() == b"secret"
        assert delivered == [0 if news is None else 1]


async def test_a_broadcast_overtaken_by_starttls_is_dropped(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    delivered = []

    async def handler(sock: Socket) -> None:
        async with trio.open_nursery() as inner:

            async def broadcast() -> None:
                delivered.append(await s.server.broadcast(b"NEWS"))

            async with sock._connection.sending:
                inner.start_soon(broadcast)
                await trio.testing.wait_all_tasks_blocked()
            await sock.starttls(server_tls)  # before the broadcast's task runs
        await sock.recv()

    async with serving(handler) as s:
        async with await s.connect() as client:
            await client.starttls(client_tls)
    assert delivered == [0]
