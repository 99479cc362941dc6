"""relay: its time limits, the memory that a peer can make it use, and no garbage at its end."""

from __future__ import annotations

import errno
import gc
import itertools
import os
import random
import socket
import tracemalloc
import weakref
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import read_all, until_full
from helpers.relaying import (
    PLAIN_OR_TLS,
    end,
    flood,
    read_to_end,
    relaying,
    send_and_end,
)
from trisock import Socket
from trisock._net import relay as _relay
from trisock.testing import socket_pair

ALL_LAYERS = list(itertools.product(PLAIN_OR_TLS, repeat=2))
EACH_LAYER = pytest.mark.parametrize("layers", ALL_LAYERS, ids="-".join)

LIMIT = 10  # seconds of an autojump clock


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """Return a clock that lets bytes in flight arrive before it jumps."""
    monkeypatch.setattr(_relay, "_HALF_CLOSED_TIMEOUT", LIMIT)
    return trio.testing.MockClock(autojump_threshold=0.02)


@pytest.fixture
def still_clock() -> trio.testing.MockClock:
    return trio.testing.MockClock()


# ---- time limits ----


@EACH_LAYER
async def test_the_idle_timeout_ends_both_connections_cleanly(
    layers: tuple[str, str], jumping_clock: trio.testing.MockClock
) -> None:
    start = trio.current_time()
    async with relaying(layers, idle_timeout=LIMIT) as relayed:
        for sender, receiver in ((relayed.x, relayed.y), (relayed.y, relayed.x)):
            await trio.sleep(LIMIT - 1)
            await sender.send(b"data")
            assert await receiver.recv() == b"data"
        assert await read_all(relayed.x) == b""
        assert await read_all(relayed.y) == b""
        assert trio.current_time() - start == pytest.approx(3 * LIMIT - 2, abs=1)
        assert await relayed.result() == (4, 4)


async def test_two_silent_open_peers_have_no_default_limit(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with relaying(("plain", "tls")) as relayed:
        await trio.sleep(3 * LIMIT)
        await relayed.x.send(b"data")
        assert await relayed.y.recv() == b"data"
        assert not relayed.done.is_set()


@EACH_LAYER
@pytest.mark.parametrize("idle_timeout", [None, LIMIT])
async def test_after_eof_the_other_direction_has_a_time_limit(
    idle_timeout: float | None,
    layers: tuple[str, str],
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with relaying(layers, idle_timeout=idle_timeout) as relayed:
        await end(relayed.x)
        start = trio.current_time()
        for _ in range(3):
            await relayed.y.send(b"data")
            assert await relayed.x.recv() == b"data"
            await trio.sleep(LIMIT - 1)
        assert await read_to_end(relayed.x) == b""
        assert await read_to_end(relayed.y) == b""
        assert trio.current_time() - start == pytest.approx(3 * LIMIT - 2, abs=1)
        assert await relayed.result() == (0, 12)


@EACH_LAYER
async def test_a_connection_breaks_if_its_peer_reads_nothing(
    layers: tuple[str, str], jumping_clock: trio.testing.MockClock
) -> None:
    start = trio.current_time()
    async with relaying(layers, idle_timeout=LIMIT) as relayed:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, relayed.x)
            await relayed.assert_broken_by(relayed.y)
            # The kernel may still move bytes while the clock jumps.
            assert LIMIT <= trio.current_time() - start <= 4 * LIMIT
            with pytest.raises(trio.BrokenResourceError):
                await read_all(relayed.y)


@pytest.mark.parametrize("layers", [("plain", "plain"), ("tls", "tls")], ids="-".join)
async def test_a_stalled_peer_has_a_limit_after_the_sources_eof(
    layers: tuple[str, str], jumping_clock: trio.testing.MockClock
) -> None:
    """The peer that sent EOF may be gone, so the default limit applies."""
    start = trio.current_time()
    async with relaying(layers, small=True) as relayed:
        async with trio.open_nursery() as nursery:

            async def send_and_leave() -> None:
                with trio.move_on_after(2):
                    await flood(relayed.x)
                relayed.x._connection.close_immediately()

            nursery.start_soon(send_and_leave)
            await relayed.done.wait()
        assert isinstance(relayed.outcome, trio.BrokenResourceError)
        assert "accepted no data" in str(relayed.outcome)
        assert LIMIT <= trio.current_time() - start <= LIMIT + 5


@pytest.mark.parametrize("layer", PLAIN_OR_TLS)
async def test_a_slow_reader_is_not_mistaken_for_a_stalled_reader(
    layer: str, jumping_clock: trio.testing.MockClock
) -> None:
    size = 1_000_000
    received = 0
    async with relaying((layer, layer), idle_timeout=3, small=True) as relayed:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_and_end, relayed.x, b"x" * size)
            while received < size:
                await trio.sleep(2)
                received += len(await relayed.y.recv())  # up to 64 KiB
                while relayed.y.info().buffered:
                    received += len(await relayed.y.recv())
            await end(relayed.y)
        assert await relayed.result() == (size, 0)
    assert trio.current_time() > 15


@pytest.mark.parametrize(
    "layers",
    [
        pytest.param(each, marks=() if each == ("plain", "plain") else pytest.mark.rare)
        for each in ALL_LAYERS
    ],
    ids="-".join,
)
async def test_a_slow_reader_is_tolerated_without_the_send_queues_size(
    layers: tuple[str, str],
    jumping_clock: trio.testing.MockClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only Linux reports how many bytes are in the send queue."""
    monkeypatch.setattr(_relay, "send_queue_size", lambda _: 0)
    async with relaying(layers, idle_timeout=3, small=True) as relayed:
        relayed.b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the kernel's minimum
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, relayed.x)
            for _ in range(15):
                await trio.sleep(2)
                assert not relayed.done.is_set()
                await relayed.y._connection.transport.receive()  # only part of a chunk
            nursery.cancel_scope.cancel()


async def test_bytes_that_arrived_before_the_limit_are_relayed(
    still_clock: trio.testing.MockClock,
) -> None:
    """Data arrives before the limit, but the event loop runs again only after the limit."""
    for _ in range(12):  # Trio wakes the tasks of one pass in random order
        async with relaying(("plain", "plain"), idle_timeout=1, small=True) as relayed:
            await trio.testing.wait_all_tasks_blocked()
            os.write(relayed.x.fileno(), b"data")
            still_clock.jump(1)
            assert await relayed.y.recv() == b"data"
            await trio.testing.wait_all_tasks_blocked()
            assert not relayed.done.is_set()


async def test_progress_just_before_the_limit_counts(
    jumping_clock: trio.testing.MockClock,
) -> None:
    """Blocked sends are checked once a second. The last check before the limit is at 10 s."""
    async with relaying(("plain", "plain"), idle_timeout=10.5, small=True) as relayed:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood, relayed.x)
            await trio.sleep(10.2)
            await relayed.y.recv()
            await trio.sleep(1)
            assert not relayed.done.is_set()
            nursery.cancel_scope.cancel()


async def test_eof_that_arrived_before_the_limit_is_relayed(
    still_clock: trio.testing.MockClock,
) -> None:
    for _ in range(12):
        async with relaying(("plain", "plain"), idle_timeout=1, small=True) as relayed:
            await trio.testing.wait_all_tasks_blocked()
            relayed.x.socket._sock.shutdown(socket.SHUT_WR)  # type: ignore[attr-defined]
            still_clock.jump(1)
            assert await relayed.y.recv() == b""
            await relayed.y.send(b"answer")
            assert await relayed.x.recv() == b"answer"


@pytest.mark.parametrize("idle_timeout", [None, LIMIT])
async def test_the_limit_restarts_when_one_direction_ends(
    idle_timeout: float | None, jumping_clock: trio.testing.MockClock
) -> None:
    async with relaying(("plain", "plain"), idle_timeout=idle_timeout) as relayed:
        await trio.sleep(LIMIT - 1)
        await end(relayed.x)
        await trio.sleep(LIMIT - 1)
        await relayed.y.send(b"data")
        assert await relayed.x.recv() == b"data"


async def test_the_limit_begins_when_the_stalled_sender_hangs_up(
    jumping_clock: trio.testing.MockClock,
) -> None:
    data = bytes(range(250)) * 1200  # more than relay can send before y reads
    async with relaying(("plain", "plain"), small=True) as relayed:
        await relayed.x.send(data)
        await trio.sleep(3 * LIMIT)
        await end(relayed.x)
        await trio.sleep(LIMIT - 2)
        assert await relayed.y.recv_exactly(len(data)) == data
        await end(relayed.y)
        assert await relayed.result() == (len(data), 0)


async def test_data_of_a_sender_that_left_waits_for_a_slow_reader(
    jumping_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """EPIPE: the reset follows the sender's FIN, so the data before FIN is complete."""
    data = bytes(range(250)) * 1200  # more than relay can send before y reads
    async with relaying(("plain", "plain"), small=True) as relayed:
        monkeypatch.setattr(type(relayed.a.socket), "getsockopt", lambda *_: errno.EPIPE)
        await relayed.x.send(data)
        await end(relayed.x)
        await trio.sleep(LIMIT / 2)  # meanwhile, a check of the source finds the error
        assert await relayed.y.recv_exactly(len(data)) == data


async def test_a_later_blocked_send_is_checked_too(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with relaying(("tls", "tls"), small=True) as relayed, trio.open_nursery() as nursery:
        await relayed.x.send(b"data")
        assert await relayed.y.recv() == b"data"
        await trio.sleep(3)  # the checks of the first send are over
        nursery.start_soon(flood, relayed.x)
        await until_full(relayed.b)
        await trio.testing.wait_all_tasks_blocked()
        relayed.a.abort()  # only a check can notice the abort
        with trio.fail_after(LIMIT):
            assert isinstance(await relayed.result(), trio.ClosedResourceError)
        nursery.cancel_scope.cancel()


# ---- memory ----


@EACH_LAYER
async def test_relay_buffers_one_read_if_the_sink_stalls(layers: tuple[str, str]) -> None:
    data = b"x" * 65536
    held_by_tls = layers.count("tls") * 70_000  # x and relay each hold one encrypted piece

    async def fill(sock: Socket) -> None:
        while True:
            await sock.send(data)

    async with relaying(layers) as relayed, trio.open_nursery() as nursery:
        await trio.testing.wait_all_tasks_blocked()
        tracemalloc.start()
        try:
            nursery.start_soon(fill, relayed.x)
            await until_full(relayed.b)
            await until_full(relayed.x)
            await trio.testing.wait_all_tasks_blocked(0.1)
            held, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert held < 1.9 * 131072 + held_by_tls
        assert len(relayed.a._connection.buffer) == 0
        nursery.cancel_scope.cancel()


# ---- garbage ----


async def ended(x: Socket, y: Socket) -> None:
    await end(x)
    await end(y)


async def reset(x: Socket, y: Socket) -> None:
    x.abort()


async def stalled_and_reset(x: Socket, y: Socket) -> None:
    with trio.move_on_after(0.2):
        await flood(x)
    x.abort()


async def cancelled(x: Socket, y: Socket) -> None:
    pass


@pytest.mark.parametrize("how", [ended, reset, stalled_and_reset, cancelled])
@pytest.mark.parametrize("layers", [("plain", "plain"), ("tls", "tls")], ids="-".join)
async def test_a_finished_relay_is_freed_immediately(
    layers: tuple[str, str],
    how: Callable[[Socket, Socket], Awaitable[None]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(_relay, "_BLOCKED_INTERVAL", 0.1)

    async def run_relay(a: Socket, b: Socket) -> None:
        # contextlib.suppress splits exception groups (Python 3.12), and leaves a reference cycle.
        try:  # noqa: SIM105
            await trisock.relay(a, b)
        except trio.BrokenResourceError:
            pass

    async def run(a: Socket, b: Socket, x: Socket, y: Socket) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(run_relay, a, b)
            await how(x, y)
            await trio.testing.wait_all_tasks_blocked(0.01)
            if how is cancelled:
                nursery.cancel_scope.cancel()

    gc.collect()
    gc.disable()
    try:
        (x, a), (b, y) = [await socket_pair(tls=layer == "tls") for layer in layers]
        references = [weakref.ref(each) for each in (a, b, a.stream, b.stream)]
        await run(a, b, x, y)
        x.abort()
        y.abort()
        del a, b
        await trio.lowlevel.checkpoint()
        assert [each() for each in references] == [None] * 4
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        relays = [each for each in gc.garbage if type(each).__module__ == _relay.__name__]
        assert relays == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()


# ---- random sizes ----


@EACH_LAYER
async def test_random_sizes_both_ways_arrive_byte_for_byte(
    layers: tuple[str, str], times: int
) -> None:
    for seed in range(3 * times):
        choose = random.Random(seed)
        data = [choose.randbytes(choose.choice([0, 100, 10_000, 3_000_000])) for _ in range(2)]
        received: dict[int, bytes] = {}

        async def send(sock: Socket, data: bytes, choose: random.Random) -> None:
            while data:
                size = choose.choice([1, 100, 16_384, 65_536, 1_000_000])
                await sock.send(data[:size])
                data = data[size:]
                if not choose.randrange(5):
                    await trio.sleep(0.001)
            await end(sock)

        async def receive(number: int, sock: Socket, received: dict[int, bytes] = received) -> None:
            received[number] = await read_to_end(sock)

        small = bool(choose.randrange(2))
        async with relaying(layers, small=small) as relayed:
            async with trio.open_nursery() as nursery:
                for number, sock in enumerate((relayed.x, relayed.y)):
                    nursery.start_soon(send, sock, data[number], random.Random(seed + number))
                    nursery.start_soon(receive, 1 - number, sock)
            assert await relayed.result() == (len(data[0]), len(data[1]))
        assert received == dict(enumerate(data))
