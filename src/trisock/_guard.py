"""Calls into the program's own code, and what it raises.

Handlers, callbacks and log filters may do anything. So nothing here hashes or compares an
exception, or calls a method of its class: a class of the program's may override each of them.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import TypeVar

import trio

if sys.version_info < (3, 11):  # pragma: no cover (one of the two on each version)
    from exceptiongroup import BaseExceptionGroup  # which Trio needs as well

T = TypeVar("T")


async def isolated(function: Callable[[], Awaitable[T]]) -> T:
    """Await the program's code in a cancel scope of its own.

    A cancel scope that the code leaves open (a timeout inside an async generator) would cancel the
    task of the library. Trio notices it when the outer scope ends, and raises ``RuntimeError``.
    """
    with trio.CancelScope():
        return await function()


def leaves(exc: BaseException) -> list[BaseException]:
    """Return the exceptions of a group, and of the groups in it; of anything else, itself."""
    found: list[BaseException] = []
    waiting = [exc]
    while waiting:
        each = waiting.pop()
        if issubclass(type(each), BaseExceptionGroup):
            # Not each.exceptions, which the class may have replaced.
            waiting.extend(reversed(BaseExceptionGroup.exceptions.__get__(each)))
        else:
            found.append(each)
    return found


def is_error(exc: BaseException) -> bool:
    """Return whether it is an ``Exception``, and not ``Cancelled``, ``KeyboardInterrupt``, ..."""
    return issubclass(type(exc), Exception)


def log(
    logger: logging.Logger,
    level: int,
    message: str,
    *args: object,
    exc_info: BaseException | None = None,
    extra: dict[str, object] | None = None,
) -> None:
    """Log, and never raise: what a filter or handler of the program's raises goes to stderr."""
    try:
        # A tuple: logging asks a bare exception for its __traceback__, and for its truth.
        info = None if exc_info is None else (type(exc_info), exc_info, exc_info.__traceback__)
        logger.log(level, message, *args, exc_info=info, extra=extra, stacklevel=2)
    except Exception as failure:
        with contextlib.suppress(Exception):
            print(f"logging on {logger.name!r} has failed:", file=sys.stderr)
            traceback.print_exception(type(failure), failure, failure.__traceback__)
