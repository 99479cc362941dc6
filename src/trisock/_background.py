"""Trio for programs that are not in Trio: what is called here is done in one background thread.

The thread starts with the first call and is a daemon: it ends with the process, and keeps none
alive. Sockets are not tied to it, only the calls that are going on.

**Fork.** A thread does not survive ``fork``, and what it held stays locked in the child. So it is
stopped before a fork, if no call is going on, and starts again with the next call, in the parent
and in the child. Where another thread is in a call it cannot be stopped: then the child
forgets it, and starts one of its own.

**Ctrl-C.** A ``KeyboardInterrupt`` (or whatever else a signal handler raises) ends the wait. Then
the call is cancelled, and the exception goes on when that has come to its end, so that the next
call finds nothing busy. If the call was done by then its result is taken back by ``undo``.

**The end.** When the interpreter finalises, daemon threads have stopped for good: a call from a
``__del__`` that runs only then is a ``RuntimeError``. So is one that the garbage collector makes in
the background thread itself.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

import trio

T = TypeVar("T")

_logger = logging.getLogger("trisock.pluto")


class _Call(Generic[T]):
    """One call: made in one thread, done in the other.

    All but the waiting happens in the background thread, one after the other, so that a call is
    either done or given up, and never both.
    """

    def __init__(
        self, function: Callable[[], Awaitable[T]], undo: Callable[[T], object] | None
    ) -> None:
        self._function = function
        self._undo = undo
        self._scope = trio.CancelScope()
        self._begun = False
        self.result: Future[T] = Future()
        self.given_up: Future[None] = Future()

    async def run(self) -> None:
        if self._scope.cancel_called:  # given up before it began
            return
        self._begun = True
        with self._scope:
            try:
                self.result.set_result(await self._function())
            except trio.Cancelled:
                raise
            except BaseException as exc:  # the caller's, and not the end of this thread
                self.result.set_exception(exc)
        if self._scope.cancel_called:
            self._take_back()

    def give_up(self) -> None:
        self._scope.cancel()
        if self.result.done() or not self._begun:
            self._take_back()

    def _take_back(self) -> None:
        try:
            if self._undo is not None and self.result.done() and self.result.exception() is None:
                self._undo(self.result.result())
        except Exception:  # it must not end the thread, which does the calls of all
            _logger.exception("could not take back the result of an interrupted call")
        self.given_up.set_result(None)


class ThreadStartError(OSError):
    """The background thread could not start Trio: there are no descriptors left, for instance."""


class _Thread(threading.Thread):
    """A Trio run in a daemon thread."""

    def __init__(self) -> None:
        super().__init__(name="trisock", daemon=True)
        self._running: Future[tuple[trio.lowlevel.TrioToken, trio.Nursery]] = Future()

    def run(self) -> None:
        try:
            trio.run(self._main)
        except OSError as exc:  # who waits for the start gets it
            self._running.set_exception(ThreadStartError(exc.errno, exc.strerror))

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            self._running.set_result((trio.lowlevel.current_trio_token(), nursery))
            await trio.sleep_forever()

    def has_failed(self) -> bool:
        """Whether it cannot be used: nor in the child of a fork, where it is not alive."""
        return not self.is_alive() or (
            self._running.done() and self._running.exception() is not None
        )

    def begin(self, call: _Call[Any]) -> None:
        token, nursery = self._running.result()
        token.run_sync_soon(nursery.start_soon, call.run)

    def give_up(self, call: _Call[Any]) -> None:
        if self.is_alive() and self._running.exception() is None:
            token, _ = self._running.result()
            token.run_sync_soon(call.give_up)
            call.given_up.result()

    def stop(self) -> None:
        if self.is_alive() and self._running.exception() is None:
            token, nursery = self._running.result()
            token.run_sync_soon(nursery.cancel_scope.cancel)
            self.join()


class Background:
    """Makes blocking calls of async functions; see the module."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may fork in the middle of everything.
        self._lock = threading.RLock()
        self._thread: _Thread | None = None
        self._calls: set[_Call[Any]] = set()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(
                before=self._before_fork,
                after_in_parent=self._lock.release,
                after_in_child=self._after_fork_in_child,
            )

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
        if sys.is_finalizing() or isinstance(threading.current_thread(), _Thread):
            raise RuntimeError("a blocking call cannot be made here: it would wait for ever")
        call = _Call(function, undo)
        thread = None
        try:
            with self._lock:
                self._calls.add(call)
                thread = self._usable_thread()
            thread.begin(call)
            return call.result.result()
        except BaseException as exc:
            is_its_own = call.result.done() and call.result.exception() is exc
            if thread is not None and not is_its_own:
                thread.give_up(call)
            raise
        finally:
            self._calls.discard(call)

    def _usable_thread(self) -> _Thread:
        if self._thread is None or self._thread.has_failed():
            self._thread = _Thread()
            self._thread.start()
        return self._thread

    def stop(self) -> None:
        """Stop the thread, unless a call is going on. It starts again with the next one."""
        with self._lock:
            if self._thread is not None and not self._calls:
                thread, self._thread = self._thread, None
                thread.stop()

    def _before_fork(self) -> None:
        self._lock.acquire()  # until after the fork: nobody starts a thread meanwhile
        self.stop()

    def _after_fork_in_child(self) -> None:
        self._thread = None
        self._calls.clear()
        self._lock.release()
