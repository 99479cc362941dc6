"""Slots: the limit on a server's concurrent connections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio


class Slots:
    """``limit`` slots for connections, plus ``limit`` places for connections that are closing.

    A close may wait up to two seconds for its peer, at no cost to the peer. So a closing
    connection releases its slot and moves to a closing place. If none is free, it keeps its slot
    until one is. (Closing the oldest one immediately instead would destroy responses to honest
    clients during a burst.)

    Invariant: ``_closing`` counts the closes without a slot, at most ``limit``. ``_holding`` has
    the closes that still hold a slot, oldest first. It is empty unless ``_closing == limit``.
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
        """Acquire a slot; wait if none is free."""
        await self._free.acquire()

    def release(self) -> None:
        """Release a slot."""
        self._free.release()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Close a connection in this block. Its slot is released at the start or at the end."""
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
            elif self._holding:  # the oldest takes over our place and releases its slot
                del self._holding[next(iter(self._holding))]
                self._free.release()
            else:
                self._closing -= 1
