"""Cancel starttls and stoptls at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.cancellation import (
    LARGE,
    TLS,
    UNIX,
    Attempt,
    Connections,
    assert_closed,
    at_every_cancel_point,
    covers,
    during,
    grid,
    peer_has_closed,
    pluto_socket,
    sending_is_clogged,
)
from helpers.peers import Peer, Script
from trisock import Socket
from trisock._server.broadcast import broadcast_to


def is_tls(wire: bytes) -> bool:
    """Return whether bytes are TLS records. The last record may be incomplete."""
    while wire:
        if not re.match(rb"[\x14-\x17](\x03|$)", wire):
            return False
        wire = wire[5 + int.from_bytes(wire[3:5], "big") :]
    return True


async def nothing_has_arrived(sock: Socket, peer: Peer) -> None:
    pass


async def hello_has_arrived(sock: Socket, peer: Peer) -> None:
    peer.act()


async def hello_was_peeked_at(sock: Socket, peer: Peer) -> None:
    peer.act()
    await sock.peek()  # returns None if we are the TLS client, because the client sends first


STATES = [
    nothing_has_arrived,
    hello_has_arrived,
    hello_was_peeked_at,
    peer_has_closed,
    sending_is_clogged,
]


@covers("Socket.starttls", "pluto.socket.starttls")
@pytest.mark.parametrize(
    ("layer", "face", "state"),
    grid(
        lambda layer, face, state: face == "trisock" or state is nothing_has_arrived,
        TLS,
        ["trisock", "pluto"],
        STATES,
    ),
)
@at_every_cancel_point
async def test_a_cancelled_starttls_closes_the_socket(
    attempt: Attempt,
    layer: str,
    face: str,
    state: Callable[[Socket, Peer], Awaitable[None]],
    connections: Connections,
) -> None:
    async with connections.pair(UNIX) as (sock, peer):
        starttls = sock.starttls if face == "trisock" else pluto_socket(sock).starttls
        if state is not sending_is_clogged:
            connections.start_tls(peer, layer)
        await state(sock, peer)

        def script() -> Script:
            if state is peer_has_closed:
                return
            if state is sending_is_clogged:
                yield
                peer.act()
                connections.start_tls(peer, layer)
            yield from peer.acting()

        await attempt(lambda: starttls(connections.role_of(layer)), during(script()))
        if state is peer_has_closed:
            assert attempt.cancelled or face == "pluto" or attempt.error is not None
            assert sock.fileno() == -1
            return
        if not attempt.cancelled:
            assert attempt.error is None
            assert sock.istls()
            await sock.send(b"confidential")
            peer.act()
            assert peer.heard.lstrip(b"x") == b"confidential"
        else:
            await assert_closed(sock, peer)
            assert not peer.heard.strip(b"x")
        assert is_tls(bytes(peer.wire).lstrip(b"x"))


@pytest.mark.parametrize("layer", TLS)
@at_every_cancel_point
async def test_a_starttls_cancelled_during_a_broadcast_closes_the_socket(
    attempt: Attempt, layer: str, connections: Connections
) -> None:
    async with connections.pair(UNIX) as (sock, peer):

        def script() -> Script:
            while len(peer.heard) < len(LARGE) and not peer.gone:
                peer.act()
                yield
            connections.start_tls(peer, layer, after=len(LARGE))
            yield from peer.acting()

        async def broadcast() -> None:
            with contextlib.suppress(trio.ClosedResourceError):
                await broadcast_to(sock._connection, LARGE, sock._connection.generation, math.inf)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(broadcast)
            await trio.testing.wait_all_tasks_blocked()
            await attempt(lambda: sock.starttls(connections.role_of(layer)), during(script()))
        if attempt.cancelled:
            await assert_closed(sock, peer)
        assert LARGE.startswith(peer.wire[: len(LARGE)])
        assert is_tls(bytes(peer.wire[len(LARGE) :]))


@covers("Socket.stoptls")
@pytest.mark.parametrize("first", ["we", "the peer"])
@pytest.mark.parametrize("layer", TLS)
@at_every_cancel_point
async def test_a_cancelled_stoptls_closes_the_socket(
    attempt: Attempt, layer: str, first: str, connections: Connections
) -> None:
    async with connections.pair(layer) as (sock, peer):
        if first == "the peer":
            peer.end()
        await attempt(sock.stoptls, during(peer.acting()))
        if attempt.cancelled:
            await assert_closed(sock, peer)
        else:
            assert attempt.error is None
            peer.act()
            await sock.send(b"plain text")
            peer.act()
        assert is_tls(bytes(peer.wire).removesuffix(b"plain text"))
        assert peer.heard == (b"" if attempt.cancelled else b"plain text")
