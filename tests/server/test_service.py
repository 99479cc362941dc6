"""open_service: several servers, tasks beside them, and how the service ends."""

from __future__ import annotations

import inspect
import signal
import socket
import sys
import threading
import typing
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import run_in_child
from helpers.resolver import Resolver
from helpers.server import connect, connected, echo
from helpers.services import no_stray_cancelled
from trisock import Service
from trisock._server import service
from trisock._server.service import BindOptions, _open_services

if sys.version_info < (3, 11):
    from exceptiongroup import BaseExceptionGroup


async def silent(sock: trisock.Socket) -> None:
    """Wait until cancelled."""
    await trio.sleep_forever()


async def stop_soon(service: Service) -> None:
    await trio.testing.wait_all_tasks_blocked()
    service.stop()


# ---- the options ----


def test_run_and_service_take_each_option_of_bind() -> None:
    parameters = inspect.signature(trisock.bind).parameters.values()
    options = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert options == set(typing.get_type_hints(BindOptions))


def test_run_takes_the_arguments_of_open_service() -> None:
    run = inspect.signature(trisock.run).parameters
    for name, parameter in inspect.signature(trisock.open_service).parameters.items():
        assert run[name] == parameter


# ---- the life of a service ----


async def test_background_tasks_run_until_all_servers_have_closed() -> None:
    events = []

    async def beside() -> None:
        try:
            await trio.sleep_forever()
        finally:
            events.append("cancelled")

    async with trio.open_nursery() as nursery:
        async with trisock.open_service() as service:
            service.nursery.start_soon(beside)
            servers = [await service.bind(0, echo, host="127.0.0.1") for _ in range(2)]
            client = await connect(servers[1])

            async def stop_and_leave() -> None:
                await stop_soon(service)
                await servers[0].wait_closed()
                await trio.testing.wait_all_tasks_blocked()
                events.append("leaves")
                await client.close()

            nursery.start_soon(stop_and_leave)
        assert events == ["leaves", "cancelled"]


async def test_a_service_without_servers_waits_for_the_stop() -> None:
    stopped = []

    async def stop() -> None:
        await stop_soon(service)
        stopped.append(True)
        await trio.sleep_forever()

    async with trisock.open_service() as service:
        service.nursery.start_soon(stop)
    assert stopped


async def test_a_service_ends_when_each_server_was_stopped() -> None:
    async with trisock.open_service(grace=None) as service:
        first, second = [await service.bind(0, echo, host="127.0.0.1") for _ in range(2)]
        first.stop()
        await first.wait_closed()

        async def stop() -> None:
            await trio.testing.wait_all_tasks_blocked()
            assert not second.closing.is_set()
            second.stop()

        service.nursery.start_soon(stop)
    assert second.closing.is_set()


async def test_a_service_ends_if_its_servers_end_before_the_block() -> None:
    async with trisock.open_service() as service:
        server = await service.bind(0, echo, host="127.0.0.1")
        server.stop()
        await server.wait_closed()
        await trio.testing.wait_all_tasks_blocked()
        replaced = await service.bind(0, echo, host="127.0.0.1")  # still possible
        replaced.stop()
        await replaced.wait_closed()


async def test_service_stop_uses_the_times_of_open_service(
    jumping_clock: trio.testing.MockClock,
) -> None:
    began = 0.0
    async with trisock.open_service(grace=5, delay=7) as service:
        server = await service.bind(0, silent, host="127.0.0.1")
        async with connected(server):
            began = trio.current_time()
            service.stop()
            assert not server.ready
            await server.closing.wait()
            assert trio.current_time() - began == pytest.approx(7, abs=1)
            await server.wait_closed()
            assert trio.current_time() - began == pytest.approx(12, abs=1)


async def test_a_second_stop_can_only_shorten_the_grace(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with trisock.open_service(grace=None) as service:
        server = await service.bind(0, silent, host="127.0.0.1")
        async with connected(server):
            began = trio.current_time()
            service.stop()
            service.stop(grace=5)
            service.stop(grace=100)
            await server.wait_closed()
            assert trio.current_time() - began == pytest.approx(5, abs=1)


async def test_service_stop_with_no_grace_cancels_handlers() -> None:
    async with trisock.open_service(delay=1000) as service:
        server = await service.bind(0, silent, host="127.0.0.1")
        async with connected(server):
            service.stop(grace=0, delay=0)
            await server.wait_closed()


async def test_service_stop_checks_its_arguments() -> None:
    async with trisock.open_service() as service:
        for arguments in ({"grace": -1}, {"delay": -1}):
            with pytest.raises(ValueError, match="must be 0 or more"):
                service.stop(**arguments)
        with pytest.raises(TypeError, match="not None"):
            service.stop(delay=None)  # type: ignore[arg-type]
        service.stop()


async def test_cancelling_the_service_cancels_handlers_without_grace() -> None:
    with trio.CancelScope() as scope:
        async with trisock.open_service() as service:
            server = await service.bind(0, silent, host="127.0.0.1")
            async with connected(server):
                scope.cancel()
                await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    with pytest.raises(ConnectionRefusedError):
        await connect(server)


@pytest.mark.parametrize("in_block", [False, True])
async def test_cancelling_a_services_nursery_ends_it_without_an_error(in_block: bool) -> None:
    async def cancel() -> None:
        await trio.testing.wait_all_tasks_blocked()
        service.nursery.cancel_scope.cancel()

    with no_stray_cancelled():
        async with trisock.open_service() as service:
            server = await service.bind(0, echo, host="127.0.0.1")
            service.nursery.start_soon(cancel)
            if in_block:
                await trio.sleep_forever()
        assert server.closing.is_set()


# ---- bind ----


async def test_bind_after_the_stop_is_a_runtime_error() -> None:
    async with trisock.open_service() as service:
        service.stop()
        with pytest.raises(RuntimeError, match="this service was stopped"):
            await service.bind(0, echo)


async def test_bind_after_the_end_is_a_runtime_error() -> None:
    async with trisock.open_service() as service:
        service.stop()
    with pytest.raises(RuntimeError, match="this service was stopped"):
        await service.bind(0, echo)


async def test_a_stop_while_bind_looks_up_the_host_leaves_nothing_listening() -> None:
    class Stopping(Resolver):
        async def getaddrinfo(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            service.stop()
            return await super().getaddrinfo(*args, **kwargs)  # type: ignore[arg-type]

    trio.socket.set_custom_hostname_resolver(Stopping(name=["127.0.0.1"]))
    with socket.create_server(("127.0.0.1", 0)) as reserved:
        port = reserved.getsockname()[1]
    async with trisock.open_service() as service:
        with pytest.raises(RuntimeError, match="this service was stopped"):
            await service.bind(port, echo, host="name")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", port)


async def test_a_service_binds_with_tls(
    server_tls: trisock.ServerTLS, client_tls: trisock.ClientTLS
) -> None:
    async with trisock.open_service() as service:
        server = await service.bind(0, echo, host="127.0.0.1", tls=server_tls)
        async with await connect(server, tls=client_tls) as client:
            await client.send(b"hello")
            assert await client.recv() == b"hello"
        service.stop()


async def test_every_async_call_of_a_service_is_a_cancel_point() -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        async with trisock.open_service():
            await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught
    async with trisock.open_service() as service:
        with trio.CancelScope() as scope:
            scope.cancel()
            await service.bind(0, echo)
        assert scope.cancelled_caught
        service.stop()


# ---- errors ----


async def test_an_error_of_the_block_is_raised_outside_a_group() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        async with trisock.open_service() as service:
            server = await service.bind(0, silent, host="127.0.0.1")
            async with connected(server):
                raise ZeroDivisionError
    assert caught.value.__context__ is None
    assert not _open_services


async def test_a_group_of_the_block_is_raised_unchanged() -> None:
    group = BaseExceptionGroup("mine", [KeyError(), ValueError()])
    with pytest.raises(BaseExceptionGroup) as caught:
        async with trisock.open_service():
            raise group
    assert caught.value is group


async def test_an_error_of_a_background_task_is_in_a_group() -> None:
    async def fail() -> None:
        raise KeyError

    with pytest.raises(BaseExceptionGroup) as caught:
        async with trisock.open_service() as service:
            await service.bind(0, echo, host="127.0.0.1")
            service.nursery.start_soon(fail)
    assert caught.group_contains(KeyError, depth=1)
    assert len(caught.value.exceptions) == 1


async def test_errors_of_block_and_task_come_in_one_group() -> None:
    async def fail() -> None:
        raise KeyError

    with pytest.raises(BaseExceptionGroup) as caught:
        async with trisock.open_service() as service:
            service.nursery.start_soon(fail)
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            raise ZeroDivisionError
    assert {type(each) for each in caught.value.exceptions} == {KeyError, ZeroDivisionError}


async def test_an_error_while_the_service_waits_is_in_a_group() -> None:
    async def fail() -> None:
        await trio.testing.wait_all_tasks_blocked()
        raise KeyError

    with pytest.raises(BaseExceptionGroup) as caught:
        async with trisock.open_service() as service:
            service.nursery.start_soon(fail)
    assert caught.group_contains(KeyError, depth=1)


# ---- one service in a program ----


async def test_a_second_service_at_the_same_time_is_a_runtime_error() -> None:
    async def open_one() -> None:
        async with trisock.open_service() as service:
            service.stop()

    async with trisock.open_service() as service:
        handlers = signal.getsignal(signal.SIGTERM)
        with pytest.raises(RuntimeError, match="another service runs in this program"):
            await open_one()
        with pytest.raises(RuntimeError, match="another service runs in this program"):
            await trio.to_thread.run_sync(trio.run, open_one)
        with pytest.raises(RuntimeError, match="another service runs in this program"):
            await trio.to_thread.run_sync(trisock.run, 0, echo)
        assert signal.getsignal(signal.SIGTERM) == handlers
        service.stop()
    await open_one()  # services one after the other are allowed


def test_a_child_forked_in_a_thread_may_open_its_own_service() -> None:
    def serve_in_child() -> None:
        signal.set_wakeup_fd(-1)  # remove the parent's: Trio would warn

        async def open_one() -> None:
            async with trisock.open_service() as service:
                service.stop()

        trio.run(open_one)

    async def main() -> None:
        async with trisock.open_service() as service:
            thread = threading.Thread(target=lambda: run_in_child(serve_in_child))
            thread.start()
            await trio.to_thread.run_sync(thread.join)
            service.stop()

    trio.run(main)


async def test_a_forked_childs_stop_leaves_the_parent_alone() -> None:
    async with trisock.open_service() as service:
        server = await service.bind(0, echo, host="127.0.0.1")
        run_in_child(service.stop)
        async with await connect(server) as client:
            await client.send(b"still here")
            assert await client.recv() == b"still here"
        service.stop()


# ---- signals inside Trio ----


async def test_a_signal_cancels_a_block_that_still_runs() -> None:
    with no_stray_cancelled():
        async with trisock.open_service() as service:
            server = await service.bind(0, echo, host="127.0.0.1")
            signal.raise_signal(signal.SIGTERM)
            await trio.sleep_forever()
        assert server.closing.is_set()


async def test_bind_after_a_signal_is_cancelled_in_the_block() -> None:
    with no_stray_cancelled():
        async with trisock.open_service() as service:
            signal.raise_signal(signal.SIGTERM)
            with trio.CancelScope(shield=True):
                await trio.testing.wait_all_tasks_blocked()
            await service.bind(0, echo, host="127.0.0.1")  # outside the block, a RuntimeError


async def test_a_signal_during_bind_raises_no_error() -> None:
    class Slow(Resolver):
        async def getaddrinfo(self, *args: object, **kwargs: object) -> object:  # type: ignore[override]
            signal.raise_signal(signal.SIGINT)
            await trio.sleep_forever()

    trio.socket.set_custom_hostname_resolver(Slow())
    with no_stray_cancelled():
        async with trisock.open_service() as service:
            server = await service.bind(0, echo, host="127.0.0.1")
            async with connected(server):
                await service.bind(0, echo, host="name")
                raise AssertionError("bind was not cancelled")
        assert server.closing.is_set()


async def test_a_signal_just_after_bind_raises_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bind(*args: Any, **options: Any) -> trisock.Server:
        server = await trisock.bind(*args, **options)
        signal.raise_signal(signal.SIGTERM)
        with trio.CancelScope(shield=True):
            await trio.testing.wait_all_tasks_blocked()
        return server

    monkeypatch.setattr(service, "bind", bind)
    with no_stray_cancelled():
        async with trisock.open_service() as opened:
            await opened.bind(0, echo, host="127.0.0.1")
            raise AssertionError("bind was not cancelled")


@pytest.mark.parametrize("stop", [Service.stop, lambda _: signal.raise_signal(signal.SIGTERM)])
async def test_a_service_gives_handlers_their_grace(stop: Callable[[Service], object]) -> None:
    async with trio.open_nursery() as nursery:
        async with trisock.open_service() as service:
            server = await service.bind(0, echo, host="127.0.0.1")

            async def client() -> None:
                async with connected(server) as sock:
                    await trio.testing.wait_all_tasks_blocked()
                    stop(service)
                    await server.closing.wait()
                    await sock.send(b"hello")
                    assert await sock.recv() == b"hello"

            nursery.start_soon(client)
