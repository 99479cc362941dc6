"""Trio for synchronous programs: one background thread runs their calls.

The thread starts with the first call. It is a daemon thread: it ends with the process, and does not
keep the process alive. Only calls in progress depend on the thread. Sockets do not.

**Interrupts.** A signal handler may raise an exception between any two bytecodes of the caller, and
another while the first exception is handled. So the caller never acquires a lock that it has to
release. It only uses operations that CPython does in one step of C: it appends to a deque, sets
attributes, and waits for a lock that the background thread releases. ``Future``, ``Event`` and
``with lock`` run Python code, and an exception there may leave their lock held. An interrupted call
is marked as abandoned and put into the inbox once more. The background thread cancels the call,
undoes its result (``undo``), and only then starts another call. A result can be lost only if a
signal arrives when the result is already on the caller's stack. (Python 3.10 still handles signals
at that point.)

**Fork.** A thread does not survive ``fork``. So we stop the background thread before a fork, and
the next call starts it again, in the parent and in the child. If another thread has a call in
progress, we cannot stop the background thread. The child then forgets the parent's background
thread and starts its own.

**Exit.** When the interpreter finalizes, daemon threads no longer run. So a call from a ``__del__``
at that time raises ``RuntimeError``. A ``__del__`` that runs in the background thread itself gets
the same error, because its call would wait for its own thread.
"""

from __future__ import annotations

import _thread
import collections
import contextlib
import logging
import os
import socket
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from .._guard import log
from .call import Call, Item, Stop, new_locked_lock

T = TypeVar("T")

_logger = logging.getLogger("trisock.pluto")

# A caller polls at this interval (seconds), to let its signal handlers run: CPython misses a signal
# that arrives in the microsecond before the caller waits for a lock.
_POLL_SECONDS = 0.05

# An interrupted caller waits at most this many polls for its call to end, and then returns anyway.
_MAX_POLLS = 20

# An ending thread waits at most this long (seconds) for callers that are about to wake it.
_MAX_WAKE_SECONDS = 1.0

_local = threading.local()


class ThreadStartError(OSError):
    """The background thread could not start Trio: no descriptors were free, for example."""


class _Thread:
    """A daemon thread that runs Trio and handles the items in the inbox."""

    def __init__(
        self, inbox: collections.deque[Item], current: dict[int, _Thread], pid: int
    ) -> None:
        self._inbox = inbox
        self._current = current
        self.pid = pid
        self.launched = self.over = False
        self.thread: threading.Thread | None = None
        self._launching = _thread.allocate_lock()
        self._go = new_locked_lock()
        # _waker is one end of a socket pair: a byte sent to it wakes the thread. _waker is set
        # while the thread can be woken. _waking contains the callers that are about to use _waker.
        self._waker: socket.socket | None = None
        self._waking: dict[object, bool] = {}
        self._running: set[Call[Any]] = set()
        # Cancelled calls that have not ended yet.
        self._cancelled: set[Call[Any]] = set()
        # Items that wait until all cancelled calls have ended.
        self._deferred: collections.deque[Item] = collections.deque()
        self._stopping = False

    # ---- in the callers' threads ----

    def launch(self) -> None:
        """Start the thread. Only the first call has an effect.

        Call this in a new thread, where no signal handler runs, because ``Thread.start`` waits for
        an ``Event`` (see the module's docstring).
        """
        if self._launching.acquire(blocking=False):  # pragma: no branch (second after interrupt)
            self.launched = True
            try:
                self.thread = threading.Thread(target=self._run, name="trisock", daemon=True)
                self.thread.start()
            except BaseException as exc:
                self.over = True
                self._go.release()
                if self.thread is not None and self.thread.is_alive():
                    self.thread.join()
                self._shut_down(exc)
            else:
                self._go.release()

    def wake(self) -> None:
        """Make the thread check the inbox. After a missed wake, items wait for the next wake."""
        key = object()
        try:
            self._waking[key] = True
            waker = self._waker
            if waker is not None:
                waker.send(b"\0")
        finally:
            self._waking.pop(key, None)

    # ---- in the thread ----

    def _run(self) -> None:
        self._go.acquire()
        if self.over:
            return
        _local.is_background = True
        failure: BaseException | None = None
        sockets: tuple[socket.socket, ...] = ()
        try:
            sockets = socket.socketpair()
            sockets[0].setblocking(False)
            trio.run(self._serve, *sockets)
        except BaseException as exc:
            failure = exc
            if not issubclass(type(exc), OSError):
                message = (
                    "the background thread of trisock.pluto failed, with all calls in progress"
                )
                log(_logger, logging.ERROR, message, exc_info=exc)
        self._shut_down(failure)
        deadline = time.monotonic() + _MAX_WAKE_SECONDS
        while self._waking and time.monotonic() < deadline:
            time.sleep(0.0001)  # otherwise a caller could send to a closed, reused descriptor
        for each in sockets:
            each.close()

    def _shut_down(self, failure: BaseException | None) -> None:
        """Let a new thread start. If there is a ``failure``, all calls of this thread also fail."""
        self._waker = None
        if failure is not None:
            calls = [*self._running, *self._cancelled, *self._deferred]
            self._deferred.clear()
            with contextlib.suppress(IndexError):
                while True:
                    calls.append(self._inbox.popleft())
            for call in calls:
                if isinstance(call, Stop):
                    call.answered.release()
                elif issubclass(type(failure), OSError):
                    assert isinstance(failure, OSError)
                    why = f"cannot start the background thread: {failure.strerror}"
                    call.fail(ThreadStartError(failure.errno, why))
                else:
                    call.fail(failure)
        while self._deferred:
            self._inbox.appendleft(self._deferred.pop())
        self._current.pop(self.pid, None)
        self.over = True

    async def _serve(self, reader: socket.socket, waker: socket.socket) -> None:
        self._waker = waker
        async with trio.open_nursery() as nursery:
            while True:
                with contextlib.suppress(IndexError):
                    while not self._stopping:
                        self._handle(self._inbox.popleft(), nursery)
                if self._stopping:
                    return
                await trio.lowlevel.wait_readable(reader)
                with contextlib.suppress(BlockingIOError):
                    reader.recv(4096)

    def _handle(self, item: Item, nursery: trio.Nursery) -> None:
        if isinstance(item, Call) and item.abandoned:
            if item in self._running and item.scope is not None:
                self._cancelled.add(item)
                item.scope.cancel()
            elif item.started and item not in self._running:
                self._cancelled.add(item)
                nursery.start_soon(self._undo, item, nursery)
            elif not item.started:
                item.undo_result()
        elif self._cancelled:
            self._deferred.append(item)
        elif isinstance(item, Call):
            item.started = True
            self._running.add(item)
            nursery.start_soon(self._run_call, item, nursery)
        elif not item.withdrawn:
            item.agreed = self._stopping = not self._running
            if self._stopping:
                nursery.cancel_scope.cancel()
            item.answered.release()

    async def _run_call(self, call: Call[Any], nursery: trio.Nursery) -> None:
        if not call.abandoned:
            await call.run()
        self._running.discard(call)
        if call.abandoned:
            await self._undo(call, nursery)

    async def _undo(self, call: Call[Any], nursery: trio.Nursery) -> None:
        call.undo_result()
        self._cancelled.discard(call)
        while self._deferred and not self._cancelled and not self._stopping:
            self._handle(self._deferred.popleft(), nursery)


class TrioThread:
    """Runs async functions as blocking calls; see the module's docstring."""

    def __init__(self) -> None:
        self._inbox: collections.deque[Item] = collections.deque()
        self._current: dict[int, _Thread] = {}  # by process id: the thread of this process
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.stop)
            os.register_at_fork(after_in_child=self._current.clear)
            os.register_at_fork(after_in_child=self._inbox.clear)

    def call(
        self, function: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None
    ) -> T:
        """Run an async function in the background thread and wait for its result.

        Args:
          function: an async function without arguments.
          undo: called with the result, in the background thread, if an exception such as
            ``KeyboardInterrupt`` ended the wait for the result.

        Returns the function's result, or raises its exception.
        """
        call = Call(function, undo)
        try:
            return self.result_of(call)
        except BaseException:
            self.abandon(call)
            raise

    def result_of(self, call: Call[T]) -> T:
        """Run a call and wait for its result. If this raises, the caller must call ``abandon``."""
        if sys.is_finalizing() or _is_background():
            call.delivered = True
            raise RuntimeError(
                "a blocking call cannot be made in the background thread, or while the interpreter "
                "finalizes: it would never end"
            )
        try:
            self._inbox.append(call)
            self._wait_for(call.finished)
            if call.error is None:
                return call.value  # type: ignore[return-value]
        except BaseException:
            call.abandoned = True
            self._cancel(call)
            raise
        error, call.error, call.delivered = call.error, None, True
        try:
            raise error
        finally:
            del error  # otherwise the exception and its traceback would refer to each other

    def abandon(self, call: Call[Any]) -> None:
        """Abandon a call whose result has not reached the caller.

        The caller calls this in its own frame, because an exception may occur there even after
        ``result_of`` has returned. Usually ``result_of`` has already abandoned the call. There is
        no need to wait here, because the next call is queued after this one anyway.
        """
        if not call.delivered:
            call.abandoned = True
            self._inbox.append(call)

    def _wait_for(self, lock: _thread.LockType) -> None:
        pid = os.getpid()
        while True:
            thread = self._usable_thread()
            thread.wake()
            while self._current.get(pid) is thread:
                if lock.acquire(timeout=_POLL_SECONDS):
                    return
            if lock.acquire(blocking=False):  # released just before the thread ended
                return
            if os.getpid() != pid:  # pragma: no cover (a frame older than the fork is not traced)
                raise RuntimeError("this process was forked in the middle of a blocking call")

    def _cancel(self, call: Call[Any]) -> None:
        call.ended = ended = new_locked_lock()
        self._inbox.append(call)
        thread = self._current.get(os.getpid())
        if thread is None and call.has_value:
            with contextlib.suppress(RuntimeError):  # raised if the system has no more threads
                thread = self._usable_thread()
        if thread is not None:
            thread.wake()
            for _ in range(_MAX_POLLS if call.started else 0):
                if ended.acquire(timeout=_POLL_SECONDS):
                    break

    def _usable_thread(self) -> _Thread:
        pid = os.getpid()
        thread = self._current.get(pid)
        if thread is None:
            thread = self._current.setdefault(pid, _Thread(self._inbox, self._current, pid))
        if not thread.launched:
            _thread.start_new_thread(thread.launch, ())
        return thread

    def stop(self) -> None:
        """Stop the thread, unless a call is in progress. The next call starts it again."""
        pid = os.getpid()
        thread = self._current.get(pid)
        if thread is None or _is_background():
            return
        request = Stop()
        self._inbox.append(request)
        while thread is self._current.get(pid):
            self._usable_thread().wake()
            if request.answered.acquire(timeout=_POLL_SECONDS):
                break
        request.withdrawn = True  # needed if an earlier, interrupted request ended the thread
        if request.agreed or thread is not self._current.get(pid):
            while not thread.over:
                time.sleep(0.0001)
            if thread.thread is not None:
                thread.thread.join()  # cannot block for long: the thread is ending


def _is_background() -> bool:
    return getattr(_local, "is_background", False)
