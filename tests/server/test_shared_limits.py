"""max_connections as a trio.CapacityLimiter: shared by servers, and changed at run time."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.server import bound, chat, connect
from trisock import Socket
from trisock._server.slots import Slots


@contextlib.asynccontextmanager
async def two_servers(
    handler: Any, limiter: trio.CapacityLimiter
) -> AsyncIterator[list[trisock.Server]]:
    async with (
        bound(handler, host="127.0.0.1", max_connections=limiter) as one,
        bound(handler, host="127.0.0.1", max_connections=limiter) as two,
    ):
        yield [one, two]


async def answer_an_unread_request(sock: Socket) -> None:
    await trio.lowlevel.wait_readable(sock.fileno())
    await sock.send(b"bye")


async def test_servers_with_the_same_limiter_share_its_slots() -> None:
    limiter = trio.CapacityLimiter(1)
    async with two_servers(chat, limiter) as (one, two):
        first, second = await connect(one), await connect(two)
        assert await first.recv() == b"hi\n"
        await trio.testing.wait_all_tasks_blocked()
        assert two.stats().accepted == 0
        await first.close()
        assert await second.recv() == b"hi\n"
        await second.close()
    assert limiter.borrowed_tokens == 0


async def test_the_limit_may_be_raised_at_run_time() -> None:
    limiter = trio.CapacityLimiter(1)
    async with bound(chat, host="127.0.0.1", max_connections=limiter) as server:
        first, second = await connect(server), await connect(server)
        assert await first.recv() == b"hi\n"
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 1
        limiter.total_tokens = 2
        assert await second.recv() == b"hi\n"
        limiter.total_tokens = 1
        third = await connect(server)
        await first.close()
        await trio.testing.wait_all_tasks_blocked()
        assert server.stats().accepted == 2
        await second.close()
        assert await third.recv() == b"hi\n"
        await third.close()


async def test_a_waiting_close_gives_a_shared_slot_to_another_server() -> None:
    limiter = trio.CapacityLimiter(1)
    async with two_servers(answer_an_unread_request, limiter) as (one, two):
        lingering, other = await connect(one), await connect(two)
        await lingering.send(b"unread")
        assert await lingering.recv() == b"bye"
        await other.send(b"unread")
        assert await other.recv() == b"bye"
        lingering.abort()
        other.abort()
    assert limiter.borrowed_tokens == 0


async def test_servers_with_the_same_limiter_share_its_closing_slots() -> None:
    limiter = trio.CapacityLimiter(1)
    async with two_servers(answer_an_unread_request, limiter) as (one, two):
        first, second, third = await connect(one), await connect(two), await connect(one)
        for client in first, second:
            await client.send(b"unread")
            assert await client.recv() == b"bye"
        await third.send(b"unread")
        await trio.testing.wait_all_tasks_blocked()
        assert one.stats().accepted == 1
        await first.close()
        assert await third.recv() == b"bye"
        second.abort()
        third.abort()


async def test_a_lowered_limit_holds_for_closing_connections_too() -> None:
    limiter = trio.CapacityLimiter(3)
    slots = Slots(limiter)
    with contextlib.ExitStack() as later:
        for _ in range(3):
            slots.acquire_nowait()
            later.enter_context(slots.while_closing())
        assert limiter.borrowed_tokens == 0
        limiter.total_tokens = 1
        slots.acquire_nowait()
        first = slots.while_closing()
        with first:
            assert limiter.borrowed_tokens == 1
            later.pop_all().close()
            assert limiter.borrowed_tokens == 0


@pytest.mark.parametrize("how", ["stop", "cancel"])
async def test_a_stop_without_grace_releases_all_slots(how: str) -> None:
    limiter = trio.CapacityLimiter(2)
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, chat, host="127.0.0.1", max_connections=limiter)
        clients = [await connect(server) for _ in range(3)]
        for client in clients[:2]:
            assert await client.recv() == b"hi\n"
        await trio.testing.wait_all_tasks_blocked()
        if how == "stop":
            server.stop(grace=0)
        else:
            nursery.cancel_scope.cancel()
    assert limiter.borrowed_tokens == 0
    for client in clients:
        client.abort()


async def test_a_close_without_a_closing_slot_releases_its_slot_at_its_end() -> None:
    limiter = trio.CapacityLimiter(1)
    slots = Slots(limiter)
    slots.acquire_nowait()
    with slots.while_closing():
        slots.acquire_nowait()
        with slots.while_closing():
            assert limiter.borrowed_tokens == 1
        assert limiter.borrowed_tokens == 0
