"""The reads of test_machine.py, and the expected result of each."""

from __future__ import annotations

import abc
import struct
from dataclasses import dataclass
from typing import NamedTuple

from trisock import Frames, IncompleteReadError, LimitExceededError, Lines, Socket, TLSError

# The possible outcomes of a read that does not return.
WAITS = "waits"
LIMIT = "limit"
INCOMPLETE = "incomplete"
STOP = "stop"
BROKEN = "broken"
CANCELLED = "cancelled"

FAILURES: dict[type[BaseException], str] = {
    LimitExceededError: LIMIT,
    IncompleteReadError: INCOMPLETE,
    StopAsyncIteration: STOP,
    TLSError: BROKEN,
}


class Taken(NamedTuple):
    returned: bytes
    count: int  # type: ignore[assignment]  # how many unread bytes the step consumed


class Expected(NamedTuple):
    """The expected results of a read's steps."""

    taken: list[Taken]  # The results of the steps that return.
    ending: str | None  # The outcome of the next step, or None if all steps return.
    dropped: int = 0  # How many unread bytes the next step consumes although it does not return.


class Read(abc.ABC):
    """A read method, and how often it is called (``steps``)."""

    steps = 1
    # False if a step may return without checking for cancellation.
    always_a_cancel_point = True

    @abc.abstractmethod
    async def step(self, sock: Socket) -> bytes: ...

    @abc.abstractmethod
    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        """Return the expected result, given the unread bytes and the end of the stream."""

    def check(self, failure: BaseException, unread: bytearray) -> None:
        """Check the attributes of an error."""
        if isinstance(failure, IncompleteReadError):
            assert failure.partial == unread
            assert failure.expected is None


@dataclass(frozen=True)
class Chunk(Read):
    """A read of any bytes that are available: ``recv``, ``receive_some`` or ``__anext__``."""

    method: str
    max_bytes: int | None

    async def step(self, sock: Socket) -> bytes:
        if self.method == "__anext__":
            return await sock.__anext__()
        chunk = await getattr(sock, self.method)(self.max_bytes)
        assert isinstance(chunk, bytes)
        return chunk

    @property
    def limit(self) -> int | None:
        return None if self.method == "__anext__" else self.max_bytes

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        if unread:
            count = len(got[0]) if got else 1
            assert 1 <= count <= (self.limit or len(unread))
            return Expected([Taken(bytes(unread[:count]), count)], None)
        if end == "clean" and self.method == "__anext__":
            return Expected([], STOP)
        if end == "clean":
            return Expected([Taken(b"", 0)], None)
        return Expected([], WAITS if end is None else BROKEN)


@dataclass(frozen=True)
class Exactly(Read):
    n: int

    async def step(self, sock: Socket) -> bytes:
        return await sock.recv_exactly(self.n)

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        if len(unread) >= self.n:
            return Expected([Taken(bytes(unread[: self.n]), self.n)], None)
        return Expected([], _ending_without_enough(end))

    def check(self, failure: BaseException, unread: bytearray) -> None:
        assert isinstance(failure, TLSError) or (
            isinstance(failure, IncompleteReadError)
            and (failure.partial, failure.expected) == (unread, self.n)  # type: ignore[comparison-overlap]
        )


@dataclass(frozen=True)
class Peek(Read):
    """``peek(wait=True)``: like ``recv``, but it consumes nothing."""

    async def step(self, sock: Socket) -> bytes:
        return await sock.peek(wait=True)

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        taken, ending, _ = Chunk("recv", None).expected(unread, end, got)
        return Expected([Taken(each.returned, 0) for each in taken], ending)


@dataclass(frozen=True)
class Skip(Read):
    """``skip_until``. A step returns its result, a number, as decimal text."""

    delimiter: bytes

    async def step(self, sock: Socket) -> bytes:
        return b"%d" % await sock.skip_until(self.delimiter)

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        at = unread.find(self.delimiter)
        if at >= 0:
            count = at + len(self.delimiter)
            return Expected([Taken(b"%d" % count, count)], None)
        ending = _ending_without_enough(end)
        kept = 0 if ending == INCOMPLETE else len(self.delimiter) - 1
        return Expected([], ending, dropped=max(0, len(unread) - kept))


# ---- lines and frames ----


class Item(NamedTuple):
    """The next line or frame, or the outcome (``ending``) of a read that does not return one."""

    returned: bytes
    size: int
    ending: str | None


class Format(abc.ABC):
    """The format of the items (lines or frames) that a read returns."""

    max_bytes: int

    @abc.abstractmethod
    async def read_one(self, sock: Socket) -> bytes:
        """Read an item without an iterator."""

    @abc.abstractmethod
    def iterate(self, sock: Socket) -> Lines | Frames: ...

    @abc.abstractmethod
    def next_item(self, unread: bytearray, start: int, end: str | None) -> Item: ...

    def check(self, failure: BaseException, unread: bytearray) -> None:
        """Check the attributes of an error."""
        if isinstance(failure, IncompleteReadError):
            assert failure.partial == unread
            assert failure.at_boundary == (not unread)
            assert failure.expected == self.wanted(unread)
        if isinstance(failure, LimitExceededError):
            assert failure.limit == self.max_bytes

    def wanted(self, unread: bytearray) -> int | None:
        """Return the right value for the attribute ``expected`` of an IncompleteReadError."""
        return None


@dataclass(frozen=True)
class LineFormat(Format):
    delimiter: bytes
    keep_ends: bool
    max_bytes: int

    async def read_one(self, sock: Socket) -> bytes:
        read = sock.recv_until if self.keep_ends else sock.recv_line
        return await read(delimiter=self.delimiter, max_bytes=self.max_bytes)

    def iterate(self, sock: Socket) -> Lines:
        return sock.lines(
            delimiter=self.delimiter, keep_ends=self.keep_ends, max_bytes=self.max_bytes
        )

    def next_item(self, unread: bytearray, start: int, end: str | None) -> Item:
        at = unread.find(self.delimiter, start)
        size = at + len(self.delimiter) - start
        if at >= 0 and size <= self.max_bytes:
            kept = size if self.keep_ends else size - len(self.delimiter)
            return Item(bytes(unread[start : start + kept]), size, None)
        if at >= 0 or len(unread) - start >= self.max_bytes:
            return Item(b"", 0, LIMIT)
        return Item(b"", 0, _ending_without_enough(end))


@dataclass(frozen=True)
class FrameFormat(Format):
    header: str | int
    max_bytes: int

    async def read_one(self, sock: Socket) -> bytes:
        return await sock.recv_frame(self.header, max_bytes=self.max_bytes)

    def iterate(self, sock: Socket) -> Frames:
        return sock.frames(self.header, max_bytes=self.max_bytes)

    @property
    def size(self) -> int:
        return self.header if isinstance(self.header, int) else struct.calcsize(self.header)

    def length(self, unread: bytearray, start: int) -> int | None:
        """Return the length of the next frame's body, or None if its header is incomplete."""
        header = unread[start : start + self.size]
        if len(header) < self.size:
            return None
        little = isinstance(self.header, str) and self.header.startswith("<")
        return int.from_bytes(header, "little" if little else "big")

    def next_item(self, unread: bytearray, start: int, end: str | None) -> Item:
        length = self.length(unread, start)
        if length is None:
            return Item(b"", 0, _ending_without_enough(end))
        if length > self.max_bytes:
            return Item(b"", 0, LIMIT)
        size = self.size + length
        if start + size > len(unread):
            return Item(b"", 0, _ending_without_enough(end))
        return Item(bytes(unread[start + self.size : start + size]), size, None)

    def check(self, failure: BaseException, unread: bytearray) -> None:
        super().check(failure, unread)
        if isinstance(failure, LimitExceededError):
            assert failure.frame_length == self.length(unread, 0)

    def wanted(self, unread: bytearray) -> int | None:
        return self.size + (self.length(unread, 0) or 0)


@dataclass(frozen=True)
class One(Read):
    """A read of one item: ``recv_until``, ``recv_line`` or ``recv_frame``."""

    format: Format

    async def step(self, sock: Socket) -> bytes:
        return await self.format.read_one(sock)

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        returned, size, ending = self.format.next_item(unread, 0, end)
        return Expected([Taken(returned, size)] if size else [], ending)

    def check(self, failure: BaseException, unread: bytearray) -> None:
        self.format.check(failure, unread)


@dataclass(frozen=True)
class Opened:
    """An iterator over items, and their format."""

    items: Lines | Frames
    format: Format


@dataclass(frozen=True)
class Next(Read):
    """A read of the next items from an iterator. Later reads may use the same iterator."""

    opened: Opened
    steps: int = 1

    always_a_cancel_point = False  # an iterator has one cancel point per batch, not per item

    async def step(self, sock: Socket) -> bytes:
        return await self.opened.items.__anext__()

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        taken: list[Taken] = []
        start = 0
        for _ in range(self.steps):
            returned, size, ending = self.opened.format.next_item(unread, start, end)
            if not size:
                if ending == INCOMPLETE and start == len(unread):
                    ending = STOP
                return Expected(taken, ending)
            taken.append(Taken(returned, size))
            start += size
        return Expected(taken, None)

    def check(self, failure: BaseException, unread: bytearray) -> None:
        self.opened.format.check(failure, unread)


@dataclass(frozen=True)
class Batch(Read):
    """A read of a batch of lines. A step returns the lines joined, with their delimiters."""

    opened: Opened

    async def step(self, sock: Socket) -> bytes:
        lines, format = self.opened.items, self.opened.format
        assert isinstance(lines, Lines)
        assert isinstance(format, LineFormat)
        batch = await anext(lines.batches())
        assert 1 <= len(batch) <= 2048
        return b"".join(line if format.keep_ends else line + format.delimiter for line in batch)

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        taken, ending, _ = Next(self.opened, 1).expected(unread, end, [])
        if not taken:
            return Expected(taken, ending)
        start = taken[0].count
        while got and start < len(got[0]):  # the model does not know the size of the batch
            _, size, ending = self.opened.format.next_item(unread, start, end)
            assert size, f"the batch is longer than the lines that were expected: {ending}"
            start += size
        return Expected([Taken(bytes(unread[:start]), start)], None)

    def check(self, failure: BaseException, unread: bytearray) -> None:
        self.opened.format.check(failure, unread)


def _ending_without_enough(end: str | None) -> str:
    """Return the outcome of a read that needs more than the unread bytes."""
    return {None: WAITS, "clean": INCOMPLETE, "cut": BROKEN}[end]
