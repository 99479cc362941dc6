"""Whether a call is a schedule point."""

from __future__ import annotations

from collections.abc import Awaitable

import trio.testing


async def is_schedule_point(call: Awaitable[object]) -> bool:
    """Await a call that is always a cancel point. Return whether it is also a schedule point."""
    try:
        with trio.testing.assert_checkpoints():
            await call
    except AssertionError:
        return False
    return True
