"""ReceiveBuffer scans few bytes and holds little memory, even for adversarial input."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from helpers.cancellation import grid
from helpers.fuzzing import number_of
from helpers.memory import held
from helpers.scanned_bytes import ScannedBytes
from trisock._net import receive_buffer as _buffer
from trisock._net.frame_header import frame_header
from trisock._net.receive_buffer import ReceiveBuffer

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture(autouse=True)
def count_from_zero() -> None:
    ScannedBytes.scanned = 0


# ---- scanning ----


@pytest.mark.parametrize(
    ("size", "delimiter", "taken"),
    grid(
        lambda size, delimiter, taken: taken == 64 or size == 100,
        [1, 100, 70_000],
        [b"\n", b"\r\n", b"\r\n.\r\n"],
        [1, 63, 64, 65, 300],
    ),
)
def test_skipping_bytes_without_a_delimiter_scans_each_byte_once(
    size: int, delimiter: bytes, taken: int
) -> None:
    """Simulate alternate calls of ``recv_until(max_bytes=64)`` and ``recv_exactly(taken)``."""
    buffer = ReceiveBuffer()
    chunk = ScannedBytes(b"\r" * size)
    total = 140_000 if size == 70_000 else 20_000
    for _ in range(total // size):
        buffer.append(chunk)
    total = len(buffer)
    rounds = 0
    while len(buffer) > 500:
        before = ScannedBytes.scanned
        assert buffer.find(delimiter, 64) is None
        seam = 2 * (len(delimiter) - 1)
        pieces = 64 // size + 2
        assert ScannedBytes.scanned - before <= 64 + pieces * seam
        buffer.take(taken)
        rounds += 1
    assert ScannedBytes.scanned <= total + (rounds + total // size) * 2 * (len(delimiter) - 1)


def test_changing_the_limit_rescans_no_byte() -> None:
    buffer = ReceiveBuffer()
    buffer.append(ScannedBytes(b"\r" * 500 * KIB))
    for number in range(1000):
        for limit in (10, 400 * KIB, 64, 1):
            assert buffer.find(b"\r\n", limit + number) is None
        buffer.take(100)
    assert ScannedBytes.scanned <= 500 * KIB + 4 * 1000 * 2


def test_a_resynchronising_reader_scans_each_byte_once() -> None:
    """The reader takes four bytes, pushes three back, and searches for the line's end again."""
    buffer = ReceiveBuffer()
    buffer.append(ScannedBytes(b"\r" * 100 * KIB))
    for _ in range(5000):
        assert buffer.find(b"\r\n", 64 * KIB) is None
        buffer.push_front(ScannedBytes(buffer.take(4)[1:]))
    assert ScannedBytes.scanned <= 64 * KIB + 5000 * 8


def test_a_delimiter_already_found_is_not_searched_for_again() -> None:
    buffer = ReceiveBuffer()
    buffer.append(ScannedBytes(b"x" * 50_000 + b"\n"))
    for number in range(1000):  # as if each read were cancelled after its search
        assert buffer.find(b"\n", 65536) == 50_001 - number
        buffer.take(1)
    assert ScannedBytes.scanned == 50_001


@pytest.mark.parametrize("max_bytes", [1, 2, 64, 1000])
def test_short_lines_with_a_small_limit_have_a_linear_cost(max_bytes: int) -> None:
    buffer = ReceiveBuffer()
    line = b"x" * (max_bytes - 1) + b"\n"
    count = 20_000 // max_bytes
    for _ in range(5):
        buffer.append(ScannedBytes(line * count))
    lines = 0
    while (end := buffer.find(b"\n", max_bytes)) is not None:
        batch = list(buffer.take_lines(b"\n", False, max_bytes))
        if not batch:
            buffer.take(end)
        lines += len(batch) or 1
    assert lines == 5 * count
    assert ScannedBytes.scanned <= 4 * 5 * count * max_bytes


class SearchMachine(RuleBasedStateMachine):
    """Compares ReceiveBuffer with plain bytes, and checks how many bytes each search scans."""

    # These limits are small, so that short examples coalesce and trim chunks.
    SIZES = {"_MAX_UNCOALESCED": 3, "_SMALL_CHUNK": 4, "_MAX_CONSUMED_BYTES": 2}

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in self.SIZES.items():
            self.patch.setattr(_buffer, name, value)
        self.buffer = ReceiveBuffer()
        self.model = b""

    def teardown(self) -> None:
        self.patch.undo()

    text = st.text("ab\n", max_size=9).map(str.encode)
    delimiter = st.sampled_from([b"\n", b"a", b"ab", b"aa", b"aba", b"b\nab"])
    limit = st.integers(1, 40)

    @rule(chunk=text)
    def append(self, chunk: bytes) -> None:
        self.buffer.append(ScannedBytes(chunk))
        self.model += chunk

    @rule(chunk=text)
    def push_front(self, chunk: bytes) -> None:
        self.buffer.push_front(ScannedBytes(chunk))
        self.model = chunk + self.model

    @rule(max_bytes=st.none() | st.integers(1, 6))
    def take_chunk(self, max_bytes: int | None) -> None:
        chunk = self.buffer.take_chunk(max_bytes)
        assert bool(chunk) == bool(self.model)
        assert self.model.startswith(chunk)
        assert max_bytes is None or len(chunk) <= max_bytes
        self.model = self.model[len(chunk) :]

    @rule()
    def peek_chunk(self) -> None:
        chunk = self.buffer.peek_chunk()
        assert bool(chunk) == bool(self.model)
        assert self.model.startswith(chunk)

    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.model)))
        if self.model:
            assert self.buffer.peek_bytes(count) == self.model[:count]
        if data.draw(st.booleans()):
            assert self.buffer.take(count) == self.model[:count]
        else:
            self.buffer.drop(count)
        self.model = self.model[count:]

    @rule(delimiter=delimiter, limit=limit)
    def find(self, delimiter: bytes, limit: int) -> None:
        before = ScannedBytes.scanned
        at = self.model.find(delimiter)
        end = at + len(delimiter)
        expected = None if at < 0 or end > limit else end
        assert self.buffer.find(delimiter, limit) == expected
        most = min(limit, len(self.model))
        assert ScannedBytes.scanned - before <= most * (1 + 2 * (len(delimiter) - 1))
        before = ScannedBytes.scanned
        assert self.buffer.find(delimiter, limit) == expected
        assert ScannedBytes.scanned == before  # the result is cached

    @rule(delimiter=delimiter, limit=limit, keep=st.booleans(), count=st.integers(0, 5))
    def take_lines(self, delimiter: bytes, limit: int, keep: bool, count: int) -> None:
        end = self.buffer.find(delimiter, limit)
        if end is None:
            return
        lines = self.buffer.take_lines(delimiter, keep, limit)
        for _, line in zip(range(count), lines, strict=False):
            expected, _, self.model = self.model.partition(delimiter)
            assert line == (expected + delimiter if keep else expected)
            assert len(expected + delimiter) <= limit

    @precondition(lambda self: self.model)
    @rule(limit=st.sampled_from([9, 10, 97, 98]), count=st.integers(0, 5))
    def take_frames(self, limit: int, count: int) -> None:
        """Each byte may be a frame's length: ``a`` is 97, ``b`` is 98, a line end is 10."""
        frames = self.buffer.take_frames(frame_header(1), limit)
        for _, frame in zip(range(count), frames, strict=False):
            length = self.model[0]
            assert frame == self.model[1 : 1 + length]
            assert len(frame) == length <= limit
            self.model = self.model[1 + length :]

    @precondition(lambda self: self.model)
    @invariant()
    def same_bytes(self) -> None:
        assert self.buffer.peek_all() == self.model
        assert self.buffer.size == len(self.model)


def test_any_mix_of_operations_matches_plain_bytes(times: int) -> None:
    options = settings(max_examples=number_of(100, times), stateful_step_count=60, deadline=None)
    run_state_machine_as_test(SearchMachine, settings=options)


# ---- memory ----


# The overhead in bytes. Up to three groups of 256 chunks are not coalesced: each of these chunks
# needs a tuple and a list entry. A partly read chunk and lines already split need up to 32 KiB.
CONSTANT = 3 * 256 * 110 + 32 * KIB


def assert_bounded(buffer: ReceiveBuffer) -> None:
    assert held(buffer) <= 2 * len(buffer) + CONSTANT


def fresh(size: int) -> bytes:
    """Return a new bytes object of zeros. Only the caller holds a reference to it."""
    return bytes(bytearray(size))


PATTERNS = [
    [1],
    [1] * 255 + [256],
    [255] * 255 + [256],
    [1, 256],
    [1, 300],
    [1, 255],
    [1] * 254 + [65_536],
    [100] * 300 + [16_384],
    [1] * 600 + [131_072],
]


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda sizes: f"{len(sizes)}x{sizes[0]}")
@pytest.mark.parametrize("add", [ReceiveBuffer.append, ReceiveBuffer.push_front])
def test_memory_stays_within_a_small_factor_of_the_unread_bytes(
    add: Callable[[ReceiveBuffer, bytes], None], pattern: list[int]
) -> None:
    buffer = ReceiveBuffer()
    while len(buffer) < 200_000:
        for size in pattern:
            add(buffer, fresh(size))
    assert_bounded(buffer)


sizes = st.sampled_from([1, 1, 1, 2, 100, 255, 256, 257, 5000, 70_000])
steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "push", "take", "chunk", "peek", "find", "lines", "frames"]),
        sizes,
        st.integers(1, 300),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(steps=steps)
def test_no_mix_of_operations_exceeds_the_memory_bound(steps: list[tuple[str, int, int]]) -> None:
    buffer = ReceiveBuffer()
    for what, size, times in steps:
        for _ in range(times):
            if what == "append":
                buffer.append(fresh(size))
            elif what == "push":
                buffer.push_front(fresh(size))
            elif what == "take":
                buffer.take(min(size, len(buffer)))
            elif what == "chunk":
                buffer.take_chunk(size)
            elif what == "peek":
                buffer.peek_chunk()
            elif what == "find":
                buffer.find(b"\n")
            elif what == "frames":
                if buffer:
                    next(buffer.take_frames(frame_header(1), 65536), None)
            elif buffer.find(b"\0") is not None:
                next(buffer.take_lines(b"\0", False, 65536), None)
            if len(buffer) > 2 * MIB:
                break
        assert_bounded(buffer)


def push_remnants(buffer: ReceiveBuffer, peek: bool) -> None:
    """Push 2000 chunks to the front, and take all but the last byte of each chunk."""
    for _ in range(2000):
        buffer.push_front(fresh(10_000))
        buffer.take_chunk(9_999)
        if peek:
            buffer.peek_chunk()


@pytest.mark.parametrize("peek", [True, False])
def test_one_unread_byte_keeps_no_large_chunk_in_memory(peek: bool) -> None:
    buffer = ReceiveBuffer()
    buffer.append(fresh(MIB))
    buffer.take(MIB - 1)
    assert_bounded(buffer)
    push_remnants(buffer, peek)
    assert_bounded(buffer)
    assert len(buffer) == 2001
