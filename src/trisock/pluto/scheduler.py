"""The part of Pluto's scheduler that servers need: ``add`` async functions, then ``run`` them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn, cast

import trio

from .._guard import isolated
from .blocking import current_run, describe, run_trio

if TYPE_CHECKING:

    class Done(Awaitable[None]):
        """The result of a call that returns nothing: awaited inside Trio, ``None`` outside."""


class scheduler:  # noqa: N801 (Pluto's name)
    """Runs the servers of ``socket.bind``, and other async functions. Source: Pluto's page."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], Awaitable[object]]] = []
        self._nursery: trio.Nursery | None = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a scheduler cannot be copied or pickled: it runs each function only once")

    def add(self, function: Callable[[], Awaitable[object]]) -> None:
        """Add an async function. It runs in its own task while the scheduler runs. Synchronous.

        If the function raises an exception, ``run`` raises it in a group. If the function leaves a
        cancel scope open, ``run`` raises a ``RuntimeError`` in a group. Source: Pluto's
        ``scheduler.add``.
        """
        if not callable(function):
            raise TypeError(f"a scheduler runs async functions, not {describe(function)}")
        if self._nursery is not None:
            self._nursery.start_soon(isolated, function, name=function)
        else:
            self._waiting.append(function)

    def run(self) -> Done:
        """Run until all added functions have ended. To end a server, ``close`` its listener.

        Await it inside Trio. Outside, it runs Trio in this thread, and a Ctrl-C ends it. Raises
        ``RuntimeError`` if it is already running. Source: Pluto's ``scheduler.run``.
        """
        if current_run() is not None:
            return cast("Done", self._run_all())
        return cast("Done", run_trio(self._run_all))

    async def _run_all(self) -> None:
        if self._nursery is not None:
            raise RuntimeError("this scheduler is already running")
        try:
            async with trio.open_nursery() as self._nursery:
                while self._waiting:
                    function = self._waiting.pop(0)
                    self._nursery.start_soon(isolated, function, name=function)
        finally:
            self._nursery = None
