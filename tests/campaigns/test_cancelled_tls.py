"""starttls and stoptls, cancelled at every moment (helpers/cancellation.py tells how)."""

from __future__ import annotations

import contextlib
import itertools
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
    Kit,
    assert_closed,
    at_every_moment,
    covers,
    grid,
    pluto_socket,
    sending_is_clogged,
    the_peer_has_left,
)
from helpers.peers import Peer, Script
from trisock import Socket


def is_tls(wire: bytes) -> bool:
    """Return whether bytes are records of TLS, of which the last may be cut off."""
    while wire:
        if not re.match(rb"[\x14-\x17](\x03|$)", wire):
            return False
        wire = wire[5 + int.from_bytes(wire[3:5], "big") :]
    return True


async def hello_has_arrived(sock: Socket, peer: Peer) -> None:
    peer.act()


async def hello_was_peeked_at(sock: Socket, peer: Peer) -> None:
    peer.act()
    await sock.peek()  # as a client it hears nothing before it has spoken


async def nothing_has_arrived(sock: Socket, peer: Peer) -> None:
    pass


STATES_OF_STARTTLS = [
    nothing_has_arrived,
    hello_has_arrived,
    hello_was_peeked_at,
    the_peer_has_left,
    sending_is_clogged,
]


@covers("Socket.starttls", "pluto.socket.starttls")
@pytest.mark.parametrize(
    ("layer", "face", "state"),
    grid(
        lambda layer, face, state: face == "trisock" or state is nothing_has_arrived,
        TLS,
        ["trisock", "pluto"],
        STATES_OF_STARTTLS,
    ),
)
async def test_a_cancelled_starttls_has_closed_the_socket(
    layer: str,
    face: str,
    state: Callable[[Socket, Peer], Awaitable[None]],
    kit: Kit,
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(UNIX) as (sock, peer):
            starttls = sock.starttls if face == "trisock" else pluto_socket(sock).starttls
            if state is not sending_is_clogged:
                kit.turn_to_tls(peer, layer)
            await state(sock, peer)

            def script() -> Script:
                yield
                if state is the_peer_has_left:
                    return
                if state is sending_is_clogged:
                    yield
                    peer.act()
                    kit.turn_to_tls(peer, layer)
                yield from peer.acting()

            await attempt(lambda: starttls(kit.role_of(layer)), script())
            if state is the_peer_has_left:
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

    await at_every_moment(scenario)


@pytest.mark.parametrize("layer", TLS)
async def test_a_starttls_cancelled_behind_a_broadcast_has_closed(layer: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(UNIX) as (sock, peer):

            def script() -> Script:
                yield
                while len(peer.heard) < len(LARGE) and not peer.gone:
                    peer.act()
                    yield
                kit.turn_to_tls(peer, layer, after=len(LARGE))
                yield from peer.acting()

            async with trio.open_nursery() as nursery:

                async def broadcast() -> None:
                    with contextlib.suppress(trio.ClosedResourceError):
                        await sock._connection.broadcast(
                            LARGE, sock._connection.generation, math.inf
                        )

                nursery.start_soon(broadcast)
                await trio.testing.wait_all_tasks_blocked()
                await attempt(lambda: sock.starttls(kit.role_of(layer)), script())
            if attempt.cancelled:
                await assert_closed(sock, peer)
            assert LARGE.startswith(peer.wire[: len(LARGE)])
            assert is_tls(bytes(peer.wire[len(LARGE) :]))

    await at_every_moment(scenario)


@covers("Socket.stoptls")
@pytest.mark.parametrize("first", ["we", "the peer"])
@pytest.mark.parametrize("layer", TLS)
async def test_a_cancelled_stoptls_has_closed_the_socket(layer: str, first: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            if first == "the peer":
                peer.end()
            await attempt(sock.stoptls, itertools.chain([None], peer.acting()))
            if attempt.cancelled:
                await assert_closed(sock, peer)
            else:
                assert attempt.error is None
                peer.act()
                await sock.send(b"in the clear")
                peer.act()
            assert is_tls(bytes(peer.wire).removesuffix(b"in the clear"))
            assert peer.heard == (b"" if attempt.cancelled else b"in the clear")

    await at_every_moment(scenario)
