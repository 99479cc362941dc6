"""Lines, LineBatches and Frames: async iterators over lines and frames that arrive."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import TypeVar

from .._not_copyable import NotCopyable
from .conflicts import ConflictDetector

# Waits for an item. Returns the item, and an iterator over later items that have arrived.
NextItems = Callable[[], Awaitable["tuple[bytes, Iterator[bytes]]"]]

# Waits for a line. Returns it in a list, together with later lines that have arrived.
NextList = Callable[[], Awaitable[list[bytes]]]

SelfT = TypeVar("SelfT", bound="ItemIterator")


class ItemIterator(NotCopyable):
    """An async iterator over the items (lines or frames) of a connection.

    Each item is consumed only when it is returned, so you can leave the loop at any time.
    """

    # This is a class because Python does not close an async generator when a loop exits early.
    #
    # Args:
    #   reading: detects whether another task is reading.
    #   next_items: waits for an item.
    #
    # Invariant: ``_items`` yields items that are still in the receive buffer. Any operation on that
    # buffer, except ``append`` and ``len``, ends ``_items``. ``__anext__`` always checks first
    # whether another task is reading, even if the next item is ready. A task in ``starttls`` counts
    # as reading, because all unread bytes then belong to TLS.

    __slots__ = ("_items", "_next_items", "_reading")

    def __init__(self, reading: ConflictDetector, next_items: NextItems) -> None:
        self._reading = reading
        self._next_items = next_items
        self._items: Iterator[bytes] = iter(())

    def __aiter__(self: SelfT) -> SelfT:
        return self

    async def __anext__(self) -> bytes:
        if self._reading.in_use:  # hot path: this check takes 3 % of the time (benchmark row lines)
            self._reading.check()
        for item in self._items:
            return item
        item, self._items = await self._next_items()
        return item


class Lines(ItemIterator):
    """The async iterator that ``Socket.lines`` returns.

    Each line is consumed only when it is returned, so you can leave the loop at any time. If
    cancelled, it consumes nothing.
    """

    __slots__ = ("_next_list",)

    def __init__(
        self, reading: ConflictDetector, next_items: NextItems, next_list: NextList
    ) -> None:
        super().__init__(reading, next_items)
        self._next_list = next_list

    def batches(self) -> LineBatches:
        """Iterate over lists of lines: ``async for lines in sock.lines().batches():``.

        Each list has 1 to 2048 lines that have already arrived. For programs that read millions of
        lines, this is faster than a loop over single lines. All lines of a list are consumed when
        the list is returned. The limits and the errors are those of ``Socket.lines``.

        Do not use ``batches`` before ``starttls``: the list with the STARTTLS command may also have
        lines that an attacker injected, and these lines would not make the handshake fail.

        If cancelled, it consumes nothing: the next read starts at the next line.
        """
        return LineBatches(self._next_list)


class LineBatches(NotCopyable):
    """The async iterator that ``Lines.batches`` returns.

    All lines of a list are consumed when the list is returned. If cancelled, it consumes nothing.
    """

    __slots__ = ("_next_list",)

    def __init__(self, next_list: NextList) -> None:
        self._next_list = next_list

    def __aiter__(self) -> LineBatches:
        return self

    async def __anext__(self) -> list[bytes]:
        return await self._next_list()


class Frames(ItemIterator):
    """The async iterator that ``Socket.frames`` returns.

    Each frame is consumed only when it is returned, so you can leave the loop at any time. If
    cancelled, it consumes nothing.
    """

    __slots__ = ()
