"""Pluto's scheduler: ``add`` functions, then ``run`` them as concurrent tasks of Trio."""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any, NoReturn, cast

import trio

from .._guard import isolated, leaves, log, raise_again, split_errors
from .blocking import Run, current_run, describe, run_trio

if sys.version_info < (3, 11):  # pragma: no cover (each version runs one of the two branches)
    from exceptiongroup import BaseExceptionGroup  # Trio depends on this package

if TYPE_CHECKING:

    class Done(Awaitable[None]):
        """The result of a call that returns nothing: awaited inside Trio, ``None`` outside."""


_logger = logging.getLogger("trisock.pluto")

# If there is no yieldfunc, a loop of addloop waits this long (seconds) between two calls.
_ROUND_SECONDS = 0.001


class coroutine:  # noqa: N801 (Pluto's name)
    """What ``scheduler.add`` returns: a function that a scheduler runs once, in its own task."""

    def __init__(self, function: Callable[..., object]) -> None:
        self._function = function  # the task is named after the function
        self._added = self._closed = False
        # Both are set while the function runs.
        self._run: Run | None = None
        self._scope: trio.CancelScope | None = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError(f"a {type(self).__name__} cannot be copied or pickled: it runs only once")

    def close(self) -> None:
        """End the coroutine. Synchronous.

        If the function is running, it is cancelled at its next checkpoint. If it has not started,
        it never starts. This can be called inside Trio, outside Trio, and in any thread. It never
        waits for the function to end. Source: Lua's ``coroutine.close``.
        """
        self._closed = True
        run = self._run
        if run is None or run is current_run():
            self._end()
        else:
            with contextlib.suppress(trio.RunFinishedError):
                run.run_sync_soon(self._end)

    def _end(self) -> None:
        if self._scope is not None:
            self._scope.cancel()

    async def _work(self, sched: scheduler) -> None:
        """Do the work of this coroutine: call the function. Subclasses override this."""
        await call(self._function)

    async def _run_in(self, sched: scheduler) -> None:
        """Run the coroutine in this task."""
        if self._closed:
            return
        self._run = current_run()
        try:
            with trio.CancelScope() as self._scope:
                await isolated(functools.partial(self._work, sched))
        finally:
            self._run = self._scope = None


class _Loop(coroutine):
    """Calls its function again and again, once in each round."""

    async def _work(self, sched: scheduler) -> None:
        while await isolated(functools.partial(call, self._function)) is not False:
            await sched._next_round()


class scheduler:  # noqa: N801 (Pluto's name)
    """Runs functions, and the servers of ``socket.bind``, as concurrent tasks.

    Source: Pluto's documentation, page "Scheduler".
    """

    def __init__(self) -> None:
        self._waiting: list[coroutine] = []
        self._errorfunc: Callable[[Any], object] | None = None
        self._yieldfunc: Callable[[], object] | None = None
        self._yieldfunc_set = trio.lowlevel.ParkingLot()
        self._round_ended = trio.lowlevel.ParkingLot()
        # These are set while the scheduler runs. The nursery runs the coroutines.
        self._run: Run | None = None
        self._nursery: trio.Nursery | None = None
        self._rounds = trio.CancelScope()
        self._failure: BaseException | None = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a scheduler cannot be copied or pickled: it runs each function only once")

    def add(self, function: Callable[[], object] | coroutine) -> coroutine:
        """Add a function. It runs in its own task while the scheduler runs. Synchronous.

        If the scheduler is running, the function starts at the next checkpoint. Otherwise, it
        starts when ``run`` is called. (Pluto's ``add`` runs the function up to its first yield.)

        Args:
          function: an async or a plain function. If it raises an exception, ``run`` raises it, or
            ``errorfunc`` is called. Leaving a cancel scope open counts as a ``RuntimeError``.

        Returns: the coroutine. Its ``close`` ends the function.

        Raises ``TypeError`` if ``function`` cannot be called, and ``RuntimeError`` if the scheduler
        is running in another run of Trio or another thread. Source: ``scheduler.add``.
        """
        if isinstance(function, coroutine):
            return self._add(function)
        return self._add(coroutine(_function(function)))

    def addloop(self, function: Callable[[], object]) -> coroutine:
        """Add a function that is called again and again, until it returns ``False``. Synchronous.

        Between two calls, the loop waits until the round has ended and ``yieldfunc`` was called.
        Without a ``yieldfunc``, the loop waits for one millisecond.

        Args:
          function: as in ``add``. Only ``False`` ends the loop. ``None`` does not.

        Returns and raises the same as ``add``. Source: ``scheduler.addloop``.
        """
        return self._add(_Loop(_function(function)))

    def _add(self, added: coroutine) -> coroutine:
        self._check_run()
        if added._added:
            raise RuntimeError("this coroutine was already added to a scheduler")
        added._added = True
        if self._nursery is None:
            self._waiting.append(added)
        else:
            self._start(added)
        return added

    def run(self) -> Done:
        """Run until all added functions have ended. To end a server, ``close`` its coroutine.

        Await it inside Trio. Outside, ``run`` runs Trio in this thread, and a Ctrl-C ends the run.

        If a function raises an exception and there is no ``errorfunc``, the other functions are
        cancelled, and then ``run`` raises the exception. (Further exceptions are logged.)
        After that, or after a cancellation, ``run`` can be called again, to run the functions that
        were added since.

        Raises ``RuntimeError`` if the scheduler is already running. Source: ``scheduler.run``.
        """
        if current_run() is not None:
            return cast("Done", self._run_all())
        return cast("Done", run_trio(self._run_all))

    @property
    def yieldfunc(self) -> Callable[[], object] | None:
        """A function, plain or async, that is called between two rounds. Settable.

        In a round, each runnable task runs up to its next checkpoint. With ``None``, the default,
        the scheduler waits until a task is runnable. (Pluto's default sleeps for a millisecond.) If
        the function raises an exception, ``run`` raises it. Source: ``scheduler.yieldfunc``.
        """
        return self._yieldfunc

    @yieldfunc.setter
    def yieldfunc(self, function: Callable[[], object] | None) -> None:
        self._check_run()
        self._yieldfunc = _function_or_none("yieldfunc", function)
        if self._nursery is not None:
            self._yieldfunc_set.unpark_all()

    @property
    def errorfunc(self) -> Callable[[Any], object] | None:
        """A function, plain or async, that is called with the exception of a coroutine. Settable.

        With ``None``, the default, ``run`` raises the exception. Otherwise, the other coroutines
        continue. A handler of ``bind`` is a coroutine too, but its exception is also logged. If
        ``errorfunc`` itself raises an exception, ``run`` raises the new exception. If ``errorfunc``
        was called for a handler, the new exception is only logged. Source: ``scheduler.errorfunc``.
        """
        return self._errorfunc

    @errorfunc.setter
    def errorfunc(self, function: Callable[[Any], object] | None) -> None:
        self._errorfunc = _function_or_none("errorfunc", function)

    def _check_run(self) -> None:
        if self._nursery is not None and self._run is not current_run():
            raise RuntimeError("this scheduler is running elsewhere: only its tasks can change it")

    async def _run_all(self) -> None:
        if self._nursery is not None:
            raise RuntimeError("this scheduler is already running")
        self._run = current_run()
        try:
            async with trio.open_nursery() as outer:
                self._rounds = trio.CancelScope()
                outer.start_soon(self._run_rounds)
                async with trio.open_nursery() as self._nursery:
                    while self._waiting:
                        self._start(self._waiting.pop(0))
                self._rounds.cancel()
            if self._failure is not None:
                raise self._failure
        except BaseException as exc:
            if exc is self._failure or self._failure is None:
                raise
            # There was also a cancellation or a Ctrl-C. Trio's cancel scopes remove their Cancelled
            # from the group.
            message = "a coroutine failed, and the scheduler was interrupted"
            raise BaseExceptionGroup(message, [self._failure, exc]) from None
        finally:
            self._run = self._nursery = self._failure = None

    def _start(self, added: coroutine) -> None:
        assert self._nursery is not None
        self._nursery.start_soon(self._run_one, added, name=added._function)

    async def _run_one(self, added: coroutine) -> None:
        assert self._nursery is not None
        try:
            await added._run_in(self)
        except BaseException as exc:
            errors, others = split_errors(exc)
            is_cancelled = others is not None and _is_cancelled(others)
            try:
                if errors is not None and self._errorfunc is not None:
                    errors = await self._report(errors)
                if others is not None and not is_cancelled:
                    self._fail(others)
                if errors is not None:
                    self._fail(errors)
                if others is not None and is_cancelled:
                    raise_again(others)
            finally:
                del errors, others  # their tracebacks refer to this frame
        finally:
            if len(self._nursery.child_tasks) == 1:  # this is the last coroutine
                self._rounds.cancel()

    async def _report(self, error: BaseException) -> BaseException | None:
        """Call ``errorfunc``. Return the exception that it raised, if any."""
        assert self._errorfunc is not None
        try:
            await isolated(functools.partial(call, self._errorfunc, error))
        except BaseException as exc:
            if _is_cancelled(exc):
                raise
            return exc
        return None

    def _fail(self, error: BaseException) -> None:
        """Cancel all coroutines, and let ``run`` raise the first error."""
        if self._failure is not None:
            message = "a coroutine failed while its scheduler was ending"
            log(_logger, logging.ERROR, message, exc_info=error)
            return
        self._failure = error
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()

    async def _run_rounds(self) -> None:
        """Call ``yieldfunc`` between two rounds, until the last coroutine ends."""
        with self._rounds:
            await self._call_yieldfunc()

    async def _call_yieldfunc(self) -> None:
        while True:
            # Trio runs ready tasks in any order. After two checkpoints, each loop that we have
            # unparked has called its function.
            for _ in range(2):
                await trio.lowlevel.checkpoint()
            if self._yieldfunc is None:
                self._round_ended.unpark_all()
                await self._yieldfunc_set.park()
                continue
            try:
                await isolated(functools.partial(call, self._yieldfunc))
            except BaseException as exc:
                if _is_cancelled(exc):
                    raise
                self._fail(exc)
                return
            self._round_ended.unpark_all()

    async def _next_round(self) -> None:
        if self._yieldfunc is None:
            await trio.sleep(_ROUND_SECONDS)
        else:
            await self._round_ended.park()


async def call(function: Callable[..., object], *args: object) -> object:
    """Call a plain or an async function."""
    result = function(*args)
    return await result if inspect.isawaitable(result) else result


def _function(value: Any) -> Any:
    if not callable(value):
        raise TypeError(f"a scheduler runs functions, not {describe(value)}")
    return value


def _function_or_none(name: str, value: Any) -> Any:
    if value is not None and not callable(value):
        raise TypeError(f"{name} must be a function or None, not {describe(value)}")
    return value


def _is_cancelled(exc: BaseException) -> bool:
    return any(issubclass(type(each), trio.Cancelled) for each in leaves(exc))
