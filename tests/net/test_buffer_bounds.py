"""ReceiveBuffer: what a search looks at and what is held, against patterns that try to evade it."""

from __future__ import annotations

import gc
import sys
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from trisock._net import receive_buffer as _buffer
from trisock._net.receive_buffer import ReceiveBuffer

KIB = 1024
MIB = 1024 * KIB


class Watched(bytes):
    """Bytes that count how many of them (and of what is cut from them) were searched."""

    looked_at = 0

    def find(self, sub: bytes, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else min(end, len(self))
        at = super().find(sub, start, end)
        Watched.looked_at += (at + len(sub) if at >= 0 else end) - start
        return at

    def split(self, sep: bytes, maxsplit: int = -1) -> list[bytes]:  # type: ignore[override]
        Watched.looked_at += len(self)
        return super().split(sep, maxsplit)

    def __getitem__(self, key: slice) -> Watched:  # type: ignore[override]
        return Watched(super().__getitem__(key))

    def __add__(self, other: bytes) -> Watched:  # type: ignore[override]
        return Watched(super().__add__(other))

    def __radd__(self, other: bytes) -> Watched:
        return Watched(other + bytes(self))


def find(buffer: ReceiveBuffer, delimiter: bytes, max_bytes: int) -> int | None:
    """Find as a Socket does: what is found beyond the limit is not for the caller."""
    if "max_bytes" not in ReceiveBuffer.find.__code__.co_varnames:  # as it was once
        end = buffer.find(delimiter)
        return None if end is None or end > max_bytes else end
    return buffer.find(delimiter, max_bytes)


# ---- looking ----


@pytest.mark.parametrize("taken", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n", b"\r\n.\r\n"])
@pytest.mark.parametrize("size", [1, 100, 70_000])
def test_skipping_what_has_no_delimiter_looks_at_each_byte_once(
    size: int, delimiter: bytes, taken: int
) -> None:
    """A loop of ``recv_until(max_bytes=64)`` and ``recv_exactly(taken)``."""
    Watched.looked_at = 0
    buffer = ReceiveBuffer()
    chunk = Watched(b"\r" * size)
    total = 300 * KIB if size == 70_000 else 20_000
    for _ in range(total // size):
        buffer.append(chunk)
    total = len(buffer)
    rounds = 0
    while len(buffer) > 500:
        before = Watched.looked_at
        assert find(buffer, delimiter, 64) is None
        seam = 2 * (len(delimiter) - 1)
        pieces = 64 // size + 2
        assert Watched.looked_at - before <= 64 + pieces * seam
        buffer.take(taken)
        rounds += 1
    assert Watched.looked_at <= total + (rounds + total // size) * 2 * (len(delimiter) - 1)


def test_limits_that_change_cost_nothing_more() -> None:
    Watched.looked_at = 0
    buffer = ReceiveBuffer()
    buffer.append(Watched(b"\r" * 500 * KIB))
    for number in range(1000):
        for limit in (10, 400 * KIB, 64, 1):
            assert find(buffer, b"\r\n", limit + number) is None
        buffer.take(100)
    assert Watched.looked_at <= 500 * KIB + 4 * 1000 * 2


def test_a_resynchronising_reader_looks_at_each_byte_once() -> None:
    """Take four bytes, put three of them back, and look for the end of the line again."""
    Watched.looked_at = 0
    buffer = ReceiveBuffer()
    buffer.append(Watched(b"\r" * 100 * KIB))
    for _ in range(5000):
        assert find(buffer, b"\r\n", 64 * KIB) is None
        buffer.push_front(Watched(buffer.take(4)[1:]))
    assert Watched.looked_at <= 64 * KIB + 5000 * 8


def test_a_delimiter_that_was_found_and_not_taken_is_not_looked_for_again() -> None:
    Watched.looked_at = 0
    buffer = ReceiveBuffer()
    buffer.append(Watched(b"x" * 50_000 + b"\n"))
    for number in range(1000):  # cancelled each time
        assert find(buffer, b"\n", 65536) == 50_001 - number
        buffer.take(1)
    assert Watched.looked_at == 50_001


@pytest.mark.parametrize("max_bytes", [1, 2, 64, 1000])
def test_short_lines_with_a_small_limit_cost_the_same_for_each_byte(max_bytes: int) -> None:
    Watched.looked_at = 0
    buffer = ReceiveBuffer()
    line = b"x" * (max_bytes - 1) + b"\n"
    count = 20_000 // max_bytes
    for _ in range(20):
        buffer.append(Watched(line * count))
    lines = 0
    while (end := find(buffer, b"\n", max_bytes)) is not None:
        batch = list(buffer.take_lines(b"\n", False, max_bytes))
        if not batch:
            buffer.take(end)
        lines += len(batch) or 1
    assert lines == 20 * count
    assert Watched.looked_at <= 4 * 20 * count * max_bytes


class SearchMachine(RuleBasedStateMachine):
    """Any mix of operations finds what a plain search finds, and looks no further than it may.

    What is joined, and when, is made so small that each example meets all of it.
    """

    SIZES = {"_MAX_UNCOALESCED": 3, "_SMALL_CHUNK": 4, "_MAX_CONSUMED_BYTES": 2}

    def __init__(self) -> None:
        super().__init__()
        self.patch = pytest.MonkeyPatch()
        for name, value in self.SIZES.items():
            self.patch.setattr(_buffer, name, value, raising=False)
        self.buffer = ReceiveBuffer()
        self.model = b""
        self.lines: Any = iter(())
        self.lines_model: list[bytes] = []

    def teardown(self) -> None:
        self.patch.undo()

    text = st.text("ab\n", max_size=9).map(str.encode)
    delimiter = st.sampled_from([b"\n", b"a", b"ab", b"aa", b"aba", b"b\nab"])
    limit = st.integers(1, 40)

    @rule(chunk=text)
    def append(self, chunk: bytes) -> None:
        self.buffer.append(Watched(chunk))
        self.model += chunk

    @rule(chunk=text)
    def push_front(self, chunk: bytes) -> None:
        self.buffer.push_front(Watched(chunk))
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
        assert self.buffer.take(count) == self.model[:count]
        self.model = self.model[count:]

    @rule(delimiter=delimiter, limit=limit)
    def find(self, delimiter: bytes, limit: int) -> None:
        before = Watched.looked_at
        at = self.model.find(delimiter)
        end = at + len(delimiter)
        expected = None if at < 0 or end > limit else end
        assert find(self.buffer, delimiter, limit) == expected
        looks = min(limit, len(self.model))
        assert Watched.looked_at - before <= looks * (1 + 2 * (len(delimiter) - 1))
        before = Watched.looked_at
        assert find(self.buffer, delimiter, limit) == expected
        assert Watched.looked_at == before  # it knows

    @rule(delimiter=delimiter, limit=limit, keep=st.booleans(), count=st.integers(0, 5))
    def take_lines(self, delimiter: bytes, limit: int, keep: bool, count: int) -> None:
        end = find(self.buffer, delimiter, limit)
        if end is None:
            return
        lines = self.buffer.take_lines(delimiter, keep, limit)
        for _, line in zip(range(count), lines, strict=False):
            expected, _, self.model = self.model.partition(delimiter)
            assert line == (expected + delimiter if keep else expected)
            assert len(expected + delimiter) <= limit

    @precondition(lambda self: self.model)
    @invariant()
    def same_bytes(self) -> None:
        assert self.buffer.peek_all() == self.model
        assert self.buffer.size == len(self.model)


TestAnyMixOfOperationsFindsWhatIsThere = SearchMachine.TestCase
TestAnyMixOfOperationsFindsWhatIsThere.settings = settings(
    max_examples=200, stateful_step_count=60, deadline=None
)


# ---- holding ----


def held(buffer: ReceiveBuffer) -> int:
    """Return the size of all objects that a buffer keeps alive, each once."""
    seen: dict[int, object] = {}
    waiting: list[object] = [getattr(buffer, name) for name in buffer.__slots__]
    while waiting:
        each = waiting.pop()
        if id(each) not in seen and not isinstance(each, (type, int)):
            seen[id(each)] = each
            waiting += gc.get_referents(each)
    return sum(map(sys.getsizeof, seen.values()))


# Tuples and lists for at most three groups of loose chunks, one chunk that is read in part, and
# lines that are split already.
CONSTANT = 3 * 256 * 110 + 32 * KIB


def assert_bounded(buffer: ReceiveBuffer) -> None:
    assert held(buffer) <= 2 * len(buffer) + CONSTANT


def fresh(size: int) -> bytes:
    """Return bytes that are an object of their own."""
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
def test_what_is_held_is_within_a_small_factor_whatever_the_sizes(pattern: list[int]) -> None:
    buffer = ReceiveBuffer()
    while len(buffer) < 400_000:
        for size in pattern:
            buffer.append(fresh(size))
    assert_bounded(buffer)


@pytest.mark.parametrize("pattern", PATTERNS, ids=lambda sizes: f"{len(sizes)}x{sizes[0]}")
def test_what_was_pushed_back_is_held_in_the_same_way(pattern: list[int]) -> None:
    buffer = ReceiveBuffer()
    while len(buffer) < 400_000:
        for size in pattern:
            buffer.push_front(fresh(size))
    assert_bounded(buffer)


sizes = st.sampled_from([1, 1, 1, 2, 100, 255, 256, 257, 5000, 70_000])
steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "push", "take", "chunk", "peek", "find", "lines"]),
        sizes,
        st.integers(1, 300),
    ),
    min_size=1,
    max_size=30,
)


@settings(max_examples=100, deadline=None)
@given(steps=steps)
def test_no_mix_of_operations_makes_it_hold_much_more(steps: list[tuple[str, int, int]]) -> None:
    buffer = ReceiveBuffer()
    most = 0
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
            elif buffer.find(b"\0") is not None:
                next(buffer.take_lines(b"\0", False, 65536), None)
            if len(buffer) > 2 * MIB:
                break
        most = max(most, len(buffer))
        assert_bounded(buffer)


def push_remnants(buffer: ReceiveBuffer, peek: bool) -> None:
    """Leave one byte of each chunk that is pushed back, under the next one."""
    for _ in range(2000):
        buffer.push_front(fresh(10_000))
        buffer.take_chunk(9_999)
        if peek:
            buffer.peek_chunk()


@pytest.mark.parametrize("peek", [True, False])
def test_a_byte_left_of_a_large_chunk_does_not_keep_all_of_it(peek: bool) -> None:
    buffer = ReceiveBuffer()
    buffer.append(fresh(MIB))
    buffer.take(MIB - 1)
    assert_bounded(buffer)
    push_remnants(buffer, peek)
    assert_bounded(buffer)
    assert len(buffer) == 2001
