"""trisock.pluto where the program fails: log handlers, exceptions, cancel scopes, forks."""

from __future__ import annotations

import contextlib
import copy
import logging
import os
import pickle
import signal
import socket as stdlib
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import trio

import trisock
from helpers.authority import Authority
from helpers.deadline import DEADLINE
from trisock import ClientTLS
from trisock.pluto import scheduler, socket
from trisock.pluto.blocking import background

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


def connection() -> tuple[Any, Any]:
    listening = socket.listen(0)
    assert listening is not None
    return socket.connect("127.0.0.1", listening.port), listening.accept()


class HostileError(Exception):
    """Fails wherever logging or a set touches it."""

    __hash__ = None  # type: ignore[assignment]

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("compared")

    def __bool__(self) -> bool:
        raise RuntimeError("asked for its truth")

    def __str__(self) -> str:
        raise RuntimeError("printed")


@pytest.fixture
def failing_log() -> Iterator[None]:
    """Have each record of pluto's fail in a filter."""

    def fail(_: logging.LogRecord) -> bool:
        raise OSError("the disk is full")

    logger = logging.getLogger("trisock.pluto")
    level = logger.level
    logger.setLevel(logging.INFO)
    logger.addFilter(fail)
    yield
    logger.removeFilter(fail)
    logger.setLevel(level)


@pytest.mark.usefixtures("failing_log")
def test_a_log_filter_that_raises_changes_no_result() -> None:
    assert socket.connect("127.0.0.1", 70000) is None
    assert socket.connect("", 1) is None
    assert socket.listen(70000) is None
    client, server = connection()
    server._sock.stream.socket.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    del server
    assert client.recv() is None
    assert client.send("x") is False
    assert client.starttls("localhost") is False


@pytest.mark.usefixtures("failing_log")
async def test_a_log_filter_that_raises_changes_no_result_inside_trio() -> None:
    assert await socket.connect("127.0.0.1", 70000) is None
    assert socket.listen(70000) is None


def test_a_hostile_exception_reaches_the_caller_and_ends_no_thread() -> None:
    client, server = connection()

    async def fail() -> None:
        raise HostileError

    for _ in range(2):
        with pytest.raises(HostileError):
            background.call(fail)
    assert client.send("x")
    assert server.recv() == b"x"


@pytest.mark.parametrize("deadline", [-1.0, 0.0])
def test_a_cancel_scope_left_open_fails_its_own_call_only(deadline: float) -> None:
    client, server = connection()
    received: list[object] = []
    reading = threading.Thread(target=lambda: received.append(server.recv()))
    reading.start()

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
    reading.join()
    assert received == [b"x"]


def test_a_stray_cancellation_is_an_error_of_its_own_call_only() -> None:
    client, _ = connection()

    async def be_cancelled() -> None:
        trio.CancelScope(deadline=-1).__enter__()
        await trio.lowlevel.checkpoint()

    with pytest.raises(RuntimeError, match="ancel scope"):
        background.call(be_cancelled)
    assert client.isopen()


async def test_a_scope_left_open_in_a_schedulers_function_is_named() -> None:
    ended: list[str] = []

    async def leave_open() -> None:
        trio.CancelScope(deadline=trio.current_time() + 0.01).__enter__()
        ended.append("left open")

    sched = scheduler()
    sched.add(leave_open)
    with pytest.raises(BaseExceptionGroup) as caught:
        await sched.run()
    assert caught.group_contains(RuntimeError, match="ancel scope")
    assert ended


def test_a_host_with_line_ends_is_one_line_of_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "trisock.pluto")
    for host in ("::1%1\nINFO forged", "a\x1b[2Kb\u2028c", "\udcff"):
        assert socket.connect(host, 9) is None
    assert len(caplog.records) == 3
    for record in caplog.records:
        assert record.getMessage().isprintable()
        record.getMessage().encode()


def test_sockets_listeners_and_schedulers_refuse_to_be_copied() -> None:
    client, _ = connection()
    for each in (client, socket.listen(0), scheduler()):
        for copying in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="cannot be copied or pickled"):
                copying(each)
    assert client.isopen()


def test_an_error_about_a_handler_does_not_quote_it() -> None:
    for key in ("-----BEGIN PRIVATE KEY-----", [{"private_key": "BEGIN PRIVATE KEY"}]):
        with pytest.raises(TypeError) as caught:
            socket.bind(scheduler(), 0, key)  # type: ignore[arg-type]
        assert "PRIVATE" not in str(caught.value)
        with pytest.raises(TypeError) as caught:
            scheduler().add(key)  # type: ignore[arg-type]
        assert "PRIVATE" not in str(caught.value)


def in_child(function: Any) -> None:
    """Run it in a forked child; what fails there fails here."""
    number = os.fork()
    if not number:
        status = 1
        with contextlib.suppress(BaseException):
            signal.alarm(DEADLINE)
            function()
            status = 0
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(number, 0)[1]) == 0


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Trio's thread for names may live
@pytest.mark.parametrize("side", ["client", "server"])
def test_in_a_child_a_tls_connection_is_none_or_false(authority: Authority, side: str) -> None:
    """The parent keeps it, and no byte of the child's reaches the peer."""
    client, server = connection()
    role = ClientTLS("localhost", ca=authority.pem)
    leaf = authority.ca.issue_cert("localhost")
    certificate = trisock.Certificate(
        b"".join(each.bytes() for each in leaf.cert_chain_pems), leaf.private_key_pem.bytes()
    )
    greeting = threading.Thread(target=lambda: server.starttls([certificate]))
    greeting.start()
    assert client.starttls(role)
    greeting.join()
    mine, other = (client, server) if side == "client" else (server, client)
    other.send("waits")

    def use() -> None:
        assert mine.send("of the child") is False
        assert mine.recv() is None
        assert mine.peek() is None
        assert mine.starttls(role) is None
        mine.close()

    in_child(use)
    in_child(mine.close)
    assert mine.recv() == b"waits"
    assert mine.send("of the parent")
    assert other.recv() == b"of the parent"


def test_a_socket_dropped_in_a_child_leaves_the_connection_open() -> None:
    client, server = connection()

    def drop() -> None:
        nonlocal client
        del client

    in_child(drop)
    assert client.send("still")
    assert server.recv() == b"still"


def run_program(text: str) -> str:
    program = "from trisock.pluto import socket\n" + textwrap.dedent(text)
    done = subprocess.run(
        [sys.executable, "-W", "ignore::DeprecationWarning", "-c", program],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_signal_handler_can_make_blocking_calls_while_a_call_waits() -> None:
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
            else:  # not earlier: a handler in a handler would read what is not its own
                signal.setitimer(signal.ITIMER_REAL, 0.003)
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.001)
        print(a.recv())
        """
    )
    assert out == "b'at last'\n"


def test_a_child_of_a_handlers_fork_that_returns_gets_an_error() -> None:
    out = run_program(
        """
        import os, signal
        listening = socket.listen(0)
        a, b = socket.connect("127.0.0.1", listening.port), listening.accept()
        def handler(*_):
            global child
            child = os.fork()
            if child:
                b.send("on")
        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            a.recv()
        except RuntimeError as exc:
            os._exit(7 if "forked" in str(exc) else 1)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
        """
    )
    assert out == "7\n"


def test_data_taken_back_while_another_thread_reads_is_not_lost() -> None:
    client, server = connection()
    reading = threading.Thread(target=client.recv)
    reading.start()
    while not client._sock._connection.reading.in_use:
        background.call(trio.lowlevel.checkpoint)

    async def take_back() -> None:
        client._unrecv(b"first")

    background.call(take_back)
    server.send("for the other")
    reading.join()
    assert client.isopen()
    assert client.peek() == client.recv() == b"first"
