"""The times of Server.stop: the delay, the grace, and calls that shorten them."""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, read_all
from helpers.server import bound, connect, connected, echo, opening
from trisock import ClientTLS, ServerTLS, Socket


class Cancelled:
    """A handler that runs until it is cancelled, and records the time of the cancellation."""

    def __init__(self) -> None:
        self.at: list[float] = []

    async def __call__(self, sock: Socket) -> None:
        try:
            await trio.sleep_forever()
        finally:
            self.at.append(trio.current_time())


async def closing_time(server: trisock.Server) -> float:
    await server.closing.wait()
    return trio.current_time()


# ---- the delay ----


async def test_during_the_delay_the_server_accepts_but_is_not_ready(
    mock_clock: trio.testing.MockClock,
) -> None:
    async with bound(echo) as server:
        assert server.ready
        server.stop(grace=5, delay=10)
        assert not server.ready
        mock_clock.jump(9.9)
        async with await connect(server) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
            assert not server.closing.is_set()
            assert not server.ready
            mock_clock.jump(0.2)
            assert await closing_time(server) == pytest.approx(10.1)
            await client.send(b"still there")
            assert await client.recv() == b"still there"
        await server.wait_closed()
    assert not server.ready


async def test_without_a_delay_the_server_stops_at_once() -> None:
    async with bound(echo) as server:
        server.stop()
        assert not server.ready
        assert server.closing.is_set()


async def test_the_grace_counts_from_the_end_of_the_delay(
    jumping_clock: trio.testing.MockClock,
) -> None:
    handler = Cancelled()
    async with bound(handler) as server, connected(server):
        begin = trio.current_time()
        server.stop(grace=5, delay=10)
        assert await closing_time(server) == pytest.approx(begin + 10)
        await server.wait_closed()
        assert handler.at == [pytest.approx(begin + 15)]


async def test_without_grace_handlers_are_cancelled_after_the_delay(
    jumping_clock: trio.testing.MockClock,
) -> None:
    handler = Cancelled()
    async with bound(handler) as server, connected(server):
        begin = trio.current_time()
        server.stop(grace=0, delay=10)
        await server.wait_closed()
        assert handler.at == [pytest.approx(begin + 10)]


async def test_a_handler_may_stop_its_server_with_a_delay(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async def handler(sock: Socket) -> None:
        server.stop(delay=1)
        assert not server.ready
        await server.closing.wait()
        await sock.send(b"goodbye")

    async with bound(handler) as server, connected(server) as client:
        assert await read_all(client) == b"goodbye"
        await server.wait_closed()


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"delay": -1}, ValueError, "delay must be 0 or more, not -1"),
        ({"delay": "1"}, TypeError, "delay must be a number of seconds"),
        ({"delay": math.nan}, ValueError, "delay"),
        ({"grace": math.nan}, ValueError, "grace"),
    ],
)
async def test_a_refused_time_changes_nothing(
    arguments: dict[str, float], error: type[Exception], words: str
) -> None:
    async with bound(echo) as server:
        with pytest.raises(error, match=words):
            server.stop(**arguments)
        assert server.ready
        assert not server.closing.is_set()


# ---- further calls ----


@pytest.mark.parametrize(
    ("calls", "closing_at", "end_at"),
    [
        ([(0, 5, 10), (0, 5, 10)], 10, 15),
        ([(0, 5, 10), (0, 50, 100)], 10, 15),
        ([(0, 20, 10), (0, 25, 1)], 1, 26),
        ([(0, 20, 10), (0, 3, 20)], 10, 23),  # each time is the earlier one
        ([(0, 20, 10), (5, 4, 1)], 6, 10),
        ([(0, 20, 0), (18, 10, 0)], 0, 20),
        ([(0, 20, 0), (3, 2, 0)], 0, 5),
        ([(0, None, 2), (1, 4, 5)], 2, 10),
        ([(0, None, 0), (9, 0, 0)], 0, 9),
        ([(0, 5, 0), (1, None, 0)], 0, 5),
        ([(0, 20, 10), (2, 0, 0)], 2, 2),
    ],
)
async def test_further_calls_can_only_make_the_times_earlier(
    calls: list[tuple[float, float | None, float]],
    closing_at: float,
    end_at: float,
    jumping_clock: trio.testing.MockClock,
) -> None:
    handler = Cancelled()
    times: list[float] = []
    async with bound(handler) as server, connected(server):
        begin = trio.current_time()

        async def note_closing() -> None:
            times.append(await closing_time(server))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(note_closing)
            for at, grace, delay in calls:
                await trio.sleep_until(begin + at)
                server.stop(grace, delay=delay)
            await server.wait_closed()
        assert times == [pytest.approx(begin + closing_at)]
        assert handler.at == [pytest.approx(begin + end_at)]


# ---- no limit ----


def run_for_long(function: Callable[[], Awaitable[None]]) -> None:
    """Run a test with a later deadline than other tests have."""

    async def limited() -> None:
        with trio.fail_after(20_000):
            await function()

    trio.run(limited, clock=trio.testing.MockClock(autojump_threshold=0.05))


def test_without_a_limit_handlers_run_as_long_as_needed() -> None:
    async def handler(sock: Socket) -> None:
        await server.closing.wait()
        await trio.sleep(10_000)
        await sock.send(b"done")

    async def main() -> None:
        nonlocal server
        async with bound(handler) as server, connected(server) as client:
            server.stop(grace=None)
            assert await read_all(client) == b"done"
            await server.wait_closed()

    server: trisock.Server
    run_for_long(main)


@pytest.mark.parametrize(("timeout", "expected"), [(None, 60), (7, 7), (100, 100)])
@pytest.mark.parametrize("begun", [True, False])
def test_without_a_limit_handshakes_still_end(
    timeout: float | None, expected: float, begun: bool, server_tls: ServerTLS
) -> None:
    """A handshake without a timeout gets 60 seconds, even if it begins after the stop."""

    async def main() -> None:
        listener = await trisock.listen(0, host="127.0.0.1")
        silent = await trisock.connect("127.0.0.1", listener.port)
        async with (
            closing(silent),
            bound(echo, listener, tls=server_tls, handshake_timeout=timeout) as server,
        ):
            while begun and not opening(server):
                await trio.lowlevel.checkpoint()
            begin = trio.current_time()
            server.stop(grace=None)
            assert await silent.recv() == b""
            await server.wait_closed()
            assert begin + expected <= trio.current_time() < begin + expected + 3
        assert server.stats().failed_handshakes == 1

    run_for_long(main)


async def test_handshakes_have_their_own_timeout_within_the_grace(
    server_tls: ServerTLS, jumping_clock: trio.testing.MockClock
) -> None:
    async with bound(echo, tls=server_tls, handshake_timeout=None, host="127.0.0.1") as server:
        async with closing(await connect(server)):
            while not opening(server):
                await trio.lowlevel.checkpoint()
            begin = trio.current_time()
            server.stop(grace=20)
            await server.wait_closed()
            assert trio.current_time() == pytest.approx(begin + 20)
    assert server.stats().refused == 1


# ---- handshakes ----


async def test_a_handshake_in_progress_reaches_its_handler(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async with bound(echo, tls=server_tls) as server:
        async with await connect(server) as client:
            while not opening(server):
                await trio.lowlevel.checkpoint()
            server.stop()
            await client.starttls(client_tls)
            await client.send(b"hello")
            assert await client.recv() == b"hello"
        await server.wait_closed()
    assert server.stats() == trisock.ServerStats(accepted=1)


async def test_the_backlog_of_a_tls_server_reaches_its_handlers(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    listener = await trisock.listen(0, host="127.0.0.1")
    clients = [await trisock.connect("127.0.0.1", listener.port) for _ in range(5)]
    async with bound(echo, listener, tls=server_tls, max_connections=2) as server:
        server.stop()
        for client in clients:
            async with client:
                await client.starttls(client_tls)
                await client.send(b"hello")
                assert await client.recv() == b"hello"
        await server.wait_closed()
    assert server.stats() == trisock.ServerStats(accepted=5)


async def test_a_stop_needs_a_finite_delay() -> None:
    async with bound(echo, host="127.0.0.1") as server:
        with pytest.raises(TypeError, match="delay must be a number"):
            server.stop(delay=None)  # type: ignore[arg-type]
        assert server.ready


async def test_handlers_cancelled_after_the_grace_are_counted(
    log: pytest.LogCaptureFixture,
) -> None:
    async def handler(sock: Socket) -> None:
        if await sock.recv() == b"stay":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)

    async with bound(handler, host="127.0.0.1") as server:
        async with connected(server) as one, connected(server) as two, connected(server) as three:
            await one.send(b"stay")
            await two.send(b"stay")
            await three.send(b"go")
            assert await three.recv() == b""
            server.stop(grace=0)
            await server.wait_closed()
    assert server.stats() == trisock.ServerStats(accepted=3, cancelled=2)
    (record,) = log.records
    where = f"the server on {server.addresses[0]} stopped; number of handlers that it cancelled: 2"
    assert (record.levelno, record.getMessage()) == (logging.INFO, where)
