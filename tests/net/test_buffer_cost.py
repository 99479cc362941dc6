"""The cost of ReceiveBuffer: calls, bytes scanned and bytes allocated. Nothing is timed.

A cost is linear if four times as many bytes, chunks or lines cost about four times as much.
"""

from __future__ import annotations

import itertools
import operator
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import pytest

from helpers.cancellation import grid
from helpers.scanned_bytes import ScannedBytes
from trisock._net.frame_header import frame_header
from trisock._net.receive_buffer import ReceiveBuffer

# An operation that copies nothing may allocate this many bytes for small objects, and for the
# frame objects that a tracer (such as coverage) creates.
NO_COPY = 8192

KIB = 1024
MIB = 1024 * KIB


def calls(function: Callable[..., object], *args: object) -> int:
    """Count calls to Python and C functions. Each iteration of a loop over chunks makes a call."""
    count = 0

    def profile(_frame: object, event: str, _arg: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        function(*args)
    finally:
        sys.setprofile(before)
    return count


def assert_linear(function: Callable[[int], object], size: int) -> None:
    """Check that the number of calls grows at most fivefold whenever the size grows fourfold."""
    function(16)  # fill caches first
    before = None
    for each in (size // 16, size // 4, size, 4 * size):  # small sizes first, to fail early
        count = calls(function, each)
        assert count >= each / KIB, "the calls were not counted"
        assert before is None or count <= 5 * before
        before = count


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def allocated(operations: Iterable[Callable[[], object]]) -> int:
    """Return the sum of the operations' peak allocations in bytes. A copy is an allocation, too."""
    total = 0
    for operation in operations:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        operation()
        _, peak = tracemalloc.get_traced_memory()
        total += peak - before
    return total


# ---- messages in many chunks ----


def receive(size: int, chunk: bytes, taken: list[int]) -> None:
    """Append chunks, and search after each chunk.

    Then append the delimiter, and take the message.
    """
    buffer = ReceiveBuffer()
    for _ in range(size // len(chunk)):
        buffer.append(chunk)
        assert buffer.find(b"\r\n") is None
    buffer.append(b"\r\n")
    end = buffer.find(b"\r\n")
    assert end is not None
    taken.append(len(buffer.take(end)))


def receive_exactly(size: int, chunk: bytes, taken: list[int]) -> None:
    """Append chunks until ``size`` bytes are unread, then take ``size`` bytes."""
    buffer = ReceiveBuffer()
    while len(buffer) < size:
        buffer.append(chunk)
    taken.append(len(buffer.take(size)))


def receive_in_parts(size: int, chunk: bytes, taken: list[int]) -> None:
    """Append a whole message, then take 777 bytes at a time."""
    buffer = ReceiveBuffer()
    while len(buffer) < size:
        buffer.append(chunk)
    while len(buffer) > 777:
        buffer.take(777)
    taken.append(size - len(buffer))


def receive_and_drop(size: int, chunk: bytes, taken: list[int]) -> None:
    """As bytes arrive, drop all bytes that cannot be part of the delimiter."""
    buffer = ReceiveBuffer()
    dropped = 0
    for _ in range(size // len(chunk)):
        buffer.append(chunk)
        assert buffer.find(b"\r\n") is None
        dropped += len(buffer) - 1
        buffer.drop(len(buffer) - 1)
    taken.append(dropped)


def receive_frame(size: int, chunk: bytes, taken: list[int]) -> None:
    """Append a frame of ``size`` bytes in many chunks. Look for the frame after each chunk."""
    buffer = ReceiveBuffer()
    header = frame_header(8)
    buffer.append(header.pack(size))
    while len(buffer) < header.size + size:
        assert header.length(buffer.peek_bytes(header.size)) == size
        assert list(buffer.take_frames(header, size)) == []
        buffer.append(chunk)
    buffer.drop(header.size)
    taken.append(len(buffer.take(size)))


@pytest.mark.parametrize(
    "way", [receive, receive_exactly, receive_in_parts, receive_and_drop, receive_frame]
)
@pytest.mark.parametrize(("chunk", "size"), [(bytes(KIB), 4 * MIB), (b"x", 5000)])
def test_taking_a_message_in_many_chunks_has_a_linear_cost(
    chunk: bytes, size: int, way: Callable[[int, bytes, list[int]], None]
) -> None:
    taken: list[int] = []
    assert_linear(lambda each: way(each, chunk, taken), size)
    assert taken[-1] >= 4 * size - 777


def test_a_message_is_copied_once(traced: None) -> None:
    buffer = ReceiveBuffer()
    chunk = bytes(64 * KIB)  # one object, appended again and again
    assert allocated(lambda: buffer.append(chunk) for _ in range(1024)) < 1024 * NO_COPY
    assert allocated([lambda: buffer.take(64 * MIB)]) < 64 * MIB + 1024 * NO_COPY


def test_waiting_for_a_delimiter_copies_nothing(traced: None) -> None:
    buffer = ReceiveBuffer()
    chunk = bytes(64 * KIB)

    def wait() -> None:
        buffer.append(chunk)
        assert buffer.find(b"\r\n.\r\n") is None
        assert len(buffer.peek_chunk()) == len(chunk)

    assert allocated(wait for _ in range(1024)) < 1024 * NO_COPY


def test_peeking_again_copies_nothing(traced: None) -> None:
    buffer = ReceiveBuffer()
    buffer.append(bytes(MIB))
    buffer.take_chunk(1)
    assert len(buffer.peek_chunk()) == MIB - 1
    assert allocated(buffer.peek_chunk for _ in range(1000)) < MIB


def test_single_bytes_are_coalesced_once(traced: None) -> None:
    def append(count: int) -> int:
        buffer = ReceiveBuffer()
        return allocated(lambda: buffer.append(b"x") for _ in range(count))

    assert append(20_000) < 5 * append(5_000)


def test_a_frame_is_copied_once(traced: None) -> None:
    buffer = ReceiveBuffer()
    chunk = bytes(64 * KIB)
    buffer.append(frame_header(4).pack(16 * MIB))
    for _ in range(256):
        buffer.append(chunk)
    assert allocated([lambda: buffer.drop(4)]) < NO_COPY
    assert allocated([lambda: buffer.take(16 * MIB)]) < 16 * MIB + 256 * NO_COPY


def test_frames_in_one_chunk_are_copied_once(traced: None) -> None:
    buffer = ReceiveBuffer()
    size = 10_000 * 1002
    buffer.append((frame_header(2).pack(1000) + bytes(1000)) * 10_000)
    taken = 0

    def take_batch() -> None:
        nonlocal taken
        for body in buffer.take_frames(frame_header(2), 1000):
            taken += 2 + len(body)
        if not taken % 130_260:  # sometimes switch to another read
            taken += len(buffer.take(1002))

    total = allocated(take_batch for _ in iter(lambda: len(buffer), 0))
    assert taken == size
    assert total < 2.2 * size  # the chunk is trimmed while it is read, which copies it once more


def test_dropping_bytes_copies_nothing(traced: None) -> None:
    buffer = ReceiveBuffer()
    for _ in range(64):
        buffer.append(bytes(MIB))
    assert allocated([lambda: buffer.drop(63 * MIB + 1)]) < NO_COPY
    assert len(buffer) == MIB - 1


# ---- delimiters ----


@pytest.mark.parametrize(
    ("before", "delimiter"),
    [
        (b"x\ry", b"\n"),
        (b"\rx\r", b"\r\n"),
        (b"aab", b"aaa"),
        (b"abab", b"ababb"),
        (b"\r\n.\r", b"\r\n.\r\n"),
    ],
)
def test_a_delimiter_is_found_however_it_is_split(before: bytes, delimiter: bytes) -> None:
    whole = before + delimiter + b"z"
    end = whole.find(delimiter) + len(delimiter)
    places = range(1, len(whole))
    for number in range(len(whole)):
        for cuts in itertools.combinations(places, number):
            starts = [0, *cuts]
            buffer = ReceiveBuffer()
            for start, stop in zip(starts, [*cuts, len(whole)], strict=True):
                buffer.append(whole[start:stop])
                assert buffer.find(delimiter) == (end if stop >= end else None)
            assert buffer.take(end) == whole[:end]
            assert buffer.peek_all() == whole[end:]


@pytest.mark.parametrize(
    ("size", "delimiter"),
    grid(
        lambda size, delimiter: size == 7 or delimiter == b"\r\n",
        [1, 2, 7, 300, 70_000],
        [b"\n", b"\r\n", b"\r\n.\r\n", b"xy", b"x" * 50],
    ),
)
def test_a_search_rescans_only_bytes_at_chunk_boundaries(delimiter: bytes, size: int) -> None:
    ScannedBytes.scanned = 0
    buffer = ReceiveBuffer()
    chunk = ScannedBytes(b"xx-" * size)[:size] if size > 2 else ScannedBytes(b"-" * size)
    chunks = 1000
    for number in range(chunks):
        buffer.append(chunk)
        for _ in range(1 + number % 3):  # repeat the search, with other calls in between
            assert buffer.find(delimiter) is None
            assert len(buffer) == (number + 1) * size
            assert buffer.peek_chunk()
    total = chunks * size
    assert total <= ScannedBytes.scanned <= total + chunks * 2 * (len(delimiter) - 1)


def test_a_search_stops_at_the_delimiter() -> None:
    ScannedBytes.scanned = 0
    buffer = ReceiveBuffer()
    buffer.append(ScannedBytes(b"line\n" + bytes(MIB)))
    for _ in range(1000):
        assert buffer.find(b"\n") == 5
    assert ScannedBytes.scanned == 5


# ---- long queues ----


def take_lines_one_by_one(count: int) -> None:
    buffer = ReceiveBuffer()
    buffer.append(b"x\n" * count)
    for _ in range(count):
        end = buffer.find(b"\n")
        assert end is not None
        assert buffer.take(end) == b"x\n"
    assert len(buffer) == 0


def test_taking_a_line_does_not_copy_the_next_lines(traced: None) -> None:
    buffer = ReceiveBuffer()
    buffer.append(b"x\n" * 100_000)

    def take_line() -> None:
        buffer.take(buffer.find(b"\n") or 0)

    assert allocated(take_line for _ in range(5_000)) < 5_000 * NO_COPY


def push_and_take(count: int) -> None:
    buffer = ReceiveBuffer()
    for number in range(count):
        buffer.push_front(b"ab" if number % 2 else b"c")
    assert buffer.take_chunk() == (b"c" if count % 2 else b"ab")
    while len(buffer) > count:
        buffer.take_chunk()
    assert len(buffer.take(len(buffer))) >= count // 2


def test_calling_take_lines_and_take_alternately_has_a_linear_cost(traced: None) -> None:
    def take_alternately(count: int) -> int:
        """Take one line with ``take_lines``, the next line with ``take``, and so on."""
        buffer = ReceiveBuffer()
        buffer.append(b"a line\n" * 2 * count)

        def take_two_lines() -> None:
            assert buffer.find(b"\n") == 7
            assert next(buffer.take_lines(b"\n", False, 65536)) == b"a line"
            assert buffer.take(7) == b"a line\n"

        total = allocated(take_two_lines for _ in range(count))
        assert len(buffer) == 0
        return total

    assert_linear(take_alternately, 500)
    assert take_alternately(2_000) < 5 * take_alternately(500)


def frames_of(buffer: ReceiveBuffer) -> Iterator[bytes]:
    return buffer.take_frames(frame_header(1), 65536)


def lines_of(buffer: ReceiveBuffer) -> Iterator[bytes]:
    assert buffer.find(b"\0") == 1
    return buffer.take_lines(b"\0", False, 65536)


@pytest.mark.parametrize("take", [frames_of, lines_of])
def test_taking_one_item_splits_few_other_items(
    take: Callable[[ReceiveBuffer], Iterator[bytes]],
) -> None:
    """A program may use a new iterator for each item, and drop the rest of the batch."""
    buffer = ReceiveBuffer()
    buffer.append(bytes(10_000))  # empty frames, or empty lines that end with b"\0"
    for _ in range(1000):
        items = take(buffer)
        assert next(items) == b""
        assert operator.length_hint(items) <= 64
    assert len(buffer) == 9_000
    sizes = []
    while buffer:
        items = take(buffer)
        sizes.append(operator.length_hint(items))
        assert set(items) == {b""}
    assert max(sizes) >= 1024  # a program that takes all items gets large batches


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n"])
@pytest.mark.parametrize("spare", [0, 1, 500])
def test_a_low_limit_does_not_make_batches_small(spare: int, delimiter: bytes) -> None:
    line = b"x" * 50 + delimiter
    buffer = ReceiveBuffer()
    buffer.append(line * 2000)
    batches = 0
    while buffer:
        assert buffer.find(delimiter, len(line) + spare) == len(line)
        for each in buffer.take_lines(delimiter, True, len(line) + spare):
            assert each == line
        batches += 1
    assert batches <= 6


def test_lines_over_the_limit_cost_one_search_each() -> None:
    """Each line over the limit follows a short line, which is a batch by itself."""
    ScannedBytes.scanned = 0
    buffer = ReceiveBuffer()
    pair = b"x\n" + b"y" * 80 + b"\n"
    buffer.append(ScannedBytes(pair * 1000))
    for _ in range(1000):
        assert buffer.find(b"\n", 80) == 2
        assert buffer.take_line_list(b"\n", False, 80) == [b"x"]
        assert buffer.find(b"\n", 80) is None
        buffer.drop(81)
    assert ScannedBytes.scanned < 4 * len(pair) * 1000


def push_pieces_of_a_line(count: int) -> None:
    """In a long queue, take the first byte of each line, push it back, and take it again."""
    buffer = ReceiveBuffer()
    for _ in range(count):
        buffer.append(b"ab\n" + b"x" * 300)
    for _ in range(count):
        first = buffer.take(1)
        buffer.push_front(first)
        assert buffer.find(b"\n") == 3
        assert buffer.take_chunk(1) == b"a"
        assert buffer.peek_chunk().startswith(b"b\n")
        assert buffer.take(302)[:2] == b"b\n"


def serve(count: int) -> None:
    """Take messages while more messages arrive.

    A message is a line with the body's length, followed by the body.
    """
    buffer = ReceiveBuffer()
    message = b"10\r\n0123456789"
    for _ in range(count):
        buffer.append(message)
    for number in range(count):
        buffer.append(message[: number % 14])
        end = buffer.find(b"\r\n")
        assert end is not None
        length = int(buffer.take(end))
        assert buffer.peek_chunk().startswith(b"0")
        body = buffer.take(length)
        buffer.push_front(body[5:])
        assert len(buffer.take_chunk(3)) == 3
        assert buffer.take(2) == b"89"
        buffer.append(message[number % 14 :])


def alternate(count: int) -> None:
    """Take and append alternately, so that the queue stays long."""
    buffer = ReceiveBuffer()
    for _ in range(count):
        buffer.append(b"x" * 300)
    for _ in range(count):
        buffer.append(b"x" * 300)
        assert len(buffer.take(450)) == 450
        assert 0 < len(buffer.take_chunk()) <= 300
        buffer.push_front(b"yy")
        buffer.append(b"x" * 300)


@pytest.mark.parametrize(
    ("program", "size"),
    [
        (take_lines_one_by_one, 5_000),
        (push_and_take, 20_000),
        (push_pieces_of_a_line, 3_000),
        (serve, 3_000),
        (alternate, 3_000),
    ],
)
def test_a_long_queue_has_a_linear_cost(program: Callable[[int], None], size: int) -> None:
    assert_linear(program, size)
