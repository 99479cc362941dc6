"""The reads of test_machine.py, and the expected result of each."""

from __future__ import annotations

import abc
from dataclasses import dataclass
from typing import NamedTuple

from trisock import (
    IncompleteReadError,
    LimitExceededError,
    Socket,
    TLSError,
)
from trisock._net.lines import Lines

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

    taken: list[Taken]  # the results of the steps that return
    ending: str | None  # the outcome of the next step, or None if all steps return


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
class Until(Read):
    delimiter: bytes
    max_bytes: int

    async def step(self, sock: Socket) -> bytes:
        return await sock.recv_until(self.delimiter, max_bytes=self.max_bytes)

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        count, ending = _until(unread, 0, self.delimiter, self.max_bytes, end)
        return Expected([Taken(bytes(unread[:count]), count)] if count else [], ending)

    def check(self, failure: BaseException, unread: bytearray) -> None:
        super().check(failure, unread)
        if isinstance(failure, LimitExceededError):
            assert failure.limit == self.max_bytes


@dataclass(frozen=True)
class Opened:
    """An iterator over lines, and its arguments."""

    lines: Lines
    delimiter: bytes
    keep_ends: bool
    max_bytes: int


@dataclass(frozen=True)
class Next(Read):
    """A read of the next lines from an iterator. Later reads may use the same iterator."""

    opened: Opened
    steps: int

    always_a_cancel_point = False  # ``Lines`` has one cancel point per chunk, not per line

    async def step(self, sock: Socket) -> bytes:
        return await self.opened.lines.__anext__()

    def expected(self, unread: bytearray, end: str | None, got: list[bytes]) -> Expected:
        opened = self.opened
        taken: list[Taken] = []
        start = 0
        for _ in range(self.steps):
            count, ending = _until(unread, start, opened.delimiter, opened.max_bytes, end)
            if not count:
                if ending == INCOMPLETE and start == len(unread):
                    ending = STOP
                return Expected(taken, ending)
            kept = count if opened.keep_ends else count - len(opened.delimiter)
            taken.append(Taken(bytes(unread[start : start + kept]), count))
            start += count
        return Expected(taken, None)

    def check(self, failure: BaseException, unread: bytearray) -> None:
        super().check(failure, unread)
        if isinstance(failure, LimitExceededError):
            assert failure.limit == self.opened.max_bytes


def _until(
    unread: bytearray, start: int, delimiter: bytes, max_bytes: int, end: str | None
) -> tuple[int, str | None]:
    """Return ``(size including the delimiter, None)``, or ``(0, outcome of the read)``."""
    at = unread.find(delimiter, start)
    count = at + len(delimiter) - start
    if at >= 0 and count <= max_bytes:
        return count, None
    if at >= 0 or len(unread) - start >= max_bytes:
        return 0, LIMIT
    return 0, _ending_without_enough(end)


def _ending_without_enough(end: str | None) -> str:
    """Return the outcome of a read that needs more than the unread bytes."""
    return {None: WAITS, "clean": INCOMPLETE, "cut": BROKEN}[end]
