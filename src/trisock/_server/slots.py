"""Slots: how many connections a server has at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import trio


class Slots:
    """``limit`` slots for connections, and as many places for those that are closing.

    A close may wait for its peer for two seconds, which costs the peer nothing. So a close gives
    its slot back, and takes a place beside them. If there is none, it keeps its slot until there
    is one. (To close the oldest immediately instead would destroy answers to honest clients when
    many come at once.)

    Invariant: ``_closing`` is the number of closes without a slot, at most ``limit``. ``_keeping``
    are the closes that still have one, in the order in which they began; there are none unless
    ``_closing`` is ``limit``.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._free = trio.Semaphore(limit)
        self._closing = 0
        self._keeping: dict[object, None] = {}

    def acquire_nowait(self) -> None:
        """Take a slot, or raise ``trio.WouldBlock``."""
        self._free.acquire_nowait()

    async def acquire(self) -> None:
        """Take a slot, or wait for one."""
        await self._free.acquire()

    def release(self) -> None:
        """Give a slot back."""
        self._free.release()

    @contextlib.contextmanager
    def closing(self) -> Iterator[None]:
        """Give the slot of a connection back while, or after, it is being closed."""
        close = object()
        if self._closing < self._limit:
            self._closing += 1
            self._free.release()
        else:
            self._keeping[close] = None
        try:
            yield
        finally:
            if close in self._keeping:
                del self._keeping[close]
                self._free.release()
            elif self._keeping:  # our place is the next one's, which gives its slot back
                del self._keeping[next(iter(self._keeping))]
                self._free.release()
            else:
                self._closing -= 1
