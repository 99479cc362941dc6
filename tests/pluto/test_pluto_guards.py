"""trisock.pluto survives failing log filters, hostile exceptions, open cancel scopes and forks."""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import trio

from helpers.exceptions import HostileError
from helpers.pluto import (
    FORK_WARNS,
    in_child,
    pair,
    raw_peer,
    recv_in_thread,
    reset,
    run_outside,
    run_program,
    tls_pair,
)
from trisock.pluto import scheduler, socket
from trisock.pluto.blocking import background, log_reason

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


@pytest.fixture
def failing_log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Install a log filter that raises an exception for each record of trisock.pluto."""

    def fail(_: logging.LogRecord) -> bool:
        raise OSError("the disk is full")

    caplog.set_level(logging.INFO, "trisock.pluto")
    monkeypatch.setattr(logging.getLogger("trisock.pluto"), "filters", [fail])


@pytest.mark.usefixtures("failing_log")
def test_results_stay_the_same_if_a_log_filter_raises() -> None:
    assert socket.connect("127.0.0.1", 70000) is None
    assert socket.connect("", 1) is None
    assert socket.listen(70000) is None
    client, raw = run_outside(raw_peer())
    reset(raw)
    assert client.recv() is None
    assert client.send("x") is False
    assert client.starttls("localhost") is False


@pytest.mark.usefixtures("failing_log")
async def test_a_log_filter_that_raises_inside_trio_changes_no_result() -> None:
    assert await socket.connect("127.0.0.1", 70000) is None
    assert socket.listen(70000) is None


def test_a_hostile_exception_reaches_the_caller_but_kills_no_thread() -> None:
    client, server = run_outside(pair())

    async def fail() -> None:
        raise HostileError

    for _ in range(2):
        with pytest.raises(HostileError):
            background.call(fail)
    assert client.send("x")
    assert server.recv() == b"x"


@pytest.mark.parametrize("deadline", [-1.0, 0.0])
def test_a_cancel_scope_left_open_fails_only_the_current_call(deadline: float) -> None:
    client, server = run_outside(pair())
    reading = recv_in_thread(server)

    async def leave_open() -> str:
        trio.CancelScope(deadline=deadline).__enter__()
        with contextlib.suppress(trio.Cancelled):
            await trio.lowlevel.checkpoint()
        return "result"

    undone: list[str] = []
    with pytest.raises(RuntimeError, match="ancel scope"):
        background.call(leave_open, undone.append)
    assert undone == ["result"]
    assert client.send("x")
    assert reading.result() == b"x"


def test_a_stray_cancellation_fails_only_the_current_call() -> None:
    client, _ = run_outside(pair())

    async def cancel_own_task() -> None:
        trio.CancelScope(deadline=-1).__enter__()
        await trio.lowlevel.checkpoint()

    with pytest.raises(RuntimeError, match="ancel scope"):
        background.call(cancel_own_task)
    assert client.isopen()


async def test_scheduler_run_raises_for_a_cancel_scope_left_open() -> None:
    ended: list[str] = []

    async def leave_open() -> None:
        trio.CancelScope(deadline=trio.current_time() + 0.01).__enter__()
        ended.append("left open")

    sched = scheduler()
    sched.add(leave_open)
    with pytest.raises(RuntimeError, match="ancel scope"):
        await sched.run()
    assert ended


def test_control_characters_are_escaped_in_log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trisock.pluto")
    for host in ("::1%1\nINFO forged", "a\x1b[2Kb\u2028c", "\udcff"):
        assert socket.connect(host, 9) is None
    log_reason(OSError("a reason\nINFO forged"))
    assert len(caplog.records) == 4
    for record in caplog.records:
        assert record.getMessage().isprintable()
        record.getMessage().encode()


def test_sockets_listeners_and_schedulers_refuse_to_be_copied() -> None:
    client, _ = run_outside(pair())
    for each in (client, socket.listen(0), scheduler()):
        for copier in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copier(each)
    assert client.isopen()


def test_type_errors_do_not_quote_an_invalid_handler() -> None:
    calls: list[Callable[[Any], object]] = [
        lambda handler: socket.bind(scheduler(), 0, handler),
        scheduler().add,
    ]
    for key in ("-----BEGIN PRIVATE KEY-----", [{"private_key": "BEGIN PRIVATE KEY"}]):
        for call in calls:
            with pytest.raises(TypeError) as caught:
                call(key)
            assert "PRIVATE" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork warns about other threads
@pytest.mark.parametrize("side", ["client", "server"])
def test_a_forked_child_cannot_use_a_tls_connection(
    side: str, certs: list[dict[str, str | bytes]], trusted: None
) -> None:
    """The parent can still use the connection, and the child sends nothing to the peer."""
    client, server = run_outside(tls_pair(certs))
    mine, other = (client, server) if side == "client" else (server, client)
    other.send("unread")

    def use() -> None:
        assert mine.send("from the child") is False
        assert mine.recv() is None
        assert mine.peek() is None
        assert mine.starttls("localhost") is None
        mine.close()

    in_child(use)
    in_child(mine.close)
    assert mine.recv() == b"unread"
    assert mine.send("from the parent")
    assert other.recv() == b"from the parent"


def test_a_socket_dropped_in_a_child_leaves_the_connection_open() -> None:
    client, server = run_outside(pair())

    def drop() -> None:
        nonlocal client
        del client

    in_child(drop)
    assert client.send("still open")
    assert server.recv() == b"still open"


def test_a_signal_handler_can_make_nested_blocking_calls() -> None:
    out = run_program(
        """
        import signal
        listening = socket.listen(0)
        a, b = socket.connect("127.0.0.1", listening.port), listening.accept()
        c, d = socket.connect("127.0.0.1", listening.port), listening.accept()
        rounds = 0
        def handler(*_):
            global rounds
            rounds += 1
            c.send("nested")
            assert d.recv() == b"nested"
            if rounds == 20:
                b.send("at last")
            else:  # not earlier: a nested handler could read this handler's data
                signal.setitimer(signal.ITIMER_REAL, 0.003)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        print(a.recv())
        """
    )
    assert out == "b'at last'\n"


def test_a_pending_call_raises_runtime_error_in_a_forked_child() -> None:
    out = run_program(
        """
        import os, signal
        listening = socket.listen(0)
        a, b = socket.connect("127.0.0.1", listening.port), listening.accept()
        def handler(*_):
            global child
            child = os.fork()
            if child:
                b.send("go on")
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            a.recv()
        except RuntimeError as exc:
            os._exit(7 if "forked" in str(exc) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """,
        *FORK_WARNS,
    )
    assert out == "7\n"


def test_data_pushed_back_during_a_concurrent_read_is_kept() -> None:
    client, server = run_outside(pair())
    reading = recv_in_thread(client)

    async def put_back() -> None:
        client._undo_recv(b"first")

    background.call(put_back)
    server.send("for the other")
    assert reading.result() == b"for the other"
    assert client.isopen()
    assert client.peek() == client.recv() == b"first"
