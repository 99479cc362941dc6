"""Closing, cancelled at every moment (helpers/cancellation.py tells how)."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.cancellation import (
    LAYERS,
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


async def bytes_are_unread(sock: Socket, peer: Peer) -> None:
    peer.say(b"unread")
    await trio.lowlevel.wait_readable(sock.fileno())


async def something_was_said(sock: Socket, peer: Peer) -> None:
    await sock.send(b"said")


STATES_OF_CLOSES = [something_was_said, bytes_are_unread, sending_is_clogged, the_peer_has_left]


@covers(*CLOSES.values())
@pytest.mark.parametrize(
    ("layer", "close", "state"),
    grid(
        lambda layer, close, state: close is Socket.close or layer == UNIX,
        LAYERS,
        CLOSES,
        STATES_OF_CLOSES,
    ),
)
async def test_a_cancelled_close_has_closed(
    layer: str,
    close: Callable[[Socket], Awaitable[None]],
    state: Callable[[Socket, Peer], Awaitable[None]],
    kit: Kit,
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            await state(sock, peer)

            def script() -> Script:
                yield
                while state is not the_peer_has_left:
                    peer.act()
                    if peer.gone:
                        peer.end()
                    yield

            await attempt(lambda: close(sock), script())
            assert attempt.error is None
            assert sock.fileno() == -1
            if state is the_peer_has_left:
                return
            await assert_closed(sock, peer)
            if state is something_was_said:
                assert peer.heard == b"said"  # the kernel had it
            assert peer.finished or attempt.cancelled or state is bytes_are_unread

    await at_every_moment(scenario)


@pytest.mark.parametrize("layer", LAYERS)
async def test_a_cancelled_close_wakes_a_reader_and_a_second_closer(layer: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer), trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await sock.recv()
                await sock.close()

            nursery.start_soon(read)
            await trio.testing.wait_all_tasks_blocked()
            await attempt(sock.close, itertools.chain([None], peer.acting()))
            assert sock.fileno() == -1

    await at_every_moment(scenario)
