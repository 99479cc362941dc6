"""The example sni_router: idle and half-closed tunnels free their slots."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio
import trio.testing

import trisock
from helpers.client_hellos import client_hello
from helpers.examples import sni_router
from helpers.pairs import closing, read_all
from helpers.server import connect
from trisock import Socket
from trisock.testing import serving

HELLO = client_hello("any.example")
SLOTS = 5
IDLE_TIMEOUT = 10  # seconds of an autojump clock


@pytest.fixture
def jumping_clock(monkeypatch: pytest.MonkeyPatch) -> trio.testing.MockClock:
    """Set a short timeout. Return a clock that lets bytes in flight arrive before it jumps."""
    monkeypatch.setattr(sni_router, "IDLE_TIMEOUT", IDLE_TIMEOUT)
    return trio.testing.MockClock(autojump_threshold=0.05)


@asynccontextmanager
async def routing(handler: Callable[[Socket], Awaitable[None]]) -> AsyncIterator[trisock.Server]:
    """Run a router with few slots in front of a backend."""
    async with serving(handler) as backend:
        router = sni_router.Router({}, ("127.0.0.1", backend.server.port))
        async with serving(router.handle, max_connections=SLOTS) as s:
            yield s.server
            s.server.stop(grace=0)
            backend.server.stop(grace=0)


@asynccontextmanager
async def tunnel(server: trisock.Server) -> AsyncIterator[Socket]:
    """Connect through the router. Abort the client on exit."""
    async with closing(client := await connect(server)):
        await client.send(HELLO)
        yield client


async def give_up_silent_clients(sock: Socket) -> None:
    await sock.recv_exactly(len(HELLO))
    with trio.move_on_after(1):
        await sock.send(await sock.recv())


async def stay_silent(sock: Socket) -> None:
    await trio.sleep_forever()


async def end_and_read(sock: Socket) -> None:
    await sock.send_eof()
    await read_all(sock)


async def test_half_closed_tunnels_free_their_slots(jumping_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    async with routing(give_up_silent_clients) as server, AsyncExitStack() as stack:
        for _ in range(SLOTS):
            await stack.enter_async_context(tunnel(server))
        async with tunnel(server) as client:
            await client.send(b"x")
            assert await client.recv() == b"x"
            assert trio.current_time() - start == pytest.approx(IDLE_TIMEOUT + 1, abs=1)


async def test_router_closes_a_silent_backend_after_the_clients_eof(
    jumping_clock: trio.testing.MockClock,
) -> None:
    start = trio.current_time()
    async with routing(stay_silent) as server, tunnel(server) as client:
        await client.send_eof()
        assert await client.recv() == b""
        assert trio.current_time() - start == pytest.approx(IDLE_TIMEOUT, abs=1)


async def test_router_closes_a_silent_client_after_the_backends_eof(
    jumping_clock: trio.testing.MockClock,
) -> None:
    start = trio.current_time()
    async with routing(end_and_read) as server, tunnel(server) as client:
        assert await client.recv() == b""
        for _ in range(IDLE_TIMEOUT):  # a client that still sends is not silent
            await client.send(b"x")
            await trio.sleep(2)
        await trio.sleep(IDLE_TIMEOUT)
        with pytest.raises(trio.BrokenResourceError):
            for _ in range(100):
                await client.send(b"x")
                await trio.sleep(0.1)
        assert trio.current_time() - start < 5 * IDLE_TIMEOUT


async def test_router_closes_an_idle_tunnel(jumping_clock: trio.testing.MockClock) -> None:
    start = trio.current_time()
    async with routing(stay_silent) as server, tunnel(server) as client:
        assert await client.recv() == b""
        assert trio.current_time() - start == pytest.approx(IDLE_TIMEOUT, abs=1)
