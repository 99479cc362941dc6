"""Run a handler, and notice what it leaves behind, what it raises and whether it ends."""

from __future__ import annotations

import contextlib
import ctypes
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from typing import Any

import trio

from .. import Handler, Socket
from .._guard import leaves

# How often the watchdog looks, in seconds.
_WATCHDOG_INTERVAL = 0.05


class WatchedHandler:
    """A handler for ``bind`` that runs the given handler.

    Attributes:
      narrow: whether to give new connections the smallest send buffer.
      started: how many connections the handler has got.
      running: how many calls of the handler are running.
      failures: what the handler has raised.
      is_stuck: whether a call was ended because it ran too long without a checkpoint.
      is_abandoned: whether calls were given up because they did not end when cancelled.
    """

    def __init__(self, handler: Handler, watchdog: Watchdog) -> None:
        self._handler = handler
        self._watchdog = watchdog
        self._socks: set[Socket] = set()
        self._changed = trio.Event()
        self.narrow = False
        self.started = 0
        self.running = 0
        self.failures: list[BaseException] = []
        self.is_stuck = False
        self.is_abandoned = False

    async def __call__(self, sock: Socket) -> None:
        """Run the handler for one connection."""
        if self.narrow:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        self.started += 1
        self.running += 1
        self._socks.add(sock)
        self._notify()
        try:
            with self._watchdog.watching():
                await _Call(self._handler(sock), self)
        except BaseException as exc:
            if any(issubclass(type(leaf), _NoCheckpoint) for leaf in leaves(exc)):
                self.is_stuck = True
                return
            self.failures.append(exc)
            raise
        finally:
            self._socks.discard(sock)
            self.running -= 1
            self._notify()

    def _notify(self) -> None:
        self._changed.set()
        self._changed = trio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition on ``started`` and ``running`` is true."""
        while not condition():
            await self._changed.wait()

    def abandon(self) -> None:
        """Give up all running calls.

        A call ends at its next checkpoint. A call that is shielded from cancellation reaches this
        checkpoint only if it waits for its own socket, which is aborted.
        """
        self.is_abandoned = True
        for sock in list(self._socks):
            sock.abort()


class _Call:
    """One call of the handler. It passes on each step, until the handler is abandoned."""

    def __init__(self, call: Awaitable[object], watched: WatchedHandler) -> None:
        self._call = call
        self._watched = watched

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self._call.__await__()
        assert isinstance(steps, Generator)
        outcome = None
        while True:
            try:
                trap = steps.send(outcome)
            except StopIteration:
                return
            outcome = yield trap
            if self._watched.is_abandoned:
                with contextlib.suppress(BaseException):  # it may ignore GeneratorExit too
                    steps.close()
                return


class _NoCheckpoint(BaseException):
    """Raised in a handler that has run too long without a checkpoint."""


class Watchdog(trio.abc.Instrument):
    """Observes the tasks of handlers, and ends what has run too long in real time.

    Trio cannot end a task that reaches no checkpoint. So a thread raises an exception in it. The
    thread also cancels a scope: with ``autojump_clock``, a task that runs in a loop stops the clock.

    Attributes:
      started_by_handlers: the running tasks that handlers have started, directly or indirectly.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._handlers: set[trio.lowlevel.Task] = set()
        self._step: tuple[float, trio.lowlevel.Task] | None = None
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
        """Take the current task for a handler's."""
        task = trio.lowlevel.current_task()
        self._handlers.add(task)
        self._step = (time.monotonic(), task)
        try:
            yield
        finally:
            self._step = None
            self._handlers.discard(task)

    @contextlib.contextmanager
    def limit(self, seconds: float) -> Iterator[trio.CancelScope]:
        """Cancel the block after some seconds, of Trio's clock or of real time."""
        with trio.CancelScope() as scope:
            self._limit = (scope, math.inf)
            self.renew(seconds)
            try:
                yield scope
            finally:
                self._limit = None

    def renew(self, seconds: float) -> None:
        """Let the seconds of ``limit`` begin again."""
        if self._limit is not None:
            scope, _ = self._limit
            scope.deadline = trio.current_time() + seconds
            self._limit = (scope, time.monotonic() + seconds)

    # ---- the instrument ----

    def _is_observed(self, task: trio.lowlevel.Task) -> bool:
        return task in self._handlers or task in self.started_by_handlers

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        """Remember a task that a handler has started."""
        with contextlib.suppress(RuntimeError):  # outside of tasks
            if self._is_observed(trio.lowlevel.current_task()):
                self.started_by_handlers.add(task)

    def task_exited(self, task: trio.lowlevel.Task) -> None:
        """Forget a task."""
        self.started_by_handlers.discard(task)

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note when a step begins."""
        if self._is_observed(task):
            self._step = (time.monotonic(), task)

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        """Note that a step has ended."""
        self._step = None

    # ---- the thread ----

    def _watch(self, thread: int, token: trio.lowlevel.TrioToken) -> None:
        while not self._stopped.wait(min(_WATCHDOG_INTERVAL, self._timeout / 4)):
            now = time.monotonic()
            step = self._step
            if step is not None and now - step[0] > self._timeout:
                _raise_in_thread(thread, _NoCheckpoint)
            limit = self._limit
            if limit is not None and now > limit[1]:
                token.run_sync_soon(limit[0].cancel, idempotent=True)


def _raise_in_thread(thread: int, exception: type[BaseException]) -> None:
    """Raise an exception in another thread, as soon as it runs Python code (CPython only)."""
    set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc
    set_async_exc(ctypes.c_ulong(thread), ctypes.py_object(exception))
