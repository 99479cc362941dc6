"""Slots: the limit on a server's concurrent connections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio


class Slots:
    """``limit`` slots for connections, and ``limit`` closing slots for those that are closing.

    A close may wait up to two seconds for its peer, at no cost to the peer. So a connection that
    starts to close releases its slot and moves to a closing slot. If no closing slot is free, the
    connection keeps its slot until one becomes free. (If we closed the oldest connection
    immediately instead, a burst of clients would destroy responses to honest ones.)

    Invariant: ``_closing`` counts the closing slots in use, at most ``limit``. ``_holding``
    contains the closes that still hold a normal slot, oldest first; it is empty unless ``_closing``
    equals ``limit``.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = trio.Semaphore(limit)
        self._closing = 0
        self._holding: dict[object, None] = {}

    def acquire_nowait(self) -> None:
        """Acquire a slot, or raise ``trio.WouldBlock``."""
        self._free.acquire_nowait()

    async def acquire(self) -> None:
        """Acquire a slot. Wait if none is free."""
        await self._free.acquire()

    def release(self) -> None:
        """Release a slot."""
        self._free.release()

    @contextlib.contextmanager
    def while_closing(self) -> Iterator[None]:
        """Close a connection in this block. Its slot is released at the start, or later."""
        close = object()
        if self._closing < self._limit:
            self._closing += 1
            self._free.release()
        else:
            self._holding[close] = None
        try:
            yield
        finally:
            if close in self._holding:
                del self._holding[close]
                self._free.release()
            elif self._holding:  # the oldest takes over our closing slot and releases its own
                del self._holding[next(iter(self._holding))]
                self._free.release()
            else:
                self._closing -= 1
