"""What ``socket.bind`` returns: a coroutine that accepts clients and runs their handlers."""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import trio

import trisock

from .._guard import isolated, split_errors
from .blocking import describe
from .scheduler import call, coroutine, scheduler


class server(coroutine):  # noqa: N801 (named like Pluto's classes)
    """The coroutine of ``bind``. It runs each client's handler in a separate task.

    If it never runs, garbage collection closes its port.
    """

    def __init__(
        self,
        listening: trisock.Listener,
        handler: Callable[[Any], object],
        wrap: Callable[[trisock.Socket], object],
    ) -> None:
        super().__init__(handler)
        self._listening = listening
        self._wrap = wrap
        self._started = False
        self._server: trisock.Server | None = None
        weakref.finalize(self, listening.abort)

    def __repr__(self) -> str:
        return f"<trisock.pluto.server {self._listening!r}>"

    @property
    def port(self) -> int:
        """The local port, which is useful after ``bind`` with port 0.

        Pluto has neither this attribute nor port 0.
        """
        return self._listening.port

    def close(self) -> None:
        """Stop listening. The server ends when its last handler has ended. Synchronous.

        This works before, during and after the scheduler's ``run``. In another thread than the
        scheduler's, it returns before the port is closed. Source: Lua's ``coroutine.close``.
        """
        super().close()

    def _end(self) -> None:
        if self._server is not None:
            self._server.stop(grace=None)
        elif self._started:
            return  # trisock.bind is running, and _work calls this again; or the server has ended
        self._listening.abort()

    async def _work(self, sched: scheduler) -> None:
        self._started = True
        try:
            async with trio.open_nursery() as nursery:
                handle = functools.partial(self._handle, sched)
                self._server = await trisock.bind(nursery, self._listening, handle)
                if self._closed:
                    self._end()
        finally:
            self._server = None

    async def _handle(self, sched: scheduler, sock: trisock.Socket) -> None:
        try:
            await isolated(functools.partial(self._call_handler, sock))
        except BaseException as exc:
            errors, _ = split_errors(exc)
            if errors is not None and sched.errorfunc is not None:
                try:
                    await isolated(functools.partial(call, sched.errorfunc, errors))
                finally:
                    del errors  # its traceback refers to this frame
            raise

    async def _call_handler(self, sock: trisock.Socket) -> None:
        awaitable = self._function(self._wrap(sock))
        if not inspect.isawaitable(awaitable):  # a plain function: it has awaited nothing
            raise TypeError(
                "a handler must be an async function: "
                f"{describe(self._function)} returned nothing to await"
            )
        await awaitable
