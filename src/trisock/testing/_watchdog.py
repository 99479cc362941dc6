"""The watchdog of ``check_handler``: observes the tasks of handlers, and ends slow ones."""

from __future__ import annotations

import contextlib
import ctypes
import math
import threading
import time
from collections.abc import Iterator
from sys import _current_frames  # public, in spite of its name

import trio

# The watchdog checks at this interval (seconds), or more often if the timeout is short. Each check
# wakes Trio, so frequent checks would disturb ``wait_all_tasks_blocked``.
_WATCHDOG_SECONDS = 1


class NoCheckpoint(BaseException):
    """Raised in a handler that has run too long without a checkpoint."""


class Watchdog(trio.abc.Instrument):
    """Observes the tasks of handlers, and ends those that run too long in real time.

    Trio cannot end a task that reaches no checkpoint. So a thread raises an exception in the task.
    The thread also enforces ``limit`` in real time, because an ``autojump_clock`` stands still
    while a task loops.

    Attributes:
      started_by_handlers: the running tasks that handlers have started, directly or indirectly.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._handlers: set[trio.lowlevel.Task] = set()
        self._has_answered = True
        self._limit: tuple[trio.CancelScope, float] | None = None
        self._stopped = threading.Event()
        self.started_by_handlers: set[trio.lowlevel.Task] = set()

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Observe all tasks of this Trio run."""
        arguments = (threading.get_ident(), trio.lowlevel.current_trio_token())
        thread = threading.Thread(target=self._watch, args=arguments, daemon=True)
        trio.lowlevel.add_instrument(self)
        thread.start()
        try:
            yield
        finally:
            trio.lowlevel.remove_instrument(self)
            self._stopped.set()
            thread.join()

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Treat the current task as a handler's, inside the block."""
        task = trio.lowlevel.current_task()
        self._handlers.add(task)
        try:
            yield
        finally:
            self._handlers.discard(task)

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Cancel the block after this many seconds, of Trio's clock or of real time."""
        with trio.CancelScope() as scope:
            self._limit = (scope, math.inf)
            self.renew(seconds)
            try:
                yield scope
            finally:
                self._limit = None

    def renew(self, seconds: float) -> None:
        """Restart the time of ``limit``, with this many seconds."""
        assert self._limit is not None
        scope, _ = self._limit
        scope.deadline = trio.current_time() + seconds
        self._limit = (scope, time.monotonic() + seconds)

    # ---- the instrument ----

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """Remember a task that a handler has started."""
        with contextlib.suppress(RuntimeError):  # outside of tasks
            parent = trio.lowlevel.current_task()
            if parent in self._handlers or parent in self.started_by_handlers:
                self.started_by_handlers.add(task)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        """Forget a task."""
        self.started_by_handlers.discard(task)

    # ---- the thread ----

    def _watch(self, thread: int, token: trio.lowlevel.TrioToken) -> None:
        interval = min(_WATCHDOG_SECONDS, self._timeout / 4)
        asked = 0.0
        while not self._stopped.wait(interval):
            now = time.monotonic()
            limit = self._limit
            if limit is not None and now > limit[1]:
                token.run_sync_soon(limit[0].cancel, idempotent=True)
            if self._has_answered:
                self._has_answered = False
                asked = now
                token.run_sync_soon(self._answer)
            elif now - asked > self._timeout and self._is_running_a_handler(thread):
                _raise_in_thread(thread, NoCheckpoint)

    def _answer(self) -> None:
        self._has_answered = True

    def _is_running_a_handler(self, thread: int) -> bool:
        tasks = [*self._handlers, *self.started_by_handlers]
        handlers = {getattr(task.coro, "cr_frame", None) for task in tasks}
        frame = _current_frames().get(thread)
        while frame is not None and frame not in handlers:
            frame = frame.f_back
        return frame is not None


def _raise_in_thread(thread: int, exception: type[BaseException]) -> None:
    """Raise an exception in another thread, as soon as it runs Python code (CPython only).

    The handler may catch the exception. The exception may also be raised in a destructor or in the
    callback of a weak reference. Python then reports it as ignored, and the handler continues. So
    the watchdog raises the exception again at its next check.
    """
    set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc
    set_async_exc(ctypes.c_ulong(thread), ctypes.py_object(exception))
