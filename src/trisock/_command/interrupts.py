"""Run a part of the command in Trio; Ctrl-C ends it at once."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

T = TypeVar("T")


def run(function: Callable[[], Awaitable[T]]) -> T:
    """Run an async function in Trio. Ctrl-C cancels it, and raises a bare ``KeyboardInterrupt``."""
    return trio.run(_run_until_interrupted, function)


async def _run_until_interrupted(function: Callable[[], Awaitable[T]]) -> T:
    previous = signal.getsignal(signal.SIGINT)
    # SIGINT is ignored, for example in a shell's background job, or handled by C code (None).
    if previous in (signal.SIG_IGN, None):
        return await function()
    token = trio.lowlevel.current_trio_token()
    with trio.CancelScope() as scope:
        # Trio's own handler would raise the interrupt in any task, and nurseries would wrap it.
        signal.signal(signal.SIGINT, lambda *_: token.run_sync_soon(scope.cancel))
        try:
            return await function()
        finally:
            signal.signal(signal.SIGINT, previous)
    raise KeyboardInterrupt
