"""Pluto's scheduler: add, addloop, run, yieldfunc, errorfunc, and the coroutines that they run."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import trio
import trio.testing

from helpers.pluto import Thread, both_sides, failing, got, in_thread
from trisock.pluto import coroutine, scheduler

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


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
async def test_a_loop_of_addloop_lets_other_tasks_run() -> None:
    sched = scheduler()
    others: list[str] = []

    async def other() -> None:
        for _ in range(5):
            await trio.lowlevel.checkpoint()
        others.append("coroutine")

    sched.addloop(lambda: len(others) < 2)
    sched.addloop(lambda: others.append("loop") or False)
    sched.add(other)
    await got(sched.run())
    assert sorted(others) == ["coroutine", "loop"]


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
