"""Deadlines: one task watches many items, and reports each overdue item."""

from __future__ import annotations

import math
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from trisock._net.deadlines import Deadlines


class Watched:
    def __init__(self) -> None:
        self.deadlines = Deadlines[str](self.expire)
        self.expired: list[tuple[str, float, float]] = []

    def expire(self, item: str, timeout: float) -> None:
        self.expired.append((item, timeout, trio.current_time()))


@pytest.fixture
async def watched(nursery: trio.Nursery) -> AsyncIterator[Watched]:
    watched = Watched()
    nursery.start_soon(watched.deadlines.run)
    await trio.testing.wait_all_tasks_blocked()
    yield watched
    watched.deadlines.close()


async def test_each_item_expires_at_its_own_time(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    for item, timeout in (("a", 5), ("b", 2), ("c", 9), ("d", 2)):
        watched.deadlines.add(item, timeout)
    await trio.sleep(10)
    assert watched.expired == [("b", 2, 2), ("d", 2, 2), ("a", 5, 5), ("c", 9, 9)]


async def test_a_later_item_may_have_an_earlier_deadline(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    watched.deadlines.add("long", 10)
    await trio.sleep(1)
    watched.deadlines.add("short", 1)
    await trio.sleep(10)
    assert watched.expired == [("short", 1, 2), ("long", 10, 10)]


async def test_a_discarded_item_does_not_expire(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    watched.deadlines.add("a", 5)
    watched.deadlines.add("b", 5)
    watched.deadlines.discard("a", 5)
    watched.deadlines.discard("unknown", 7)
    await trio.sleep(10)
    assert watched.expired == [("b", 5, 5)]


async def test_adding_an_item_again_restarts_its_timeout(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    watched.deadlines.add("a", 5)
    await trio.sleep(4)
    watched.deadlines.discard("a", 5)
    watched.deadlines.add("a", 5)
    await trio.sleep(10)
    assert watched.expired == [("a", 5, 9)]


async def test_limit_applies_to_items_without_a_deadline(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    for item, timeout in (("never", math.inf), ("discarded", math.inf), ("soon", 3.0)):
        watched.deadlines.add(item, timeout)
    await trio.sleep(1)
    watched.deadlines.limit(5)
    watched.deadlines.discard("discarded", math.inf)
    await trio.sleep(10)
    assert watched.expired == [("soon", 3, 3), ("never", 5, 6)]


async def test_an_expiring_item_may_add_other_items(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    def expire(item: str, timeout: float) -> None:
        Watched.expire(watched, item, timeout)
        if timeout < 3:
            watched.deadlines.add(item, timeout + 1)

    watched.deadlines._expire = expire
    watched.deadlines.add("a", 1)
    await trio.sleep(10)
    assert watched.expired == [("a", 1, 1), ("a", 2, 3), ("a", 3, 6)]


async def test_computed_timeouts_need_little_memory(watched: Watched) -> None:
    """Memory stays small even while the task sleeps: ``add`` forgets unused timeouts."""
    watched.deadlines.add("first", 1)
    for number in range(1000):
        watched.deadlines.add("a", 2 + number / 1000)
        watched.deadlines.discard("a", 2 + number / 1000)
    assert len(watched.deadlines._by_timeout) <= 16
    for number in range(1000):
        watched.deadlines.add(str(number), 5 + number)
    assert len(watched.deadlines._by_timeout) >= 1001


async def test_timeouts_without_items_are_forgotten(
    watched: Watched, autojump_clock: trio.testing.MockClock
) -> None:
    for number in range(1, 100):
        watched.deadlines.add("a", number)
        watched.deadlines.discard("a", number)
    await trio.sleep(2)
    assert not watched.deadlines._by_timeout
