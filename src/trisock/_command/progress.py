"""A progress bar on stderr, for checks that take long."""

from __future__ import annotations

import trio
from rich import progress
from rich.console import Console

# In seconds. Checks that end sooner need no bar.
_DELAY = 0.5
_REFRESH_INTERVAL = 0.1


class Progress:
    """Shows how many checks are done.

    Args:
      console: the terminal, or ``None`` to show nothing.
      total: the number of checks.
    """

    def __init__(self, console: Console | None, total: int) -> None:
        self._bar: progress.Progress | None = None
        if console is not None:
            self._bar = progress.Progress(
                progress.TextColumn("checking"),
                progress.BarColumn(),
                progress.MofNCompleteColumn(),
                progress.TimeElapsedColumn(),
                console=console,
                auto_refresh=False,  # True would start a thread
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._bar.add_task("", total=total)

    def advance(self) -> None:
        """Count one more finished check."""
        if self._bar is not None:
            self._bar.advance(self._task)

    async def run(self) -> None:
        """Show the bar until cancelled, and then remove it."""
        if self._bar is None:
            return
        await trio.sleep(_DELAY)
        with self._bar:
            while True:
                self._bar.refresh()
                await trio.sleep(_REFRESH_INTERVAL)
