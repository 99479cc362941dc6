"""Tests of recv_line, skip_until, batches of lines, and a peek that waits."""

from __future__ import annotations

import contextlib
import itertools
import socket

import pytest
import trio
import trio.testing

from helpers.blocked import cancel_when_blocked
from helpers.pairs import reset
from trisock import IncompleteReadError, LimitExceededError, Socket, TLSError
from trisock._net.receive_buffer import ITEMS_AT_A_TIME

BOTH_LAYERS = pytest.mark.parametrize("layer", ["plain", "tls"])

# One read receives at most this many bytes from the kernel.
ONE_READ = 128 * 1024

# ---- recv_line ----


@BOTH_LAYERS
async def test_recv_line_returns_a_line_without_its_delimiter(a: Socket, b: Socket) -> None:
    await b.send(b"one\r\n\r\n\nth", b"ree\r\nfour\n\r\n")
    assert await a.recv_line(delimiter=b"\r\n") == b"one"
    assert await a.recv_line() == b"\r"
    assert await a.recv_line() == b""
    assert await a.recv_line(delimiter=bytearray(b"\r\n")) == b"three"
    assert await a.recv_line(delimiter=memoryview(b"\n\r\n")) == b"four"
    assert a.info().buffered == 0


async def test_recv_line_distinguishes_eof_from_half_a_line(a: Socket, b: Socket) -> None:
    await b.send(b"one\nQUIT")
    await b.send_eof()
    assert await a.recv_line() == b"one"
    for _ in range(2):
        with pytest.raises(IncompleteReadError) as caught:
            await a.recv_line()
        assert (caught.value.partial, caught.value.at_boundary) == (b"QUIT", False)
    assert await a.recv_exactly(4) == b"QUIT"
    for _ in range(2):
        with pytest.raises(IncompleteReadError) as caught:
            await a.recv_line()
        assert (caught.value.partial, caught.value.at_boundary) == (b"", True)


async def test_the_limit_of_a_line_includes_its_delimiter(a: Socket, b: Socket) -> None:
    a.unrecv(b"12345678\r\nnext")
    for limit in (1, 2, 9):  # 1 is less than the delimiter's length
        with pytest.raises(LimitExceededError) as caught:
            await a.recv_line(delimiter=b"\r\n", max_bytes=limit)
        assert (caught.value.limit, caught.value.frame_length) == (limit, None)
    assert await a.recv_line(delimiter=b"\r\n", max_bytes=10) == b"12345678"


async def test_any_byte_exceeds_a_limit_below_the_delimiters_length(a: Socket, b: Socket) -> None:
    await b.send(b"\r")
    with pytest.raises(LimitExceededError):
        await a.recv_line(delimiter=b"\r\n", max_bytes=1)
    assert await a.recv() == b"\r"
    await b.send_eof()
    with pytest.raises(IncompleteReadError) as caught:
        await a.recv_line(delimiter=b"\r\n", max_bytes=1)
    assert caught.value.at_boundary


async def test_wrong_arguments_of_a_read_consume_nothing(a: Socket) -> None:
    a.unrecv(b"line\n")
    for read in (a.recv_line, lambda delimiter: a.skip_until(delimiter)):
        with pytest.raises(ValueError, match="delimiter"):
            await read(delimiter=b"")
        with pytest.raises(TypeError, match="expected bytes"):
            await read(delimiter="\n")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes"):
        await a.recv_line(max_bytes=0)
    with pytest.raises(TypeError, match="wait"):
        await a.peek(wait=None)  # type: ignore[call-overload]
    assert await a.recv_line() == b"line"


# ---- skip_until ----


@pytest.mark.parametrize(
    ("before", "delimiter"),
    [
        (b"", b"\n"),
        (b"x\ry", b"\n"),
        (b"\rx\r", b"\r\n"),
        (b"aab", b"aaa"),
        (b"abab", b"ababb"),
        (b"\r\n.\r", b"\r\n.\r\n"),
    ],
)
@pytest.mark.parametrize("family", ["unix"])
async def test_skip_until_finds_a_delimiter_however_it_is_split(
    before: bytes, delimiter: bytes, a: Socket, b: Socket
) -> None:
    whole = before + delimiter + b"z"
    skipped = whole.find(delimiter) + len(delimiter)
    for number in range(len(whole)):
        for cuts in itertools.combinations(range(1, len(whole)), number):
            for start, end in reversed([*itertools.pairwise([0, *cuts, len(whole)])]):
                a.unrecv(whole[start:end])
            assert await a.skip_until(delimiter) == skipped
            assert await a.recv_exactly(len(whole) - skipped) == whole[skipped:]
    # Now the bytes arrive from the kernel one at a time. skip_until drops them as they arrive, and
    # keeps fewer bytes than the delimiter has.
    counts: list[int] = []

    async def skip() -> None:
        counts.append(await a.skip_until(delimiter))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(skip)
        for start in range(len(whole)):
            await trio.testing.wait_all_tasks_blocked()
            assert a.info().buffered < len(delimiter)
            assert bool(counts) == (start >= skipped)
            await b.send(whole[start : start + 1])
    assert counts == [skipped]
    assert await a.recv_exactly(len(whole) - skipped) == whole[skipped:]


@pytest.mark.parametrize("rest", [b"", b"x", b"xyz\r", b"\r", b"\r\n\r"])
async def test_skip_until_drops_all_data_if_no_delimiter_arrives(
    rest: bytes, a: Socket, b: Socket
) -> None:
    await b.send(rest)
    await b.send_eof()
    with pytest.raises(IncompleteReadError) as caught:
        await a.skip_until(b"\r\n\r\n")
    assert (caught.value.partial, caught.value.expected) == (b"", None)
    assert caught.value.at_boundary == (not rest)
    assert f"after {len(rest)} bytes" in str(caught.value)
    assert await a.recv() == b""
    with pytest.raises(IncompleteReadError) as caught:
        await a.skip_until(b"\n")
    assert caught.value.at_boundary


async def test_a_server_continues_after_a_line_over_the_limit(a: Socket, b: Socket) -> None:
    await b.send(b"x" * 100 + b"\r\nnext\r\n")
    with pytest.raises(LimitExceededError):
        await a.recv_line(delimiter=b"\r\n", max_bytes=10)
    assert await a.skip_until(b"\r\n") == 102
    assert await a.recv_line(delimiter=b"\r\n", max_bytes=10) == b"next"


@BOTH_LAYERS
async def test_skip_until_buffers_at_most_one_read(layer: str, a: Socket, b: Socket) -> None:
    size = 20_000_000
    most = 0

    async def watch() -> None:
        nonlocal most
        while True:
            most = max(most, a.info().buffered)
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.send, b"\r" * size + b"\nrest")
        nursery.start_soon(watch)
        assert await a.skip_until(b"\r\n") == size + 1
        assert await a.recv_exactly(4) == b"rest"
        nursery.cancel_scope.cancel()
    assert most <= ONE_READ


@pytest.mark.parametrize("family", ["unix"])
async def test_a_cancelled_skip_keeps_the_start_of_the_delimiter(a: Socket, b: Socket) -> None:
    await b.send(b"dropped\r")
    await cancel_when_blocked(a.skip_until, b"\r\n")
    assert a.info().buffered == 1
    await b.send(b"\nkept")
    assert await a.skip_until(b"\r\n") == 2
    assert await a.recv() == b"kept"


async def test_bytes_dropped_before_a_reset_stay_dropped(sock: Socket, raw: socket.socket) -> None:
    raw.sendall(b"dropped\r")
    async with trio.open_nursery() as nursery:

        async def skip() -> None:
            with pytest.raises(trio.BrokenResourceError, match="reset"):
                await sock.skip_until(b"\r\n")

        nursery.start_soon(skip)
        await trio.testing.wait_all_tasks_blocked(0.01)
        reset(raw)
    assert await sock.recv() == b"\r"
    with pytest.raises(trio.BrokenResourceError, match="reset"):
        await sock.skip_until(b"\n")


async def test_a_skip_ignores_bytes_dropped_by_a_cancelled_skip(a: Socket, b: Socket) -> None:
    await b.send(b"half a line")
    await cancel_when_blocked(a.skip_until, b"\n")
    assert a.info().buffered == 0
    await b.send_eof()
    with pytest.raises(IncompleteReadError) as caught:
        await a.skip_until(b"\n")
    assert caught.value.at_boundary


# ---- batches of lines ----


@BOTH_LAYERS
@pytest.mark.parametrize("keep_ends", [False, True])
async def test_batches_have_all_lines_in_order(keep_ends: bool, a: Socket, b: Socket) -> None:
    lines = [b"%d" % (n**5) for n in range(20_000)]
    got: list[bytes] = []

    async def send() -> None:
        await b.send(b"".join(line + b"\r\n" for line in lines))
        await b.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        sizes = []
        async for batch in a.lines(delimiter=b"\r\n", keep_ends=keep_ends).batches():
            sizes.append(len(batch))
            got += batch
    assert got == ([line + b"\r\n" for line in lines] if keep_ends else lines)
    assert min(sizes) >= 1
    assert 100 < max(sizes) <= ITEMS_AT_A_TIME


async def test_a_batch_never_exceeds_2048_lines(a: Socket) -> None:
    a.unrecv(b"\n" * 200_000)
    batches = a.lines().batches()
    sizes = []
    while a.info().buffered:
        sizes.append(len(await anext(batches)))
    assert sum(sizes) == 200_000
    assert max(sizes) == ITEMS_AT_A_TIME == 2048


@pytest.mark.parametrize("family", ["unix"])
async def test_a_batch_has_the_lines_that_have_arrived(a: Socket, b: Socket) -> None:
    batches = a.lines().batches()
    got: list[list[bytes]] = []

    async def read() -> None:
        async for batch in batches:
            got.append(batch)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for part, expected in [
            (b"one\ntwo\nthr", [b"one", b"two"]),
            (b"ee\n", [b"three"]),
            (b"fo", []),
            (b"u", []),
            (b"r\nfive\n", [b"four"]),  # a line from three chunks is a batch of its own
        ]:
            await trio.testing.wait_all_tasks_blocked()
            got.clear()
            await b.send(part)
            await trio.testing.wait_all_tasks_blocked()
            assert got[:1] == ([expected] if expected else [])
        assert got == [[b"four"], [b"five"]]
        await b.send_eof()


async def test_a_batch_ends_before_a_line_over_the_limit(a: Socket, b: Socket) -> None:
    await b.send(b"one\ntwo\nthree\nfour\nfi")
    await b.send_eof()
    batches = a.lines(max_bytes=4).batches()
    assert await anext(batches) == [b"one", b"two"]
    with pytest.raises(LimitExceededError):
        await anext(batches)
    assert await anext(a.lines().batches()) == [b"three", b"four"]
    with pytest.raises(IncompleteReadError) as caught:
        await anext(batches)
    assert caught.value.partial == b"fi"
    assert await a.recv() == b"fi"
    with pytest.raises(StopAsyncIteration):
        await anext(batches)


async def test_the_first_batch_has_all_lines_of_a_chunk(a: Socket) -> None:
    chunk = (b"x" * 59 + b"\n") * 2000
    for max_bytes in (60, 61, 1000, 65_536, len(chunk)):
        a.unrecv(chunk)
        assert len(await anext(a.lines(max_bytes=max_bytes).batches())) == 2000
    assert a.info().buffered == 0


async def test_batches_and_other_reads_can_be_mixed(a: Socket) -> None:
    a.unrecv(b"one\ntwo\nthree\nfour\nfive\nsix\n")
    lines = a.lines()
    batches = lines.batches()
    assert await anext(lines) == b"one"
    assert await a.recv_line() == b"two"
    async for batch in batches:
        assert batch == [b"three", b"four", b"five", b"six"]
        break
    a.unrecv(b"again\nand again\n")
    assert await anext(lines) == b"again"
    assert await anext(batches) == [b"and again"]
    await cancel_when_blocked(batches.__anext__)


# ---- peek ----


@BOTH_LAYERS
@pytest.mark.parametrize("family", ["unix"])
async def test_a_peek_that_waits_consumes_nothing(layer: str, a: Socket, b: Socket) -> None:
    seen: list[bytes] = []

    async def look() -> None:
        seen.append(await a.peek(wait=True))

    await cancel_when_blocked(look)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        assert not seen
        await b.send(b"hello")
    assert await a.peek(wait=True) == await a.peek() == b"hello"
    assert seen == [b"hello"]
    assert await a.recv() == b"hello"
    await b.close()
    for _ in range(2):
        assert await a.peek(wait=True) == b""
        assert await a.peek() == b""
    assert await a.recv() == b""


async def test_a_peek_that_waits_returns_data_pushed_back_after_eof(a: Socket, b: Socket) -> None:
    await b.send_eof()
    assert await a.peek(wait=True) == b""
    a.unrecv(b"again")
    assert await a.peek(wait=True) == b"again"
    assert await a.recv() == b"again"
    assert await a.peek(wait=True) == b""


async def test_a_peek_that_waits_raises_the_error_of_recv(sock: Socket, raw: socket.socket) -> None:
    reset(raw)
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            await sock.peek(wait=True)
        assert await sock.peek() is None
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            await sock.recv()


@pytest.mark.parametrize("layer", ["tls"])
async def test_a_peek_that_waits_reports_truncation(a: Socket, b: Socket) -> None:
    await b.send(b"last")
    assert await a.peek(wait=True) == b"last"
    await b.stream.send_eof()  # without close_notify
    assert await a.peek(wait=True) == b"last"
    assert await a.recv() == b"last"
    with pytest.raises(TLSError):
        await a.peek(wait=True)


@BOTH_LAYERS
async def test_an_abort_wakes_a_peek_that_waits(layer: str, a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:

        async def look() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.peek(wait=True)

        nursery.start_soon(look)
        await trio.testing.wait_all_tasks_blocked()
        a.abort()
    with pytest.raises(trio.ClosedResourceError):
        await a.peek(wait=True)


# ---- frames and lines ----


@BOTH_LAYERS
async def test_buffered_data_stays_within_the_limits_of_frames_and_lines(
    layer: str, a: Socket, b: Socket
) -> None:
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await b.send(b"\1" * 20_000_000)

        nursery.start_soon(send)
        for _ in range(3):
            with pytest.raises(LimitExceededError):
                await a.recv_frame(3, max_bytes=65_792)
            with pytest.raises(LimitExceededError):
                await anext(a.frames(max_bytes=1000))
            with pytest.raises(LimitExceededError):
                await a.recv_line(max_bytes=100)
            with pytest.raises(LimitExceededError):
                await anext(a.lines(max_bytes=100).batches())
            assert a.info().buffered <= 100 + ONE_READ
            assert len(await a.recv_frame(3, max_bytes=65_793)) == 65_793
        a.abort()
