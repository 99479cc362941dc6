"""SIGHUP reloads a service: its certificates, then whatever ``on_reload`` does."""

from __future__ import annotations

import logging
import signal
import ssl
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pem import pems
from helpers.server import echo, logged
from helpers.services import Systemd, checked_service, program, systemd
from trisock import ServerTLS, Service
from trisock.testing import Authority


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
    one, two = ServerTLS(certificate), ServerTLS(certificate)  # equal, but two objects
    calls: list[Service] = []

    async def check() -> None:
        await reloaded_once(manager)
        assert [each is one or each is two for each in reloads.roles] == [False, True, True]
        assert reloads.roles[0] == one  # bind made this role from a certificate
        assert calls == [service]

    async with checked_service(check, reload=[one, two, one], on_reload=calls.append) as service:
        await service.bind(0, echo, host="127.0.0.1")
        await service.bind(0, echo, host="127.0.0.1", tls=certificate)
        await service.bind(0, echo, host="127.0.0.1", tls=one)
        reloads.roles.clear()


async def test_sighup_reloads_the_role_of_set_tls(
    manager: Systemd, reloads: Reloads, server_tls: ServerTLS, authority: Authority
) -> None:
    other = authority.server_tls()

    async def check() -> None:
        await reloaded_once(manager)
        assert [each is other for each in reloads.roles] == [True]

    async with checked_service(check) as service:
        server = await service.bind(0, echo, host="127.0.0.1", tls=server_tls)
        server.set_tls(other)


async def test_a_context_of_the_program_is_not_reloaded(
    manager: Systemd, reloads: Reloads, authority: Authority
) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.certificate("localhost").load_into(context)

    async def check() -> None:
        await reloaded_once(manager)
        assert reloads.roles == []

    async with checked_service(check) as service:
        await service.bind(0, echo, host="127.0.0.1", tls=context)


async def test_a_server_that_has_closed_is_not_reloaded(
    manager: Systemd, reloads: Reloads, server_tls: ServerTLS
) -> None:
    async def check() -> None:
        await reloaded_once(manager)
        assert reloads.roles == []

    async with checked_service(check) as service:
        server = await service.bind(0, echo, host="127.0.0.1", tls=server_tls)
        await service.bind(0, echo, host="127.0.0.1")
        server.stop()
        await server.wait_closed()


class Unhashable(Exception):
    """An unhashable exception, as an exception that is a dataclass would be."""

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
async def test_errors_during_a_reload_are_logged(
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
        assert certificate.getMessage() == (
            "SIGHUP: cannot reload the certificate of localhost; the old one stays in use: "
            "no such file"
        )
        assert certificate.exc_info
        assert function.getMessage() == "SIGHUP: on_reload failed; the service goes on"
        assert function.exc_info

    async with checked_service(check, reload=[server_tls], on_reload=on_reload):
        pass


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


async def test_signals_during_a_reload_cause_one_more_reload(manager: Systemd) -> None:
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

    async with checked_service(check, on_reload=on_reload):
        pass


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
    assert manager.silent()  # no READY=1 after the stop


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


RELOADED = """
tls = trisock.ServerTLS(trisock.Certificate.from_files("chain.pem", "key.pem"))
trisock.run(listener, echo, tls=tls)
"""


async def test_sighup_reads_renewed_files(
    tmp_path: Path, authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def renew() -> bytes:
        chain, key = pems(authority, "localhost")
        Path("chain.pem").write_bytes(chain)
        Path("key.pem").write_bytes(key)
        return ssl.PEM_cert_to_DER_cert(chain.decode())

    async def connect() -> trisock.Socket:
        tls = authority.client_tls("localhost")
        return await trisock.connect("127.0.0.1", running.port, tls=tls)

    def certificate(sock: trisock.Socket) -> bytes | None:
        return sock.tls.peer_certificate if sock.tls else None

    first = renew()
    with systemd(tmp_path / "notify") as manager:
        async with program(RELOADED, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            async with await connect() as before:
                assert certificate(before) == first
                second = renew()
                running.process.send_signal(signal.SIGHUP)
                assert (await manager.receive()).startswith(b"RELOADING=1")
                assert await manager.receive() == b"READY=1"
                async with await connect() as after:
                    assert certificate(after) == second
                await before.send(b"still there\n")
                assert await before.recv_line() == b"still there"
            await running.stop()


async def test_a_failed_reload_is_logged_without_traceback(
    manager: Systemd, pem: Path, log: pytest.LogCaptureFixture
) -> None:
    role = ServerTLS(trisock.Certificate.from_files(pem / "chain.pem", pem / "key.pem"))
    (pem / "key.pem").unlink()

    async def check() -> None:
        await reloaded_once(manager)

    async with checked_service(check, reload=[role]):
        pass
    failed, summary = log.records
    assert failed.levelno == logging.ERROR
    assert f"{pem / 'key.pem'}" in failed.getMessage()
    assert failed.exc_info is None
    assert summary.getMessage().endswith(" and 1 could not be reloaded")


async def test_a_reload_logs_how_many_certificates_changed(
    manager: Systemd, server_tls: ServerTLS, pem: Path, log: pytest.LogCaptureFixture
) -> None:
    renewed = ServerTLS(trisock.Certificate.from_files(pem / "chain.pem", pem / "key.pem"))
    chain, key = pems(Authority(), "localhost")
    (pem / "chain.pem").write_bytes(chain)
    (pem / "key.pem").write_bytes(key)

    async def check() -> None:
        await reloaded_once(manager)

    async with checked_service(check, reload=[server_tls, renewed]):
        pass
    expected = "SIGHUP: 1 of 2 TLS roles have a new certificate, and 0 could not be reloaded"
    assert [record.getMessage() for record in log.records] == [expected]
