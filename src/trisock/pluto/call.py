"""One blocking call: the state that the caller shares with the background thread."""

from __future__ import annotations

import _thread
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import trio

from .._guard import log

T = TypeVar("T")

_logger = logging.getLogger("trisock.pluto")


def new_locked_lock() -> _thread.LockType:
    """Return a locked lock, to be released once by another thread. (An Event runs Python code.)"""
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


class Call(Generic[T]):
    """One call: made by the caller's thread, run by the background thread.

    The caller sets ``abandoned``, and sets ``ended`` to a locked lock. Before it raises the error,
    the caller sets ``delivered``. The background thread sets all other attributes. The thread
    releases ``finished`` when it has set ``value`` or ``error``, and releases ``ended`` when an
    abandoned call has ended and its result is undone. If a call is abandoned before it starts,
    ``on_not_started`` is called instead of the function.
    """

    __slots__ = (
        "abandoned",
        "delivered",
        "ended",
        "error",
        "finished",
        "function",
        "has_value",
        "on_not_started",
        "scope",
        "started",
        "undo",
        "value",
    )

    def __init__(
        self,
        function: Callable[[], Awaitable[T]],
        undo: Callable[[T], object] | None,
        on_not_started: Callable[[], object] | None = None,
    ) -> None:
        self.function: Callable[[], Awaitable[T]] | None = function
        self.undo = undo
        self.on_not_started = on_not_started
        self.finished = new_locked_lock()
        self.ended: _thread.LockType | None = None
        self.abandoned = self.started = self.delivered = self.has_value = False
        self.scope: trio.CancelScope | None = None
        self.value: T | None = None
        self.error: BaseException | None = None

    async def run(self) -> None:
        """Run the function, in the background thread."""
        function, self.function = self.function, None
        assert function is not None
        try:
            with trio.CancelScope() as self.scope:
                self.value = await function()
                self.has_value = True
        except BaseException as exc:  # the error must not end this thread: the caller raises it
            if self.has_value:  # the function left a cancel scope open
                self.undo_result()
            if issubclass(type(exc), trio.Cancelled):
                self.error = RuntimeError(
                    "a function in this call left a cancel scope open, such as a timeout inside an "
                    "async generator"
                )
            else:
                self.error = exc
        self.finished.release()

    def fail(self, error: BaseException) -> None:
        """End the call with an error, because Trio cannot run it."""
        self.function = None
        if self.abandoned:
            self.undo_result()
        elif not self.has_value and self.error is None:
            self.error = error
            self.finished.release()

    def undo_result(self) -> None:
        """Undo a result that did not reach the caller. Idempotent."""
        value, has_value, undo = self.value, self.has_value, self.undo
        on_not_started, self.on_not_started = self.on_not_started, None
        self.value, self.has_value, self.undo, self.error = None, False, None, None
        try:
            if has_value and undo is not None:
                undo(value)  # type: ignore[arg-type]
            elif on_not_started is not None and not self.started:
                on_not_started()
        except BaseException as exc:  # an error must not end this thread, which runs all calls
            message = "could not undo the result of an interrupted call"
            log(_logger, logging.ERROR, message, exc_info=exc)
        ended, self.ended = self.ended, None
        if ended is not None:
            ended.release()


class Stop:
    """A request to end the thread. The thread agrees if no call is in progress."""

    def __init__(self) -> None:
        self.answered = new_locked_lock()
        self.agreed = self.withdrawn = False


Item = Call[Any] | Stop
