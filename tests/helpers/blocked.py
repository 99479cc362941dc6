"""Tasks that block."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing


async def cancel_when_blocked(function: Callable[..., Awaitable[object]], *args: Any) -> None:
    """Run an async function. Cancel it when all tasks are blocked."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function, *args)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
