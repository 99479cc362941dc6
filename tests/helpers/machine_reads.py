"""The reads that test_machine.py makes, and what each has to do."""

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

# How a read ends that does not return.
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
    count: int  # type: ignore[assignment]  # how many bytes that took


class Expected(NamedTuple):
    """What the steps of a read return, and how they end if it is in another way."""

    taken: list[Taken]
    ending: str | None


class Read(abc.ABC):
    """One way of reading, one call or more of it."""

    steps = 1
    # Whether each step is a cancel point; if not, then each that has to wait.
    always_a_cancel_point = True

    @abc.abstractmethod
    async def step(self, sock: Socket) -> bytes: ...

    @abc.abstractmethod
    def expected(self, left: bytearray, end: str | None, got: list[bytes]) -> Expected:
        """Say what has to come, given what is left to read and how it ends."""

    def check(self, failure: BaseException, left: bytearray) -> None:
        """Check what an error says."""
        if isinstance(failure, IncompleteReadError):
            assert failure.partial == left
            assert failure.expected is None


@dataclass(frozen=True)
class Chunk(Read):
    """``recv``, ``receive_some`` or the Socket's ``__anext__``: a chunk, or the front of it."""

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

    def expected(self, left: bytearray, end: str | None, got: list[bytes]) -> Expected:
        if left:
            count = len(got[0]) if got else 1
            assert 1 <= count <= (self.limit or len(left))
            return Expected([Taken(bytes(left[:count]), count)], None)
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

    def expected(self, left: bytearray, end: str | None, got: list[bytes]) -> Expected:
        if len(left) >= self.n:
            return Expected([Taken(bytes(left[: self.n]), self.n)], None)
        return Expected([], _starved(end))

    def check(self, failure: BaseException, left: bytearray) -> None:
        assert isinstance(failure, TLSError) or (
            isinstance(failure, IncompleteReadError)
            and (failure.partial, failure.expected) == (left, self.n)  # type: ignore[comparison-overlap]
        )


@dataclass(frozen=True)
class Until(Read):
    delimiter: bytes
    max_bytes: int

    async def step(self, sock: Socket) -> bytes:
        return await sock.recv_until(self.delimiter, max_bytes=self.max_bytes)

    def expected(self, left: bytearray, end: str | None, got: list[bytes]) -> Expected:
        count, ending = _until(left, 0, self.delimiter, self.max_bytes, end)
        return Expected([Taken(bytes(left[:count]), count)] if count else [], ending)

    def check(self, failure: BaseException, left: bytearray) -> None:
        super().check(failure, left)
        if isinstance(failure, LimitExceededError):
            assert failure.limit == self.max_bytes


@dataclass(frozen=True)
class Opened:
    """An iterator over lines, and what it was made with."""

    lines: Lines
    delimiter: bytes
    keep_ends: bool
    max_bytes: int


@dataclass(frozen=True)
class Next(Read):
    """So many lines of an iterator that lives on."""

    opened: Opened
    steps: int

    always_a_cancel_point = False  # but once a chunk

    async def step(self, sock: Socket) -> bytes:
        return await self.opened.lines.__anext__()

    def expected(self, left: bytearray, end: str | None, got: list[bytes]) -> Expected:
        opened = self.opened
        taken: list[Taken] = []
        start = 0
        for _ in range(self.steps):
            count, ending = _until(left, start, opened.delimiter, opened.max_bytes, end)
            if not count:
                if ending == INCOMPLETE and start == len(left):
                    ending = STOP
                return Expected(taken, ending)
            kept = count if opened.keep_ends else count - len(opened.delimiter)
            taken.append(Taken(bytes(left[start : start + kept]), count))
            start += count
        return Expected(taken, None)

    def check(self, failure: BaseException, left: bytearray) -> None:
        super().check(failure, left)
        if isinstance(failure, LimitExceededError):
            assert failure.limit == self.opened.max_bytes


def _until(
    left: bytearray, start: int, delimiter: bytes, max_bytes: int, end: str | None
) -> tuple[int, str | None]:
    """Return how many bytes there are up to and including the delimiter, or how it ends."""
    at = left.find(delimiter, start)
    count = at + len(delimiter) - start
    if at >= 0 and count <= max_bytes:
        return count, None
    if at >= 0 or len(left) - start >= max_bytes:
        return 0, LIMIT
    return 0, _starved(end)


def _starved(end: str | None) -> str:
    """Say how a read ends that wants more than is left."""
    return {None: WAITS, "clean": INCOMPLETE, "cut": BROKEN}[end]
