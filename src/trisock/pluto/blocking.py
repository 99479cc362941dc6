"""Methods that are awaited inside Trio and block outside it.

An object works only where it was made: in one run of Trio, or outside Trio. Outside Trio, all work
on connections is done in one background thread (``trio_thread``), even for synchronous methods. So
no two threads ever work on one connection.
"""

from __future__ import annotations

import functools
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, TypeVar, overload

import trio

from .._guard import leaves, log, text
from .call import Call
from .intent import Intent
from .trio_thread import TrioThread

if sys.version_info < (3, 11):  # pragma: no cover (each version runs one of the two branches)
    from exceptiongroup import BaseExceptionGroup  # Trio depends on this package

P = ParamSpec("P")
R = TypeVar("R")
Run = trio.lowlevel.TrioToken

background = TrioThread()  # one thread for the whole process

_logger = logging.getLogger("trisock.pluto")


def current_run() -> Run | None:
    """Return the run of Trio that this task belongs to, or ``None`` outside Trio."""
    return trio.lowlevel.current_trio_token() if trio.lowlevel.in_trio_task() else None


def describe(value: object) -> str:
    """Describe an argument for an error message. Text is not shown, because it may be a secret."""
    if value is None or type(value) in (bool, int, float):
        return repr(value)
    return f"a {type(value).__name__}"


def close_descriptor(sock: trio.socket.SocketType) -> None:
    """Close an unused socket immediately. Any thread may call this, inside Trio or not."""
    # The argument is Trio's socket, and not a trisock.Socket. A broken trisock.Socket refers to its
    # exception, and the exception's frames may refer to the object to finalize. A finalizer that
    # referred to the trisock.Socket could then keep this object alive forever.
    descriptor = sock.detach()
    if descriptor >= 0:
        socket.close(descriptor)


def log_reason(reason: Exception) -> None:
    """Log a failure as text. (A log handler that stores exceptions would keep their frames.)"""
    log(_logger, logging.INFO, "%s", text(reason))


def run_trio(main: Callable[[], Awaitable[None]]) -> None:
    """Run Trio in this thread. A Ctrl-C is raised as ``KeyboardInterrupt``, not in a group."""
    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        # Do not call split(): it calls methods of nested groups, whose class may be the user's.
        found = leaves(group)
        rest = [each for each in found if not issubclass(type(each), KeyboardInterrupt)]
        if len(rest) == len(found):
            raise
        cause = BaseExceptionGroup("besides the Ctrl-C", rest) if rest else None
        raise KeyboardInterrupt from cause


class RunBound:
    """An object that works only in one run of Trio, or only outside Trio if ``run`` is None."""

    def __init__(self, run: Run | None) -> None:
        self._run = run

    def _in_trio(self) -> bool:
        """Return whether calls are awaited.

        Raises ``RuntimeError`` if this object cannot be used here.
        """
        run = current_run()
        if run is self._run:
            return run is not None
        made = "outside Trio" if self._run is None else "inside Trio"
        here = "outside Trio" if run is None else "inside Trio"
        if made == here:
            here = "in another run of Trio"
        raise RuntimeError(f"this {type(self).__name__} was made {made}: it cannot be used {here}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # For copy, deepcopy and pickle. A copy would share the buffer or the descriptor.
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    def _call(self, function: Callable[[], R]) -> R:
        """Call a synchronous function: directly if inside Trio, else in the background thread."""
        if self._in_trio():
            return function()

        async def call() -> R:
            return function()

        return background.call(call)


class InsideTrio(RunBound):
    """Marks an object that was made inside Trio, for type checkers."""


class PendingCall(Generic[R]):
    """An awaitable without the methods of a coroutine.

    Coroutines have methods named ``send`` and ``close``, and so do sockets. If a program forgets an
    ``await``, its next call must not reach the coroutine's method.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, R]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, R]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"there is no {name!r} yet: inside Trio, await this call first")


if TYPE_CHECKING:

    class AsyncOrBlocking(Generic[P, R]):
        """A method that is async inside Trio and blocking outside, for type checkers."""

        @overload
        def __get__(
            self, instance: InsideTrio, owner: object
        ) -> Callable[P, Coroutine[Any, Any, R]]: ...
        @overload
        def __get__(self, instance: RunBound, owner: object) -> Callable[P, R]: ...
        @overload
        def __get__(self, instance: None, owner: object) -> Callable[..., Any]: ...
        def __get__(self, instance: object, owner: object) -> object: ...


def async_or_blocking(
    undo: Callable[[Any, Any], object] | None = None,
    wrap: Callable[[Coroutine[Any, Any, Any]], object] | None = None,
    intent: Callable[[Any], Intent] | None = None,
) -> Callable[[Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]], AsyncOrBlocking[P, R]]:
    """Decorate an async method of a RunBound: awaited inside Trio, blocking outside.

    Args:
      undo: called with the object and the result if a Ctrl-C kept the result from the caller.
      wrap: called inside Trio, to wrap the coroutine.
      intent: returns the object's ``Intent`` for this call. The intent is recorded even if an
        interrupt keeps the call from starting.
    """

    def decorate(method: Callable[..., Coroutine[Any, Any, R]]) -> Any:
        @functools.wraps(method)
        def call(self: RunBound, *args: Any, **kwargs: Any) -> object:
            if not self._in_trio():
                on_not_started = None
                if intent is not None:
                    intended = intent(self)
                    intended.recorded = True
                    on_not_started = intended.check
                bound = functools.partial(method, self, *args, **kwargs)
                blocking = Call(bound, undo and functools.partial(undo, self), on_not_started)
                try:
                    return background.result_of(blocking)
                except BaseException:
                    background.abandon(blocking)
                    raise
            awaited = method(self, *args, **kwargs)
            return awaited if wrap is None else wrap(awaited)

        return call

    return decorate
