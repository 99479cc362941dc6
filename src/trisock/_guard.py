"""Call the user's code, and handle its exceptions.

Handlers, callbacks and log filters may do anything. So this module never hashes or compares an
exception, and never relies on a method of its class, because a user's class may override any
method.
"""

from __future__ import annotations

import contextlib
import logging
import math
import sys
import traceback
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import trio

from ._text import printable

if sys.version_info < (3, 11):  # pragma: no cover (each version runs one of the two branches)
    from exceptiongroup import BaseExceptionGroup  # installed with Trio, which depends on it

T = TypeVar("T")


async def isolated(function: Callable[[], Awaitable[T]]) -> T:
    """Await the user's code in its own cancel scope.

    If the code leaves a cancel scope open (a timeout inside an async generator), that scope could
    cancel our task later. Trio detects the open scope when our scope around the code exits, and
    raises ``RuntimeError``. Also raises ``RuntimeError`` for a ``Cancelled`` that no enclosing
    scope requested, because such a ``Cancelled`` would end the nursery silently.
    ``KeyboardInterrupt`` and the like always propagate.
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
        # This is Trio's error for the open scope. Its context is the user code's exception.
        if failure is not None and _contains(failure, _must_propagate):
            raise_again(failure)
        raise
    finally:
        del failure  # its traceback refers to this frame
    raise AssertionError("no code cancels this scope")  # pragma: no cover


def stray_cancelled(exc: BaseException) -> RuntimeError | None:
    """If ``Cancelled`` was raised but nothing was cancelled, return an error that explains this.

    Returns ``None`` for any other exception. Call this only where all enclosing cancel scopes are
    the library's own.
    """
    if (
        not _contains(exc, _is_cancelled)
        or _contains(exc, _must_propagate)
        or trio.current_effective_deadline() == -math.inf
    ):
        return None
    error = RuntimeError(
        "trio.Cancelled was raised, but no scope around this call was cancelled: a cancel scope "
        "was left open, such as a timeout inside an async generator, or the Cancelled of another "
        "scope was stored and raised again"
    )
    error.__cause__ = exc
    return error


def leaves(exc: BaseException) -> list[BaseException]:
    """Return all exceptions in a group and its nested groups, or ``[exc]`` if it is not a group."""
    found: list[BaseException] = []
    pending = [exc]
    while pending:
        each = pending.pop()
        if issubclass(type(each), BaseExceptionGroup):
            pending.extend(reversed(_exceptions(each)))
        else:
            found.append(each)
    return found


class bare:  # noqa: N801 (used like a function)
    """If a group with only one exception is raised, raise that exception without the group.

    This is for a call with an internal nursery. The caller then gets a bare ``KeyboardInterrupt``
    on Ctrl-C, for example, no matter where the call was waiting. A ``Cancelled`` in the group does
    not count: our tasks also raise it if the caller is cancelled at this moment.
    """

    # Not contextlib.contextmanager: the frame of its __exit__ holds the group, which would be
    # garbage in a cycle with the traceback.

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, exc: BaseException | None, tb: object) -> None:
        if exc is None or not issubclass(type(exc), BaseExceptionGroup):
            return
        alone = _alone(leaves(exc))
        if alone is None:
            return
        try:
            raise_again(alone)
        finally:
            del exc, tb, alone  # the traceback refers to this frame


def _alone(exceptions: list[BaseException]) -> BaseException | None:
    """Return the one exception that counts, or ``None`` if there are several."""
    others = [each for each in exceptions if not _is_cancelled(each)]
    if len(others) > 1 and not all(issubclass(type(each), KeyboardInterrupt) for each in others):
        return None
    return (others or exceptions)[0]


def raise_again(exc: BaseException) -> NoReturn:
    """Raise an exception of the user, and keep its context and its cause.

    For example, while we handle a group that contains the exception: a plain ``raise`` would set
    the group as the context, which loses the old context and makes a cycle. ``from None`` would
    lose the cause.
    """
    context = _attribute(exc, "__context__")
    try:
        raise exc
    finally:
        BaseException.__dict__["__context__"].__set__(exc, context)
        del exc, context  # the traceback refers to this frame


def is_error(exc: BaseException) -> bool:
    """Return whether this is an ``Exception``, unlike ``Cancelled`` or ``KeyboardInterrupt``."""
    return issubclass(type(exc), Exception)


def split_errors(exc: BaseException) -> tuple[BaseException | None, BaseException | None]:
    """Return a pair: the ``Exception``s, to be logged, and all others, to be raised again.

    If a group contains both kinds, each result is a flat group. But if only one exception is to be
    raised again, the second result is this exception itself. We do not call the group's ``split``
    method, because a user's class may override it.
    """
    each = leaves(exc)
    errors = [leaf for leaf in each if is_error(leaf)]
    others = [leaf for leaf in each if not is_error(leaf)]
    if not others:
        return exc, None
    if not errors:
        return None, exc
    tb = _attribute(exc, "__traceback__")
    return (
        BaseExceptionGroup("errors raised along with other exceptions", errors).with_traceback(tb),
        _regroup(others, tb),
    )


def text(exc: BaseException) -> str:
    """Return the message of an exception, or the name of its class, as one line."""
    try:
        return printable(str(exc)) or _name(exc)
    except Exception:
        return _name(exc)


def is_logged(logger: logging.Logger, level: int) -> bool:
    """Return whether a logger is enabled for a level, so that callers can skip the formatting."""
    try:
        return logger.isEnabledFor(level)
    except Exception:  # the logger's class may be the user's; log() reports the failure
        return True


def log(
    logger: logging.Logger,
    level: int,
    message: str,
    *args: object,
    exc_info: BaseException | None = None,
    extra: dict[str, object] | None = None,
) -> None:
    """Log, and never raise.

    A filter may raise, a handler may fail to open its file, and ``StreamHandler`` re-raises
    ``RecursionError``. If logging fails, print the message to stderr, with the tracebacks of
    ``exc_info`` and of the failure. If an exception cannot be formatted, logging would drop the
    record, so we log a replacement for the exception.
    """
    shown: BaseException | None = None
    try:
        info = None
        if exc_info is not None:
            shown = _loggable(exc_info)
            # Pass a tuple: logging would use a bare exception's __bool__ and __traceback__, which a
            # user's class may override.
            info = (type(shown), shown, _attribute(shown, "__traceback__"))
        logger.log(level, message, *args, exc_info=info, extra=extra, stacklevel=2)
    except Exception as failure:
        # Do not use print(file=sys.stderr): if sys.stderr is None, print writes to stdout.
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


def _must_propagate(exc: BaseException) -> bool:
    return not is_error(exc) and not _is_cancelled(exc)


def _contains(exc: BaseException, condition: Callable[[BaseException], bool]) -> bool:
    return any(condition(each) for each in leaves(exc))


def _attribute(exc: BaseException, name: str) -> Any:
    """Return an attribute as defined by ``BaseException``, even if the class overrides it."""
    return BaseException.__dict__[name].__get__(exc)


def _exceptions(group: BaseException) -> tuple[BaseException, ...]:
    found: tuple[BaseException, ...]
    if sys.version_info >= (3, 11):
        found = BaseExceptionGroup.__dict__["exceptions"].__get__(group)
    else:  # pragma: no cover (each version runs one of the two branches)
        found = object.__getattribute__(group, "_exceptions")
    return found


def _regroup(others: list[BaseException], tb: Any) -> BaseException:
    if len(others) > 1:
        with contextlib.suppress(Exception):  # a user's class may make this fail
            message = "exceptions raised along with errors"
            return BaseExceptionGroup(message, others).with_traceback(tb)
    return others[0]


def _name(exc: BaseException) -> str:
    # Do not use type(exc).__qualname__: a metaclass may override it.
    return printable(str(type.__dict__["__qualname__"].__get__(type(exc))))


class _NotPrintable(Exception):
    """Logged in place of an exception that cannot be formatted."""


def _loggable(exc: BaseException, *, nested: bool = False) -> BaseException:
    """Return the exception, or a loggable replacement with the same traceback.

    ``nested``: whether ``exc`` is in a group, or is the cause or the context of another exception.
    """
    try:
        _format(_caused_by(exc) if nested else exc)
    except Exception as failure:
        why = text(failure)
    else:
        return exc
    tb = _attribute(exc, "__traceback__")
    found = leaves(exc)
    if len(found) > 1 or found[0] is not exc:
        loggable = [_loggable(each, nested=True) for each in found]
        return BaseExceptionGroup(f"a {_name(exc)}", loggable).with_traceback(tb)
    shown = _NotPrintable(f"{_name(exc)}: {text(exc)} (its traceback cannot be printed: {why})")
    for name in ("__context__", "__cause__"):
        value = _attribute(exc, name)
        if value is not None:
            with contextlib.suppress(Exception):
                _format(_caused_by(value))
                setattr(shown, name, value)
    return shown.with_traceback(tb)


def _caused_by(exc: BaseException) -> Exception:
    probe = Exception()
    probe.__cause__ = exc
    return probe


def _format(exc: BaseException) -> list[str]:
    return traceback.format_exception(type(exc), exc, _attribute(exc, "__traceback__"))
