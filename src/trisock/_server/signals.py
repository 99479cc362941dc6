"""SignalReceiver: receive the signals that stop and reload a program."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections import deque
from types import FrameType, TracebackType
from typing import Any, Final

import trio

from .. import _fork

# Windows has no SIGHUP.
SIGHUP: Final = getattr(signal, "SIGHUP", None)
_SIGNALS: Final = [each for each in (signal.SIGTERM, signal.SIGINT, SIGHUP) if each is not None]

# The maximum number of unreceived signals of one kind. We keep two, because a second SIGTERM has
# another meaning than the first. If two are still unreceived when a third arrives, the event loop
# is blocked.
_MAX_WAITING: Final = 2


class SignalReceiver:
    """Handles SIGTERM, SIGINT and SIGHUP in a ``with`` block, then restores their handlers.

    The block may begin before Trio runs. If a signal arrives before a task waits for it, the signal
    is queued. (``trio.open_signal_receiver`` works only inside Trio. At its end, it raises
    unreceived signals again, so a Ctrl-C at the last moment would end the program with a
    traceback.)

    Python allows signal handlers only in the main thread. In another thread, the block does
    nothing.

    In two cases, a signal gets the handler that it had before the block: in a forked child, and if
    the event loop is blocked and has not received the last two signals of this kind. So Ctrl-C can
    stop a program that is stuck in an endless loop. (If the event loop is blocked, a third SIGHUP
    is dropped.)

    Invariant: ``_previous`` holds the handlers to restore, and is empty outside the block.
    ``_waiting`` holds the signals that no task has received yet, oldest first.
    """

    def __init__(self) -> None:
        self._forks = _fork.count
        self._previous: dict[int, Any] = {}
        self._waiting: deque[int] = deque()
        self._arrived = trio.Event()
        self._token: trio.lowlevel.TrioToken | None = None

    def __enter__(self) -> SignalReceiver:
        if threading.current_thread() is threading.main_thread():
            for signum in _SIGNALS:
                self._previous[signum] = signal.signal(signum, self._handle)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._give_back()

    async def receive(self) -> int:
        """Wait for the next signal, and return its number. Only one task may wait at a time."""
        self._token = trio.lowlevel.current_trio_token()
        await trio.lowlevel.checkpoint()
        while not self._waiting:
            self._arrived = trio.Event()
            await self._arrived.wait()
        return self._waiting.popleft()

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        """Handle a signal. Python calls this between any two instructions of the main thread."""
        if self._forks != _fork.count:
            # This is a forked child. Its copy of the token would wake the parent.
            self._raise_as_before(signum)
        elif self._waiting.count(signum) < _MAX_WAITING:
            self._waiting.append(signum)
            if self._token is not None:
                with contextlib.suppress(trio.RunFinishedError):
                    self._token.run_sync_soon(self._wake)
        elif signum != SIGHUP:
            self._raise_as_before(signum)

    def _wake(self) -> None:
        self._arrived.set()

    def _raise_as_before(self, signum: int) -> None:
        self._give_back()
        signal.raise_signal(signum)

    def _give_back(self) -> None:
        """Restore each handler, unless the program has set another one in the meantime."""
        while self._previous:
            signum, previous = self._previous.popitem()
            if signal.getsignal(signum) == self._handle:
                # None: the handler was not set by Python, and Python cannot restore it.
                signal.signal(signum, signal.SIG_DFL if previous is None else previous)
