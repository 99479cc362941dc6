"""Run callbacks, plain or async, in the background: in order, even if some of them fail."""

from __future__ import annotations

import inspect
import logging
import math
import sys
from collections import deque
from collections.abc import Callable

import trio

from .._guard import is_error, isolated, leaves, log

if sys.version_info < (3, 11):  # pragma: no cover (each version runs one of the two branches)
    from exceptiongroup import BaseExceptionGroup  # Trio depends on this package

#: A plain or async function that the program passes.
Callback = Callable[..., object]

# The overhead of a queue entry in bytes: the objects around its data, and its slot. (We measured
# 200 to 450 bytes.) If the overhead were not counted, a flood of empty lines would cost nothing.
ENTRY_OVERHEAD = 512

# If the queued callbacks of an object hold more than this many bytes, the object stops reading.
MAX_HELD = 16 * 1024 * 1024

# After this many plain callbacks in a row, let other tasks run.
_CALLS_PER_CHECKPOINT = 16


def cost(*held: object) -> int:
    """Return the memory cost, in bytes, of a queue entry that holds these objects."""
    # Count only these exact types, because a user's class may override __sizeof__.
    return ENTRY_OVERHEAD + sum(
        sys.getsizeof(each) for each in held if type(each) in (bytes, int, str)
    )


class PendingCallbacks:
    """The queued callbacks of an object, until the object is disconnected.

    Invariant: ``held`` is the cost of the queued callbacks and the running one.
    """

    def __init__(self, start: Callable[[PendingCallbacks], object]) -> None:
        self.queued: deque[tuple[Callable[..., object], tuple[object, ...]]] = deque()
        self.held = 0
        self._start = start
        self._readers = trio.lowlevel.ParkingLot()

    def put(self, callback: Callable[..., object], *args: object) -> None:
        """Queue a function and its arguments."""
        self.queued.append((callback, args))
        self.held += cost(*args)
        self._start(self)

    def done(self, args: tuple[object, ...]) -> None:
        """Subtract the cost of a callback that has ended."""
        self.held -= cost(*args)
        if self.held <= MAX_HELD:
            self._readers.unpark_all()

    async def wait_for_room(self) -> None:
        """Wait until the callbacks hold at most ``MAX_HELD`` bytes.

        This is a checkpoint only if it has to wait.
        """
        while self.held > MAX_HELD:
            await self._readers.park()


class CallbackQueue:
    """Runs callbacks in order, in a task that exists only while there are callbacks.

    If a callback raises an ``Exception``, even in a group, or leaves a cancel scope open, the error
    is logged, and the next callbacks still run.

    Invariant: a task that runs callbacks exists exactly while ``_running`` is set.
    """

    def __init__(self, owner: object, nursery: trio.Nursery, logger: logging.Logger) -> None:
        self._owner = owner
        self._nursery = nursery
        self._logger = logger
        self._running = False
        self.pending = PendingCallbacks(self._start)

    @property
    def put(self) -> Callable[..., None]:
        """The method that queues a function and its arguments.

        ``clear`` replaces this method. The old method then does nothing.
        """
        return self.pending.put

    def clear(self) -> None:
        """Drop the queued callbacks. A running callback continues.

        ``Socket.disconnect`` calls this, and also cancels the reads for the old callbacks. So no
        read waits for room in the old queue.
        """
        self.pending.queued.clear()
        self.pending = PendingCallbacks(self._start)

    def _start(self, callbacks: PendingCallbacks) -> None:
        if callbacks is not self.pending:
            callbacks.queued.clear()
        elif not self._running:
            self._running = True
            self._nursery.start_soon(self._run_all)

    async def _run_all(self) -> None:
        calls = 0
        try:
            while self.pending.queued:
                if calls == _CALLS_PER_CHECKPOINT:
                    calls = 0
                    await trio.lowlevel.checkpoint()
                    continue  # disconnect may have cleared the queue
                calls += 1
                await trio.lowlevel.checkpoint_if_cancelled()  # plain functions have no checkpoint
                pending = self.pending
                callback, args = pending.queued.popleft()
                try:
                    await self._call(callback, args)
                finally:
                    pending.done(args)
                del callback, args  # free the data before the next callback
        finally:
            self._running = False

    async def _call(self, callback: Callable[..., object], args: tuple[object, ...]) -> None:
        async def call() -> None:
            awaitable = callback(*args)
            if inspect.isawaitable(awaitable):
                await awaitable

        try:
            await isolated(call)
        except BaseException as exc:
            raised = leaves(exc)
            rest = [each for each in raised if not _is_callback_error(each)]
            if len(rest) < len(raised):
                message = "a callback of %r failed"
                log(self._logger, logging.ERROR, message, self._owner, exc_info=exc)
            if not rest:
                return
            if len(rest) == 1 and rest[0] is exc:
                raise
        else:
            return
        raise BaseExceptionGroup(f"raised by a callback of {self._owner!r}", rest)


def _is_callback_error(exc: BaseException) -> bool:
    """Return whether an exception is only a failure of the callback.

    While our task is not cancelled, even a ``Cancelled`` is such a failure: the callback has raised
    a ``Cancelled`` that belongs to another cancel scope.
    """
    if issubclass(type(exc), trio.Cancelled):
        return trio.current_effective_deadline() != -math.inf
    return is_error(exc)
