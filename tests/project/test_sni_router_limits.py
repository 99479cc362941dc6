"""examples/sni_router.py: no tunnel holds a slot for longer than it is used."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

import trisock
from helpers.client_hellos import client_hello
from helpers.examples import sni_router
from helpers.pairs import read_all
from trisock import Socket

HELLO = client_hello("any.example")
SLOTS = 5


@pytest.fixture(autouse=True)
def _short_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sni_router, "IDLE_TIMEOUT", 1, raising=False)
    monkeypatch.setattr(sni_router, "LAST_TIMEOUT", 0.3, raising=False)


@asynccontextmanager
async def routing(
    handler: Callable[[Socket], Awaitable[None]],
) -> AsyncIterator[trisock.Server]:
    """Run a router of few slots in front of a backend."""
    async with trio.open_nursery() as nursery:
        backend = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        router = sni_router.Router({}, ("127.0.0.1", backend.port))
        server = await trisock.bind(
            nursery, 0, router.handle, host="127.0.0.1", max_connections=SLOTS
        )
        try:
            with trio.fail_after(20):
                yield server
        finally:
            for each in (server, backend):
                each.stop(grace=0)


async def connect(server: trisock.Server) -> Socket:
    sock = await trisock.connect("127.0.0.1", server.port)
    await sock.send(HELLO)
    return sock


async def give_up_silent_clients(sock: Socket) -> None:
    await sock.recv_exactly(len(HELLO))
    with trio.move_on_after(0.3):
        await sock.send(await sock.recv())


async def stay_silent(sock: Socket) -> None:
    await trio.sleep_forever()


async def end_and_read(sock: Socket) -> None:
    await sock.send_eof()
    await read_all(sock)


async def test_half_ended_tunnels_give_their_slots_back() -> None:
    async with routing(give_up_silent_clients) as server, AsyncExitStack() as stack:
        for _ in range(SLOTS):
            stack.callback((await connect(server)).abort)
        client = await connect(server)
        stack.callback(client.abort)
        await client.send(b"x")
        assert await client.recv() == b"x"


async def test_a_backend_that_goes_on_after_the_client_has_a_limit() -> None:
    async with routing(stay_silent) as server, AsyncExitStack() as stack:
        client = await connect(server)
        stack.callback(client.abort)
        await client.send_eof()
        assert await client.recv() == b""


async def test_a_client_that_goes_on_after_the_backend_has_a_limit() -> None:
    async with routing(end_and_read) as server, AsyncExitStack() as stack:
        client = await connect(server)
        stack.callback(client.abort)
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await client.send(b"x")
                await trio.sleep(0.05)


async def test_a_tunnel_without_a_byte_ends() -> None:
    async with routing(stay_silent) as server, AsyncExitStack() as stack:
        client = await connect(server)
        stack.callback(client.abort)
        assert await client.recv() == b""
