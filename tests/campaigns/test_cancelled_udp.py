"""Cancel calls of UDP sockets at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest
import trio
import trio.testing

import trisock
from helpers.cancellation import Attempt, Call, at_every_cancel_point, covers, during
from helpers.full_buffer import full_buffer
from helpers.peers import Script
from helpers.resolver import Resolver
from helpers.waiting import is_waiting
from trisock import UDPSocket


def use_resolver() -> None:
    """Resolve ``name`` without threads: a real lookup's thread outlives a cancellation."""
    trio.socket.set_custom_hostname_resolver(Resolver(name=["127.0.0.1"]))


OPENS: dict[str, Callable[[int, str | None], Call]] = {
    "open_udp": lambda port, host: lambda: trisock.open_udp(port, host=host),
    "connect_udp": lambda port, host: lambda: trisock.connect_udp(host or "::1", port),
}


@covers(*OPENS)
@pytest.mark.parametrize("host", [None, "127.0.0.1", "name"])
@pytest.mark.parametrize("name", OPENS)
@at_every_cancel_point
async def test_a_cancelled_open_leaves_the_port_free(
    attempt: Attempt, name: str, host: str | None
) -> None:
    use_resolver()
    async with await trisock.open_udp(host=host) as udp:
        port = udp.getlocal().port
    await attempt(OPENS[name](port, host))
    assert attempt.error is None
    if not attempt.cancelled:
        attempt.value.abort()
    async with await trisock.open_udp(port, host=host):
        pass


RECEIVES: dict[str, Callable[[UDPSocket], Call]] = {
    "UDPSocket.recv": lambda udp: udp.recv,
    "UDPSocket.__anext__": lambda udp: udp.__anext__,
}


@covers(*RECEIVES)
@pytest.mark.parametrize("arrival", ["before", "during", "after stop_receiving"])
@pytest.mark.parametrize("earlier", [0, 1])  # whether the next call is a schedule point
@pytest.mark.parametrize("name", RECEIVES)
@at_every_cancel_point
async def test_a_cancelled_receive_loses_no_datagram(
    attempt: Attempt, name: str, earlier: int, arrival: str
) -> None:
    async with await trisock.open_udp() as udp:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.connect(("127.0.0.1", udp.getlocal().port))
            for _ in range(earlier):
                raw.send(b"earlier")
                assert (await udp.recv()).data == b"earlier"

            def script() -> Script:
                raw.send(b"hello")
                if arrival == "after stop_receiving":
                    udp.stop_receiving()
                yield

            steps = during(script()) if arrival == "during" else script()
            await attempt(RECEIVES[name](udp), steps)
            assert attempt.error is None
            for _ in steps:
                pass
            datagram = attempt.value or await udp.recv()
            assert datagram.data == b"hello"
            assert not is_waiting(udp)


@covers("UDPSocket.send")
@pytest.mark.parametrize("full", [0, 1, 2])
@pytest.mark.parametrize("host", ["127.0.0.1", "name"])
@pytest.mark.parametrize("earlier", [0, 1])
@at_every_cancel_point
async def test_a_cancelled_send_has_sent_nothing(
    attempt: Attempt, earlier: int, host: str, full: int
) -> None:
    use_resolver()
    async with await trisock.open_udp() as udp:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
            raw.bind(("127.0.0.1", 0))
            raw.setblocking(False)
            port = raw.getsockname()[1]
            for _ in range(earlier):
                await udp.send(b"earlier", (host, port))
                assert raw.recv(100) == b"earlier"
            with full_buffer(full):
                await attempt(lambda: udp.send(b"hello", (host, port)))
            assert attempt.error is None
            if attempt.cancelled:
                with pytest.raises(BlockingIOError):
                    raw.recv(100)
            else:
                assert raw.recv(100) == b"hello"


async def leave(udp: UDPSocket) -> None:
    async with udp:
        pass


CLOSES = {
    UDPSocket.close: "UDPSocket.close",
    UDPSocket.aclose: "UDPSocket.aclose",
    leave: "UDPSocket.__aexit__",
}


@covers(*CLOSES.values())
@pytest.mark.parametrize("close", CLOSES)
@at_every_cancel_point
async def test_a_cancelled_close_closes_the_socket_and_wakes_recv(
    attempt: Attempt, close: Callable[[UDPSocket], Awaitable[None]]
) -> None:
    udp = await trisock.open_udp()
    async with trio.open_nursery() as nursery:

        async def receive() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await udp.recv()

        nursery.start_soon(receive)
        await trio.testing.wait_all_tasks_blocked()
        await attempt(lambda: close(udp))
    assert not udp.isopen()
    async with await trisock.open_udp(udp.getlocal().port):
        pass


@covers("UDPSocket.wait_closed")
@pytest.mark.parametrize("when", ["before", "during"])
@at_every_cancel_point
async def test_a_cancelled_wait_for_the_close_changes_nothing(attempt: Attempt, when: str) -> None:
    async with await trisock.open_udp() as udp:

        def script() -> Script:
            udp.abort()
            yield

        steps = during(script()) if when == "during" else script()
        await attempt(udp.wait_closed, steps)
        assert attempt.error is None


@contextlib.asynccontextmanager
async def service() -> AsyncIterator[trisock.Service]:
    async with trisock.open_service() as service:
        yield service
        service.stop(grace=0)


@covers("Service.open_udp")
@pytest.mark.parametrize("host", [None, "127.0.0.1", "name"])
@at_every_cancel_point
async def test_a_cancelled_open_of_a_service_leaves_the_port_free(
    attempt: Attempt, host: str | None
) -> None:
    use_resolver()
    async with await trisock.open_udp(host=host) as udp:
        port = udp.getlocal().port
    async with service() as running:
        await attempt(lambda: running.open_udp(port, host=host))
        assert attempt.error is None
        if attempt.cancelled:
            async with await trisock.open_udp(port, host=host):
                pass
    async with await trisock.open_udp(port, host=host):
        pass
