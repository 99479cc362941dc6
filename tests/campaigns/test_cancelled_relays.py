"""Cancel a relay at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest

import trisock
from helpers.cancellation import (
    LARGE,
    TCP,
    TLS,
    UNIX,
    Attempt,
    Connections,
    assert_closed,
    at_every_cancel_point,
    covers,
    grid,
    sending_is_clogged,
)
from helpers.peers import Peer, Script
from trisock import Socket


async def nothing(sock: Socket, peer: Peer) -> None:
    pass


async def bytes_are_in_the_receive_buffer(sock: Socket, peer: Peer) -> None:
    sock.unrecv(b"pushed back")


async def sink_is_clogged(sock: Socket, peer: Peer) -> None:
    sock.unrecv(LARGE[:40_000])  # three TLS records, more than the clogged sink accepts


def talking(a: Peer, b: Peer) -> Script:
    """Let each peer send data and then call ``end``, one step at a time."""
    yield
    for peer, other in ((a, b), (b, a)):
        peer.say(b"data")
        yield
        peer.end()
        yield
        other.act()
    while True:
        a.act()
        b.act()
        yield


STATES = [nothing, bytes_are_in_the_receive_buffer, sink_is_clogged]


USUAL = [(UNIX, UNIX), (UNIX, TLS[1]), (TLS[1], UNIX)]


@covers("relay")
@pytest.mark.parametrize(
    ("first", "second", "state"),
    grid(
        lambda first, second, state: (
            (first, second) in USUAL and (state is not sink_is_clogged or first == UNIX)
        ),
        [UNIX, TCP, *TLS],
        [UNIX, TCP, *TLS],
        STATES,
    ),
)
@at_every_cancel_point
async def test_a_cancelled_relay_closes_both_sockets(
    attempt: Attempt,
    first: str,
    second: str,
    state: Callable[[Socket, Peer], Awaitable[None]],
    connections: Connections,
) -> None:
    async with connections.pair(first) as (a, a_peer), connections.pair(second) as (b, b_peer):
        await state(a, a_peer)
        pushed_back = len(a._connection.buffer)
        if state is sink_is_clogged:
            await sending_is_clogged(b, b_peer)
        await attempt(lambda: trisock.relay(a, b), talking(a_peer, b_peer))
        assert attempt.error is None
        a_peer.act()
        b_peer.act()
        if not attempt.cancelled:
            assert attempt.value == (pushed_back + 4, 4)
            assert b_peer.heard[-4:] == a_peer.heard == b"data"
        await assert_closed(a, a_peer)
        await assert_closed(b, b_peer)
        # Until both directions have ended, no TLS peer may see a clean end.
        if attempt.cancelled and not (a_peer.heard and b_peer.heard):
            assert not (a_peer.finished and first in TLS)
            assert not (b_peer.finished and second in TLS)
