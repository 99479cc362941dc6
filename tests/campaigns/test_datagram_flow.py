"""No datagram is lost, changed or mixed up: ``datagrams.py`` with fewer datagrams."""

from __future__ import annotations

import datagrams


async def test_no_datagram_is_lost_changed_or_mixed_up(times: int) -> None:
    result = await datagrams.run(20_000 * times)
    assert not result.wrong
    assert result.dropped == 0
    assert result.sent == result.received == result.acknowledged >= 20_000 * times
    assert result.growth < 512 * 1024


def test_the_sizes_cover_the_whole_range() -> None:
    found = datagrams.sizes(0)
    drawn = {next(found) for _ in range(10_000)}
    assert {0, datagrams.LONGEST} <= drawn
    assert all(any(n <= size < n + 4096 for size in drawn) for n in range(0, 65536, 4096))
