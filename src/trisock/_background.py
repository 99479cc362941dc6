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
"""

from __future__ import annotations

import logging
import os
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
            except Exception as exc:
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


class _Thread:
    """A Trio run in a daemon thread."""

    def __init__(self) -> None:
        self._started: Future[tuple[trio.lowlevel.TrioToken, trio.Nursery]] = Future()
        self._thread = threading.Thread(target=self._run, name="trisock", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except OSError as exc:  # such as EMFILE: who waits for the start gets it
            self._started.set_exception(exc)

    def has_failed(self) -> bool:
        return self._started.done() and self._started.exception() is not None

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            self._started.set_result((trio.lowlevel.current_trio_token(), nursery))
            await trio.sleep_forever()

    def start(self, call: _Call[Any]) -> None:
        token, nursery = self._started.result()
        token.run_sync_soon(nursery.start_soon, call.run)

    def give_up(self, call: _Call[Any]) -> None:
        if self._started.exception() is not None:
            return
        token, _ = self._started.result()
        token.run_sync_soon(call.give_up)
        call.given_up.result()

    def stop(self) -> None:
        if self._started.exception() is not None:
            return
        token, nursery = self._started.result()
        token.run_sync_soon(nursery.cancel_scope.cancel)
        self._thread.join()


class Background:
    """Makes blocking calls of async functions; see the module."""

    def __init__(self) -> None:
        # Reentrant: a signal handler may fork in the middle of everything.
        self._lock = threading.RLock()
        self._thread: _Thread | None = None
        self._calls = 0
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
        with self._lock:
            self._calls += 1
        try:
            return self._make(_Call(function, undo))
        finally:
            with self._lock:
                self._calls -= 1

    def _make(self, call: _Call[T]) -> T:
        with self._lock:
            if self._thread is None or self._thread.has_failed():
                self._thread = _Thread()
            thread = self._thread
        try:
            thread.start(call)
            return call.result.result()
        except BaseException as exc:
            if not call.result.done() or call.result.exception() is not exc:
                thread.give_up(call)
            raise

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
        self._calls = 0
        self._lock.release()
