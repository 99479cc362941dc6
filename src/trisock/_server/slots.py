"""Slots: the limit on a server's concurrent connections."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator

import trio

from .._arguments import quoted


class _Closing:
    """The closing connections of all servers that share one limiter.

    Invariant: ``in_use`` counts the closing slots in use. ``waiting`` has an entry for each closing
    connection that still holds a normal slot, oldest first.
    """

    def __init__(self) -> None:
        self.in_use = 0
        self.waiting: dict[object, Slots] = {}


_closing_of: weakref.WeakKeyDictionary[trio.CapacityLimiter, _Closing] = weakref.WeakKeyDictionary()


class Slots:
    """Slots for open connections, and the same number of slots for closing connections.

    A close may wait up to two seconds for the peer, and this wait costs the peer nothing. To keep
    slots free for other peers, a connection that starts to close releases its slot and moves to a
    closing slot. If no closing slot is free, the connection keeps its slot until one becomes free.
    (If we closed the oldest connection immediately instead, a burst of hostile clients would
    destroy responses to honest ones.)

    Args:
      limit: the number of slots, or a limiter. Servers with the same limiter share its slots, and
        also the closing slots. The program may change ``total_tokens`` at any time.

    Raises TypeError or ValueError if ``limit`` is invalid.

    Invariant: ``_borrowers`` has one entry for each slot in use. (Trio allows a borrower only one
    token of a limiter. All slots are alike, so it does not matter which borrower is released.)
    """

    def __init__(self, limit: int | trio.CapacityLimiter) -> None:
        if isinstance(limit, trio.CapacityLimiter):
            self._limiter = limit
        elif not isinstance(limit, int) or isinstance(limit, bool):
            wanted = "an int, a trio.CapacityLimiter or None"
            raise TypeError(f"max_connections must be {wanted}, not {quoted(limit)}")
        elif limit < 1:
            raise ValueError(f"max_connections must be 1 or more, not {quoted(limit)}")
        else:
            self._limiter = trio.CapacityLimiter(limit)
        self._closing = _closing_of.setdefault(self._limiter, _Closing())
        self._borrowers: list[object] = []

    def acquire_nowait(self) -> None:
        """Acquire a slot, or raise ``trio.WouldBlock``."""
        borrower = object()
        self._limiter.acquire_on_behalf_of_nowait(borrower)
        self._borrowers.append(borrower)

    async def acquire(self) -> None:
        """Acquire a slot. Wait if none is free."""
        borrower = object()
        await self._limiter.acquire_on_behalf_of(borrower)
        self._borrowers.append(borrower)

    def release(self) -> None:
        """Release a slot."""
        self._limiter.release_on_behalf_of(self._borrowers.pop())

    @contextlib.contextmanager
    def while_closing(self) -> Iterator[None]:
        """Release the slot of a connection that this block closes.

        If a closing slot is free, the connection's slot is released at the start. Otherwise it is
        released when another connection leaves a closing slot, or at the end of the block.
        """
        closing = self._closing
        close = object()
        closing.waiting[close] = self
        self._fill_closing_slots()
        try:
            yield
        finally:
            if close in closing.waiting:
                del closing.waiting[close]
                self.release()
            else:
                closing.in_use -= 1
                self._fill_closing_slots()

    def _fill_closing_slots(self) -> None:
        """Move the oldest closing connections to the free closing slots."""
        closing = self._closing
        while closing.waiting and closing.in_use < self._limiter.total_tokens:
            slots = closing.waiting.pop(next(iter(closing.waiting)))
            closing.in_use += 1
            slots.release()
