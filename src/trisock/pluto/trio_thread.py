"""Trio for programs that are not in Trio: one background thread makes their calls.

The thread starts with the first call and is a daemon: it ends with the process, and keeps none
alive. Sockets are not tied to it, only the calls in progress.

**Interrupts.** A signal handler may raise between any two bytecodes of the caller, and again while
the first exception is handled. So the caller takes no lock that it has to give back. It shares with
the background thread what CPython does in one step of C: it appends to a deque, sets attributes,
and waits for a lock that the other thread releases. A ``Future``, an ``Event`` or a ``with lock``
is Python code, and an exception in the middle leaves its lock held. An interrupted call is marked,
and put into the inbox once more. The background thread cancels it, takes back its result
(``undo``), and begins no other call before that is done. Only a result that the caller has on its
stack can be lost: Python 3.10 looks for signals there as well.

**Fork.** A thread does not survive ``fork``. So it is stopped before a fork, if no call is in
progress, and starts again with the next call, in the parent and in the child. Where another thread
is in a call it cannot be stopped: the child forgets it, and starts one of its own.

**The end.** When the interpreter finalizes, daemon threads have stopped for good: a call from a
``__del__`` that runs only then is a ``RuntimeError``. So is one that the garbage collector makes in
the background thread itself.
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
from .call import Call, Item, Stop, held_lock

T = TypeVar("T")

_logger = logging.getLogger("trisock.pluto")

# How long a caller waits (seconds) before it lets its signal handlers run. CPython does not notice
# a signal that comes in the microsecond before it waits for a lock.
_LOOK = 0.05

# The most waits of an interrupted call for its end: one that does not end is left behind.
_LOOKS = 20

# How long the end of a thread waits for callers that are about to wake it.
_WAKING_SECONDS = 1.0

_here = threading.local()


class ThreadStartError(OSError):
    """The background thread could not start Trio: there are no descriptors left, for instance."""


class _Thread:
    """A run of Trio in a daemon thread, which takes what is in the inbox."""

    def __init__(
        self, inbox: collections.deque[Item], current: dict[int, _Thread], pid: int
    ) -> None:
        self._inbox = inbox
        self._current = current
        self.pid = pid
        self.launched = self.over = False
        self.thread: threading.Thread | None = None
        self._launching = _thread.allocate_lock()
        self._go = held_lock()
        # The end of a socket pair that wakes the thread, while it can be woken; and who does.
        self._waker: socket.socket | None = None
        self._waking: dict[object, bool] = {}
        self._running: set[Call[Any]] = set()
        self._ending: set[Call[Any]] = set()  # abandoned, and not at their end yet
        self._held: collections.deque[Item] = collections.deque()  # behind those
        self._stopping = False

    # ---- in the callers' threads ----

    def launch(self) -> None:
        """Start it, in a thread of its own, which no signal interrupts: the first launch counts.

        ``Thread.start`` waits for an ``Event``.
        """
        if self._launching.acquire(blocking=False):  # pragma: no branch (an interrupt's second)
            self.launched = True
            try:
                self.thread = threading.Thread(target=self._run, name="trisock", daemon=True)
                self.thread.start()
            except BaseException as exc:
                self.over = True
                self._go.release()
                if self.thread is not None and self.thread.is_alive():
                    self.thread.join()
                self._leave(exc)
            else:
                self._go.release()

    def wake(self) -> None:
        """Have it look into the inbox. What it has not been woken for it finds at the next time."""
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
        _here.is_background = True
        failure: BaseException | None = None
        sockets: tuple[socket.socket, ...] = ()
        try:
            sockets = socket.socketpair()
            sockets[0].setblocking(False)
            trio.run(self._serve, *sockets)
        except BaseException as exc:
            failure = exc
            if not issubclass(type(exc), OSError):
                message = "the background thread has failed"
                log(_logger, logging.ERROR, message, exc_info=exc)
        self._leave(failure)
        deadline = time.monotonic() + _WAKING_SECONDS
        while self._waking and time.monotonic() < deadline:
            time.sleep(0.0001)  # closed now, the number could be another connection's
        for each in sockets:
            each.close()

    def _leave(self, failure: BaseException | None) -> None:
        """Make way for another thread; where this one has failed, so do the calls."""
        self._waker = None
        if failure is not None:
            calls = [*self._running, *self._ending, *self._held]
            self._held.clear()
            with contextlib.suppress(IndexError):
                while True:
                    calls.append(self._inbox.popleft())
            for call in calls:
                if isinstance(call, Stop):
                    call.answered.release()
                elif issubclass(type(failure), OSError):
                    assert isinstance(failure, OSError)
                    call.fail(ThreadStartError(failure.errno, failure.strerror))
                else:
                    call.fail(failure)
        while self._held:
            self._inbox.appendleft(self._held.pop())
        self._current.pop(self.pid, None)
        self.over = True

    async def _serve(self, reader: socket.socket, waker: socket.socket) -> None:
        self._waker = waker
        async with trio.open_nursery() as nursery:
            while True:
                with contextlib.suppress(IndexError):
                    while not self._stopping:
                        self._take(self._inbox.popleft(), nursery)
                if self._stopping:
                    return
                await trio.lowlevel.wait_readable(reader)
                with contextlib.suppress(BlockingIOError):
                    reader.recv(4096)

    def _take(self, item: Item, nursery: trio.Nursery) -> None:
        if isinstance(item, Call) and item.abandoned:
            if item in self._running and item.scope is not None:
                self._ending.add(item)
                item.scope.cancel()
            elif item.begun and item not in self._running:
                self._ending.add(item)
                nursery.start_soon(self._take_back, item, nursery)
            elif not item.begun:
                item.take_back()
        elif self._ending:
            self._held.append(item)
        elif isinstance(item, Call):
            item.begun = True
            self._running.add(item)
            nursery.start_soon(self._make, item, nursery)
        elif not item.withdrawn:
            item.agreed = self._stopping = not self._running
            if self._stopping:
                nursery.cancel_scope.cancel()
            item.answered.release()

    async def _make(self, call: Call[Any], nursery: trio.Nursery) -> None:
        if not call.abandoned:
            await call.run()
        self._running.discard(call)
        if call.abandoned:
            await self._take_back(call, nursery)

    async def _take_back(self, call: Call[Any], nursery: trio.Nursery) -> None:
        call.take_back()
        self._ending.discard(call)
        while self._held and not self._ending and not self._stopping:
            self._take(self._held.popleft(), nursery)


class Background:
    """Makes blocking calls of async functions; see the module."""

    def __init__(self) -> None:
        self._inbox: collections.deque[Item] = collections.deque()
        self._current: dict[int, _Thread] = {}  # by process: one, or none
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(before=self.stop)
            os.register_at_fork(after_in_child=self._current.clear)
            os.register_at_fork(after_in_child=self._inbox.clear)

    def call(
        self, function: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None = None
    ) -> T:
        """Call an async function in the background thread and wait for its result.

        Args:
          function: takes no arguments.
          undo: called with the result (in the background thread) if an exception, such as a
            ``KeyboardInterrupt``, ended the wait for it.

        Returns, raises: what the function does.
        """
        call = Call(function, undo)
        try:
            return self.result_of(call)
        except BaseException:
            self.abandon(call)
            raise

    def result_of(self, call: Call[T]) -> T:
        """Make a call and wait for its result. If it does not reach the caller: ``abandon``."""
        if sys.is_finalizing() or _is_background():
            call.delivered = True
            raise RuntimeError("a blocking call cannot be made here: it would never end")
        try:
            self._inbox.append(call)
            self._wait_for(call.finished)
            if call.error is None:
                return call.value  # type: ignore[return-value]
        except BaseException:
            call.abandoned = True
            self._give_up(call)
            raise
        error, call.error, call.delivered = call.error, None, True
        try:
            raise error
        finally:
            del error  # or exception and traceback would refer to each other

    def abandon(self, call: Call[Any]) -> None:
        """Take a call back in the frame of the caller, where an exception has come last.

        Mostly ``result_of`` has done it. This does not wait: the next call comes behind it.
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
                if lock.acquire(timeout=_LOOK):
                    return
            if lock.acquire(blocking=False):  # the last that it did
                return
            if os.getpid() != pid:  # pragma: no cover (a frame older than the fork is not traced)
                raise RuntimeError("this process was forked in the middle of a blocking call")

    def _give_up(self, call: Call[Any]) -> None:
        call.gone = gone = held_lock()
        self._inbox.append(call)
        thread = self._current.get(os.getpid())
        if thread is None and call.has_value:
            with contextlib.suppress(RuntimeError):  # the system has no more threads
                thread = self._usable_thread()
        if thread is not None:
            thread.wake()
            for _ in range(_LOOKS if call.begun else 0):
                if gone.acquire(timeout=_LOOK):
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
        """Stop the thread, unless a call is in progress. It starts again with the next one."""
        pid = os.getpid()
        thread = self._current.get(pid)
        if thread is None or _is_background():
            return
        request = Stop()
        self._inbox.append(request)
        while thread is self._current.get(pid):
            self._usable_thread().wake()
            if request.answered.acquire(timeout=_LOOK):
                break
        request.withdrawn = True  # where an earlier one, which was interrupted, has ended it
        if request.agreed or thread is not self._current.get(pid):
            while not thread.over:
                time.sleep(0.0001)
            if thread.thread is not None:
                thread.thread.join()  # it is at its end, and needs nobody for that


def _is_background() -> bool:
    return getattr(_here, "is_background", False)
