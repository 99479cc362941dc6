"""Server.broadcast: which connections it reaches, and which it leaves alone."""

from __future__ import annotations

import io
import logging
import math

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.pairs import closing
from helpers.server import connected, serving
from helpers.serving import chat, connect
from trisock import ClientTLS, ServerTLS, Socket


async def test_broadcast_reaches_all_open_connections() -> None:
    async with serving(chat) as server:
        assert await server.broadcast(b"nobody") == 0
        clients = [await connect(server) for _ in range(5)]
        for client in clients:
            assert await client.recv() == b"hi\n"
        assert await server.broadcast(bytearray(b"news")) == 5
        for client in clients:
            assert await client.recv() == b"news"
        clients[0].abort()
        await clients[1].close()
        while len(server.connections) > 3:
            await trio.lowlevel.checkpoint()
        assert await server.broadcast(memoryview(b"more")) == 3
        with pytest.raises(TypeError, match="bytes are needed"):
            await server.broadcast("text")  # type: ignore[arg-type]
        for client in clients:
            client.abort()


async def test_broadcast_reaches_clients_that_have_ended_their_side() -> None:
    """As ``printf 'SUBSCRIBE\\n' | nc -N`` does: it only listens from then on."""

    async def handler(sock: Socket) -> None:
        await sock.recv_until(b"\n")
        assert await sock.recv() == b""
        await server.closing.wait()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as client:
            await client.send(b"SUBSCRIBE\n")
            await client.send_eof()
            while not server.connections or server.connections[0].isopen():
                await trio.lowlevel.checkpoint()
            assert await server.broadcast(b"news") == 1
            assert await client.recv() == b"news"
            server.stop()


async def test_coming_and_going_does_not_change_a_broadcast() -> None:
    big = b"b" * 5_000_000
    async with serving(chat) as server:
        staying, leaving = await connect(server), await connect(server)
        assert await staying.recv() == await leaving.recv() == b"hi\n"
        delivered = []

        async def broadcast() -> None:
            delivered.append(await server.broadcast(big))

        async with trio.open_nursery() as broadcasting:
            broadcasting.start_soon(broadcast)
            await trio.testing.wait_all_tasks_blocked()
            leaving.abort()
            late = await connect(server)
            assert await late.recv() == b"hi\n"
            assert await staying.recv_exactly(len(big)) == big
        assert delivered == [1]
        assert await server.broadcast(b"news") == 2
        assert await staying.recv() == await late.recv() == b"news"
        staying.abort()
        late.abort()


@pytest.mark.parametrize("how", ["reset by the client", "closed by the handler"])
async def test_a_connection_that_is_over_costs_a_broadcast_nothing(how: str) -> None:
    async def handler(sock: Socket) -> None:
        if how == "closed by the handler" and await sock.recv() == b"QUIT":
            await sock.close()
        await server.closing.wait()

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        async with await connect(server) as leaving, await connect(server) as staying:
            await staying.send(b"STAY")
            if how == "closed by the handler":
                await leaving.send(b"QUIT")
                assert await leaving.recv() == b""
            else:
                leaving.abort()
            while len(server.connections) < 2 or all(each.isopen() for each in server.connections):
                await trio.lowlevel.checkpoint()
            assert await server.broadcast(b"news") == 1
            assert await staying.recv() == b"news"
            server.stop()


async def test_a_broadcast_never_splits_what_a_handler_sends() -> None:
    big = b"h" * 5_000_000

    async def handler(sock: Socket) -> None:
        await sock.send(big)
        await sock.send(b"after")
        await sock.recv()

    async with serving(handler) as server, connected(server) as client:
        await trio.testing.wait_all_tasks_blocked()  # the handler is still sending
        async with trio.open_nursery() as broadcasting:
            broadcasting.start_soon(server.broadcast, b"NEWS")
            broadcasting.start_soon(server.broadcast, b"MORE")
            await trio.testing.wait_all_tasks_blocked()
            assert await client.recv_exactly(len(big)) == big
            rest = await client.recv_exactly(13)
        # The handler's next send waits for the earlier ones. It is not refused.
        assert rest in (b"NEWSMOREafter", b"MORENEWSafter")


async def test_a_handler_waits_for_a_broadcast_a_second_sender_collides() -> None:
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

    big = b"b" * 5_000_000
    async with (
        serving(handler) as server,
        connected(server) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.broadcast, big)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"go")
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert await client.recv_exactly(len(big) + 4) == big + b"mine"
        assert results == ["busy"]


async def test_a_handler_that_is_cancelled_while_waiting_leaves_its_turn() -> None:
    async def handler(sock: Socket) -> None:
        await sock.recv()
        with trio.move_on_after(0):
            await sock.send(b"never")
        await sock.send(b"later")
        await sock.recv()

    big = b"b" * 5_000_000
    async with (
        serving(handler) as server,
        connected(server) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.broadcast, big)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"go")
        assert await client.recv_exactly(len(big) + 5) == big + b"later"


async def test_a_slow_client_is_aborted_and_hurts_no_other(
    autojump_clock: trio.testing.MockClock, log: pytest.LogCaptureFixture
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are in flight
    async with serving(chat) as server, trio.open_nursery() as nursery:
        slow, fast = await connect(server), await connect(server)
        assert await slow.recv() == await fast.recv() == b"hi\n"
        big = b"b" * 50_000_000
        got = []

        async def read() -> None:
            got.append(await fast.recv_exactly(len(big)))

        nursery.start_soon(read)
        assert await server.broadcast(big, timeout=5) == 1
        assert got == [big]
        with pytest.raises(trio.BrokenResourceError):
            while await slow.recv():
                pass
        assert server.stats().aborted == 1
        fast.abort()
        slow.abort()
    assert server.stats().handler_errors == 0  # its handler was woken by our own abort
    assert not [each for each in log.records if each.levelno > logging.INFO]


async def test_connections_in_a_handshake_or_upgrade_are_left_out(
    authority: Authority, server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def handler(sock: Socket) -> None:
        await sock.starttls(server_tls)
        await sock.recv()

    for bind_tls in (None, server_tls):
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(
                nursery, 0, handler if bind_tls is None else chat, tls=bind_tls
            )
            client = await connect(server)
            while server.stats().active < 1:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked()
            assert await server.broadcast(b"CLEAR") == 0
            await client.starttls(client_tls)
            if bind_tls is not None:
                assert await client.recv() == b"hi\n"
            while not (server.connections and server.connections[0].istls()):
                await trio.lowlevel.checkpoint()
            assert await server.broadcast(b"SECRET") == 1
            assert await client.recv() == b"SECRET"
            await client.close()
            server.stop()


@pytest.mark.parametrize("how", ["timeout", "cancelled", "aborted"])
async def test_starttls_behind_a_broadcast_can_end_early(
    how: str, server_tls: ServerTLS, autojump_clock: trio.testing.MockClock
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are in flight
    done = []

    async def handler(sock: Socket) -> None:
        await sock.recv()
        if how == "timeout":
            with pytest.raises(trisock.TLSError, match="a broadcast was in its way"):
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

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        async with closing(client), trio.open_nursery() as inner:
            inner.start_soon(lambda: server.broadcast(b"b" * 50_000_000, timeout=100))
            await trio.testing.wait_all_tasks_blocked()
            await client.send(b"STARTTLS")
            while server.stats().active:
                await trio.sleep(1)  # by a clock that jumps
        assert done == [how]
        server.stop()


async def test_send_file_behind_a_broadcast_can_be_cancelled(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are in flight
    big = b"b" * 5_000_000

    async def handler(sock: Socket) -> None:
        await sock.recv()
        with trio.move_on_after(5) as scope:
            await sock.send_file(io.BytesIO(b"never"))
        assert scope.cancelled_caught
        async with trio.open_nursery() as inner:
            inner.start_soon(sock.recv)  # the go-ahead of the client
            await sock.send(b"mine")  # only the broadcast is ahead of it

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler)
        client = await connect(server)
        while not server.connections:
            await trio.lowlevel.checkpoint()
        async with closing(client), trio.open_nursery() as inner:
            inner.start_soon(server.broadcast, big)
            await trio.testing.wait_all_tasks_blocked()
            await client.send(b"file, please")
            await trio.sleep(6)
            await client.send(b"go on")
            assert await client.recv_exactly(len(big) + 4) == big + b"mine"
        server.stop()


async def test_a_broadcast_copies_its_data_at_the_call() -> None:
    big = b"h" * 5_000_000

    async def handler(sock: Socket) -> None:
        await sock.send(big)
        await sock.recv()

    async with (
        serving(handler) as server,
        connected(server) as client,
        trio.open_nursery() as nursery,
    ):
        await trio.testing.wait_all_tasks_blocked()
        news = bytearray(b"old")
        nursery.start_soon(server.broadcast, news)
        await trio.testing.wait_all_tasks_blocked()
        news[:] = b"new"
        assert await client.recv_exactly(len(big) + 3) == big + b"old"


async def test_starttls_waits_for_an_earlier_broadcast(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    async def handler(sock: Socket) -> None:
        assert await sock.recv() == b"STARTTLS"
        await sock.starttls(server_tls)
        await sock.send(b"secret")

    big = b"b" * 5_000_000
    async with (
        serving(handler) as server,
        connected(server) as client,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(server.broadcast, big)
        await trio.testing.wait_all_tasks_blocked()
        await client.send(b"STARTTLS")
        assert await client.recv_exactly(len(big)) == big
        await client.starttls(client_tls)
        assert await client.recv() == b"secret"


async def test_a_broadcast_too_late_for_plain_text_is_dropped(
    server_tls: ServerTLS, client_tls: ClientTLS
) -> None:
    """It waits behind the handler's go-ahead, and the handler calls starttls next."""
    big = b"go ahead " * 500_000

    async def handler(sock: Socket) -> None:
        await sock.send(big)
        await sock.starttls(server_tls)
        await sock.send(b"secret")

    async with (
        serving(handler) as server,
        connected(server) as client,
        trio.open_nursery() as nursery,
    ):
        await trio.testing.wait_all_tasks_blocked()
        delivered = []

        async def broadcast() -> None:
            delivered.append(await server.broadcast(b"NEWS"))

        nursery.start_soon(broadcast)
        await trio.testing.wait_all_tasks_blocked()
        assert await client.recv_exactly(len(big)) == big
        # Either it went out before starttls began, whole, or not at all.
        news = await client.peek()
        if news is not None:
            assert await client.recv_exactly(4) == b"NEWS"
        await client.starttls(client_tls)
        assert await client.recv() == b"secret"
        assert delivered == [0 if news is None else 1]


async def test_a_cancelled_broadcast_without_a_timeout_ends(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are in flight
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat)
        client = await connect(server)
        assert await client.recv() == b"hi\n"
        with trio.move_on_after(1) as scope:
            await server.broadcast(b"b" * 50_000_000, timeout=math.inf)
        assert scope.cancelled_caught
        async with closing(client):
            server.stop(grace=0)


async def test_broadcast_sends_to_all_concurrently(
    autojump_clock: trio.testing.MockClock,
) -> None:
    autojump_clock.autojump_threshold = 0.05  # not while bytes are in flight

    async with serving(chat) as server:
        slow = [await connect(server) for _ in range(3)]
        for each in slow:
            assert await each.recv() == b"hi\n"
        start = trio.current_time()
        assert await server.broadcast(b"b" * 50_000_000, timeout=5) == 0
        assert trio.current_time() - start == pytest.approx(5, abs=1)
        for each in slow:
            each.abort()


async def test_a_broadcast_waiting_behind_a_go_ahead_is_left_out(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    delivered = []

    async def handler(sock: Socket) -> None:
        async with trio.open_nursery() as inner:

            async def broadcast() -> None:
                delivered.append(await server.broadcast(b"NEWS"))

            async with sock._connection.sending:
                inner.start_soon(broadcast)
                await trio.testing.wait_all_tasks_blocked()
            await sock.starttls(server_tls)  # without a pass through the scheduler
        await sock.recv()

    async with serving(handler) as server:
        async with await connect(server) as client:
            await client.starttls(client_tls)
    assert delivered == [0]
