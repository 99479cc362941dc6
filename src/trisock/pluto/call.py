"""One blocking call: what the caller and the background thread share of it (``_background``)."""

from __future__ import annotations

import _thread
import logging
from collections.abc import Awaitable, Callable
from typing import Any, Generic, TypeVar

import trio

from .._guard import log

T = TypeVar("T")

_logger = logging.getLogger("trisock.pluto")


def held_lock() -> _thread.LockType:
    """Return a lock that another thread is to release, once: an event without Python code."""
    lock = _thread.allocate_lock()
    lock.acquire()
    return lock


class Call(Generic[T]):
    """One call: made in one thread, done in the other.

    The caller sets ``abandoned``, ``gone`` and ``delivered`` (its error was raised), the
    background thread all else. ``finished`` is released when ``value`` or ``error`` is there,
    ``gone`` when an abandoned call has ended and its result was taken back. ``unbegun`` is called
    in place of the function if the call is abandoned before it has begun.
    """

    __slots__ = (
        "abandoned",
        "begun",
        "delivered",
        "error",
        "finished",
        "function",
        "gone",
        "has_value",
        "scope",
        "unbegun",
        "undo",
        "value",
    )

    def __init__(
        self,
        function: Callable[[], Awaitable[T]],
        undo: Callable[[T], object] | None,
        unbegun: Callable[[], object] | None = None,
    ) -> None:
        self.function: Callable[[], Awaitable[T]] | None = function
        self.undo = undo
        self.unbegun = unbegun
        self.finished = held_lock()
        self.gone: _thread.LockType | None = None
        self.abandoned = self.begun = self.delivered = self.has_value = False
        self.scope: trio.CancelScope | None = None
        self.value: T | None = None
        self.error: BaseException | None = None

    async def run(self) -> None:
        """Await the function, in the background thread."""
        function, self.function = self.function, None
        assert function is not None
        try:
            with trio.CancelScope() as self.scope:
                self.value = await function()
                self.has_value = True
        except BaseException as exc:  # the caller's, and not the end of this thread
            if self.has_value:  # and a cancel scope that the function has left open
                self.take_back()
            if issubclass(type(exc), trio.Cancelled):
                self.error = RuntimeError("a cancel scope was left open by code of this call")
            else:
                self.error = exc
        self.finished.release()

    def fail(self, error: BaseException) -> None:
        """End it where there is no Trio to run it."""
        self.function = None
        if self.abandoned:
            self.take_back()
        elif not self.has_value and self.error is None:
            self.error = error
            self.finished.release()

    def take_back(self) -> None:
        """Undo the result that the caller does not get; once more changes nothing."""
        value, has_value, undo = self.value, self.has_value, self.undo
        unbegun, self.unbegun = self.unbegun, None
        self.value, self.has_value, self.undo, self.error = None, False, None, None
        try:
            if has_value and undo is not None:
                undo(value)  # type: ignore[arg-type]
            elif unbegun is not None and not self.begun:
                unbegun()
        except BaseException as exc:  # it must not end the thread, which makes all calls
            message = "could not take back the result of an interrupted call"
            log(_logger, logging.ERROR, message, exc_info=exc)
        gone, self.gone = self.gone, None
        if gone is not None:
            gone.release()


class Stop:
    """Asks the thread to end. It agrees if no call is in progress."""

    def __init__(self) -> None:
        self.answered = held_lock()
        self.agreed = self.withdrawn = False


Item = Call[Any] | Stop
