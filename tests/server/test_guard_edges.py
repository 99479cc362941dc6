"""User code that raises exception groups, leaves cancel scopes open, or has failing loggers."""

from __future__ import annotations

import contextlib
import gc
import logging
import sys
import weakref

import pytest
import trio

from trisock import _guard
from trisock._guard import split_errors

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
    """It can have a weak reference."""


def test_an_exception_out_of_its_group_keeps_its_context_and_is_no_garbage() -> None:
    def fail() -> weakref.ref[Interrupt]:
        interrupt, context = Interrupt(), ValueError()
        interrupt.__context__ = context
        raised = weakref.ref(interrupt)
        with contextlib.suppress(Interrupt), _guard.bare():
            raise BaseExceptionGroup("group", [BaseExceptionGroup("nested", [interrupt])])
        assert interrupt.__context__ is context
        del interrupt
        return raised

    gc.disable()
    try:
        assert fail()() is None
    finally:
        gc.enable()


def test_exceptions_that_all_count_stay_in_their_group() -> None:
    group = BaseExceptionGroup("group", [KeyboardInterrupt(), OSError()])
    with pytest.raises(BaseExceptionGroup) as caught, _guard.bare():
        raise group
    assert caught.value is group


def test_two_interrupts_are_one() -> None:
    first, second = KeyboardInterrupt(), KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt) as caught, _guard.bare():
        raise BaseExceptionGroup("group", [first, second])
    assert caught.value is first
