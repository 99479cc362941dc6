"""background_tasks: a nursery that is cancelled when its block ends, and wraps no exception."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import trio


@contextlib.asynccontextmanager
async def background_tasks() -> AsyncIterator[trio.Nursery]:
    """Open a nursery for a block. The end of the block cancels the tasks.

    An exception of the block is raised as it is. A plain nursery would put it into a group.
    """
    failure: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield nursery
        except BaseException as exc:
            failure = exc
        nursery.cancel_scope.cancel()
    if failure is not None:
        try:
            raise failure
        finally:
            del failure  # its traceback refers to this frame
