"""Tests of recv_exactly, recv_until and lines."""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from trisock import IncompleteReadError, LimitExceededError, Socket
from trisock._net import transport as _transport


async def test_recv_exactly_concatenates_and_splits_chunks(a: Socket, b: Socket) -> None:
    a.unrecv(b"abc")
    async with trio.open_nursery() as nursery:
        got = []

        async def read() -> None:
            got.append(await a.recv_exactly(8))

        nursery.start_soon(read)
        for part in (b"d", b"ef", b"ghij"):
            await trio.testing.wait_all_tasks_blocked()
            await b.send(part)
    assert got == [b"abcdefgh"]
    assert await a.recv_exactly(0) == b""
    assert await a.recv_exactly(2) == b"ij"


async def test_an_incomplete_read_loses_nothing(a: Socket, b: Socket) -> None:
    await b.send(b"abc")
    await b.send_eof()
    for _ in range(2):
        with pytest.raises(IncompleteReadError) as caught:
            await a.recv_exactly(4)
        assert (caught.value.partial, caught.value.expected) == (b"abc", 4)
        with pytest.raises(IncompleteReadError) as caught:
            await a.recv_until(b"\n")
        assert (caught.value.partial, caught.value.expected) == (b"abc", None)
    assert await a.recv_exactly(3) == b"abc"
    with pytest.raises(IncompleteReadError) as caught:
        await a.recv_exactly(1)
    assert caught.value.partial == b""


async def test_recv_until_returns_up_to_and_including_the_delimiter(a: Socket, b: Socket) -> None:
    got = []

    async def read() -> None:
        got.append(await a.recv_until(b"\r\n"))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for part in (b"EH", b"LO\r", b"\nNEXT\r\n"):
            await trio.testing.wait_all_tasks_blocked()
            await b.send(part)
    assert got == [b"EHLO\r\n"]
    assert await a.recv_until(bytearray(b"\r\n")) == b"NEXT\r\n"


async def test_no_byte_of_a_line_over_the_limit_is_lost(a: Socket, b: Socket) -> None:
    a.unrecv(b"0123456789\nrest")
    for limit in (1, 10):
        with pytest.raises(LimitExceededError) as caught:
            await a.recv_until(b"\n", max_bytes=limit)
        assert caught.value.limit == limit
    assert await a.recv_until(b"\n", max_bytes=11) == b"0123456789\n"
    assert await a.recv() == b"rest"


async def test_an_endless_line_is_buffered_up_to_the_limit(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:

        async def flood() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await b.send(b"x" * 50_000_000)

        nursery.start_soon(flood)
        with pytest.raises(LimitExceededError):
            await a.recv_until(b"\n", max_bytes=100_000)
        assert a.info().buffered <= 100_000 + _transport.RECEIVE_SIZE
        a.abort()


async def test_a_cancelled_read_loses_nothing(a: Socket, b: Socket) -> None:
    for read in (lambda: a.recv_exactly(100), lambda: a.recv_until(b"\n")):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            await b.send(b"abc")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert await a.recv_exactly(6) == b"abcabc"


async def test_leaving_a_loop_over_lines_loses_nothing(a: Socket, b: Socket) -> None:
    await b.send(b"one\ntwo\n\nthree\nfour\n")
    await b.send_eof()
    async for line in a.lines():
        if line == b"two":
            break
    assert await a.recv_exactly(1) == b"\n"
    with pytest.raises(ZeroDivisionError):
        async for line in a.lines(keep_ends=True):
            assert line == b"three\n"
            1 / 0  # noqa: B018
    assert [line async for line in a.lines(delimiter=b"r\n")] == [b"fou"]
    assert await a.recv() == b""


async def test_a_line_cut_short_raises_incomplete_read_error(a: Socket, b: Socket) -> None:
    await b.send(b"DELETE /tmp/x\nDELETE /")
    await b.send_eof()
    got = []
    with pytest.raises(IncompleteReadError) as caught:
        async for line in a.lines():
            got.append(line)
    assert got == [b"DELETE /tmp/x"]
    assert caught.value.partial == b"DELETE /"


async def test_the_lines_iterator_raises_if_a_line_exceeds_the_limit(a: Socket, b: Socket) -> None:
    await b.send(b"x" * 100)
    with pytest.raises(LimitExceededError):
        async for _ in a.lines(max_bytes=99):
            pass
    await b.send(b"\nfits\n" + b"x" * 9 + b"\nrest")
    assert await a.recv_exactly(101) == b"x" * 100 + b"\n"
    got = []
    with pytest.raises(LimitExceededError):  # although one chunk holds the whole line
        async for line in a.lines(max_bytes=9):
            got.append(line)
    assert got == [b"fits"]
    assert await a.recv_exactly(14) == b"x" * 9 + b"\nrest"


async def test_the_iterator_continues_after_a_skipped_line(a: Socket, b: Socket) -> None:
    await b.send(b"one\n" + b"x" * 9 + b"\ntwo\n")
    await b.send_eof()
    lines = a.lines(max_bytes=9)
    got: list[bytes] = []
    while True:
        try:
            line = await anext(lines, None)
        except LimitExceededError:
            assert await a.skip_until(b"\n") == 10
            continue
        if line is None:
            break
        got.append(line)
    assert got == [b"one", b"two"]


async def test_iterating_over_a_socket_yields_chunks(a: Socket, b: Socket) -> None:
    await b.send(b"abc")
    await b.send_eof()
    a.unrecv(b"first")
    assert [chunk async for chunk in a] == [b"first", b"abc"]


async def test_a_read_after_the_last_line_of_a_chunk_waits(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:
        await b.send(b"one\ntwo\n")
        lines = a.lines()
        assert [await lines.__anext__(), await lines.__anext__()] == [b"one", b"two"]
        got = []

        async def read() -> None:
            got.append(await a.recv())

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await b.send(b"more")
    assert got == [b"more"]


async def test_info_and_isopen_do_not_discard_lines_already_split(a: Socket, b: Socket) -> None:
    await b.send(b"one\n\nthree\nfour")
    unread = []
    async for _ in a.lines():
        buffer = a._connection.buffer
        lines = buffer._batch
        unread.append(a.info().buffered)
        assert a.isopen()
        assert buffer._batch is lines is not None
        if len(unread) == 3:
            break
    assert unread == [11, 10, 4]
    assert await a.recv_exactly(4) == b"four"


@pytest.mark.parametrize(
    ("chunk", "delimiter"),
    [
        (b"one\n", b"\n"),
        (b"\n", b"\n"),
        (b"one\ntwo\n", b"\n"),
        (b"one\r\n", b"\r\n"),
        (b"\r", b"\r\n"),
        (b"x", b"\r\n"),
        (b"one\r\ntwo\r\nthree", b"\r\n"),
        (b"one\n\n\n", b"\n\n"),
    ],
)
async def test_a_chunk_of_one_line_is_read_like_other_chunks(
    a: Socket, b: Socket, chunk: bytes, delimiter: bytes
) -> None:
    rest = b"|" + delimiter
    expected, remainder = (chunk + rest).split(delimiter, 1)
    reads: list[Callable[[], Awaitable[object]]] = [
        lambda: a.recv_line(delimiter=delimiter),
        lambda: a.recv_until(delimiter),
        lambda: anext(a.lines(delimiter=delimiter)),
        lambda: anext(a.lines(delimiter=delimiter, keep_ends=True)),
        lambda: anext(a.lines(delimiter=delimiter).batches()),
    ]
    got: list[object] = []
    for read in reads:
        async with trio.open_nursery() as nursery:

            async def receive(read: Callable[[], Awaitable[object]] = read) -> None:
                got.append(await read())

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await b.send(chunk)
            await trio.testing.wait_all_tasks_blocked()
            await b.send(rest)
        if read is not reads[-1]:
            assert await a.recv_exactly(len(remainder)) == remainder
    end = expected + delimiter
    assert got[:4] == [expected, end, expected, end]
    assert got[4] == (chunk.split(delimiter)[:-1] or [expected])


async def test_a_line_over_the_limit_that_is_a_whole_chunk_stays_unread(
    a: Socket, b: Socket
) -> None:
    await b.send(b"12345\n")
    with pytest.raises(LimitExceededError):
        await a.recv_line(max_bytes=5)
    assert await a.recv_line(max_bytes=6) == b"12345"
