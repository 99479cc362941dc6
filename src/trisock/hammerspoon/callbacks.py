"""Callbacks, plain or async, called in the background: one after the other, whatever they raise."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections import deque
from collections.abc import Callable

import trio

from .._guard import is_error, isolated, leaves, log

if sys.version_info < (3, 11):  # pragma: no cover (one of the two on each version)
    from exceptiongroup import BaseExceptionGroup  # which Trio needs as well

# What an entry of a queue costs beside its data: the objects around it and its place. Measured:
# 200 to 450 bytes. Without it, a flood of empty lines would cost nothing.
ENTRY = 512

# How many bytes the callbacks of one object may hold, in data that was read for them, before its
# reads wait.
MAX_HELD = 16 * 1024 * 1024

# How many plain callbacks are called in a row before other tasks run.
_CALLS_PER_PASS = 16


def cost(*held: object) -> int:
    """Return how many bytes an entry of a queue costs that holds these."""
    # Exactly these types: a class of the program's may override __sizeof__.
    return ENTRY + sum(sys.getsizeof(each) for each in held if type(each) in (bytes, int, str))


class CallbackLine:
    """The callbacks that are queued for one life of an object: until it is disconnected.

    Invariant: ``held`` is what those cost that are queued, and the one that runs.
    """

    def __init__(self, start: Callable[[CallbackLine], object]) -> None:
        self.queued: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self.held = 0
        self._start = start
        self._readers = trio.lowlevel.ParkingLot()

    def put(self, callback: Callable[..., object], *args: object) -> None:
        """Call a function (with arguments), behind those that are queued."""
        self.queued.append((callback, args))
        self.held += cost(*args)
        self._start(self)

    def done(self, args: tuple[object, ...]) -> None:
        """Count one that was called as gone."""
        self.held -= cost(*args)
        if self.held <= MAX_HELD:
            self._readers.unpark_all()

    async def room(self) -> None:
        """Wait until the callbacks hold no more than ``MAX_HELD``. A checkpoint if it waits."""
        while self.held > MAX_HELD:
            await self._readers.park()


class CallbackQueue:
    """Callbacks that are called in order, in a task that is there only while there are any.

    What one raises as ``Exception``, also in a group, is logged and ends nothing. The same holds
    for a cancel scope that one leaves open.

    Invariant: there is a task that calls them exactly while ``_calling``.
    """

    def __init__(self, owner: object, nursery: trio.Nursery, logger: logging.Logger) -> None:
        self._owner = owner
        self._nursery = nursery
        self._logger = logger
        self._calling = False
        self.line = CallbackLine(self._start)

    @property
    def put(self) -> Callable[..., None]:
        """Call a function (with arguments), behind those that are queued: good until ``clear``."""
        return self.line.put

    def clear(self) -> None:
        """Drop those that are queued, and what a ``put`` from before brings. One that runs goes on.

        A read for the old line is cancelled by the same disconnect, so nothing waits for its room.
        """
        self.line.queued.clear()
        self.line = CallbackLine(self._start)

    def _start(self, line: CallbackLine) -> None:
        if line is not self.line:
            line.queued.clear()
        elif not self._calling:
            self._calling = True
            self._nursery.start_soon(self._call_all)

    async def _call_all(self) -> None:
        calls = 0
        try:
            while self.line.queued:
                if calls == _CALLS_PER_PASS:
                    calls = 0
                    await trio.lowlevel.checkpoint()
                    continue  # it may have been disconnected meanwhile
                calls += 1
                await trio.lowlevel.checkpoint_if_cancelled()  # a plain function would not look
                line = self.line
                callback, args = line.queued.popleft()
                try:
                    await self._call(callback, args)
                finally:
                    line.done(args)
                del callback, args  # the data is not held while the next one runs
        finally:
            self._calling = False

    async def _call(self, callback: Callable[..., object], args: tuple[object, ...]) -> None:
        async def call() -> None:
            waiting = callback(*args)
            if inspect.isawaitable(waiting):
                await waiting

        try:
            await isolated(call)
        except BaseException as exc:
            raised = leaves(exc)
            rest = [each for each in raised if not _is_the_callbacks(each)]
            if len(rest) < len(raised):
                log(
                    self._logger,
                    logging.ERROR,
                    "a callback of %r has failed",
                    self._owner,
                    exc_info=exc,
                )
            if not rest:
                return
            if len(rest) == 1 and rest[0] is exc:
                raise
        else:
            return
        raise BaseExceptionGroup(f"out of a callback of {self._owner!r}", rest)


def _is_the_callbacks(exc: BaseException) -> bool:
    """Whether an exception is a failure of the callback's, and ends nothing else.

    A ``Cancelled`` is one where our task is not cancelled: it belongs to another scope, and was
    kept, or passed on to us.
    """
    if issubclass(type(exc), trio.Cancelled):
        return trio.current_effective_deadline() != -math.inf
    return is_error(exc)
