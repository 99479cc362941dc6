"""Lines: the async iterator over the lines of a connection."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator

from .._not_copyable import NotCopyable
from .conflicts import ConflictDetector


class Lines(NotCopyable):
    """The async iterator that ``Socket.lines`` returns.

    Each line is consumed only when it is returned, so you can leave the loop at any time.
    """

    # This is a class because Python does not close an async generator when a loop is left early.
    #
    # Args:
    #   reading: detects whether another task is reading.
    #   next_batch: waits for a line. Returns it, and an iterator over more lines that have already
    #     arrived.
    #
    # Invariant: ``_batch`` yields lines that are still in the receive buffer. Any operation on that
    # buffer, except ``append`` and ``len``, ends the batch. ``__anext__`` always checks first
    # whether another task is reading, even if the next line is ready. A task in ``starttls`` counts
    # as reading, because all unread bytes then belong to TLS.

    __slots__ = ("_batch", "_next_batch", "_reading")

    def __init__(
        self,
        reading: ConflictDetector,
        next_batch: Callable[[], Awaitable[tuple[bytes, Iterator[bytes]]]],
    ) -> None:
        self._reading = reading
        self._next_batch = next_batch
        self._batch: Iterator[bytes] = iter(())

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> bytes:
        if self._reading.in_use:  # hot path: this check takes 3 % of the time (benchmark row lines)
            self._reading.check()
        for line in self._batch:
            return line
        line, self._batch = await self._next_batch()
        return line
