"""Ctrl-C interrupts every blocking Pluto call and loses no data."""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket as stdlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.deadline import DEADLINE
from helpers.pluto import Thread, raw_peer, recv_all, run_outside, signal_main_thread
from trisock.pluto import socket
from trisock.pluto.blocking import background
from trisock.pluto.trio_thread import TrioThread

pytestmark = pytest.mark.usefixtures("bounded")  # some tests make blocking calls


class Interrupter(trio.abc.Instrument):
    """Signals the main thread as soon as the next call blocks in the background thread."""

    def __init__(self, signum: signal.Signals) -> None:
        self._signum = signum
        self._called = False

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._called = True

    def before_io_wait(self, timeout: float) -> None:
        if self._called and timeout > 0:
            self._called = False
            signal_main_thread(self._signum)


class AlarmError(Exception):
    pass


SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGUSR1: AlarmError}


@pytest.fixture(params=SIGNALS, ids=lambda signum: signum.name)
def check_interrupted(
    request: pytest.FixtureRequest,
) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Return a function that makes a call and checks that a signal interrupts it."""

    def alarm(*_: object) -> None:
        raise AlarmError

    def check(call: Callable[[], Any]) -> None:
        async def arm() -> Interrupter:
            instrument = Interrupter(request.param)
            trio.lowlevel.add_instrument(instrument)
            return instrument

        instrument = background.call(arm)
        with pytest.raises(SIGNALS[request.param]):
            call()

        async def disarm() -> None:
            trio.lowlevel.remove_instrument(instrument)

        background.call(disarm)

    before = signal.signal(signal.SIGUSR1, alarm)
    yield check
    signal.signal(signal.SIGUSR1, before)


CheckInterrupted = Callable[[Callable[[], Any]], None]


def test_ctrl_c_interrupts_recv_and_loses_no_byte(check_interrupted: CheckInterrupted) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        for _ in range(3):
            check_interrupted(client.recv)
        raw.sendall(b"hello")
        assert client.recv() == b"hello"
        assert client.send("still works")
        assert raw.recv(100) == b"still works"


def test_ctrl_c_interrupts_accept_and_loses_no_client(check_interrupted: CheckInterrupted) -> None:
    listening = socket.listen(0)
    check_interrupted(listening.accept)
    client = socket.connect("127.0.0.1", listening.port)
    server = listening.accept()
    client.send("hello")
    assert server.recv() == b"hello"


def test_ctrl_c_interrupts_connect(check_interrupted: CheckInterrupted) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(stdlib.create_server(("127.0.0.1", 0), backlog=0))
        address = full.getsockname()
        others = []
        for _ in range(3):  # overflow the backlog: the kernel drops further SYNs
            other = stack.enter_context(stdlib.socket())
            other.setblocking(False)
            other.connect_ex(address)
            others.append(other)
        select.select([], others[:1], [], DEADLINE)
        check_interrupted(lambda: socket.connect(*address))
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        assert socket.connect(*listening.getsockname()) is not None


def test_ctrl_c_interrupts_starttls_and_closes_the_socket(
    check_interrupted: CheckInterrupted,
) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        check_interrupted(lambda: client.starttls("localhost"))
        assert client.isopen() is False
        assert client.recv() is None
        assert client.starttls("localhost") is False


def test_no_data_can_follow_a_send_interrupted_by_ctrl_c(
    check_interrupted: CheckInterrupted,
) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        check_interrupted(lambda: client.send(bytes(50_000_000)))
        assert client.send("x") is False
        assert client.isopen()
        client.unrecv("unread")
        assert client.recv() == b"unread"
        receiving = Thread(lambda: recv_all(raw))
        assert client.starttls("localhost") is False
        assert client.isopen() is False
        received = receiving.result()
        assert 0 < len(received) < 50_000_000
        assert not any(received)


def test_ctrl_c_interrupts_a_script_that_reads() -> None:
    program = """
import os, signal, socket, sys, threading, trio
from trisock.pluto import socket as pluto
from trisock.pluto.blocking import background

class Reporter(trio.abc.Instrument):
    called = False
    def task_spawned(self, task):
        self.called = True
    def before_io_wait(self, timeout):
        if self.called and timeout > 0:
            self.called = False
            print("waiting", flush=True)

async def report():
    trio.lowlevel.add_instrument(Reporter())

listening = pluto.listen(0)
peer = socket.create_connection(("127.0.0.1", listening.port))
s = listening.accept()
background.call(report)
try:
    s.recv()
except KeyboardInterrupt:
    peer.sendall(b"hello")
    print(s.recv(), flush=True)
peer.close()
"""
    with subprocess.Popen(
        [sys.executable, "-X", "dev", "-W", "error", "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"waiting\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=DEADLINE)
    assert b"hello" in out
    assert (process.returncode, err) == (0, b"")


async def signal_and_wait_for_cancellation() -> None:
    """Send Ctrl-C to the main thread, and wait until this call has been cancelled."""
    signal_main_thread()
    while trio.current_effective_deadline() > -math.inf:
        await trio.lowlevel.cancel_shielded_checkpoint()


async def result_after_ctrl_c() -> str:
    await signal_and_wait_for_cancellation()
    return "result"


def test_a_result_discarded_by_ctrl_c_is_undone(own_thread: TrioThread) -> None:
    undone: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        own_thread.call(result_after_ctrl_c, undone.append)
    assert undone == ["result"]


@pytest.mark.parametrize("fails", [False, True])
def test_only_a_result_that_ctrl_c_discards_is_undone(own_thread: TrioThread, fails: bool) -> None:
    undone: list[object] = []

    async def function() -> str:
        if fails:
            raise ValueError("a mistake")
        return "result"

    with contextlib.nullcontext() if not fails else pytest.raises(ValueError, match="mistake"):
        assert own_thread.call(function, undone.append) == "result"

    async def waiting() -> None:
        signal_main_thread()
        await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        own_thread.call(waiting, undone.append)
    assert undone == []


def test_a_failed_undo_is_logged_and_later_calls_work(
    own_thread: TrioThread, caplog: pytest.LogCaptureFixture
) -> None:
    def undo(result: str) -> None:
        raise ValueError("a mistake")

    with pytest.raises(KeyboardInterrupt):
        own_thread.call(result_after_ctrl_c, undo)

    async def later() -> str:
        return "fine"

    assert own_thread.call(later) == "fine"
    assert "could not undo" in caplog.text
    caplog.clear()


def test_data_from_an_interrupted_recv_is_received_before_other_data() -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        client.unrecv("second")
        client._undo_recv(b"first")
        client._undo_recv(None)
        assert [client.recv() for _ in range(2)] == [b"first", b"second"]
        client.close()
        client._undo_recv(b"late")  # ignored, because the socket is closed
        assert client.recv() is None


InterruptAfter = Callable[[type, str], None]


@pytest.fixture
def interrupt_after(monkeypatch: pytest.MonkeyPatch) -> InterruptAfter:
    """Return a function ``arm(class, name)``, whose arguments are a class and a method's name.

    After ``arm``, the next call of the method completes, but Ctrl-C discards the result.
    """

    def arm(where: type, name: str) -> None:
        original = getattr(where, name)

        async def result_and_ctrl_c(self: Any) -> Any:
            result = await original(self)
            monkeypatch.setattr(where, name, original)
            await signal_and_wait_for_cancellation()
            return result

        monkeypatch.setattr(where, name, result_and_ctrl_c)

    return arm


def test_recv_returns_the_data_from_an_interrupted_recv(interrupt_after: InterruptAfter) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        raw.sendall(b"hello")
        interrupt_after(trisock.Socket, "recv")
        with pytest.raises(KeyboardInterrupt):
            client.recv()
        assert client.recv() == b"hello"


def interrupted_accept(interrupt_after: InterruptAfter) -> tuple[Any, stdlib.socket]:
    """Interrupt ``accept`` after it has accepted a client. Return the listener and the client."""
    listening = socket.listen(0)
    raw = stdlib.create_connection(("127.0.0.1", listening.port), timeout=DEADLINE)
    interrupt_after(trisock.Listener, "accept")
    with pytest.raises(KeyboardInterrupt):
        listening.accept()
    return listening, raw


def test_accept_returns_the_client_from_an_interrupted_accept(
    interrupt_after: InterruptAfter,
) -> None:
    listening, raw = interrupted_accept(interrupt_after)
    with raw:
        assert listening.hasconnection()
        assert listening.accept().getpeer() == raw.getsockname()
        assert not listening.hasconnection()


def test_closing_a_listener_closes_the_client_of_an_interrupted_accept(
    interrupt_after: InterruptAfter,
) -> None:
    listening, raw = interrupted_accept(interrupt_after)
    with raw:
        listening.close()
        assert not listening.hasconnection()
        assert listening.accept() is None
        assert raw.recv(1) == b""
