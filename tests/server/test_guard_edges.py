"""User code that raises exception groups, leaves cancel scopes open, or has failing loggers."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import weakref
from collections.abc import Awaitable, Callable

import pytest
import trio

from trisock import Address, Socket, _guard
from trisock._guard import split_errors
from trisock._server.reloading import reload_all
from trisock.testing import Script, serving

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def test_errors_are_split_from_other_exceptions_in_a_group() -> None:
    error, interrupt, leaving = ValueError(), KeyboardInterrupt(), SystemExit()
    errors, others = split_errors(BaseExceptionGroup("mixed", [error, interrupt, leaving]))
    assert isinstance(errors, BaseExceptionGroup)
    assert isinstance(others, BaseExceptionGroup)
    assert errors.exceptions == (error,)
    assert others.exceptions == (interrupt, leaving)


async def test_keyboard_interrupt_propagates_despite_a_scope_left_open() -> None:
    async def leave_one_open() -> None:
        trio.CancelScope().__enter__()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await _guard.isolated(leave_one_open)


def test_a_logger_whose_level_check_fails_is_still_used() -> None:
    class Refusing(logging.Logger):
        def isEnabledFor(self, level: int) -> bool:  # noqa: N802
            raise ValueError("from the logger")

    assert _guard.is_logged(Refusing("refusing"), logging.INFO)


class Unprintable(Exception):
    def __getattribute__(self, name: str) -> object:
        raise ValueError("from the exception")


def test_an_exception_that_cannot_be_printed_keeps_its_cause() -> None:
    cause = ValueError("the cause")
    failure = Unprintable()
    BaseException.__dict__["__cause__"].__set__(failure, cause)
    shown = _guard._loggable(failure)
    assert shown is not failure
    assert shown.__cause__ is cause


class Interrupt(KeyboardInterrupt):
    """An exception that supports weak references."""


def test_an_unwrapped_exception_keeps_its_context_and_leaves_no_garbage() -> None:
    context = ValueError()
    raised: list[weakref.ref[Interrupt]] = []

    def fail() -> None:
        interrupt = Interrupt()  # the group's traceback refers to this variable
        interrupt.__context__ = context
        raised.append(weakref.ref(interrupt))
        raise BaseExceptionGroup("group", [BaseExceptionGroup("nested", [interrupt])])

    gc.disable()
    try:
        with contextlib.suppress(Interrupt), _guard.bare():
            fail()
        assert raised[0]() is None
    finally:
        gc.enable()
    with pytest.raises(Interrupt) as caught, _guard.bare():
        fail()
    assert caught.value.__context__ is context


def test_an_interrupt_and_an_error_stay_in_their_group() -> None:
    group = BaseExceptionGroup("group", [KeyboardInterrupt(), OSError()])
    with pytest.raises(BaseExceptionGroup) as caught, _guard.bare():
        raise group
    assert caught.value is group


def test_two_interrupts_are_raised_as_one() -> None:
    first, second = KeyboardInterrupt(), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught, _guard.bare():
        raise BaseExceptionGroup("group", [first, second])
    assert caught.value is first


def leaving() -> SystemExit:
    """An exception with a cause and a context."""
    failure = SystemExit(3)
    failure.__context__, failure.__cause__ = KeyError("context"), ValueError("cause")
    return failure


async def leave_in_on_reload() -> None:
    def on_reload() -> None:
        raise BaseExceptionGroup("group", [OSError(), leaving()])

    await reload_all([], on_reload)


async def leave_in_a_handler() -> None:
    async def handler(sock: Socket) -> None:
        raise BaseExceptionGroup("group", [OSError(), leaving()])

    async with serving(handler) as s:
        await s.connect()
        await s.server.wait_closed()


async def leave_with_a_scope_left_open() -> None:
    async def leave_one_open() -> None:
        trio.CancelScope().__enter__()
        raise leaving()

    await _guard.isolated(leave_one_open)


async def leave_in_admit() -> None:
    def admit(address: Address) -> bool:
        raise leaving()

    async with serving(Script(), admit=admit) as s:
        await s.connect()
        await s.server.wait_closed()


@pytest.mark.parametrize(
    "leave",
    [leave_in_on_reload, leave_in_a_handler, leave_with_a_scope_left_open, leave_in_admit],
)
async def test_an_exception_that_ends_the_program_keeps_its_cause(
    leave: Callable[[], Awaitable[None]],
) -> None:
    with pytest.raises(BaseException) as caught:  # noqa: PT011
        await leave()
    [failure] = [each for each in _guard.leaves(caught.value) if isinstance(each, SystemExit)]
    assert repr(failure.__cause__) == "ValueError('cause')"
    assert repr(failure.__context__) == "KeyError('context')"
