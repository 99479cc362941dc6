"""Pluto's scheduler while it runs: run, yieldfunc and errorfunc."""

from __future__ import annotations

import contextlib
import logging
import sys

import pytest
import trio
import trio.testing

from helpers.exceptions import HostileError
from helpers.pluto import both_sides, failing, got, inside, run_program
from trisock.pluto import scheduler

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


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
async def test_a_second_run_runs_functions_added_since_the_first(how: str) -> None:
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


def test_sys_exit_in_a_coroutine_ends_the_program_without_a_traceback() -> None:
    out = run_program(
        """
        import sys
        sched = scheduler()
        sched.add(lambda: sys.exit(0))
        sched.run()
        print("not reached")
        """
    )
    assert out == ""


def test_ctrl_c_ends_a_scheduler_in_which_all_tasks_wait() -> None:
    """Trio raises KeyboardInterrupt in the task that called ``run``, in an exception group."""
    out = run_program(
        """
        import os, signal, trio
        async def interrupt():
            await trio.to_thread.run_sync(os.kill, os.getpid(), signal.SIGINT)
            await trio.sleep_forever()
        async def fail_when_cancelled():
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("a mistake")
        sched = scheduler()
        for others in ([], [fail_when_cancelled]):
            for function in (interrupt, trio.sleep_forever, *others):
                sched.add(function)
            try:
                sched.run()
            except KeyboardInterrupt as exc:
                besides = getattr(exc.__cause__, "exceptions", [])
                print("interrupted", [type(each).__name__ for each in besides])
        """
    )
    assert out == "interrupted []\ninterrupted ['ValueError']\n"


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
async def test_yieldfunc_may_be_set_and_cleared_while_all_tasks_wait() -> None:
    sched = scheduler()

    async def set_and_clear() -> None:
        for _ in range(2):
            called = trio.Event()
            await trio.testing.wait_all_tasks_blocked()
            sched.yieldfunc = called.set
            await called.wait()
            sched.yieldfunc = None

    sched.add(set_and_clear)
    await got(sched.run())


@both_sides
async def test_a_loop_continues_if_another_loop_clears_yieldfunc() -> None:
    sched = scheduler()
    sched.yieldfunc = lambda: None
    counts = [0, 0]

    def count(index: int) -> bool:
        counts[index] += 1
        return counts[index] < 5

    def clear() -> bool:
        sched.yieldfunc = None
        return False

    # Trio runs these tasks in this order or in reverse order, so one of the two loops is in the
    # middle of a round when ``clear`` runs.
    sched.addloop(lambda: count(0))
    sched.addloop(clear)
    sched.addloop(lambda: count(1))
    await got(sched.run())
    assert counts == [5, 5]


@both_sides
async def test_run_ends_with_the_last_coroutine_despite_a_waiting_yieldfunc() -> None:
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
    sched.errorfunc = errors.append  # errorfunc gets only errors of coroutines
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
async def test_errorfunc_gets_the_error_and_the_other_coroutines_continue(kind: str) -> None:
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
@pytest.mark.parametrize("where", ["yieldfunc", "addloop", "errorfunc"])
async def test_a_cancel_scope_left_open_ends_run(where: str) -> None:
    sched = scheduler()

    async def leave_open(*_: object) -> None:
        trio.CancelScope(deadline=trio.current_time() + 0.01).__enter__()

    sched.add(trio.sleep_forever)
    if where == "addloop":
        sched.addloop(leave_open)
    else:
        setattr(sched, where, leave_open)
        if where == "errorfunc":
            sched.add(failing(ValueError("a mistake")))
    with pytest.raises(RuntimeError, match="ancel scope"):
        await got(sched.run())


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
async def test_a_failed_coroutine_cancels_an_errorfunc(caplog: pytest.LogCaptureFixture) -> None:
    sched = scheduler()
    order: list[str] = []

    async def errorfunc(exc: Exception) -> None:
        order.append(str(exc))
        sched.errorfunc = None
        sched.add(failing(ValueError("the second")))
        try:
            await trio.sleep_forever()
        finally:
            order.append("cancelled")

    sched.errorfunc = errorfunc
    sched.add(failing(ValueError("the first")))
    with pytest.raises(ValueError, match="the second"):
        await got(sched.run())
    assert order == ["the first", "cancelled"]
    assert not caplog.records  # the cancellation is no failure


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
