"""What systemd is told, over a real datagram socket, and how SIGHUP reloads a service."""

from __future__ import annotations

import logging
import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import run_in_child
from helpers.server import echo, logged
from helpers.services import Systemd, program, systemd
from trisock import ServerTLS, Service
from trisock._server.notify import (
    READY,
    STOPPING,
    WATCHDOG,
    ServiceManager,
    reloading,
    socket_address,
    watchdog_interval,
)
from trisock.testing import Authority


@pytest.fixture
def manager(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Systemd]:
    """systemd, for a service in this process."""
    with systemd(tmp_path / "notify") as manager:
        monkeypatch.setenv("NOTIFY_SOCKET", manager.path)
        yield manager


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


@pytest.mark.parametrize("value", ["", "0", "-1", "1.5", "x", "²", "9" * 21, " 1"])
@pytest.mark.parametrize("name", ["WATCHDOG_USEC", "WATCHDOG_PID"])
def test_a_bad_watchdog_variable_is_a_value_error(name: str, value: str) -> None:
    environment = {"WATCHDOG_USEC": "1", name: value}
    with pytest.raises(ValueError, match=f"{name} is not a positive number"):
        watchdog_interval(environment, 7)


def test_reloading_gives_the_time_in_microseconds() -> None:
    assert reloading(1_234_567_890) == b"RELOADING=1\nMONOTONIC_USEC=1234567"


# ---- a program under systemd ----


@pytest.mark.parametrize("abstract", [False, True])
async def test_a_program_tells_systemd_about_its_life(abstract: bool, tmp_path: Path) -> None:
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


async def test_a_service_that_was_stopped_is_never_ready(manager: Systemd) -> None:
    async with trisock.open_service() as service:
        service.stop()
    assert await manager.receive() == b"STOPPING=1"
    assert manager.silent()


async def test_a_servers_own_stop_is_told_when_it_begins(manager: Systemd) -> None:
    async def stop() -> None:
        assert await manager.receive() == b"READY=1"
        async with await trisock.connect("127.0.0.1", server.port) as client:
            await client.send(b"x")
            await client.recv()
            server.stop()
            assert await manager.receive() == b"STOPPING=1"
            assert not server._closed.is_set()

    async with trisock.open_service() as service:
        server = await service.bind(0, echo, host="127.0.0.1")
        service.nursery.start_soon(stop)


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


async def test_a_program_lives_if_systemd_is_gone(
    tmp_path: Path, log: pytest.LogCaptureFixture
) -> None:
    service_manager = ServiceManager({"NOTIFY_SOCKET": str(tmp_path / "gone")})
    await service_manager.notify(READY)
    await service_manager.notify(READY)
    [record] = logged(log, logging.WARNING)  # the first failure in a row
    assert "cannot notify systemd: [Errno 2] No such file" in record.getMessage()
    with systemd(tmp_path / "gone") as manager:
        await service_manager.notify(READY)
        assert await manager.receive() == b"READY=1"
    await service_manager.notify(READY)
    assert len(logged(log, logging.WARNING)) == 2


async def test_a_full_queue_delays_a_message_for_five_seconds(
    tmp_path: Path, log: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    with systemd(tmp_path / "notify") as manager:
        service_manager = ServiceManager({"NOTIFY_SOCKET": manager.path})
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as other:
            other.setblocking(False)
            other.connect(manager.path)
            with pytest.raises(BlockingIOError):
                while True:
                    other.send(b"X")
        began = trio.current_time()
        await service_manager.notify(READY)
        assert trio.current_time() - began == pytest.approx(5)
        assert len(logged(log, logging.WARNING)) == 1
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


# ---- reload ----


class Reloads:
    """Counts the calls of ``ServerTLS.reload``, by role."""

    def __init__(self) -> None:
        self.roles: list[ServerTLS] = []
        self.failure: BaseException | None = None


@pytest.fixture
def reloads(monkeypatch: pytest.MonkeyPatch) -> Reloads:
    reloads = Reloads()

    def reload(role: ServerTLS) -> bool:
        reloads.roles.append(role)
        if reloads.failure is not None:
            raise reloads.failure
        return True

    monkeypatch.setattr(ServerTLS, "reload", reload)
    return reloads


async def reloaded_once(manager: Systemd) -> None:
    """Raise SIGHUP, and wait until the service has reloaded."""
    assert await manager.receive() == b"READY=1"
    signal.raise_signal(signal.SIGHUP)
    assert (await manager.receive()).startswith(b"RELOADING=1\n")
    assert await manager.receive() == b"READY=1"


async def test_sighup_reloads_each_role_once(
    manager: Systemd, reloads: Reloads, authority: Authority
) -> None:
    certificate = authority.certificate("localhost")
    one, two = ServerTLS(certificate), ServerTLS(certificate)  # equal, but not the same
    calls: list[Service] = []

    async def check() -> None:
        await reloaded_once(manager)
        assert [each is one or each is two for each in reloads.roles] == [False, True, True]
        assert reloads.roles[0] == one  # from the bare certificate
        assert calls == [service]
        service.stop()

    async with trisock.open_service(reload=[one, two, one], on_reload=calls.append) as service:
        await service.bind(0, echo, host="127.0.0.1")
        await service.bind(0, echo, host="127.0.0.1", tls=certificate)
        await service.bind(0, echo, host="127.0.0.1", tls=one)
        service.nursery.start_soon(check)
        reloads.roles.clear()


async def test_a_server_that_has_closed_is_not_reloaded(
    manager: Systemd, reloads: Reloads, server_tls: ServerTLS
) -> None:
    async def check() -> None:
        await reloaded_once(manager)
        assert reloads.roles == []
        service.stop()

    async with trisock.open_service() as service:
        server = await service.bind(0, echo, host="127.0.0.1", tls=server_tls)
        await service.bind(0, echo, host="127.0.0.1")
        server.stop()
        await server.wait_closed()
        service.nursery.start_soon(check)


class Unhashable(Exception):
    """Like an exception that is a dataclass."""

    __hash__ = None  # type: ignore[assignment]


async def leave_scope_open(service: Service) -> None:
    trio.CancelScope(deadline=trio.current_time()).__enter__()
    await trio.sleep_forever()


async def raise_group(service: Service) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leave_scope_open, service)
        raise Unhashable


def fail(service: Service) -> None:
    raise Unhashable


@pytest.mark.parametrize("on_reload", [fail, raise_group, leave_scope_open])
async def test_what_a_reload_raises_is_logged(
    on_reload: Any,
    manager: Systemd,
    reloads: Reloads,
    log: pytest.LogCaptureFixture,
    server_tls: ServerTLS,
) -> None:
    reloads.failure = Unhashable("no such file")

    async def check() -> None:
        await reloaded_once(manager)
        certificate, function = logged(log, logging.ERROR)
        assert certificate.name == function.name == "trisock.server"
        assert certificate.getMessage().startswith("cannot reload a certificate")
        assert certificate.exc_info
        assert function.getMessage() == "on_reload failed"
        assert function.exc_info
        service.stop()

    async with trisock.open_service(reload=[server_tls], on_reload=on_reload) as service:
        service.nursery.start_soon(check)


@pytest.mark.parametrize("grouped", [False, True])
async def test_system_exit_of_on_reload_ends_the_service(
    grouped: bool, manager: Systemd, log: pytest.LogCaptureFixture
) -> None:
    async def on_reload(service: Service) -> None:
        async with trio.open_nursery() as nursery:
            if grouped:
                nursery.start_soon(fail_soon)
            raise SystemExit(3)

    async def fail_soon() -> None:
        raise KeyError

    with pytest.raises(BaseException) as caught:  # noqa: PT011
        async with trisock.open_service(on_reload=on_reload) as service:
            service.nursery.start_soon(reloaded_once, manager)
    assert caught.group_contains(SystemExit)
    assert len(logged(log, logging.ERROR)) == grouped


async def test_signals_during_a_reload_cause_one_more(manager: Systemd) -> None:
    calls = []

    async def on_reload(service: Service) -> None:
        calls.append(True)
        if len(calls) == 1:
            for _ in range(3):
                signal.raise_signal(signal.SIGHUP)
                await trio.testing.wait_all_tasks_blocked()

    async def check() -> None:
        await reloaded_once(manager)
        assert (await manager.receive()).startswith(b"RELOADING=1\n")
        assert await manager.receive() == b"READY=1"
        await trio.testing.wait_all_tasks_blocked()
        assert len(calls) == 2
        service.stop()

    async with trisock.open_service(on_reload=on_reload) as service:
        service.nursery.start_soon(check)


async def test_sighup_before_the_program_is_ready_waits(manager: Systemd) -> None:
    calls = []

    def on_reload(service: Service) -> None:
        calls.append(True)
        service.stop()

    async with trisock.open_service(on_reload=on_reload):
        signal.raise_signal(signal.SIGHUP)
        await trio.testing.wait_all_tasks_blocked()
        assert not calls
    assert await manager.receive() == b"READY=1"
    assert (await manager.receive()).startswith(b"RELOADING=1\n")
    assert await manager.receive() == b"STOPPING=1"
    assert manager.silent()  # a service that stops is not ready again


async def test_sighup_after_the_stop_does_nothing(manager: Systemd) -> None:
    async def check() -> None:
        async with await trisock.connect("127.0.0.1", server.port) as client:
            await client.send(b"x")
            await client.recv()
            service.stop()
            signal.raise_signal(signal.SIGHUP)
            await trio.testing.wait_all_tasks_blocked()

    async with trisock.open_service(on_reload=fail) as service:
        server = await service.bind(0, echo, host="127.0.0.1")
        service.nursery.start_soon(check)
    assert [await manager.receive() for _ in range(2)] == [b"READY=1", b"STOPPING=1"]
    assert manager.silent()
