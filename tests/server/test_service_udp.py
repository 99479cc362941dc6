"""Service.open_udp: a UDP server that stops as the other servers do."""

from __future__ import annotations

import inspect
import signal
import typing
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.forks import run_in_child
from helpers.resolver import Resolver
from helpers.server import echo
from helpers.services import no_stray_cancelled, program
from trisock import Datagram, UDPSocket
from trisock._server.service import UDPOptions


class EchoServer:
    """Answers datagrams, at most two at a time, once the test allows it."""

    def __init__(self) -> None:
        self.allowed = trio.Event()
        self.limiter = trio.CapacityLimiter(2)
        self.answered = 0

    async def serve(self, udp: UDPSocket) -> None:
        async with udp, trio.open_nursery() as nursery:
            async for query in udp:
                await nursery.start(self.answer, udp, query)

    async def answer(
        self, udp: UDPSocket, query: Datagram, task_status: trio.TaskStatus[None]
    ) -> None:
        async with self.limiter:
            task_status.started()
            await self.allowed.wait()
            await udp.send(query.data, query.address, source=query.destination)
            self.answered += 1


@pytest.fixture
async def client() -> AsyncIterator[UDPSocket]:
    async with await trisock.open_udp(host="127.0.0.1") as client:
        yield client


def test_open_udp_of_a_service_takes_each_option() -> None:
    parameters = inspect.signature(trisock.open_udp).parameters.values()
    options = {each.name for each in parameters if each.kind is each.KEYWORD_ONLY}
    assert options == set(typing.get_type_hints(UDPOptions))


async def test_datagrams_that_arrived_before_a_stop_are_answered(client: UDPSocket) -> None:
    server = EchoServer()
    async with trisock.open_service() as service:
        udp = await service.open_udp(host="127.0.0.1")
        service.nursery.start_soon(server.serve, udp)
        for number in range(4):  # two datagrams are still in the kernel at the stop
            await client.send(bytes([number]), udp.getlocal())
        await trio.testing.wait_all_tasks_blocked()
        service.stop()
        await trio.testing.wait_all_tasks_blocked()
        assert udp.isopen()
        server.allowed.set()
    assert not udp.isopen()
    assert {(await client.recv()).data[0] for _ in range(4)} == {0, 1, 2, 3}


async def test_the_end_of_the_grace_cancels_unfinished_answers(
    client: UDPSocket, jumping_clock: trio.testing.MockClock
) -> None:
    server = EchoServer()
    async with trisock.open_service(grace=5, delay=7) as service:
        udp = await service.open_udp()
        service.nursery.start_soon(server.serve, udp)
        await client.send(b"x", ("127.0.0.1", udp.getlocal().port))
        await trio.testing.wait_all_tasks_blocked()
        began = trio.current_time()
        service.stop()
        await trio.sleep(6)
        await client.send(b"still received", ("127.0.0.1", udp.getlocal().port))
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert server.limiter.borrowed_tokens == 2
    assert trio.current_time() - began == pytest.approx(12, abs=1)
    assert not udp.isopen()
    assert server.answered == 0


async def test_a_second_stop_can_only_shorten_the_grace(
    jumping_clock: trio.testing.MockClock,
) -> None:
    async with trisock.open_service(grace=None) as service:
        udp = await service.open_udp()  # not closed by the program
        began = trio.current_time()
        service.stop()
        service.stop(grace=5)
        service.stop(grace=100)
    assert trio.current_time() - began == pytest.approx(5, abs=1)
    assert not udp.isopen()


async def test_no_grace_closes_the_socket_at_once() -> None:
    async with trisock.open_service() as service:
        udp = await service.open_udp()
        service.nursery.start_soon(EchoServer().serve, udp)
        service.stop(grace=0)
    assert not udp.isopen()


async def test_a_service_ends_when_the_program_closes_its_socket() -> None:
    async with trisock.open_service(grace=None) as service:
        server = await service.bind(0, echo, host="127.0.0.1")
        udp = await service.open_udp()
        server.stop()
        await server.wait_closed()
        await trio.testing.wait_all_tasks_blocked()

        async def close() -> None:
            await trio.testing.wait_all_tasks_blocked()
            assert udp.isopen()
            await udp.close()

        service.nursery.start_soon(close)


async def test_the_service_takes_a_socket_that_is_open_already(client: UDPSocket) -> None:
    server = EchoServer()
    server.allowed.set()
    udp = trisock.open_udp_nowait(host="127.0.0.1")
    async with trisock.open_service() as service:
        with trio.testing.assert_checkpoints():
            assert await service.open_udp(udp) is udp
        with pytest.raises(TypeError, match="a UDPSocket is open already, so it takes no options"):
            await service.open_udp(udp, broadcast=True)
        service.nursery.start_soon(server.serve, udp)
        await client.send(b"x", udp.getlocal())
        assert (await client.recv()).data == b"x"
        service.stop()
    assert not udp.isopen()


async def test_a_stopped_service_opens_no_socket() -> None:
    async with trisock.open_service() as service:
        service.stop()
        with pytest.raises(RuntimeError, match="this service was stopped"):
            await service.open_udp()


async def test_a_stop_during_the_lookup_leaves_nothing_open() -> None:
    class StoppingResolver(Resolver):
        async def getaddrinfo(self, *arguments: Any) -> Any:  # type: ignore[override]
            service.stop()
            return await super().getaddrinfo(*arguments)

    trio.socket.set_custom_hostname_resolver(StoppingResolver(name=["127.0.0.1"]))
    async with trisock.open_service() as service:
        with pytest.raises(RuntimeError, match="this service was stopped"):
            await service.open_udp(host="name")


@pytest.mark.parametrize("when", ["before", "during"])
async def test_a_stopped_service_does_not_close_a_given_socket(
    when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = trio.lowlevel.cancel_shielded_checkpoint

    async def stop() -> None:
        service.stop()
        await real()

    async with trisock.open_udp_nowait(host="127.0.0.1") as udp:
        async with trisock.open_service() as service:
            if when == "before":
                service.stop()
            with monkeypatch.context() as patch:
                patch.setattr(trio.lowlevel, "cancel_shielded_checkpoint", stop)
                with pytest.raises(RuntimeError, match="this service was stopped"):
                    await service.open_udp(udp)
        assert udp.isopen()


@pytest.mark.parametrize("how", ["error", "cancellation"])
async def test_the_end_of_the_block_closes_the_socket(how: str) -> None:
    class ProgramError(Exception):
        pass

    with no_stray_cancelled(), trio.CancelScope() as scope:
        try:
            async with trisock.open_service() as service:
                udp = await service.open_udp()
                if how == "error":
                    raise ProgramError
                scope.cancel()
        except ProgramError:
            assert how == "error"
    assert not udp.isopen()


async def test_a_child_that_stops_the_service_leaves_the_parent_serving(client: UDPSocket) -> None:
    server = EchoServer()
    server.allowed.set()
    async with trisock.open_service() as service:
        udp = await service.open_udp(host="127.0.0.1")
        service.nursery.start_soon(server.serve, udp)
        await trio.testing.wait_all_tasks_blocked()
        run_in_child(service.stop)
        await client.send(b"x", udp.getlocal())
        assert (await client.recv()).data == b"x"
        service.stop()


async def test_a_failed_open_leaves_the_service_unchanged() -> None:
    async with trisock.open_service() as service:
        udp = await service.open_udp()
        with pytest.raises(OSError, match="Address already in use"):
            await service.open_udp(udp.getlocal().port)
        service.stop(grace=0)


SERVER = """
limiter, allowed = trio.CapacityLimiter(10), trio.Event()

async def serve(udp):
    async with udp, trio.open_nursery() as nursery:
        async for query in udp:
            await nursery.start(answer, udp, query)
        say("receives no more")

async def answer(udp, query, task_status):
    async with limiter:
        task_status.started()
        say("answers")
        await allowed.wait()
        await udp.send(query.data, query.address, source=query.destination)

async def allow(task_status):
    with trio.open_signal_receiver(signal.SIGUSR1) as signals:
        task_status.started()
        async for _ in signals:
            allowed.set()

async def main():
    async with trisock.open_service() as service:
        await service.nursery.start(allow)
        udp = await service.open_udp()
        service.nursery.start_soon(serve, udp)
        say(udp.getlocal().port)
    say("ended")

trio.run(main)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_answers_be_sent(client: UDPSocket, number: int) -> None:
    async with program(SERVER) as running:
        address = ("127.0.0.1", int(await running.line()))
        await client.send(b"slow", address)
        assert await running.line() == "answers"
        running.process.send_signal(number)
        assert await running.line() == "receives no more"
        running.process.send_signal(signal.SIGUSR1)
        assert (await client.recv()).data == b"slow"
        assert await running.line() == "ended"
        assert await running.process.wait() == 0
