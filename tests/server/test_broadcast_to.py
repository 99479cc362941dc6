"""Broadcasts to some of a server's sockets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import trio

import trisock
from helpers.server import bound, connect
from trisock import Socket


class Room:
    """A handler that records its sockets, and discards the data that they receive."""

    def __init__(self) -> None:
        self.socks: list[Socket] = []

    async def __call__(self, sock: Socket) -> None:
        self.socks.append(sock)
        await sock.send(b"hi\n")
        async for _ in sock:
            pass
        await trio.sleep_forever()

    async def join(self, server: trisock.Server) -> Socket:
        client = await connect(server)
        assert await client.recv_exactly(3) == b"hi\n"
        return client


async def all_received(client: Socket) -> bytes:
    received = b""
    async with client:
        async for chunk in client:
            received += chunk
    return received


async def test_a_broadcast_reaches_only_the_given_sockets() -> None:
    room = Room()
    async with bound(room, host="127.0.0.1") as server:
        clients = [await room.join(server) for _ in range(3)]
        assert await server.broadcast(b"a", to=room.socks[1:]) == 2
        assert await server.broadcast(b"b", to=(each for each in room.socks[:1])) == 1
        assert await server.broadcast(b"c", to=set(room.socks)) == 3
        assert await server.broadcast(b"d", to=[]) == 0
        server.stop(grace=0)
        assert [await all_received(client) for client in clients] == [b"bc", b"ac", b"ac"]


async def test_a_duplicate_gets_the_data_once() -> None:
    room = Room()
    async with bound(room, host="127.0.0.1") as server:
        client = await room.join(server)
        assert await server.broadcast(b"a", to=room.socks * 3) == 1
        server.stop(grace=0)
        assert await all_received(client) == b"a"


async def test_closed_and_foreign_sockets_are_skipped() -> None:
    room, other_room = Room(), Room()
    async with (
        bound(room, host="127.0.0.1") as server,
        bound(other_room, host="127.0.0.1") as other,
    ):
        first, client = await room.join(server), await room.join(server)
        foreign = await other_room.join(other)
        room.socks[0].abort()
        everyone = [*room.socks, *other_room.socks, first, client]
        assert await server.broadcast(b"a", to=everyone) == 1
        server.stop(grace=0)
        other.stop(grace=0)
        assert await all_received(client) == b"a"
        assert await all_received(foreign) == b""
        first.abort()


@pytest.mark.parametrize(
    "room",
    [
        lambda sock: sock,
        lambda sock: 5,
        lambda sock: "room",
        lambda sock: [sock, None],
        lambda sock: [sock, sock.stream],
        lambda sock: [sock, [sock]],
    ],
)
async def test_anything_but_a_socket_raises_type_error(room: Callable[[Socket], Any]) -> None:
    members = Room()
    async with bound(members, host="127.0.0.1") as server:
        client = await members.join(server)
        with pytest.raises(TypeError, match="Socket"):
            await server.broadcast(b"a", to=room(members.socks[0]))
        server.stop(grace=0)
        assert await all_received(client) == b""
