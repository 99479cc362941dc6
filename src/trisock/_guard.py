"""Calls into the program's own code, and what it raises.

Handlers, callbacks and log filters may do anything. So nothing here hashes or compares an
exception, or calls a method of its class: a class of the program's may override each of them.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import trio

from ._text import printable

if sys.version_info < (3, 11):  # pragma: no cover (one of the two on each version)
    from exceptiongroup import BaseExceptionGroup  # which Trio needs as well

T = TypeVar("T")


async def isolated(function: Callable[[], Awaitable[T]]) -> T:
    """Await the program's code in a cancel scope of its own.

    A cancel scope that the code leaves open (a timeout inside an async generator) would cancel the
    task of the library. Trio notices it when the outer scope ends, and raises ``RuntimeError``.
    A ``Cancelled`` that no enclosing scope asked for would end the nursery without a trace. It
    becomes a ``RuntimeError`` too. ``KeyboardInterrupt`` and its like always go on.
    """
    failure: BaseException | None = None
    try:
        with trio.CancelScope():
            try:
                return await function()
            except BaseException as exc:
                failure = exc
                raise
    except BaseException as exc:
        if exc is failure:
            stray = stray_cancelled(exc)
            if stray is not None:
                raise stray from exc
            raise
        # Trio says that a scope was left open; its error has the code's own as the context.
        if failure is not None and _holds(failure, _must_go_on):
            raise failure from None
        raise
    finally:
        del failure  # its traceback refers to this frame
    raise AssertionError("nobody cancels that scope")  # pragma: no cover


def stray_cancelled(exc: BaseException) -> RuntimeError | None:
    """Return the error that names the mistake, if ``Cancelled`` came where nothing was cancelled.

    ``None`` for any other exception. To be called in a task, or a scope, that only the library's
    own cancel scopes surround.
    """
    if (
        not _holds(exc, _is_cancelled)
        or _holds(exc, _must_go_on)
        or trio.current_effective_deadline() == -math.inf
    ):
        return None
    error = RuntimeError(
        "trio.Cancelled was raised, but nothing around this call was cancelled: a cancel scope "
        "was left open, or an exception of another scope was kept and raised again"
    )
    error.__cause__ = exc
    return error


def leaves(exc: BaseException) -> list[BaseException]:
    """Return the exceptions of a group, and of the groups in it; of anything else, itself."""
    found: list[BaseException] = []
    waiting = [exc]
    while waiting:
        each = waiting.pop()
        if issubclass(type(each), BaseExceptionGroup):
            waiting.extend(reversed(_exceptions(each)))
        else:
            found.append(each)
    return found


def is_error(exc: BaseException) -> bool:
    """Return whether it is an ``Exception``, and not ``Cancelled``, ``KeyboardInterrupt``, ..."""
    return issubclass(type(exc), Exception)


def parts(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Split into what is an ``Exception``, to be logged, and what is not, to be raised again.

    A group of both kinds becomes two flat ones: ``split`` of its class may do anything.
    """
    each = leaves(exc)
    errors = [leaf for leaf in each if is_error(leaf)]
    others = [leaf for leaf in each if not is_error(leaf)]
    if not others:
        return exc, None
    if not errors:
        return None, exc
    where = _attribute(exc, "__traceback__")
    return (
        BaseExceptionGroup("raised along with others", errors).with_traceback(where),
        _together(others, where),
    )


def text(exc: BaseException) -> str:
    """Return what an exception says, or the name of its class, as one line."""
    try:
        return printable(str(exc)) or _name(exc)
    except Exception:
        return _name(exc)


def is_logged(logger: logging.Logger, level: int) -> bool:
    """Return whether a logger takes this level: where not, nothing need be formatted."""
    try:
        return logger.isEnabledFor(level)
    except Exception:  # a class of the program's; log reports it
        return True


def log(
    logger: logging.Logger,
    level: int,
    message: str,
    *args: object,
    exc_info: BaseException | None = None,
    extra: dict[str, object] | None = None,
) -> None:
    """Log, and never raise. Where logging fails, stderr gets the message and both tracebacks.

    A filter may raise, a handler may fail to open its file, and ``StreamHandler`` raises a
    ``RecursionError`` again. An exception that cannot be formatted is replaced by one that can:
    logging would drop the record.
    """
    shown: BaseException | None = None
    try:
        info = None
        if exc_info is not None:
            shown = _loggable(exc_info)
            # A tuple: logging asks a bare exception for its __traceback__, and for its truth.
            info = (type(shown), shown, _attribute(shown, "__traceback__"))
        logger.log(level, message, *args, exc_info=info, extra=extra, stacklevel=2)
    except Exception as failure:
        # Not print: without a stderr (None) it would write to stdout.
        with contextlib.suppress(Exception):
            lines = [f"logging on {logger.name!r} failed; the message was: {message % args}\n"]
            if shown is not None:
                lines += _format(shown)
            lines += _format(_loggable(failure))
            sys.stderr.write("".join(lines))
            sys.stderr.flush()
    finally:
        del shown


def _is_cancelled(exc: BaseException) -> bool:
    return issubclass(type(exc), trio.Cancelled)


def _must_go_on(exc: BaseException) -> bool:
    return not is_error(exc) and not _is_cancelled(exc)


def _holds(exc: BaseException, condition: Callable[[BaseException], bool]) -> bool:
    return any(condition(each) for each in leaves(exc))


def _attribute(exc: BaseException, name: str) -> Any:
    """Return an attribute that every exception has, past whatever its class has in place of it."""
    return BaseException.__dict__[name].__get__(exc)


def _exceptions(group: BaseException) -> tuple[BaseException, ...]:
    found: tuple[BaseException, ...]
    if sys.version_info >= (3, 11):
        found = BaseExceptionGroup.__dict__["exceptions"].__get__(group)
    else:  # pragma: no cover (one of the two on each version)
        found = object.__getattribute__(group, "_exceptions")
    return found


def _together(others: list[BaseException], where: Any) -> BaseException:
    if len(others) > 1:
        with contextlib.suppress(Exception):  # a class that lies about itself
            return BaseExceptionGroup("raised along with others", others).with_traceback(where)
    return others[0]


def _name(exc: BaseException) -> str:
    # Not of the class itself, whose metaclass may do anything.
    return printable(str(type.__dict__["__qualname__"].__get__(type(exc))))


class _NotPrintable(Exception):
    """Stands in the log for an exception that cannot be formatted."""


def _loggable(exc: BaseException, *, nested: bool = False) -> BaseException:
    """Return the exception, or what can be logged in its place, with its traceback.

    ``nested``: it is the cause or the context of another one, or in a group.
    """
    try:
        _format(_caused_by(exc) if nested else exc)
    except Exception as failure:
        why = text(failure)
    else:
        return exc
    where = _attribute(exc, "__traceback__")
    found = leaves(exc)
    if len(found) > 1 or found[0] is not exc:
        each_loggable = [_loggable(each, nested=True) for each in found]
        return BaseExceptionGroup(f"a {_name(exc)}", each_loggable).with_traceback(where)
    stand_in = _NotPrintable(f"{_name(exc)}: {text(exc)} (its traceback cannot be printed: {why})")
    for name in ("__context__", "__cause__"):
        value = _attribute(exc, name)
        if value is not None:
            with contextlib.suppress(Exception):
                _format(_caused_by(value))
                setattr(stand_in, name, value)
    return stand_in.with_traceback(where)


def _caused_by(exc: BaseException) -> Exception:
    probe = Exception()
    probe.__cause__ = exc
    return probe


def _format(exc: BaseException) -> list[str]:
    return traceback.format_exception(type(exc), exc, _attribute(exc, "__traceback__"))
