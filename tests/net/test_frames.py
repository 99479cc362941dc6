"""Length-prefixed frames: headers, the receive buffer, and sockets."""

from __future__ import annotations

import array
import copy
import itertools
import pickle
import struct
from collections.abc import AsyncIterator, Callable

import pytest
import trio
import trio.testing

from trisock import IncompleteReadError, LimitExceededError, Socket
from trisock._net.frame_header import FrameHeader, frame_header
from trisock._net.receive_buffer import ReceiveBuffer

BOTH_LAYERS = pytest.mark.parametrize("layer", ["plain", "tls"])

# A way to read all frames until EOF. Each frame has a header of one byte.
Read = Callable[[Socket], AsyncIterator[bytes]]


async def by_recv_frame(sock: Socket) -> AsyncIterator[bytes]:
    with pytest.raises(IncompleteReadError) as caught:
        while True:
            yield await sock.recv_frame(1)
    assert caught.value.at_boundary


def by_frames(sock: Socket) -> AsyncIterator[bytes]:
    return sock.frames(1)


async def by_many_iterators(sock: Socket) -> AsyncIterator[bytes]:
    while (body := await anext(sock.frames(1), None)) is not None:
        yield body


WAYS = pytest.mark.parametrize("way", [by_recv_frame, by_frames, by_many_iterators])


# ---- headers ----


@pytest.mark.parametrize(
    ("header", "length", "packed"),
    [
        ("!B", 255, b"\xff"),
        ("!H", 258, b"\1\2"),
        (">H", 258, b"\1\2"),
        ("<H", 258, b"\2\1"),
        ("<I", 1, b"\1\0\0\0"),
        ("!L", 1, b"\0\0\0\1"),
        ("!Q", 2**64 - 1, b"\xff" * 8),
        ("<L", 1, b"\1\0\0\0"),
        (">Q", 7, b"\0\0\0\0\0\0\0\7"),
        (1, 255, b"\xff"),
        (2, 258, b"\1\2"),
        (3, 2**24 - 1, b"\xff" * 3),
        (4, 1, b"\0\0\0\1"),
        (5, 258, b"\0\0\0\1\2"),
        (7, 2**56 - 1, b"\xff" * 7),
        (8, 258, b"\0\0\0\0\0\0\1\2"),
    ],
)
def test_a_header_is_a_struct_format_or_a_size(
    header: str | int, length: int, packed: bytes
) -> None:
    parsed = frame_header(header)
    assert parsed.size == len(packed)
    assert parsed.max_length == 256 ** len(packed) - 1
    assert parsed.pack(length) == packed
    assert parsed.length(packed) == length
    assert parsed.length(packed + b"more") == length
    assert parsed.length(parsed.pack(parsed.max_length)) == parsed.max_length
    with pytest.raises(ValueError, match=f"at most {parsed.max_length}"):
        parsed.pack(parsed.max_length + 1)


@pytest.mark.parametrize(
    "header",
    ["", "!", "!b", "!i", "!II", "2I", "1I", "!I\n", " I", "! I", "=N", "<N", "P", "f", "4s", "x"],
)
async def test_a_format_other_than_one_unsigned_integer_is_refused(header: str, a: Socket) -> None:
    with pytest.raises(ValueError, match='such as "!I"'):
        a.frames(header)
    with pytest.raises(ValueError, match='such as "!I"'):
        await a.recv_frame(header)
    with pytest.raises(ValueError, match='such as "!I"'):
        await a.send_frame(b"x", header=header)


@pytest.mark.parametrize("order", ["", "=", "@"])
@pytest.mark.parametrize("code", "HILQN")
def test_a_header_that_depends_on_the_machine_is_refused(order: str, code: str) -> None:
    with pytest.raises(ValueError, match='after "!", ">" or "<", such as "!I"'):
        frame_header(order + code)


@pytest.mark.parametrize("header", [0, 9, -1, 10**30])
async def test_a_header_size_outside_one_to_eight_bytes_is_refused(header: int, a: Socket) -> None:
    with pytest.raises(ValueError, match="1 to 8"):
        a.frames(header)


@pytest.mark.parametrize("header", [True, 4.0, b"!I", None, [4], struct.Struct("!I")])
async def test_a_header_of_another_type_is_refused(header: object, a: Socket) -> None:
    frame_header(1)  # now cached: True == 1, but True must be refused
    with pytest.raises(TypeError, match="header must be"):
        a.frames(header)  # type: ignore[arg-type]


@pytest.mark.parametrize("max_bytes", [0, -1, 1.5, None])
async def test_the_limit_of_a_frame_is_a_positive_int(max_bytes: object, a: Socket) -> None:
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        a.frames(max_bytes=max_bytes)  # type: ignore[arg-type]
    with pytest.raises((TypeError, ValueError), match="max_bytes"):
        await a.recv_frame(max_bytes=max_bytes)  # type: ignore[arg-type]


def test_split_stops_before_an_incomplete_or_a_long_frame() -> None:
    header = FrameHeader(1)
    chunk = b"\1a\0\3bcd\2ef"
    assert header.split(chunk, 0, len(chunk), 3, 9) == ([b"a", b"", b"bcd", b"ef"], 10)
    assert header.split(chunk, 0, 9, 3, 9) == ([b"a", b"", b"bcd"], 7)
    assert header.split(chunk, 0, 7, 3, 9) == ([b"a", b"", b"bcd"], 7)
    assert header.split(chunk, 0, 10, 2, 9) == ([b"a", b""], 3)
    assert header.split(chunk, 2, 10, 3, 2) == ([b"", b"bcd"], 7)
    assert FrameHeader(2).split(b"\0", 0, 1, 3, 9) == ([], 0)


# ---- the receive buffer ----


def test_take_frames_consumes_only_the_frames_that_it_has_yielded() -> None:
    for taken in range(4):
        buffer = ReceiveBuffer()
        buffer.append(b"\1a\0\2bc\4d")
        frames = buffer.take_frames(frame_header(1), 9)
        assert [next(frames) for _ in range(taken)] == [b"a", b"", b"bc"][:taken]
        left = [b"\1a\0\2bc\4d", b"\0\2bc\4d", b"\2bc\4d", b"\4d"][taken]
        assert len(buffer) == len(left)
        assert buffer.peek_bytes(2) == left[:2]
        assert list(frames) == []  # peek_bytes has ended the iteration
        assert buffer.peek_all() == left


def test_bytes_can_be_dropped_and_peeked_at_across_chunks() -> None:
    whole = b"abcdefgh"
    for first, second in itertools.product(range(len(whole) + 1), repeat=2):
        for dropped in range(len(whole) + 1):
            buffer = ReceiveBuffer()
            for part in (whole[:first], whole[first:second], whole[max(first, second) :]):
                buffer.append(part)
            held = buffer.peek_all()
            buffer.drop(min(dropped, len(held)))
            for count in range(1, len(buffer) + 1):
                assert buffer.peek_bytes(count) == held[dropped : dropped + count]
            assert buffer.take(len(buffer)) == held[dropped:]


# ---- reading ----


BODIES = [b"", b"a", b"\0\0", b"xyz", b""]
WIRE = b"".join(bytes([len(body)]) + body for body in BODIES)


@WAYS
async def test_frames_are_read_however_they_are_split(way: Read, a: Socket, b: Socket) -> None:
    await b.send_eof()
    places = range(1, len(WIRE))
    for number in range(len(WIRE)):
        for cuts in itertools.combinations(places, number):
            for start, end in reversed([*itertools.pairwise([0, *cuts, len(WIRE)])]):
                a.unrecv(WIRE[start:end])
            assert [body async for body in way(a)] == BODIES


@WAYS
@BOTH_LAYERS
@pytest.mark.parametrize("family", ["unix"])
async def test_frames_are_read_as_their_bytes_arrive(way: Read, a: Socket, b: Socket) -> None:
    got: list[bytes] = []

    async def read() -> None:
        async for body in way(a):
            got.append(body)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for start in range(len(WIRE)):
            await b.send(WIRE[start : start + 1])
            await trio.testing.wait_all_tasks_blocked()
            complete = [n for n in range(6) if start >= sum(map(len, BODIES[:n])) + n - 1]
            assert len(got) == complete[-1]
        await b.close()
    assert got == BODIES


@BOTH_LAYERS
async def test_a_sent_frame_arrives_as_one_frame(a: Socket, b: Socket) -> None:
    bodies = [b"", b"x", bytes(65_535), bytes(range(256)) * 4096]
    got = []

    async def send() -> None:
        for body in bodies:
            await b.send_frame(body)
        await b.send_frame(b"one, ", bytearray(b"two, "), memoryview(b"three"), header="<H")
        await b.send_frame(memoryview(array.array("I", [1, 2])), header=3)
        await b.send_frame(header=8)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        async for body in a.frames():
            got.append(body)
            if len(got) == len(bodies):
                break
        assert got == bodies
        assert await a.recv_frame("<H") == b"one, two, three"
        assert await a.recv_frame(3) == array.array("I", [1, 2]).tobytes()
        assert await a.recv_exactly(8) == bytes(8)


async def test_a_frame_too_long_for_its_header_is_not_sent(a: Socket, b: Socket) -> None:
    with pytest.raises(ValueError, match="256 bytes is too long for its header: at most 255"):
        await a.send_frame(b"x" * 255, b"y", header=1)
    with pytest.raises(TypeError, match=r"expected bytes.*not str \(.* as header=\)"):
        await a.send_frame(b"body", "!H")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"expected bytes.*not int$"):
        await a.send_frame(b"body", 2)  # type: ignore[arg-type]
    await a.send_frame(b"x" * 254, b"y", header=1)
    assert await b.recv_frame(1) == b"x" * 254 + b"y"


@pytest.mark.parametrize("size", range(6))
async def test_a_frame_cut_short_stays_unread(size: int, a: Socket, b: Socket) -> None:
    cut = b"\0\3abc"[:size]
    await b.send(b"\0\1x", cut)
    await b.send_eof()
    got = []
    failure = None
    try:
        async for body in a.frames(2):
            got.append(body)
    except IncompleteReadError as exc:
        failure = exc
    if size == 5:
        assert (got, failure) == ([b"x", b"abc"], None)
        return
    assert got == [b"x"]
    assert (failure is None) == (size == 0)
    for _ in range(2):
        with pytest.raises(IncompleteReadError) as caught:
            await a.recv_frame(2)
        assert caught.value.partial == cut
        assert caught.value.expected == (5 if size >= 2 else 2)
        assert caught.value.at_boundary == (size == 0)
        if failure is not None:
            assert (failure.partial, failure.at_boundary) == (cut, False)
    assert await a.recv() == cut


@BOTH_LAYERS
@pytest.mark.parametrize("family", ["unix"])
async def test_a_frame_over_the_limit_is_refused_by_its_header(a: Socket, b: Socket) -> None:
    failures: list[LimitExceededError] = []

    async def read() -> None:
        with pytest.raises(LimitExceededError) as caught:
            await a.recv_frame(max_bytes=255)
        failures.append(caught.value)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        for byte in (b"\0", b"\0", b"\1", b"\0"):
            await trio.testing.wait_all_tasks_blocked()
            assert not failures
            await b.send(byte)
    assert (failures[0].limit, failures[0].frame_length) == (255, 256)
    assert str(failures[0]).startswith(f"a frame of 256 bytes from {a.getpeer()} exceeds the limit")
    with pytest.raises(LimitExceededError):
        await anext(a.frames(max_bytes=255))
    await b.send(bytes(256))
    assert await a.recv_frame(max_bytes=256) == bytes(256)


async def test_the_longest_possible_length_is_over_the_limit(a: Socket) -> None:
    a.unrecv(b"\xff" * 8 + b"body")
    for max_bytes in (1, 2**63, 2**64 - 2):
        with pytest.raises(LimitExceededError) as caught:
            await a.recv_frame("!Q", max_bytes=max_bytes)
        assert caught.value.frame_length == 2**64 - 1
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: a.recv_frame("!Q", max_bytes=2**70))
        await trio.testing.wait_all_tasks_blocked()  # recv_frame waits for the body
        nursery.cancel_scope.cancel()
    assert await a.recv() == b"\xff" * 8 + b"body"


async def test_frames_before_a_frame_over_the_limit_are_returned(a: Socket) -> None:
    a.unrecv(b"\1a\2bc\3def\1g")
    got = []
    with pytest.raises(LimitExceededError) as caught:
        async for body in a.frames(1, max_bytes=2):
            got.append(body)
    assert (got, caught.value.frame_length) == ([b"a", b"bc"], 3)
    frames = a.frames(1, max_bytes=3)
    assert [await anext(frames), await anext(frames)] == [b"def", b"g"]


@pytest.mark.parametrize("copied", [copy.copy, lambda exc: pickle.loads(pickle.dumps(exc))])
def test_a_copied_limit_error_keeps_the_length(
    copied: Callable[[LimitExceededError], LimitExceededError],
) -> None:
    twin = copied(LimitExceededError(9, frame_length=10))
    assert (twin.limit, twin.frame_length) == (9, 10)
    assert str(twin) == "a frame of 10 bytes exceeds the limit of 9 bytes"


# ---- mixed with other reads ----


async def test_leaving_a_loop_over_frames_loses_nothing(a: Socket, b: Socket) -> None:
    await b.send(WIRE, b"line\n\2hi")
    await b.send_eof()
    async for body in a.frames(1):
        if body == b"a":
            break
    with pytest.raises(ZeroDivisionError):
        async for body in a.frames(1):
            assert body == b"\0\0"
            1 / 0  # noqa: B018
    assert await a.recv_exactly(5) == b"\3xyz\0"
    assert await a.recv_line() == b"line"
    assert [body async for body in a.frames(1)] == [b"hi"]
    assert await a.recv() == b""


async def test_data_pushed_back_between_frames_is_read_first(a: Socket) -> None:
    a.unrecv(b"\1a\1b\1c")
    frames = a.frames(1)
    assert await anext(frames) == b"a"
    a.unrecv(b"\2x")  # the start of a frame that ends with the next header
    assert await anext(frames) == b"x\1"
    assert await a.recv_exactly(1) == b"b"
    a.unrecv(b"\0")
    assert [await anext(frames), await anext(frames)] == [b"", b"c"]
    assert a.info().buffered == 0


async def test_iterators_over_one_socket_take_turns(a: Socket) -> None:
    a.unrecv(b"\1a\1b\1c\1d\0\1e\nline\n")
    frames, others, lines = a.frames(1), a.frames("!B"), a.lines()
    assert [await anext(frames), await anext(others)] == [b"a", b"b"]
    assert [await anext(frames), await anext(others)] == [b"c", b"d"]
    assert await a.recv_frame(2) == b"e"
    assert [await anext(lines), await anext(lines)] == [b"", b"line"]


@pytest.mark.parametrize("family", ["unix"])
async def test_a_cancelled_read_of_a_frame_loses_nothing(a: Socket, b: Socket) -> None:
    frames = a.frames()
    for read in (a.recv_frame, frames.__anext__):
        for part in (b"\0\0", b"\0\6", b"abc", b"de"):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await b.send(part)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        await b.send(b"f")
        assert await read() == b"abcdef"
