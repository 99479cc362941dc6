"""Batches: the async iterator under ``Lines`` and ``Frames``."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from .._not_copyable import NotCopyable
from .conflicts import ConflictDetector

# Waits for an item. Returns the item, and an iterator over later items that have arrived.
NextBatch = Callable[[], Awaitable["tuple[bytes, Iterator[bytes]]"]]

SelfT = TypeVar("SelfT", bound="BatchIterator")


class BatchIterator(NotCopyable):
    """An async iterator over the items (lines or frames) of a connection.

    Each item is consumed only when it is returned, so you can leave the loop at any time.
    """

    # This is a class because Python does not close an async generator when a loop is left early.
    #
    # Args:
    #   reading: detects whether another task is reading.
    #   next_batch: waits for an item.
    #
    # Invariant: ``_batch`` yields items that are still in the receive buffer. Any operation on that
    # buffer, except ``append`` and ``len``, ends the batch. ``__anext__`` always checks first
    # whether another task is reading, even if the next item is ready. A task in ``starttls`` counts
    # as reading, because all unread bytes then belong to TLS.

    __slots__ = ("_batch", "_next_batch", "_reading")

    def __init__(self, reading: ConflictDetector, next_batch: NextBatch) -> None:
        self._reading = reading
        self._next_batch = next_batch
        self._batch: Iterator[bytes] = iter(())

    def __aiter__(self: SelfT) -> SelfT:
        return self

    async def __anext__(self) -> bytes:
        if self._reading.in_use:  # hot path: this check takes 3 % of the time (benchmark row lines)
            self._reading.check()
        for item in self._batch:
            return item
        item, self._batch = await self._next_batch()
        return item
