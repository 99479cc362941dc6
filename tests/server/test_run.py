"""trisock.run: programs that are started as processes and stopped by real signals."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
import threading
from pathlib import Path

import pytest
import trio

import trisock
from helpers.forks import run_in_child
from helpers.server import echo, until_refused
from helpers.services import program, systemd
from trisock._server.signals import SignalReceiver

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup

RUN = "trisock.run(listener, echo)\nsay('returned')\n"
STOPS = [signal.SIGTERM, signal.SIGINT]
ALL = [*STOPS, signal.SIGHUP]


async def talk(sock: trisock.Socket) -> None:
    await sock.send(b"hello\n")
    assert await sock.recv_line() == b"hello"


@pytest.mark.parametrize("signum", STOPS)
async def test_a_signal_stops_the_program_when_its_clients_have_left(
    signum: signal.Signals, tmp_path: Path
) -> None:
    with systemd(tmp_path / "notify") as manager:
        async with program(RUN, NOTIFY_SOCKET=manager.path) as running:
            pid = running.process.pid
            assert await manager.receive(pid) == b"READY=1"
            async with await trisock.connect("127.0.0.1", running.port) as client:
                await talk(client)
                running.ask_to_stop(signum)
                assert await manager.receive(pid) == b"STOPPING=1"
                await talk(client)
                await until_refused(running.port)
            assert await running.line() == "returned"
            await running.stop()  # checks that the status is 0 and that stderr is empty


async def test_a_server_keeps_accepting_during_the_delay(tmp_path: Path) -> None:
    source = "trisock.run(listener, echo, delay=1000)"
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            running.process.send_signal(signal.SIGTERM)
            assert await manager.receive() == b"STOPPING=1"
            async with await trisock.connect("127.0.0.1", running.port) as client:
                await talk(client)
            await running.stop()  # a second signal stops the server immediately


@pytest.mark.parametrize("second", STOPS)
async def test_a_second_signal_stops_the_program_immediately(
    second: signal.Signals, tmp_path: Path
) -> None:
    source = """
async def handler(sock):
    try:
        await sock.send(b"hello\\n")
        await trio.sleep_forever()
    finally:
        say("cancelled")
trisock.run(listener, handler, grace=None)
"""
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            async with await trisock.connect("127.0.0.1", running.port) as client:
                await client.recv_line()
                assert await manager.receive() == b"READY=1"
                running.process.send_signal(signal.SIGTERM)
                assert await manager.receive() == b"STOPPING=1"
                running.ask_to_stop(second)
                assert await running.line() == "cancelled"
            await running.stop()


async def test_handlers_are_cancelled_when_the_grace_is_over() -> None:
    source = """
async def handler(sock):
    try:
        await sock.send(b"hello\\n")
        await trio.sleep_forever()
    finally:
        say("cancelled")
trisock.run(listener, handler, grace=0.1)
"""
    async with program(source) as running:
        async with await trisock.connect("127.0.0.1", running.port) as client:
            await client.recv_line()
            running.ask_to_stop()
            assert await running.line() == "cancelled"
        await running.stop()


async def test_run_returns_after_a_handler_has_stopped_its_server(tmp_path: Path) -> None:
    source = """
async def handler(sock):
    sock.server.stop()
    await sock.recv()
trisock.run(listener, handler)
say("returned")
"""
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            async with await trisock.connect("127.0.0.1", running.port):
                assert await manager.receive() == b"READY=1"
                assert await manager.receive() == b"STOPPING=1"
            assert await running.line() == "returned"
            assert await running.process.wait() == 0


async def test_sighup_reloads_certificates_and_then_calls_on_reload(tmp_path: Path) -> None:
    source = """
from trisock.testing import Authority
certificate = Authority().certificate("localhost")
class Role(trisock.ServerTLS):
    def reload(self):
        say("reloaded", self.alpn_protocols[0])
        return super().reload()
handshakes = Role(certificate, alpn_protocols=["handshakes"])
upgrades = Role(certificate, alpn_protocols=["upgrades"])
async def on_reload(service):
    await trio.lowlevel.checkpoint()
    say("on_reload", type(service).__name__)
trisock.run(listener, echo, tls=handshakes, reload=[upgrades], on_reload=on_reload)
"""
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            for _ in range(2):
                running.process.send_signal(signal.SIGHUP)
                assert [await running.line() for _ in range(3)] == [
                    "reloaded handshakes",
                    "reloaded upgrades",
                    "on_reload Service",
                ]
            await running.stop()


async def test_a_signal_before_trio_runs_is_not_lost() -> None:
    source = """
def run(*args, real_run=trio.run):
    signal.raise_signal(signal.SIGINT)
    real_run(*args)
trio.run = run
trisock.run(listener, echo)
say("returned")
"""
    async with program(source) as running:
        assert await running.line() == "returned"
        assert await running.process.wait() == 0


async def test_a_forked_child_dies_of_sigterm_and_the_server_lives(tmp_path: Path) -> None:
    source = """
import warnings
warnings.simplefilter("ignore", DeprecationWarning)  # fork() warns if there are threads
async def handler(sock):
    pid = os.fork()
    if pid == 0:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
        finally:
            os._exit(1)  # still alive
    await sock.send(b"%d\\n" % os.waitpid(pid, 0)[1])
    await sock.send(await sock.recv_line())
trisock.run(listener, handler)
"""
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            async with await trisock.connect("127.0.0.1", running.port) as client:
                assert os.WTERMSIG(int(await client.recv_line())) == signal.SIGTERM
                await client.send(b"still here\n")
                assert await client.recv() == b"still here"
                assert manager.silent()
            await running.stop()


def test_a_taken_port_raises_an_oserror_outside_a_group() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        with pytest.raises(OSError, match="cannot listen on") as caught:
            trisock.run(taken.getsockname()[1], echo, host="127.0.0.1")
    assert caught.value.errno == errno.EADDRINUSE


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"grace": -1}, ValueError, "grace must be 0 or more"),
        ({"delay": None}, TypeError, "delay must be a number of seconds, not None"),
        ({"delay": "1"}, TypeError, "delay must be a number"),
        ({"reload": ["x"]}, TypeError, "reload must be a list of trisock.ServerTLS, not 'x'"),
        ({"on_reload": 1}, TypeError, "on_reload must be a function, not 1"),
        ({"max_connections": 0}, ValueError, "1 or more"),
        ({"no_such_option": 0}, TypeError, "no_such_option"),
    ],
)
def test_bad_arguments_of_run_raise(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        trisock.run(0, echo, host="127.0.0.1", **options)  # type: ignore[arg-type]


def test_reload_refuses_a_single_server_tls(server_tls: trisock.ServerTLS) -> None:
    with pytest.raises(TypeError, match="not a single one"):
        trisock.run(0, echo, reload=server_tls)  # type: ignore[arg-type]


async def test_the_error_of_run_inside_trio_names_open_service() -> None:
    with pytest.raises(RuntimeError, match=r"inside Trio, use trisock\.open_service"):
        trisock.run(0, echo)


def test_signal_handlers_are_restored_at_the_end() -> None:
    def mine(signum: int, frame: object) -> None:
        """Do nothing."""

    before = {signum: signal.signal(signum, mine) for signum in ALL}
    try:
        with pytest.raises(TypeError):
            trisock.run(0, "not a function")  # type: ignore[arg-type]
        assert [signal.getsignal(signum) for signum in ALL] == [mine] * 3
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def test_a_signal_handler_set_meanwhile_is_kept() -> None:
    def mine(signum: int, frame: object) -> None:
        """Do nothing."""

    before = signal.getsignal(signal.SIGTERM)
    try:
        with SignalReceiver():
            signal.signal(signal.SIGTERM, mine)
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_forked_child_calls_the_previous_signal_handler() -> None:
    seen: list[int] = []

    def raise_in_child() -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert seen == [os.getpid()] * 2

    before = signal.signal(signal.SIGTERM, lambda *_: seen.append(os.getpid()))
    try:
        with SignalReceiver():
            run_in_child(raise_in_child)
        assert not seen
    finally:
        signal.signal(signal.SIGTERM, before)


def test_at_most_two_unreceived_sighups_are_kept() -> None:
    async def receive() -> list[int]:
        found = [await receiver.receive() for _ in range(2)]
        with trio.move_on_after(0) as scope:
            await receiver.receive()
        assert scope.cancelled_caught
        return found

    with SignalReceiver() as receiver:
        for _ in range(3):
            signal.raise_signal(signal.SIGHUP)
        assert trio.run(receive) == [signal.SIGHUP] * 2
        signal.raise_signal(signal.SIGHUP)  # must be ignored: Trio's run is over


def test_a_third_ctrl_c_ends_an_endless_loop() -> None:
    async def block() -> None:
        with trio.move_on_after(0):
            await receiver.receive()
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)

    with SignalReceiver() as receiver, pytest.raises(KeyboardInterrupt):
        trio.run(block)


def test_run_in_another_thread_sets_no_signal_handler() -> None:
    before = [signal.getsignal(signum) for signum in ALL]
    seen: list[object] = []
    listener = trisock.listen_nowait(0, host="127.0.0.1")

    async def handler(sock: trisock.Socket) -> None:
        seen.append([signal.getsignal(signum) for signum in ALL])
        raise SystemExit(3)

    def run() -> None:
        try:
            trisock.run(listener, handler)
        except BaseException as exc:
            seen.append(exc)

    thread = threading.Thread(target=run)
    thread.start()
    with socket.create_connection(("127.0.0.1", listener.port)):
        thread.join()
    assert seen[0] == before
    assert isinstance(seen[1], SystemExit)  # not in a group


def test_several_exceptions_of_a_server_come_in_a_group() -> None:
    listener = trisock.listen_nowait(0, host="127.0.0.1")

    async def handler(sock: trisock.Socket) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(2):
                nursery.start_soon(exit_)

    async def exit_() -> None:
        raise SystemExit(3)

    with socket.create_connection(("127.0.0.1", listener.port)):
        with pytest.raises(BaseExceptionGroup) as caught:
            trisock.run(listener, handler)
    assert caught.group_contains(SystemExit)
