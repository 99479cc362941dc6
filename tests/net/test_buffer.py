"""ReceiveBuffer agrees with a simple model, however the input is split."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator

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

from helpers.fuzzing import number_of
from trisock._net.receive_buffer import ReceiveBuffer

# A small alphabet makes delimiters and partial delimiters frequent.
text = st.lists(st.sampled_from([b"a", b"b", b"\r", b"\n"]), max_size=12).map(b"".join)


class BufferMachine(RuleBasedStateMachine):
    """Compares ReceiveBuffer with a model: a queue of chunks that are never coalesced."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = ReceiveBuffer()
        self.chunks: deque[bytes] = deque()  # the model: the unread part of each chunk

    @property
    def model(self) -> bytes:
        return b"".join(self.chunks)

    @rule(chunk=text)
    def append(self, chunk: bytes) -> None:
        self.buffer.append(chunk)
        if chunk:
            self.chunks.append(chunk)

    @rule(chunk=text)
    def push_front(self, chunk: bytes) -> None:
        self.buffer.push_front(chunk)
        if chunk:
            self.chunks.appendleft(chunk)

    @rule(max_bytes=st.none() | st.integers(1, 6))
    def take_chunk(self, max_bytes: int | None) -> None:
        expected = b""
        if self.chunks:
            chunk = self.chunks.popleft()
            expected = chunk[:max_bytes]
            if chunk[len(expected) :]:
                self.chunks.appendleft(chunk[len(expected) :])
        assert self.buffer.take_chunk(max_bytes) == expected

    @precondition(lambda self: self.chunks)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        count = data.draw(st.integers(0, len(self.model)))
        expected = self.model[:count]
        assert self.buffer.peek_bytes(count) == expected
        if data.draw(st.booleans()):
            assert self.buffer.take(count) == expected
        else:
            self.buffer.drop(count)
        while count:
            chunk = self.chunks.popleft()
            if len(chunk) > count:
                self.chunks.appendleft(chunk[count:])
            count = max(0, count - len(chunk))

    @rule()
    def peek_chunk(self) -> None:
        assert self.buffer.peek_chunk() == (self.chunks[0] if self.chunks else b"")

    @rule(delimiter=text.filter(len))
    def find(self, delimiter: bytes) -> None:
        at = self.model.find(delimiter)
        assert self.buffer.find(delimiter) == (None if at < 0 else at + len(delimiter))

    @invariant()
    def same_bytes(self) -> None:
        assert len(self.buffer) == len(self.model)
        assert self.buffer.peek_all() == self.model


def test_any_mix_of_operations_keeps_every_byte(times: int) -> None:
    options = settings(max_examples=number_of(100, times), deadline=None)
    run_state_machine_as_test(BufferMachine, settings=options)


@given(before=text, delimiter=text.filter(len), after=text, sizes=st.lists(st.integers(1, 5)))
def test_a_delimiter_is_found_wherever_the_chunks_are_split(
    before: bytes, delimiter: bytes, after: bytes, sizes: list[int]
) -> None:
    whole = before + delimiter + after
    expected = whole.find(delimiter) + len(delimiter)
    buffer = ReceiveBuffer()
    found: int | None = None
    rest = whole
    for size in [*sizes, *[1] * len(whole)]:
        buffer.append(rest[:size])
        rest = rest[size:]
        if found is None:
            found = buffer.find(delimiter)
    assert found == expected


@pytest.mark.parametrize("search", [True, False])
def test_runs_of_single_bytes_are_coalesced(search: bool) -> None:
    buffer = ReceiveBuffer()
    taken = b""
    for number in range(10_000):
        buffer.append(bytes([97 + number % 7]))
        if search or number % 1000 == 500:
            assert buffer.find(b"\r\n") is None
        if number == 5000:
            taken = buffer.take(300)
    buffer.append(b"\r")
    buffer.append(b"\n")
    assert buffer._count() < 10_000 / 255 + 2 * 256
    assert buffer.find(b"\r\n") == 10_002 - 300
    whole = bytes(97 + number % 7 for number in range(10_000))
    assert taken + buffer.take(9_700) == whole


def test_only_small_chunks_are_coalesced() -> None:
    buffer = ReceiveBuffer()
    for _ in range(256):
        buffer.append(b"x")
    buffer.take(256)
    large = b"y" * 100_000
    buffer.push_front(large)
    buffer.append(b"z")
    assert buffer.take_chunk() is large
    assert buffer.take_chunk() == b"z"


def test_taking_lines_from_one_chunk_does_not_copy_the_rest() -> None:
    buffer = ReceiveBuffer()
    chunk = b"line\n" * 1000
    buffer.append(chunk)
    for _ in range(999):
        end = buffer.find(b"\n")
        assert end is not None
        assert buffer.take(end) == b"line\n"
    assert buffer._chunk(0)[0] is chunk  # not a copy


def test_a_whole_chunk_is_not_copied() -> None:
    buffer = ReceiveBuffer()
    first, second = b"x" * 10_000, b"y" * 10_000
    buffer.append(second)
    buffer.push_front(first)
    assert buffer.peek_chunk() is first
    assert buffer.take_chunk() is first
    assert buffer.take(10_000) is second


def test_taking_more_bytes_than_are_unread_raises_assertion_error() -> None:
    for method in (ReceiveBuffer.take, ReceiveBuffer.drop):
        with pytest.raises(AssertionError):
            method(ReceiveBuffer(), 1)


def test_push_front_restarts_the_search() -> None:
    buffer = ReceiveBuffer()
    buffer.append(b"abc")
    assert buffer.find(b"\n") is None
    buffer.push_front(b"x\ny")
    assert buffer.find(b"\n") == 2
    assert buffer.take(6) == b"x\nyabc"
    buffer.append(b"abc\n")
    assert buffer.find(b"\n", 2) is None
    buffer.push_front(b"long")
    assert buffer.find(b"\n", 3) is None  # the limit is inside the bytes that were pushed back
    assert buffer.find(b"\n") == 8


def lines_of(buffer: ReceiveBuffer, **options: object) -> Iterator[bytes]:
    assert buffer.find(b"\n") is not None
    return buffer.take_lines(b"\n", **{"keep_ends": False, "max_bytes": 100, **options})  # type: ignore[arg-type]


def test_lines_not_yet_yielded_by_take_lines_stay_unread() -> None:
    for taken in range(4):
        buffer = ReceiveBuffer()
        buffer.append(b"one\ntwo\nthree\nrest")
        lines = lines_of(buffer)
        assert [next(lines) for _ in range(taken)] == [b"one", b"two", b"three"][:taken]
        buffer.append(b" of it")
        left = [b"one\n", b"two\n", b"three\n", b"rest of it"][taken:]
        assert buffer.peek_all() == b"".join(left)
        assert len(buffer) == len(b"".join(left))
        assert list(lines) == []  # peek_all has ended the iteration


def test_take_lines_respects_keep_ends_and_max_bytes() -> None:
    buffer = ReceiveBuffer()
    buffer.append(b"a\nbb\n" + b"c" * 100 + b"\n")
    assert list(lines_of(buffer, keep_ends=True)) == [b"a\n", b"bb\n"]
    assert buffer.find(b"\n") == 101  # longer than max_bytes, so take_lines left it unread
    assert buffer.take(101) == b"c" * 100 + b"\n"


@pytest.mark.parametrize("delimiter", [b"a", b"ab", b"aa", b"aba"])
@pytest.mark.parametrize("max_bytes", range(1, 8))
def test_no_split_line_exceeds_the_limit(delimiter: bytes, max_bytes: int) -> None:
    for letters in itertools.product("ab", repeat=10):
        text = "".join(letters).encode()
        lines = [line + delimiter for line in text.split(delimiter)[:-1]]
        fitting = list(itertools.takewhile(lambda line: len(line) <= max_bytes, lines))
        buffer = ReceiveBuffer()
        buffer.append(text)
        got = []
        while (end := buffer.find(delimiter, max_bytes)) is not None:
            taken = buffer.take_line_list(delimiter, True, max_bytes)
            got += taken or [buffer.take(end)]
            if delimiter != delimiter[::-1] or len(delimiter) == 1:
                assert taken == fitting  # one call takes all lines
        assert got == fitting


def test_a_line_across_two_chunks_is_taken_with_later_lines() -> None:
    buffer = ReceiveBuffer()
    for chunk in (b"o", b"ne\ntwo\nth", b"ree\n"):
        buffer.append(chunk)
    assert list(lines_of(buffer)) == [b"one", b"two"]
    assert list(lines_of(buffer)) == [b"three"]
    assert len(buffer) == 0


def test_take_lines_yields_no_line_across_many_or_large_chunks() -> None:
    for chunks in ([b"o", b"n", b"e\nx"], [b"o", b"ne\n" + b"x" * 1_000_000]):
        buffer = ReceiveBuffer()
        for chunk in chunks:
            buffer.append(chunk)
        assert list(lines_of(buffer)) == []
        assert buffer.take(4) == b"one\n"
