"""Messages to systemd, over a real datagram socket."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import run_in_child
from helpers.server import echo, logged
from helpers.services import Systemd, program, systemd
from trisock._server.notify import (
    READY,
    STOPPING,
    WATCHDOG,
    ServiceManager,
    reloading,
    socket_address,
    watchdog_interval,
)

# ---- without I/O ----


@pytest.mark.parametrize(
    ("path", "address"),
    [
        ("/run/systemd/notify", "/run/systemd/notify"),
        ("@name", "\0name"),
        ("@", None),
        ("relative", None),
        ("vsock:2:1234", None),
    ],
)
def test_a_notify_socket_is_a_path_or_an_abstract_name(path: str, address: str | None) -> None:
    assert socket_address(path) == address


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({}, None),
        ({"WATCHDOG_PID": "7"}, None),
        ({"WATCHDOG_USEC": "30000000"}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
    ],
)
def test_the_watchdog_is_fed_twice_per_period(
    environment: dict[str, str], interval: float | None
) -> None:
    assert watchdog_interval(environment, 7) == interval


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "x", "²", "9" * 21, " 1", "\n"])
@pytest.mark.parametrize("name", ["WATCHDOG_USEC", "WATCHDOG_PID"])
def test_a_bad_watchdog_variable_is_a_value_error(name: str, value: str) -> None:
    environment = {"WATCHDOG_USEC": "1", name: value}
    with pytest.raises(ValueError, match=f"{name} is not a positive number") as caught:
        watchdog_interval(environment, 7)
    assert str(caught.value).isprintable()


def test_reloading_gives_the_time_in_microseconds() -> None:
    assert reloading(1_234_567_890) == b"RELOADING=1\nMONOTONIC_USEC=1234567"


# ---- a program under systemd ----


@pytest.mark.parametrize("abstract", [False, True])
async def test_a_program_reports_ready_reloading_and_stopping(
    abstract: bool, tmp_path: Path
) -> None:
    path = f"@trisock-{os.getpid()}" if abstract else tmp_path / "notify"
    with systemd(path) as manager:
        async with program("trisock.run(listener, echo)", NOTIFY_SOCKET=manager.path) as running:
            pid = running.process.pid
            assert await manager.receive(pid) == b"READY=1"
            asked = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            running.process.send_signal(signal.SIGHUP)
            first, second = (await manager.receive(pid)).split(b"\n")
            assert first == b"RELOADING=1"
            assert second.startswith(b"MONOTONIC_USEC=")
            answered = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
            assert asked <= int(second.partition(b"=")[2]) <= answered
            assert await manager.receive(pid) == b"READY=1"
            running.ask_to_stop()
            assert await manager.receive(pid) == b"STOPPING=1"
            await running.stop()
        assert manager.silent()


@pytest.mark.needs("systemd-notify")
async def test_messages_are_those_of_systemd_notify(manager: Systemd) -> None:
    service_manager = ServiceManager(os.environ)
    for message in (READY, STOPPING, WATCHDOG, reloading(5000)):
        await trio.run_process(["systemd-notify", "--no-block", *message.decode().split("\n")])
        theirs = await manager.receive()
        await service_manager.notify(message)
        assert await manager.receive(os.getpid()) == theirs == message


async def test_ready_is_sent_when_the_block_ends(manager: Systemd) -> None:
    async def stop() -> None:
        assert await manager.receive() == b"READY=1"
        service.stop()

    async with trisock.open_service() as service:
        await service.bind(0, echo, host="127.0.0.1")
        service.nursery.start_soon(stop)
        await trio.testing.wait_all_tasks_blocked()
        assert manager.silent()
    assert await manager.receive() == b"STOPPING=1"
    assert manager.silent()


async def test_a_stopped_service_never_reports_ready(manager: Systemd) -> None:
    async with trisock.open_service() as service:
        service.stop()
    assert await manager.receive() == b"STOPPING=1"
    assert manager.silent()


async def test_stopping_the_only_server_is_reported_immediately(manager: Systemd) -> None:
    told = []

    async def stop() -> None:
        assert await manager.receive() == b"READY=1"
        async with await trisock.connect("127.0.0.1", server.port) as client:
            await client.send(b"x")
            await client.recv()
            server.stop()
            assert await manager.receive() == b"STOPPING=1"
            told.append(server._closed.is_set())

    async with trisock.open_service() as service:
        server = await service.bind(0, echo, host="127.0.0.1")
        service.nursery.start_soon(stop)
    assert told == [False]


async def test_the_watchdog_is_fed_while_the_event_loop_runs(
    manager: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
    async with trisock.open_service() as service:
        for _ in range(3):
            assert await manager.receive() == b"WATCHDOG=1"
        service.stop()


async def test_another_processs_watchdog_is_not_fed(
    manager: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WATCHDOG_USEC", "1000")
    monkeypatch.setenv("WATCHDOG_PID", str(os.getpid() + 1))
    async with trisock.open_service() as service:
        service.stop()
    assert await manager.receive() == b"STOPPING=1"
    assert manager.silent()


async def test_a_forked_child_tells_systemd_nothing(manager: Systemd) -> None:
    service_manager = ServiceManager(os.environ)
    run_in_child(lambda: _run_by_hand(service_manager.notify(READY)))
    assert manager.silent()
    await service_manager.notify(READY)
    assert not manager.silent()


def _run_by_hand(coroutine: Any) -> None:
    """Run up to the first checkpoint, because Trio does not run in a forked child."""
    coroutine.send(None)
    coroutine.close()


# ---- systemd fails ----


async def test_a_program_continues_if_systemd_is_gone(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    service_manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    await service_manager.notify(READY)
    await service_manager.notify(READY)
    [record] = logged(log, logging.WARNING)  # only the first of successive failures
    why = f"cannot notify systemd at {tmp_path}/gone: [Errno 2] No such file or directory"
    assert record.getMessage() == why
    with systemd(tmp_path / "gone") as manager:
        await service_manager.notify(READY)
        assert await manager.receive() == b"READY=1"
    await service_manager.notify(READY)
    assert len(logged(log, logging.WARNING)) == 2


def fill(manager: Systemd) -> None:
    """Fill the queue of messages."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
        other.setblocking(False)
        other.connect(manager.path)
        with pytest.raises(BlockingIOError):
            while True:
                other.send(b"X")


async def test_a_full_queue_delays_a_stop_for_one_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    async def stop_when_full() -> None:
        assert await manager.receive() == b"READY=1"
        fill(manager)
        service.stop()

    with systemd(tmp_path / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        async with trisock.open_service() as service:
            service.nursery.start_soon(stop_when_full)
    assert trio.current_time() == pytest.approx(1)


async def test_a_full_queue_delays_a_message_for_five_seconds(
    tmp_path: Path, log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    with systemd(tmp_path / "notify") as manager:
        service_manager = ServiceManager({"NOTIFY_SOCKET": manager.path})
        fill(manager)
        began = trio.current_time()
        await service_manager.notify(READY)
        assert trio.current_time() - began == pytest.approx(5)
        [record] = logged(log, logging.WARNING)
        why = "it has read no messages for 5 seconds"
        assert record.getMessage() == f"cannot notify systemd at {manager.path}: {why}"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(service_manager.notify, READY)
            while await manager.receive() != b"READY=1":
                pass


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"NOTIFY_SOCKET": "vsock:\n"}, r"NOTIFY_SOCKET is not a Unix socket: vsock:\n"),
        (
            {"NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "\n"},
            r"WATCHDOG_USEC is not a positive number: \n",
        ),
    ],
)
def test_a_bad_variable_of_systemd_is_logged_on_one_line(
    environment: dict[str, str], words: str, log: pytest.LogCaptureFixture
) -> None:
    ServiceManager(environment)
    assert [each.getMessage() for each in logged(log, logging.WARNING)] == [words]
