"""Deadlines: one task that watches the deadlines of many items."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, TypeVar

import trio

ItemT = TypeVar("ItemT")

# ``add`` forgets unused timeouts only if there are at least this many timeouts. A server has few
# different timeouts, and its next item is likely to use one of them again.
_MIN_TIMEOUTS = 16


class Deadlines(Generic[ItemT]):
    """The deadlines of many items, and the task that reports the overdue ones.

    One task for all items is cheaper than a cancel scope for each item (benchmark rows
    tls-handshakes and idle-timeout).

    Args:
      expire: called with each overdue item and its timeout, after the item is discarded.

    Invariant: all items in one dict of ``_by_timeout`` have the same timeout. So each dict is in
    the order of the deadlines. ``_wake_at`` is not later than the earliest deadline. There are
    never more than ``_max_timeouts`` dicts.
    """

    def __init__(self, expire: Callable[[ItemT, float], object]) -> None:
        self._expire = expire
        self._by_timeout: dict[float, dict[ItemT, float]] = {}
        self._max_timeouts = _MIN_TIMEOUTS
        self._running = trio.CancelScope(shield=True)
        self._sleep = trio.CancelScope()
        self._wake_at = math.inf

    def add(self, item: ItemT, timeout: float) -> None:
        """Set the item's deadline: ``timeout`` seconds from now. ``math.inf`` means never."""
        deadline = trio.current_time() + timeout
        items = self._by_timeout.get(timeout)
        if items is None:
            self._make_room()
            items = self._by_timeout[timeout] = {}
        items[item] = deadline
        if deadline < self._wake_at:
            self._wake_at = self._sleep.deadline = deadline

    def discard(self, item: ItemT, timeout: float) -> None:
        """Remove the item's deadline. ``timeout``: as in ``add``."""
        items = self._by_timeout.get(timeout)
        if items is None or items.pop(item, None) is None:
            for others in self._by_timeout.values():  # ``limit`` has changed the item's timeout
                others.pop(item, None)

    def limit(self, timeout: float) -> None:
        """Set a deadline for all items that have none: ``timeout`` seconds from now."""
        for item in self._by_timeout.pop(math.inf, {}):
            self.add(item, timeout)

    async def run(self) -> None:
        """Report overdue items until ``close`` is called.

        ``run`` is shielded, because cancelled tasks may still need their deadlines.
        """
        with self._running:
            while True:
                self._expire_overdue()
                self._forget_unused()
                self._wake_at = self._earliest()
                with trio.CancelScope(deadline=self._wake_at) as self._sleep:
                    await trio.sleep_forever()

    def close(self) -> None:
        """End ``run``."""
        self._running.cancel()

    def _expire_overdue(self) -> None:
        now = trio.current_time()
        for timeout, items in list(self._by_timeout.items()):
            while items:  # no copy of the dict: it may have thousands of items
                item, deadline = next(iter(items.items()))
                if deadline > now:
                    break
                del items[item]
                self._expire(item, timeout)

    def _earliest(self) -> float:
        """Return the earliest deadline. No dict may be empty."""
        return min(
            (next(iter(items.values())) for items in self._by_timeout.values()), default=math.inf
        )

    def _make_room(self) -> None:
        """Make room for one more timeout. A program may compute a new timeout for each read."""
        if len(self._by_timeout) >= self._max_timeouts:
            self._forget_unused()
            self._max_timeouts = max(_MIN_TIMEOUTS, 2 * len(self._by_timeout))

    def _forget_unused(self) -> None:
        """Forget the timeouts that no item has."""
        self._by_timeout = {timeout: items for timeout, items in self._by_timeout.items() if items}
