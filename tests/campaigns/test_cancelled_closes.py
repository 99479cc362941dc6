"""Cancel the close of a socket at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.cancellation import (
    LAYERS,
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


async def leave(sock: Socket) -> None:
    async with sock:
        await trio.lowlevel.checkpoint()


async def pluto_close(sock: Socket) -> None:
    await pluto_socket(sock).close()


CLOSES = {
    Socket.close: "Socket.close",
    Socket.aclose: "Socket.aclose",
    leave: "Socket.__aexit__",
    pluto_close: "pluto.socket.close",
}


async def data_was_sent(sock: Socket, peer: Peer) -> None:
    await sock.send(b"sent")


async def bytes_are_unread(sock: Socket, peer: Peer) -> None:
    peer.say(b"unread")
    await trio.lowlevel.wait_readable(sock.fileno())


def reading_to_eof(peer: Peer) -> Script:
    while True:
        peer.act()
        if peer.gone:
            peer.end()
        yield


STATES = [data_was_sent, bytes_are_unread, sending_is_clogged, peer_has_closed]


@covers(*CLOSES.values())
@pytest.mark.parametrize(
    ("layer", "close", "state"),
    grid(
        lambda layer, close, state: close is Socket.close or layer == UNIX,
        LAYERS,
        CLOSES,
        STATES,
    ),
)
@at_every_cancel_point
async def test_a_cancelled_close_closes_the_socket(
    attempt: Attempt,
    layer: str,
    close: Callable[[Socket], Awaitable[None]],
    state: Callable[[Socket, Peer], Awaitable[None]],
    connections: Connections,
) -> None:
    async with connections.pair(layer) as (sock, peer):
        await state(sock, peer)

        script = iter(()) if state is peer_has_closed else reading_to_eof(peer)
        await attempt(lambda: close(sock), during(script))
        assert attempt.error is None
        assert sock.fileno() == -1
        if state is peer_has_closed:
            return
        await assert_closed(sock, peer)
        if state is data_was_sent:
            assert peer.heard == b"sent"  # the kernel has delivered its buffered data
        assert peer.finished or attempt.cancelled or state is bytes_are_unread


@pytest.mark.parametrize("layer", LAYERS)
@at_every_cancel_point
async def test_a_cancelled_close_wakes_a_reader_and_a_second_closer(
    attempt: Attempt, layer: str, connections: Connections
) -> None:
    async with connections.pair(layer) as (sock, peer), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await sock.recv()
            await sock.close()

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await attempt(sock.close, during(peer.acting()))
        assert sock.fileno() == -1


@pytest.mark.parametrize("layer", LAYERS)
@at_every_cancel_point
async def test_a_cancelled_second_close_closes_the_socket(
    attempt: Attempt, layer: str, connections: Connections
) -> None:
    async with connections.pair(layer) as (sock, peer), trio.open_nursery() as nursery:
        await sending_is_clogged(sock, peer)
        nursery.start_soon(sock.close)
        await trio.testing.wait_all_tasks_blocked()
        await attempt(sock.close, during(reading_to_eof(peer)))
        assert attempt.error is None
        await assert_closed(sock, peer)
