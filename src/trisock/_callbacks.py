"""Callbacks, plain or async, called in the background: one after the other, whatever they raise."""

from __future__ import annotations

import inspect
import logging
import sys
from collections import deque
from collections.abc import Callable
from functools import partial

import trio

if sys.version_info < (3, 11):  # pragma: no cover (one of the two on each version)
    from exceptiongroup import BaseExceptionGroup  # which Trio needs as well


class CallbackQueue:
    """Callbacks that are called in order, in a task that is there only while there are any.

    What one raises as ``Exception``, also out of a group, is logged and ends nothing.

    Invariant: there is a task that calls them exactly while ``_calling``.
    """

    def __init__(self, owner: object, nursery: trio.Nursery, logger: logging.Logger) -> None:
        self._owner = owner
        self._nursery = nursery
        self._logger = logger
        self._due: deque[Callable[[], object]] = deque()
        self._calling = False

    @property
    def put(self) -> Callable[..., None]:
        """Call a function (with arguments), behind those that are due: good until ``clear``."""
        return partial(self._put, self._due)

    def _put(
        self, due: deque[Callable[[], object]], callback: Callable[..., object], *args: object
    ) -> None:
        due.append(partial(callback, *args))
        if not self._calling:
            self._calling = True
            self._nursery.start_soon(self._call_all)

    def clear(self) -> None:
        """Drop those that are due, and what a ``put`` from before brings. One that runs goes on."""
        self._due = deque()

    async def _call_all(self) -> None:
        try:
            while self._due:
                await trio.lowlevel.checkpoint_if_cancelled()  # a plain function would not look
                await self._call(self._due.popleft())
        finally:
            self._calling = False

    async def _call(self, callback: Callable[[], object]) -> None:
        try:
            waiting = callback()
            if inspect.isawaitable(waiting):
                await waiting
        except Exception:
            self._logger.exception("a callback of %r has failed", self._owner)
        except BaseExceptionGroup as group:
            failed, rest = group.split(Exception)
            if failed is not None:
                self._logger.error("a callback of %r has failed", self._owner, exc_info=failed)
            if rest is not None:
                raise rest from None
