"""Run a handler, and notice what it leaves behind, what it raises and whether it ends."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Generator, Iterator
from sys import _current_frames  # public, in spite of its name
from typing import Any

import trio

from .. import Handler, Socket
from .._guard import leaves

_SMALL_BUFFER = 16384  # bytes. With less, Linux waits for an acknowledgement after each few sends.

# How often the watchdog looks, at most, in seconds. It wakes Trio each time, which must not disturb
# those who wait until nothing happens.
_WATCHDOG_SECONDS = 1


class WatchedHandler:
    """A handler for ``bind`` that runs the given handler.

    Attributes:
      narrow: whether to give new connections a small send buffer.
      started: how many connections the handler has got.
      running: how many calls of the handler are running.
      failures: what the handler has raised.
      is_stuck: whether a call was ended because it ran too long without a checkpoint.
      is_abandoned: whether calls were given up because they did not end when cancelled.
    """

    def __init__(self, handler: Handler, watchdog: Watchdog) -> None:
        self._handler = handler
        self._watchdog = watchdog
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
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SMALL_BUFFER)
        self.started += 1
        self.running += 1
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

        A call ends when it next wakes up. If it waits for its own socket, it does so because the
        client has left.
        """
        self.is_abandoned = True


class _Call:
    """One call of the handler. It passes on each step, until the handler is abandoned."""

    def __init__(self, call: Awaitable[object], watched: WatchedHandler) -> None:
        self._call = call
        self._watched = watched

    def __await__(self) -> Generator[Any, Any, None]:
        steps = self._call.__await__()
        assert isinstance(steps, Generator)
        step = functools.partial(steps.send, None)
        while True:
            try:
                trap = step()
            except StopIteration:
                return
            try:
                step = functools.partial(steps.send, (yield trap))
            except BaseException as exc:
                step = functools.partial(steps.throw, exc)
            if self._watched.is_abandoned:
                _close(steps)
                return


# Calls that go on even when they are closed. Python would report it if one was destroyed.
_unclosable: list[Generator[Any, Any, object]] = []


def _close(steps: Generator[Any, Any, object]) -> None:
    for _ in range(3):
        try:
            steps.close()
        except RuntimeError:  # it goes on
            continue
        except BaseException:  # noqa: S110 (it has ended)
            pass
        return
    _unclosable.append(steps)


class _NoCheckpoint(BaseException):
    """Raised in a handler that has run too long without a checkpoint."""


class Watchdog(trio.abc.Instrument):
    """Observes the tasks of handlers, and ends what has run too long in real time.

    Trio cannot end a task that reaches no checkpoint. So a thread raises an exception in it. The
    thread also cancels a scope, because a task that runs in a loop stops an ``autojump_clock``.

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
        """Take the current task for a handler's."""
        task = trio.lowlevel.current_task()
        self._handlers.add(task)
        try:
            yield
        finally:
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
                _raise_in_thread(thread, _NoCheckpoint)

    def _answer(self) -> None:
        self._has_answered = True

    def _is_running_a_handler(self, thread: int) -> bool:
        tasks = {getattr(task.coro, "cr_frame", None) for task in list(self.started_by_handlers)}
        frame = _current_frames().get(thread)
        while frame is not None:
            if frame.f_code is WatchedHandler.__call__.__code__ or frame in tasks:
                return True
            frame = frame.f_back
        return False


def _raise_in_thread(thread: int, exception: type[BaseException]) -> None:
    """Raise an exception in another thread, as soon as it runs Python code (CPython only)."""
    set_async_exc = ctypes.pythonapi.PyThreadState_SetAsyncExc
    set_async_exc(ctypes.c_ulong(thread), ctypes.py_object(exception))
