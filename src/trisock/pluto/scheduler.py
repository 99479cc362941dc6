"""Pluto's scheduler, as far as servers need it: what is added to it runs when it is run."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, NoReturn, cast

import trio

from .._guard import isolated
from .blocking import current_run, run_trio, shown

if TYPE_CHECKING:

    class Done(Awaitable[None]):
        """Nothing: outside Trio it is done, inside it is waited for."""


class scheduler:  # noqa: N801 (Pluto's name)
    """Runs the servers of ``socket.bind``, and whatever else it is given. Source: Pluto's page."""

    def __init__(self) -> None:
        self._waiting: list[Callable[[], Awaitable[object]]] = []
        self._nursery: trio.Nursery | None = None

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        raise TypeError("a scheduler cannot be copied or pickled: it runs what it was given once")

    def add(self, function: Callable[[], Awaitable[object]]) -> None:
        """Run an async function in a task of its own, when the scheduler runs. A plain call.

        What it raises comes out of ``run``, in a group; so does a ``RuntimeError`` if it ends with
        a cancel scope left open. Source: Pluto's ``scheduler.add``.
        """
        if not callable(function):
            raise TypeError(f"a scheduler runs async functions, not {shown(function)}")
        if self._nursery is not None:
            self._nursery.start_soon(isolated, function, name=function)
        else:
            self._waiting.append(function)

    def run(self) -> Done:
        """Run until everything that was added has ended; servers end by their listener's ``close``.

        Awaited inside Trio; outside it runs Trio, in this thread, until a Ctrl-C. Raises
        ``RuntimeError`` if it is running already. Source: Pluto's ``scheduler.run``.
        """
        if current_run() is not None:
            return cast("Done", self._run_all())
        return cast("Done", run_trio(self._run_all))

    async def _run_all(self) -> None:
        if self._nursery is not None:
            raise RuntimeError("this scheduler is running already")
        try:
            async with trio.open_nursery() as self._nursery:
                while self._waiting:
                    function = self._waiting.pop(0)
                    self._nursery.start_soon(isolated, function, name=function)
        finally:
            self._nursery = None
