"""Pluto's scheduler: add, addloop, run, yieldfunc, errorfunc, and the coroutines that they run."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import sys
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from helpers.pluto import Thread, both_sides, got, in_thread, inside, run_program
from trisock.pluto import coroutine, scheduler

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


class HostileError(Exception):
    """Raises an exception when it is compared, hashed, tested for truth or printed."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __bool__(self) -> bool:
        raise RuntimeError("tested for truth")

    def __str__(self) -> str:
        raise RuntimeError("printed")


def failing(error: BaseException) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail


# ---- add ----


@both_sides
async def test_add_returns_the_coroutine_and_starts_it_in_run() -> None:
    sched = scheduler()
    order: list[object] = []
    added = sched.add(lambda: order.append("started"))
    assert isinstance(added, coroutine)
    assert order == []
    await got(sched.run())
    assert order == ["started"]


@both_sides
async def test_add_in_a_running_scheduler_starts_the_function_at_the_next_checkpoint() -> None:
    sched = scheduler()
    order: list[str] = []

    async def outer() -> None:
        sched.add(lambda: order.append("inner"))
        order.append("outer")
        for _ in range(2):
            await trio.lowlevel.checkpoint()
        order.append("outer again")

    sched.add(outer)
    await got(sched.run())
    assert order == ["outer", "inner", "outer again"]


@both_sides
async def test_add_accepts_a_coroutine_once() -> None:
    sched = scheduler()
    order: list[str] = []
    made = coroutine(lambda: order.append("ran"))
    assert sched.add(made) is made
    with pytest.raises(RuntimeError, match="already added"):
        sched.add(made)
    await got(sched.run())
    with pytest.raises(RuntimeError, match="already added"):
        scheduler().add(made)
    assert order == ["ran"]


@pytest.mark.parametrize("mistake", [None, 5, "a function", ["a function"]])
def test_add_and_addloop_raise_type_error_for_anything_but_a_function(mistake: Any) -> None:
    sched = scheduler()
    for add in (sched.add, sched.addloop):
        with pytest.raises(TypeError, match="a scheduler runs functions, not"):
            add(mistake)
    with pytest.raises(TypeError, match="a scheduler runs functions, not a coroutine"):
        sched.addloop(coroutine(print))  # type: ignore[arg-type]
    sched.run()


async def test_add_in_another_thread_raises_runtime_error_while_the_scheduler_runs() -> None:
    sched = scheduler()

    async def try_elsewhere() -> None:
        def use() -> None:
            for change in (sched.add, sched.addloop):
                with pytest.raises(RuntimeError, match="running elsewhere"):
                    change(print)
            with pytest.raises(RuntimeError, match="running elsewhere"):
                sched.yieldfunc = print

        await in_thread(use)

    sched.add(try_elsewhere)
    await sched.run()


# ---- coroutine.close ----


@both_sides
async def test_close_ends_a_running_coroutine_and_no_other() -> None:
    sched = scheduler()
    order: list[str] = []

    async def closed() -> None:
        try:
            await trio.sleep_forever()
        finally:
            order.append("closed")

    async def closer() -> None:
        await trio.testing.wait_all_tasks_blocked()
        assert added.close() is None  # type: ignore[func-returns-value]
        await trio.testing.wait_all_tasks_blocked()
        order.append("closer")

    added = sched.add(closed)
    sched.add(closer)
    await got(sched.run())
    assert order == ["closed", "closer"]
    added.close()  # a second close does nothing


@both_sides
async def test_a_coroutine_that_is_closed_before_run_never_starts() -> None:
    sched = scheduler()
    order: list[str] = []
    sched.add(lambda: order.append("one")).close()
    sched.add(lambda: order.append("two"))
    await got(sched.run())
    assert order == ["two"]


def test_close_works_in_another_thread() -> None:
    sched = scheduler()
    added = sched.add(trio.sleep_forever)

    async def close_elsewhere() -> None:
        await in_thread(added.close)

    sched.add(close_elsewhere)
    sched.run()
    Thread(added.close).result()  # the run has ended: nothing is left to close


@both_sides
async def test_a_coroutine_can_close_itself() -> None:
    sched = scheduler()
    order: list[str] = []

    async def close_itself() -> None:
        added.close()
        order.append("still here")
        await trio.lowlevel.checkpoint()
        order.append("not reached")

    added = sched.add(close_itself)
    await got(sched.run())
    assert order == ["still here"]


def test_coroutines_refuse_to_be_copied() -> None:
    with pytest.raises(TypeError, match="cannot be copied or pickled"):
        copy.copy(scheduler().add(print))


def test_a_dropped_scheduler_frees_its_coroutines_at_once() -> None:
    gc.disable()
    try:
        sched = scheduler()
        refs = [weakref.ref(each) for each in (sched.add(print), sched.addloop(print))]
        del sched
        assert [ref() for ref in refs] == [None, None]
    finally:
        gc.enable()


# ---- addloop ----


@both_sides
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_addloop_calls_the_function_until_it_returns_false(kind: str) -> None:
    sched = scheduler()
    results = iter([None, True, 0, "", False, True])
    calls: list[object] = []

    def plain() -> object:
        calls.append(next(results))
        return calls[-1]

    async def asynchronous() -> object:
        await trio.lowlevel.checkpoint()
        return plain()

    added = sched.addloop(plain if kind == "plain" else asynchronous)
    assert isinstance(added, coroutine)
    assert calls == []
    await got(sched.run())
    assert calls == [None, True, 0, "", False]


@both_sides
async def test_loops_of_addloop_and_other_tasks_take_turns() -> None:
    sched = scheduler()
    counts = [0, 0]

    def loop(index: int) -> bool:
        counts[index] += 1
        return counts[1 - index] < 3

    sched.addloop(lambda: loop(0))
    sched.addloop(lambda: loop(1))
    await got(sched.run())
    assert max(counts) <= 4


async def test_addloop_waits_a_millisecond_between_two_calls(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sched = scheduler()
    times: list[float] = []

    def loop() -> bool:
        times.append(trio.current_time())
        return len(times) < 4

    sched.addloop(loop)
    await sched.run()
    assert times == pytest.approx([times[0] + 0.001 * number for number in range(4)])


@both_sides
async def test_an_error_in_a_loop_of_addloop_ends_run() -> None:
    sched = scheduler()
    sched.addloop(failing(ValueError("a mistake")))
    with pytest.raises(ValueError, match="a mistake"):
        await got(sched.run())


@both_sides
async def test_close_ends_a_loop_of_addloop() -> None:
    sched = scheduler()
    calls: list[int] = []

    def loop() -> None:
        calls.append(len(calls))
        if len(calls) == 3:
            added.close()

    added = sched.addloop(loop)
    await got(sched.run())
    assert calls == [0, 1, 2]


# ---- run ----


@both_sides
async def test_run_raises_the_error_of_a_coroutine_and_cancels_the_others() -> None:
    sched = scheduler()
    error = ValueError("a mistake")
    order: list[str] = []

    async def other() -> None:
        try:
            await trio.sleep_forever()
        finally:
            order.append("cancelled")

    async def fail() -> None:
        await trio.testing.wait_all_tasks_blocked()
        raise error

    sched.add(other)
    sched.add(fail)
    with pytest.raises(ValueError, match="a mistake") as caught:
        await got(sched.run())
    assert caught.value is error
    assert order == ["cancelled"]


@both_sides
@pytest.mark.parametrize("how", ["finished", "failed"])
async def test_run_again_runs_what_was_added_since(how: str) -> None:
    sched = scheduler()
    order: list[str] = []

    async def wait() -> None:
        order.append("first")
        if how == "failed":
            await trio.sleep_forever()

    sched.add(wait)
    if how == "failed":
        sched.add(failing(ValueError("a mistake")))
    with (
        pytest.raises(ValueError, match="a mistake")
        if how == "failed"
        else contextlib.nullcontext()
    ):
        await got(sched.run())
    sched.add(lambda: order.append("second"))
    await got(sched.run())
    await got(sched.run())  # there is nothing left to run
    assert order[-1] == "second"
    assert order.count("first") <= 1


@both_sides
async def test_run_raises_the_first_error_and_logs_later_ones(
    caplog: pytest.LogCaptureFixture,
) -> None:
    sched = scheduler()

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise KeyError("another mistake")

    async def fail() -> None:
        await trio.testing.wait_all_tasks_blocked()
        raise ValueError("a mistake")

    sched.add(fail_when_cancelled)
    sched.add(fail)
    with pytest.raises(ValueError, match="a mistake"):
        await got(sched.run())
    (record,) = [each for each in caplog.records if each.name == "trisock.pluto"]
    assert record.levelno == logging.ERROR
    assert isinstance(record.exc_info[1], KeyError)


@both_sides
async def test_run_raises_a_group_unchanged() -> None:
    sched = scheduler()
    group = BaseExceptionGroup("a group", [ValueError("one"), KeyError("two")])
    sched.add(failing(group))
    with pytest.raises(BaseExceptionGroup) as caught:
        await got(sched.run())
    assert caught.value is group


@both_sides
@pytest.mark.parametrize("error", [HostileError(), SystemExit(3), KeyboardInterrupt()])
async def test_run_raises_any_exception_of_a_coroutine(error: BaseException) -> None:
    sched = scheduler()
    sched.errorfunc = None
    sched.add(trio.sleep_forever)
    sched.add(failing(error))
    with pytest.raises(type(error)) as caught:
        await got(sched.run())
    assert caught.value is error or isinstance(error, KeyboardInterrupt)
    await got(sched.run())  # the scheduler can run again


@both_sides
async def test_run_raises_the_error_and_the_interrupt_that_came_with_it() -> None:
    sched = scheduler()

    async def fail() -> None:
        raise BaseExceptionGroup("both", [ValueError("a mistake"), SystemExit(3)])

    sched.add(fail)
    with pytest.raises(SystemExit):
        await got(sched.run())


async def test_a_cancelled_run_raises_the_error_that_came_with_the_cancellation() -> None:
    sched = scheduler()

    async def fail_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise ValueError("a mistake")

    sched.add(fail_when_cancelled)
    with pytest.RaisesGroup(ValueError, flatten_subgroups=True):
        with trio.CancelScope() as scope:
            scope.cancel()
            await sched.run()


async def test_a_cancelled_run_ends_and_can_run_again() -> None:
    sched = scheduler()
    sched.add(trio.sleep_forever)
    sched.yieldfunc = trio.lowlevel.checkpoint
    with trio.CancelScope() as scope:
        scope.cancel()
        await sched.run()
    assert scope.cancelled_caught
    await sched.run()


def test_sys_exit_in_a_coroutine_ends_the_program_with_its_status() -> None:
    run_program(
        """
        import sys
        sched = scheduler()
        sched.add(sys.exit)
        sched.run()
        print("not reached")
        """
    )


# ---- yieldfunc ----


@both_sides
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_yieldfunc_is_called_between_two_rounds(kind: str) -> None:
    sched = scheduler()
    order: list[str] = []

    def plain() -> None:
        order.append("yield")

    async def asynchronous() -> None:
        await trio.lowlevel.checkpoint()
        order.append("yield")

    sched.yieldfunc = plain if kind == "plain" else asynchronous
    for name in ("a", "b"):

        def loop(name: str = name) -> bool:
            order.append(name)
            return order.count(name) < 3

        sched.addloop(loop)
    await got(sched.run())
    assert [sorted(order[at : at + 2]) for at in (0, 3, 6)] == [["a", "b"]] * 3
    assert [*order[2::3]] == ["yield", "yield"]
    assert len(order) == 8


@both_sides
async def test_yieldfunc_is_none_by_default_and_may_be_set_at_any_time() -> None:
    sched = scheduler()
    assert sched.yieldfunc is None
    calls: list[str] = []

    def loop() -> bool:
        if sched.yieldfunc is None:
            sched.yieldfunc = yieldfunc
        return len(calls) < 6

    def yieldfunc() -> None:
        calls.append("yield")
        if len(calls) == 3:
            sched.yieldfunc = None

    sched.addloop(loop)
    await got(sched.run())
    assert len(calls) == 6


@both_sides
async def test_run_ends_with_the_last_coroutine_and_not_after_yieldfunc() -> None:
    sched = scheduler()
    sched.yieldfunc = trio.sleep_forever

    async def finish() -> None:
        await trio.testing.wait_all_tasks_blocked()

    sched.add(finish)
    await got(sched.run())


@both_sides
async def test_an_error_in_yieldfunc_ends_run() -> None:
    sched = scheduler()
    errors: list[object] = []
    sched.errorfunc = errors.append  # it is for the errors of coroutines only
    sched.yieldfunc = failing(ValueError("a mistake"))
    sched.add(trio.sleep_forever)
    with pytest.raises(ValueError, match="a mistake"):
        await got(sched.run())
    assert errors == []


@pytest.mark.parametrize("name", ["yieldfunc", "errorfunc"])
def test_yieldfunc_and_errorfunc_raise_type_error_for_anything_but_a_function(name: str) -> None:
    sched = scheduler()
    with pytest.raises(TypeError, match=f"{name} must be a function or None, not 5"):
        setattr(sched, name, 5)
    assert getattr(sched, name) is None


# ---- errorfunc ----


@both_sides
@pytest.mark.parametrize("kind", ["plain", "async"])
async def test_errorfunc_gets_the_error_and_the_other_coroutines_go_on(kind: str) -> None:
    sched = scheduler()
    assert sched.errorfunc is None
    order: list[object] = []
    error = HostileError()

    async def asynchronous(exc: Exception) -> None:
        await trio.lowlevel.checkpoint()
        order.append(exc)

    async def other() -> None:
        while not order:
            await trio.lowlevel.checkpoint()
        order.append("went on")

    sched.errorfunc = order.append if kind == "plain" else asynchronous
    sched.add(failing(error))
    sched.add(other)
    await got(sched.run())
    assert order[0] is error
    assert order[1] == "went on"
    assert len(order) == 2


@both_sides
async def test_errorfunc_gets_the_error_of_a_loop_which_then_ends() -> None:
    sched = scheduler()
    errors: list[object] = []
    sched.errorfunc = errors.append
    sched.addloop(failing(ValueError("a mistake")))
    await got(sched.run())
    assert [str(each) for each in errors] == ["a mistake"]


@both_sides
async def test_errorfunc_gets_a_runtime_error_for_a_cancel_scope_left_open() -> None:
    sched = scheduler()
    errors: list[object] = []
    sched.errorfunc = errors.append

    async def leave_open() -> None:
        trio.CancelScope(deadline=-1).__enter__()
        await trio.lowlevel.checkpoint()

    sched.add(leave_open)
    sched.add(trio.lowlevel.checkpoint)
    await got(sched.run())
    (error,) = errors
    assert isinstance(error, RuntimeError)


@both_sides
async def test_an_error_in_errorfunc_ends_run() -> None:
    sched = scheduler()

    def errorfunc(exc: Exception) -> None:
        raise KeyError("in errorfunc") from exc

    sched.errorfunc = errorfunc
    sched.add(failing(ValueError("a mistake")))
    sched.add(trio.sleep_forever)
    with pytest.raises(KeyError, match="in errorfunc") as caught:
        await got(sched.run())
    assert isinstance(caught.value.__cause__, ValueError)


@both_sides
async def test_errorfunc_does_not_get_a_cancellation_or_an_exit() -> None:
    sched = scheduler()
    errors: list[object] = []
    sched.errorfunc = errors.append
    sched.add(trio.sleep_forever).close()
    sched.add(failing(SystemExit(3)))
    with pytest.raises(SystemExit):
        await got(sched.run())
    if inside():
        sched.add(trio.sleep_forever)
        with trio.CancelScope() as scope:
            scope.cancel()
            await sched.run()
    assert errors == []
