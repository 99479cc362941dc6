"""The background thread of trisock.pluto: system failures, races, late interrupts."""

from __future__ import annotations

import collections
import errno
import os
import threading
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import pytest
import trio

from helpers.pluto import Thread, refuse_thread
from trisock.pluto import socket, trio_thread
from trisock.pluto.blocking import background, log_reason
from trisock.pluto.call import Call, Item, Stop
from trisock.pluto.trio_thread import ThreadStartError, _Thread

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


async def answer() -> str:
    return "result"


def new_thread(*items: Item) -> _Thread:
    return _Thread(collections.deque(items), {}, os.getpid())


def run_to_end(thread: _Thread) -> None:
    """Launch a thread and wait until the thread ends."""
    thread.launch()
    assert thread.thread is not None
    thread.thread.join()
    assert thread.over


def stop_in_thread() -> None:
    """In another thread, call ``background.stop()`` until the background thread has stopped."""

    def stop() -> None:
        while os.getpid() in background._current:
            background.stop()

    Thread(stop).result()


def after_wake(monkeypatch: pytest.MonkeyPatch, then: Callable[[], None]) -> None:
    """Call ``then`` once, after the next caller wakes the thread and before the caller waits."""
    wake = _Thread.wake

    def patched(thread: _Thread) -> None:
        monkeypatch.setattr(_Thread, "wake", wake)
        wake(thread)
        then()

    monkeypatch.setattr(_Thread, "wake", patched)


def stop_during_call(
    monkeypatch: pytest.MonkeyPatch, then: Callable[[], None] = lambda: None
) -> Callable[[], Awaitable[str]]:
    """Return a function to pass to ``background.call``.

    The background thread runs the function and stops before the caller waits for the result.
    """
    begun = threading.Event()

    async def begin() -> str:
        begun.set()
        return "result"

    def stop() -> None:
        begun.wait()
        stop_in_thread()
        then()

    after_wake(monkeypatch, stop)
    return begin


def interrupt() -> NoReturn:
    raise KeyboardInterrupt


def test_calls_fail_if_no_thread_can_start(monkeypatch: pytest.MonkeyPatch) -> None:
    call, stop = Call(answer, None), Stop()
    thread = new_thread(call, stop)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse_thread)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            background.call(answer)
        thread.launch()
    assert thread.over
    assert str(call.error) == "can't start new thread"
    assert stop.answered.acquire(blocking=False)
    assert background.call(answer) == "result"


def test_a_thread_ends_if_start_raises_after_starting_it(monkeypatch: pytest.MonkeyPatch) -> None:
    start = threading.Thread.start

    def start_and_fail(thread: threading.Thread) -> None:
        start(thread)
        raise MemoryError

    call = Call(answer, None)
    thread = new_thread(call)
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", start_and_fail)
        run_to_end(thread)
    assert type(call.error) is MemoryError


def test_stop_returns_if_no_thread_can_be_created(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> NoReturn:
        raise MemoryError

    pid = os.getpid()
    background.stop()
    # Simulate an interrupted call that has created a thread but not launched it.
    background._current[pid] = _Thread(background._inbox, background._current, pid)
    with monkeypatch.context() as patch:
        patch.setattr(threading, "Thread", refuse)
        background.stop()
    assert background.call(answer) == "result"


@pytest.mark.parametrize("failure", [OSError(errno.EMFILE, "too many"), ValueError("odd")])
def test_calls_propagate_exceptions_from_trio_run(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failure: Exception
) -> None:
    def fail(*_: object) -> NoReturn:
        raise failure

    with monkeypatch.context() as patch:
        patch.setattr(trio, "run", fail)
        with pytest.raises((ThreadStartError, ValueError)) as caught:
            background.call(answer)
    why = "[Errno 24] cannot start the background thread: too many"
    assert str(caught.value) == (why if isinstance(failure, OSError) else str(failure))
    logged = [record.getMessage() for record in caplog.records]
    expected = (
        []
        if isinstance(failure, OSError)
        else ["the background thread of trisock.pluto failed, with all calls in progress"]
    )
    assert logged == expected
    assert background.call(answer) == "result"


def test_calls_after_a_stop_request_wait_for_the_next_thread() -> None:
    stop, behind = Stop(), Call(answer, None)

    async def be_abandoned() -> None:
        first.abandoned = True
        thread._inbox.extend([first, stop, behind])
        thread.wake()
        await trio.sleep_forever()

    first = Call(be_abandoned, None)
    thread = new_thread(first)
    run_to_end(thread)
    assert stop.agreed
    assert list(thread._inbox) == [behind]


def test_a_withdrawn_stop_request_is_ignored() -> None:
    withdrawn, stop = Stop(), Stop()
    withdrawn.withdrawn = True
    run_to_end(new_thread(withdrawn, stop))
    assert stop.agreed
    assert not withdrawn.agreed


class Abandon(Stop):
    """Abandons a call when the thread looks at this request."""

    def __init__(self, call: Call[None]) -> None:
        self._call: Call[None] | None = None
        super().__init__()
        self._call = call

    @property
    def withdrawn(self) -> bool:
        if self._call is not None:
            self._call.abandoned = True
        return True

    @withdrawn.setter
    def withdrawn(self, value: bool) -> None:
        pass


def test_a_call_that_is_abandoned_before_it_begins_does_not_run() -> None:
    ran: list[str] = []
    stop = Stop()

    async def run() -> None:
        ran.append("run")

    async def end() -> None:
        ran.append("end")
        thread._inbox.append(stop)
        thread.wake()

    call = Call(run, None)
    thread = new_thread(call, Abandon(call), call, Call(end, None))  # the second cancels it
    run_to_end(thread)
    assert stop.agreed
    assert ran == ["end"]


def test_a_call_returns_its_result_even_if_the_thread_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    background.call(answer)
    assert background.call(stop_during_call(monkeypatch)) == "result"


def test_a_new_thread_undoes_the_result_of_an_interrupted_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    undone: list[str] = []
    begin = stop_during_call(monkeypatch, interrupt)
    with pytest.raises(KeyboardInterrupt):
        background.call(begin, undone.append)
    assert undone == ["result"]


def test_ctrl_c_does_not_wait_for_a_call_that_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = threading.Event()
    released: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    async def stay() -> str:
        release = trio.Event()
        released.append((trio.lowlevel.current_trio_token(), release))
        begun.set()
        with trio.CancelScope(shield=True):
            await release.wait()
        return "late"

    def interrupt_it() -> None:
        begun.wait()
        interrupt()

    monkeypatch.setattr(trio_thread, "_POLL_SECONDS", 0.001)
    undone: list[str] = []
    after_wake(monkeypatch, interrupt_it)
    with pytest.raises(KeyboardInterrupt):
        background.call(stay, undone.append)
    assert undone == []
    token, release = released[0]
    token.run_sync_soon(release.set)
    assert background.call(answer) == "result"
    assert undone == ["late"]


def test_stop_waits_until_a_busy_thread_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    begun, resume = threading.Event(), threading.Event()

    async def block() -> None:
        begun.set()
        resume.wait()

    blocking = Thread(lambda: background.call(block))
    begun.wait()
    monkeypatch.setattr(trio_thread, "_POLL_SECONDS", 0.001)
    # If the thread does not answer in time, stop() wakes the thread again. This second call of
    # ``wake`` unblocks the thread.
    after_wake(monkeypatch, lambda: after_wake(monkeypatch, resume.set))
    background.stop()
    blocking.result()
    assert background.call(answer) == "result"


def test_two_threads_can_stop_the_background_thread_concurrently(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def overtaken() -> Stop:
        monkeypatch.setattr(trio_thread, "Stop", Stop)
        stop_in_thread()
        return Stop()

    background.call(answer)
    monkeypatch.setattr(trio_thread, "Stop", overtaken)
    background.stop()
    assert os.getpid() not in background._current
    assert background.call(answer) == "result"


def test_raising_cancelled_outside_its_scope_fails_only_that_call() -> None:
    async def raise_late() -> None:
        kept: Any = None
        with trio.CancelScope() as scope:
            scope.cancel()
            try:
                await trio.lowlevel.checkpoint()
            except trio.Cancelled as exc:
                kept = exc
                raise
        raise kept

    with pytest.raises(RuntimeError, match="cancel scope"):
        background.call(raise_late)
    assert background.call(answer) == "result"


def test_fail_does_not_change_the_result_of_a_finished_call() -> None:
    call = Call(answer, None)
    trio.run(call.run)
    call.fail(MemoryError())
    assert (call.value, call.error) == ("result", None)


class UnprintableError(Exception):
    def __str__(self) -> str:
        raise ValueError


def test_an_unprintable_exception_is_logged_by_its_type_name(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "trisock.pluto")
    log_reason(UnprintableError())
    assert [record.getMessage() for record in caplog.records] == ["UnprintableError"]


def test_a_client_put_back_into_a_closed_listener_is_closed() -> None:
    listening: Any = socket.listen(0)
    client: Any = socket.connect("127.0.0.1", listening.port)
    accepted = listening.accept()
    listening.close()
    listening._keep(accepted)
    del accepted
    assert client.recv() is None
