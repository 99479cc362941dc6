"""What ReceiveBuffer costs, counted and not timed: calls made, bytes looked at, bytes allocated.

A cost for each byte (or chunk, or line) that is constant is one that grows by four when there are
four times as many of them.
"""

from __future__ import annotations

import itertools
import sys
import tracemalloc
from collections.abc import Callable, Iterable, Iterator

import pytest

from trisock._net.receive_buffer import ReceiveBuffer

# What an operation may allocate that copies nothing: small objects, and frames where it is traced.
NO_COPY = 8192

KIB = 1024
MIB = 1024 * KIB


def calls(function: Callable[..., object], *args: object) -> int:
    """Count the calls, of Python's functions and of C's, that a function makes.

    Each round of a loop over chunks makes one, so this is what the interpreter does.
    """
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
    """Check that four times the size takes about four times the calls, up to ``4 * size``."""
    function(16)  # what is done once, and the first time only
    before = None
    for each in (size // 16, size // 4, size, 4 * size):  # what is not linear shows early
        count = calls(function, each)
        assert count >= each / KIB, "the work was not seen"
        assert before is None or count <= 5 * before
        before = count


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def allocated(operations: Iterable[Callable[[], object]]) -> int:
    """Sum up what each operation had allocated when it had most.

    What it copies it allocates; what it lets go at once is in there as well.
    """
    total = 0
    for operation in operations:
        tracemalloc.reset_peak()
        before, _ = tracemalloc.get_traced_memory()
        operation()
        _, peak = tracemalloc.get_traced_memory()
        total += peak - before
    return total


class Watched(bytes):
    """Bytes that count how many of them (and of what is cut from them) were searched."""

    looked_at = 0

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else min(end, len(self))
        at = super().find(sub, start, end)
        Watched.looked_at += (at + len(sub) if at >= 0 else end) - start
        return at

    def index(self, *_: object) -> int:  # type: ignore[override]
        raise NotImplementedError("count this, too")

    split = partition = count = __contains__ = index  # type: ignore[assignment]

    def __getitem__(self, key: slice) -> Watched:  # type: ignore[override]
        return Watched(super().__getitem__(key))

    def __add__(self, other: bytes) -> Watched:  # type: ignore[override]
        return Watched(super().__add__(other))

    def __radd__(self, other: bytes) -> Watched:
        return Watched(other + bytes(self))


@pytest.fixture
def watched() -> type[Watched]:
    Watched.looked_at = 0
    return Watched


# ---- messages in many chunks ----


def receive(size: int, chunk: bytes, taken: list[int]) -> None:
    """Wait for a delimiter at the end of a message, chunk by chunk, and take it."""
    buffer = ReceiveBuffer()
    for _ in range(size // len(chunk)):
        buffer.append(chunk)
        assert buffer.find(b"\r\n") is None
    buffer.append(b"\r\n")
    end = buffer.find(b"\r\n")
    assert end is not None
    taken.append(len(buffer.take(end)))


def receive_exactly(size: int, chunk: bytes, taken: list[int]) -> None:
    """Wait for a count of bytes, chunk by chunk, and take them."""
    buffer = ReceiveBuffer()
    while len(buffer) < size:
        buffer.append(chunk)
    taken.append(len(buffer.take(size)))


def receive_in_parts(size: int, chunk: bytes, taken: list[int]) -> None:
    """Let the message come, and take it in parts that fit no chunk."""
    buffer = ReceiveBuffer()
    while len(buffer) < size:
        buffer.append(chunk)
    while len(buffer) > 777:
        buffer.take(777)
    taken.append(size - len(buffer))


@pytest.mark.parametrize("way", [receive, receive_exactly, receive_in_parts])
def test_a_message_costs_the_same_for_each_chunk_however_many_there_are(
    way: Callable[[int, bytes, list[int]], None],
) -> None:
    taken: list[int] = []
    chunk = bytes(KIB)
    assert_linear(lambda size: way(size, chunk, taken), 16 * MIB)
    assert taken[-1] >= 64 * MIB - 777


@pytest.mark.parametrize("way", [receive, receive_exactly, receive_in_parts])
def test_a_message_that_comes_byte_by_byte_costs_the_same_for_each_byte(
    way: Callable[[int, bytes, list[int]], None],
) -> None:
    taken: list[int] = []
    assert_linear(lambda size: way(size, b"x", taken), 20_000)
    assert taken[-1] >= 80_000 - 777


def test_a_message_is_copied_once(traced: None) -> None:
    buffer = ReceiveBuffer()
    chunk = bytes(64 * KIB)  # the same one each time: the buffer holds what it is given
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


def test_bytes_that_come_one_by_one_are_joined_once(traced: None) -> None:
    def come(count: int) -> int:
        buffer = ReceiveBuffer()
        return allocated(lambda: buffer.append(b"x") for _ in range(count))

    assert come(80_000) < 5 * come(20_000)


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
def test_a_delimiter_is_found_in_every_way_to_cut_it(before: bytes, delimiter: bytes) -> None:
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


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"\r\n.\r\n", b"xy", b"x" * 50])
@pytest.mark.parametrize("size", [1, 2, 7, 300, 70_000])
def test_a_search_looks_at_each_byte_once_but_for_those_at_a_seam(
    delimiter: bytes, size: int, watched: type[Watched]
) -> None:
    buffer = ReceiveBuffer()
    chunk = watched(b"xx-" * size)[:size] if size > 2 else watched(b"-" * size)
    chunks = 1000
    for number in range(chunks):
        buffer.append(chunk)
        for _ in range(1 + number % 3):  # whatever is asked in between, and how often
            assert buffer.find(delimiter) is None
            assert len(buffer) == (number + 1) * size
            assert buffer.peek_chunk()
    total = chunks * size
    assert total <= watched.looked_at <= total + chunks * 2 * (len(delimiter) - 1)


def test_a_search_that_finds_looks_no_further(watched: type[Watched]) -> None:
    buffer = ReceiveBuffer()
    buffer.append(watched(b"line\n" + bytes(MIB)))
    for _ in range(1000):
        assert buffer.find(b"\n") == 5
    assert watched.looked_at == 5


# ---- many lines, many pieces ----


def take_lines_one_by_one(count: int) -> None:
    buffer = ReceiveBuffer()
    buffer.append(b"x\n" * count)
    for _ in range(count):
        end = buffer.find(b"\n")
        assert end is not None
        assert buffer.take(end) == b"x\n"
    assert len(buffer) == 0


def test_a_line_costs_the_same_however_many_follow_it_in_its_chunk(traced: None) -> None:
    assert_linear(take_lines_one_by_one, 5_000)
    buffer = ReceiveBuffer()
    buffer.append(b"x\n" * 100_000)

    def take_line() -> None:
        buffer.take(buffer.find(b"\n") or 0)

    assert allocated(take_line for _ in range(5_000)) < 5_000 * NO_COPY


def test_a_million_lines_in_one_chunk() -> None:
    take_lines_one_by_one(1_000_000)


def push_and_take(count: int) -> None:
    buffer = ReceiveBuffer()
    for number in range(count):
        buffer.push_front(b"ab" if number % 2 else b"c")
    assert buffer.take_chunk() == b"ab" if count % 2 == 0 else b"c"
    while len(buffer) > count:
        buffer.take_chunk()
    assert len(buffer.take(len(buffer))) >= count // 2


def test_a_chunk_that_is_pushed_back_costs_the_same_however_many_there_are() -> None:
    assert_linear(push_and_take, 20_000)


def test_a_million_chunks_pushed_back() -> None:
    push_and_take(1_000_000)


def test_lines_that_were_split_and_not_taken_cost_the_same_however_many_follow(
    traced: None,
) -> None:
    def take_by_turns(count: int) -> int:
        """Take a line as the first of many, and the next one in another way."""
        buffer = ReceiveBuffer()
        buffer.append(b"a line\n" * 2 * count)

        def turn() -> None:
            assert buffer.find(b"\n") == 7
            assert next(buffer.take_lines(b"\n", False, 65536)) == b"a line"
            assert buffer.take(7) == b"a line\n"

        total = allocated(turn for _ in range(count))
        assert len(buffer) == 0
        return total

    assert_linear(take_by_turns, 1_000)
    assert take_by_turns(4_000) < 5 * take_by_turns(1_000)


def push_pieces_of_a_line(count: int) -> None:
    """Put back, and take again, a byte of the front of a long queue."""
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
    """Take messages of a line with a length, and so many bytes, while more of them arrive."""
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
    """Take and add by turns, so that the queue stays long and its ends never meet."""
    buffer = ReceiveBuffer()
    for _ in range(count):
        buffer.append(b"x" * 300)
    for _ in range(count):
        buffer.append(b"x" * 300)
        assert len(buffer.take(450)) == 450
        assert 0 < len(buffer.take_chunk()) <= 300
        buffer.push_front(b"yy")
        buffer.append(b"x" * 300)


@pytest.mark.parametrize("program", [push_pieces_of_a_line, serve, alternate])
def test_a_program_that_mixes_all_ways_to_read_pays_for_what_it_takes(
    program: Callable[[int], None],
) -> None:
    assert_linear(program, 3_000)
