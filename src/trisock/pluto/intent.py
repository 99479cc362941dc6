"""Intent aborts a socket if ``starttls`` or ``close`` was interrupted before its work began."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator


class Intent:
    """Records that ``starttls``, or ``close``, was called on a socket outside Trio.

    Invariant: ``recorded`` is True from the call until its work has ended. If a later call finds
    that ``recorded`` is True while no work is running, an interrupt occurred before the work began.
    The program may not know this: it may believe that the connection is closed or encrypted. So the
    socket is aborted.
    """

    def __init__(self, abort: Callable[[], object]) -> None:
        self._abort = abort
        self.recorded = self._working = False

    def check(self) -> bool:
        """If the call was made but its work never began, abort the socket and return False."""
        if self.recorded and not self._working:
            self._abort()
            return False
        return True

    @contextlib.contextmanager
    def work(self) -> Iterator[None]:
        """Run the work of the call in this block."""
        self._working = True
        try:
            yield
        finally:
            self.recorded = self._working = False
