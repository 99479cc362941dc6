"""Only some sends in a row are schedule points, but enough to let other tasks run."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from helpers.checkpoints import is_schedule_point
from helpers.reads import ITEM, READS
from trisock import Socket

pytestmark = pytest.mark.parametrize("layer", ["plain", "tls"])

KIB = 1024


async def schedule_points(sock: Socket, data: bytes, count: int) -> list[bool]:
    """Send ``count`` times. Return one bool per send: whether it was a schedule point."""
    return [await is_schedule_point(sock.send(data)) for _ in range(count)]


async def test_at_least_one_of_sixteen_sends_is_a_schedule_point(a: Socket) -> None:
    found = await schedule_points(a, b"x", 100)
    assert found[0]
    assert all(any(found[i : i + 16]) for i in range(len(found) - 15))


async def test_most_sends_in_a_row_are_not_schedule_points(a: Socket) -> None:
    found = await schedule_points(a, b"x", 100)
    assert sum(found) < 10


@pytest.mark.parametrize("size", [128 * KIB, 512 * KIB, 1024 * KIB])
async def test_one_send_in_each_mib_is_a_schedule_point(a: Socket, b: Socket, size: int) -> None:
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2048 * KIB)
    count = 1024 * KIB // size
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.recv_exactly, 2 * count * size)
        found = await schedule_points(a, bytes(size), 2 * count)
    assert all(any(found[i : i + count]) for i in range(count + 1))


@pytest.mark.parametrize("name", READS)
async def test_the_first_send_after_a_buffered_read_is_a_schedule_point(
    a: Socket, name: str
) -> None:
    await a.send(b"x")
    for _ in range(20):
        a.unrecv(ITEM)
        await READS[name](a)
        assert await is_schedule_point(a.send(b"x"))


@pytest.mark.parametrize("name", [name for name in READS if name != "recv_exactly nothing"])
async def test_the_first_send_after_a_received_chunk_is_a_schedule_point(
    a: Socket, b: Socket, name: str
) -> None:
    await a.send(b"x")
    for _ in range(5):
        await b.send(ITEM)
        await trio.lowlevel.wait_readable(a.fileno())
        await READS[name](a)
        assert await is_schedule_point(a.send(b"x"))
        while a.info().buffered:
            await a.recv()


async def test_a_send_after_an_item_of_a_batch_is_a_schedule_point(a: Socket) -> None:
    for data, items in ((b"line\n", a.lines()), (b"\1x", a.frames(1))):
        a.unrecv(data * 24)
        for _ in range(24):
            await anext(items)
            assert await is_schedule_point(a.send(b"x"))


async def test_every_send_in_a_row_is_a_cancel_point(a: Socket, b: Socket) -> None:
    for _ in range(40):
        with trio.CancelScope() as scope:
            scope.cancel()
            await a.send(b"never sent")
        assert scope.cancelled_caught
        await a.send(b"x")
    assert await b.recv_exactly(40) == b"x" * 40


async def test_every_send_all_is_a_full_checkpoint(a: Socket) -> None:
    await a.send(b"x")
    for _ in range(20):
        with trio.testing.assert_checkpoints():
            await a.send_all(b"x")
