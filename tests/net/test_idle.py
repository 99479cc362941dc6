"""``Socket.idle`` without a server: only its timeout has an effect."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from helpers.pairs import closing
from helpers.reads import ITEM, READS, waits
from trisock import IdleTimeoutError, Socket
from trisock._net.iterators import Lines
from trisock.testing import socket_pair


@pytest.fixture(params=[False, True], ids=["plain", "TLS"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Socket, Socket]]:
    async with closing(*(pair := await socket_pair(tls=request.param))):
        yield pair


@pytest.mark.parametrize("read", list(filter(waits, READS)))
async def test_a_read_ends_after_the_timeout_and_loses_nothing(
    read: str, a: Socket, b: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    begin = trio.current_time()
    with pytest.raises(IdleTimeoutError) as caught, a.idle(timeout=1):
        await READS[read](a)
    assert trio.current_time() == begin + 1
    assert str(caught.value) == f"{a.getpeer()} sent nothing for 1 second"
    assert isinstance(caught.value, trio.TooSlowError)
    assert caught.value.at_boundary
    await b.send(ITEM)
    assert await a.recv_exactly(len(ITEM)) == ITEM


async def test_the_timeout_counts_from_the_last_byte(
    a: Socket, b: Socket, mock_clock: trio.testing.MockClock
) -> None:
    async def read() -> None:
        with pytest.raises(IdleTimeoutError) as caught, a.idle(timeout=10):
            await a.recv_line()
        assert not caught.value.at_boundary

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for _ in range(3):
            await trio.testing.wait_all_tasks_blocked()
            mock_clock.jump(9)
            await b.send(b"half")
            while len(a._connection.buffer) % 4 or not a._connection.in_idle_read:
                await trio.lowlevel.checkpoint()
            await trio.testing.wait_all_tasks_blocked(0.001)
        mock_clock.jump(10)
    await b.send(b" line\n")
    assert await a.recv_line() == b"halfhalfhalf line"


@pytest.mark.parametrize("timeouts", [(2, 7), (7, 2), (None, 2), (2, None)])
async def test_the_shortest_timeout_of_nested_blocks_applies(
    timeouts: tuple[float | None, float | None],
    a: Socket,
    autojump_clock: trio.testing.MockClock,
) -> None:
    begin = trio.current_time()
    outer, inner = timeouts
    with pytest.raises(IdleTimeoutError), a.idle(outer), a.idle(inner):
        await a.recv()
    assert trio.current_time() == begin + 2


async def test_the_timeout_ends_with_its_block(
    a: Socket, b: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    with a.idle(timeout=1):
        pass
    with pytest.raises(ValueError, match="of the block"), a.idle(timeout=1):
        raise ValueError("of the block")
    with trio.move_on_after(5) as scope:
        await a.recv()
    assert scope.cancelled_caught


async def test_only_reads_of_this_socket_have_the_timeout(
    a: Socket, b: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    with a.idle(timeout=1):
        await trio.sleep(5)
        with trio.move_on_after(5) as scope:
            await b.recv()
    assert scope.cancelled_caught


async def test_a_read_in_another_task_has_the_timeout_too(
    a: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    async def read() -> None:
        with pytest.raises(IdleTimeoutError):
            await a.recv()

    with a.idle(timeout=1):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)


async def test_blocks_of_two_tasks_may_overlap(
    a: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    first, second, third = a.idle(3), a.idle(2), a.idle(1)
    for each in (first, second, third):
        each.__enter__()
    first.__exit__(None, None, None)  # the two later blocks continue
    third.__exit__(None, None, None)
    begin = trio.current_time()
    with pytest.raises(IdleTimeoutError):
        await a.recv()
    assert trio.current_time() == begin + 2
    second.__exit__(None, None, None)
    assert a._connection.idle is None


async def test_bytes_in_an_inner_block_count_in_the_outer_one(a: Socket, b: Socket) -> None:
    outer = a.idle()
    await b.send(b"x")
    with outer:
        with a.idle():
            assert await a.recv() == b"x"
        assert outer.begun


async def test_a_block_cannot_be_used_twice_at_once(a: Socket) -> None:
    block = a.idle()
    with block, pytest.raises(RuntimeError, match="already in use"), block:
        pass
    with block:
        pass


async def test_data_is_returned_without_delay(a: Socket, b: Socket) -> None:
    await b.send(b"one\ntwo\n")
    with a.idle(timeout=100):
        assert await a.recv_line() == b"one"
    async for line in a.lines(idle=True):
        assert line == b"two"
        break


async def test_an_idle_read_returns_eof(a: Socket, b: Socket) -> None:
    await b.close()
    with a.idle(timeout=100):
        assert await a.recv() == b""
    assert [line async for line in a.lines(idle=True)] == []


async def test_a_close_wakes_an_idle_read(a: Socket) -> None:
    async def read() -> None:
        with pytest.raises(trio.ClosedResourceError), a.idle(timeout=100):
            await a.recv()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        a.abort()


async def test_a_second_reader_is_refused_during_an_idle_read(a: Socket) -> None:
    async with trio.open_nursery() as nursery:
        with a.idle():
            nursery.start_soon(a.recv)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await a.recv()
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("iterate", [Socket.lines, Socket.frames, Lines.batches])
async def test_a_second_reader_of_an_idle_iterator_is_refused(
    iterate: Callable[..., AsyncIterator[object]], a: Socket
) -> None:
    items = a.lines(idle=True).batches() if iterate is Lines.batches else iterate(a, idle=True)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(anext, items)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await anext(items)
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(("timeout", "error"), [(-1, ValueError), ("1", TypeError)])
async def test_an_invalid_timeout_is_refused(
    timeout: float, error: type[Exception], a: Socket
) -> None:
    with pytest.raises(error, match="timeout"):
        a.idle(timeout)


@pytest.mark.parametrize("iterate", ["lines", "frames"])
async def test_idle_must_be_a_bool(iterate: str, a: Socket) -> None:
    with pytest.raises(TypeError, match="idle must be True or False"):
        getattr(a, iterate)(idle=None)


async def test_server_is_none_for_a_socket_without_a_server(a: Socket, b: Socket) -> None:
    assert a.server is b.server is None
