"""Two sides: inside Trio, where calls are awaited, and outside it, where the same calls block.

What is made on one side stays there. Outside Trio all calls are made in one background thread
(``_background``), plain ones too: so nothing is ever done to a connection in two threads at once.
"""

from __future__ import annotations

import functools
import logging
import socket
import sys
from collections.abc import Awaitable, Callable, Coroutine, Generator
from typing import TYPE_CHECKING, Any, Concatenate, Generic, NoReturn, ParamSpec, TypeVar, overload

import trio

from .._guard import leaves, log
from .._text import printable
from .call import Call
from .trio_thread import Background

if sys.version_info < (3, 11):  # pragma: no cover (one of the two on each version)
    from exceptiongroup import BaseExceptionGroup  # which Trio needs as well

P = ParamSpec("P")
R = TypeVar("R")
Run = trio.lowlevel.TrioToken

background = Background()

_logger = logging.getLogger("trisock.pluto")


def current_run() -> Run | None:
    """Return which run of Trio this task is in; ``None`` outside Trio."""
    return trio.lowlevel.current_trio_token() if trio.lowlevel.in_trio_task() else None


def shown(mistake: object) -> str:
    """Tell what was given in place of a function; not its text, which may be a private key."""
    if mistake is None or type(mistake) in (bool, int, float):
        return repr(mistake)
    return f"a {type(mistake).__name__}"


def close_descriptor(sock: trio.socket.SocketType) -> None:
    """Close a socket that nobody uses any more: in any thread, in Trio or not, and at once."""
    # The innermost: a trisock.Socket that broke has the exception, and so the frames and us.
    descriptor = sock.detach()
    if descriptor >= 0:
        socket.close(descriptor)


def log_reason(reason: Exception, where: str = "") -> None:
    """Log why something failed, as text: a handler that keeps exceptions keeps their frames."""
    try:
        text = str(reason)
    except Exception:  # of an argument whose class is the program's
        text = type(reason).__name__
    log(_logger, logging.INFO, "%s", printable(where + text))


def run_trio(main: Callable[[], Awaitable[None]]) -> None:
    """Run Trio in this thread. A Ctrl-C comes out of it as such, and not in a group."""
    try:
        trio.run(main)
    except BaseExceptionGroup as group:
        # Not split(): it calls methods of the groups in it, whose classes may be the program's.
        found = leaves(group)
        rest = [each for each in found if not issubclass(type(each), KeyboardInterrupt)]
        if len(rest) == len(found):
            raise
        cause = BaseExceptionGroup("besides the Ctrl-C", rest) if rest else None
        raise KeyboardInterrupt from cause


class OneSided:
    """Belongs to one run of Trio, or to none (``run``), and is used there only."""

    def __init__(self, run: Run | None) -> None:
        self._run = run

    def _is_inside(self) -> bool:
        """Return whether calls are awaited; RuntimeError on the wrong side."""
        run = current_run()
        if run is self._run:
            return run is not None
        made = "outside Trio" if self._run is None else "inside Trio"
        here = "outside Trio" if run is None else "inside Trio"
        if made == here:
            here = "in another run of Trio"
        raise RuntimeError(f"this {type(self).__name__} was made {made}: it cannot be used {here}")

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        # What copying, deep copying and pickling ask. Two would share a buffer, or a descriptor.
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled")

    def _at_once(self, function: Callable[[], R]) -> R:
        """Make a plain call, on the side where this is used."""
        if self._is_inside():
            return function()

        async def call() -> R:
            return function()

        return background.call(call)


class Awaited(OneSided):
    """Made inside Trio. What type checkers tell the two sides by."""


class ToBeAwaited(Generic[R]):
    """What there will be when it is awaited, and not the coroutine that makes it.

    A coroutine has a ``send`` and a ``close``, too: who forgets the ``await`` would call those.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, R]) -> None:
        self._coroutine = coroutine

    def __await__(self) -> Generator[Any, Any, R]:
        return self._coroutine.__await__()

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"there is no {name!r} yet: inside Trio this call is awaited")


if TYPE_CHECKING:

    class Waits(Generic[P, R]):
        """A method that waits, as type checkers see it on each side."""

        @overload
        def __get__(
            self, instance: Awaited, owner: object
        ) -> Callable[P, Coroutine[Any, Any, R]]: ...
        @overload
        def __get__(self, instance: OneSided, owner: object) -> Callable[P, R]: ...
        @overload
        def __get__(self, instance: None, owner: object) -> Callable[..., Any]: ...
        def __get__(self, instance: object, owner: object) -> object: ...


def waits(method: Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]) -> Waits[P, R]:
    """Make an async method of a OneSided one that is awaited inside Trio and blocks outside it."""
    return taken_back_by(None)(method)


def taken_back_by(
    undo: Callable[[Any, Any], object] | None,
    wrap: Callable[[Coroutine[Any, Any, Any]], object] | None = None,
    announced: str = "",
) -> Callable[[Callable[Concatenate[Any, P], Coroutine[Any, Any, R]]], Waits[P, R]]:
    """Do the same as ``waits``; ``undo`` takes back a result that a Ctrl-C kept from the caller.

    ``wrap`` is for the coroutine, inside Trio. ``announced`` names the attribute with the
    ``Announced`` of this call: it is known also if an interrupt keeps the call from beginning.
    """

    def decorate(method: Callable[..., Coroutine[Any, Any, R]]) -> Any:
        @functools.wraps(method)
        def call(self: OneSided, *args: Any, **kwargs: Any) -> object:
            if not self._is_inside():
                unbegun = None
                if announced:
                    getattr(self, announced).announced = True
                    unbegun = getattr(self, announced).check
                bound = functools.partial(method, self, *args, **kwargs)
                blocking = Call(bound, undo and functools.partial(undo, self), unbegun)
                try:
                    return background.result_of(blocking)
                except BaseException:
                    background.abandon(blocking)
                    raise
            awaited = method(self, *args, **kwargs)
            return awaited if wrap is None else wrap(awaited)

        return call

    return decorate
