"""Ctrl-C in each of Pluto's blocking calls: it ends the call, and nothing is lost."""

from __future__ import annotations

import contextlib
import math
import select
import signal
import socket as stdlib
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.deadline import DEADLINE
from helpers.pluto import raw_peer, run_outside, signal_main_thread
from trisock.pluto import socket
from trisock.pluto.blocking import background
from trisock.pluto.trio_thread import TrioThread

pytestmark = pytest.mark.usefixtures("bounded")  # some of these calls block


class Interrupter(trio.abc.Instrument):
    """Sends a signal to the main thread as soon as the next call waits in the background."""

    def __init__(self, signum: signal.Signals) -> None:
        self._signum = signum
        self._begun = False

    def task_spawned(self, task: trio.lowlevel.Task) -> None:
        self._begun = True

    def before_io_wait(self, timeout: float) -> None:
        if self._begun and timeout > 0:
            self._begun = False
            ident = threading.main_thread().ident
            assert ident is not None
            signal.pthread_kill(ident, self._signum)


class AlarmError(Exception):
    pass


SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGUSR1: AlarmError}


@pytest.fixture(params=SIGNALS, ids=lambda signum: signum.name)
def interrupted(request: pytest.FixtureRequest) -> Iterator[Callable[[Callable[[], Any]], None]]:
    """Return what makes a call and checks that a signal in the middle of it ends it."""

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


Interrupted = Callable[[Callable[[], Any]], None]


def test_ctrl_c_ends_recv_and_no_byte_is_lost(interrupted: Interrupted) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        for _ in range(3):
            interrupted(client.recv)
        raw.sendall(b"hello")
        assert client.recv() == b"hello"
        assert client.send("and on")
        assert raw.recv(100) == b"and on"


def test_ctrl_c_ends_accept_and_no_client_is_lost(interrupted: Interrupted) -> None:
    listening = socket.listen(0)
    interrupted(listening.accept)
    client = socket.connect("127.0.0.1", listening.port)
    server = listening.accept()
    client.send("hello")
    assert server.recv() == b"hello"


def test_ctrl_c_ends_connect(interrupted: Interrupted) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(stdlib.create_server(("127.0.0.1", 0), backlog=0))
        address = full.getsockname()
        others = []
        for _ in range(3):  # more than fit: the kernel answers no other SYN
            other = stack.enter_context(stdlib.socket())
            other.setblocking(False)
            other.connect_ex(address)
            others.append(other)
        select.select([], others[:1], [], DEADLINE)
        interrupted(lambda: socket.connect(*address))
    with stdlib.create_server(("127.0.0.1", 0)) as listening:
        assert socket.connect(*listening.getsockname()) is not None


def test_ctrl_c_ends_starttls_and_closes_the_socket(interrupted: Interrupted) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        interrupted(lambda: client.starttls("localhost"))
        assert client.isopen() is False
        assert client.recv() is None
        assert client.starttls("localhost") is False


def test_ctrl_c_ends_send_and_nothing_follows_the_cut(interrupted: Interrupted) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        interrupted(lambda: client.send(bytes(50_000_000)))
        assert client.send("x") is False
        assert client.isopen()
        client.unrecv("still to be read")
        assert client.recv() == b"still to be read"
        assert client.starttls("localhost") is False
        assert client.isopen() is False


def test_ctrl_c_ends_a_script_that_reads() -> None:
    program = """
import os, signal, socket, sys, threading, trio
from trisock.pluto import socket as pluto
from trisock.pluto.blocking import background

class Tell(trio.abc.Instrument):
    begun = False
    def task_spawned(self, task):
        self.begun = True
    def before_io_wait(self, timeout):
        if self.begun and timeout > 0:
            self.begun = False
            print("waiting", flush=True)

async def tell():
    trio.lowlevel.add_instrument(Tell())

listening = pluto.listen(0)
peer = socket.create_connection(("127.0.0.1", listening.port))
s = listening.accept()
background.call(tell)
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


async def raise_in_main_and_be_given_up() -> None:
    signal_main_thread()
    while trio.current_effective_deadline() > -math.inf:
        await trio.lowlevel.cancel_shielded_checkpoint()


def test_undo_takes_back_what_was_done_when_ctrl_c_came(
    own_thread: TrioThread,
) -> None:
    undone: list[str] = []

    async def done() -> str:
        await raise_in_main_and_be_given_up()
        return "result"  # it has come to its end just then

    with pytest.raises(KeyboardInterrupt):
        own_thread.call(done, undone.append)
    assert undone == ["result"]


@pytest.mark.parametrize("fails", [False, True])
def test_undo_is_for_results_only(own_thread: TrioThread, fails: bool) -> None:
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


def test_an_undo_that_fails_harms_no_later_call(
    own_thread: TrioThread, caplog: pytest.LogCaptureFixture
) -> None:
    async def done() -> str:
        await raise_in_main_and_be_given_up()
        return "result"

    def undo(result: str) -> None:
        raise ValueError("a mistake")

    with pytest.raises(KeyboardInterrupt):
        own_thread.call(done, undo)

    async def later() -> str:
        return "fine"

    assert own_thread.call(later) == "fine"
    assert "could not take back" in caplog.text
    caplog.clear()


def test_recv_pushes_back_what_ctrl_c_kept_from_the_caller() -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        client.unrecv("second")
        client._unrecv(b"first")
        client._unrecv(None)
        assert [client.recv() for _ in range(2)] == [b"first", b"second"]
        client.close()
        client._unrecv(b"late")  # has no place to go back to
        assert client.recv() is None


def hold_back(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """Have a call of the core end with a result and a Ctrl-C at the same time."""
    where = {"recv": trisock.Socket, "accept": trisock.Listener}[name]
    original = getattr(where, name)

    async def result_and_signal(self: Any) -> Any:
        result = await original(self)
        monkeypatch.setattr(where, name, original)
        await raise_in_main_and_be_given_up()
        return result

    monkeypatch.setattr(where, name, result_and_signal)


def test_recv_has_what_ctrl_c_kept_from_the_caller_again(monkeypatch: pytest.MonkeyPatch) -> None:
    client, raw = run_outside(raw_peer())
    with raw:
        raw.sendall(b"hello")
        hold_back(monkeypatch, "recv")
        with pytest.raises(KeyboardInterrupt):
            client.recv()
        assert client.recv() == b"hello"


def test_accept_has_the_client_that_ctrl_c_kept_back_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port)) as raw:
        hold_back(monkeypatch, "accept")
        with pytest.raises(KeyboardInterrupt):
            listening.accept()
        assert listening.hasconnection()
        assert listening.accept().getpeer() == raw.getsockname()
        assert not listening.hasconnection()


def test_a_closed_listener_has_no_client_left_by_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    listening = socket.listen(0)
    with stdlib.create_connection(("127.0.0.1", listening.port), timeout=DEADLINE) as raw:
        hold_back(monkeypatch, "accept")
        with pytest.raises(KeyboardInterrupt):
            listening.accept()
        listening.close()
        assert not listening.hasconnection()
        assert listening.accept() is None
        assert raw.recv(1) == b""
