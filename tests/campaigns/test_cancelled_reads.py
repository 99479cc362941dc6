"""Reads that are cancelled at every moment (helpers/cancellation.py tells how)."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable

import pytest

import trisock
from helpers.cancellation import (
    LAYERS,
    TCP,
    UNIX,
    Attempt,
    Kit,
    at_every_moment,
    covers,
    grid,
    pluto_socket,
)
from helpers.peers import Peer, Script
from trisock import Socket

SAID = b"one\ntwo\nthree\n"


async def recv(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv())


async def recv_a_part(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv(2))


async def recv_exactly(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv_exactly(9))


async def recv_until(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv_until(b"two\n"))


async def receive_some(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.receive_some())


async def next_chunk(sock: Socket, got: list[bytes]) -> None:
    got.append(await anext(sock, b""))


async def all_chunks(sock: Socket, got: list[bytes]) -> None:
    async for chunk in sock:
        got.append(chunk)


async def one_line(sock: Socket, got: list[bytes]) -> None:
    got.append(await anext(sock.lines(keep_ends=True)))


async def all_lines(sock: Socket, got: list[bytes]) -> None:
    async for line in sock.lines(keep_ends=True):
        got.append(line)


async def peek(sock: Socket, got: list[bytes]) -> None:
    assert SAID.startswith(await sock.peek() or b"")


async def pluto_recv(sock: Socket, got: list[bytes]) -> None:
    got.append(await pluto_socket(sock).recv() or b"")


async def pluto_peek(sock: Socket, got: list[bytes]) -> None:
    assert SAID.startswith(await pluto_socket(sock).peek() or b"")


READS = {
    recv: "Socket.recv",
    recv_a_part: "Socket.recv",
    recv_exactly: "Socket.recv_exactly",
    recv_until: "Socket.recv_until",
    receive_some: "Socket.receive_some",
    next_chunk: "Socket.__anext__",
    all_chunks: "Socket.__anext__",
    one_line: "Lines.__anext__",
    all_lines: "Lines.__anext__",
    peek: "Socket.peek",
    pluto_recv: "pluto.socket.recv",
    pluto_peek: "pluto.socket.peek",
}


# What a state does up to its first yield is there before the read begins.


def pushed_back(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(SAID)
    yield
    peer.end()


def arrived(sock: Socket, peer: Peer) -> Script:
    peer.say(SAID)
    yield
    peer.end()


def arrived_with_the_end(sock: Socket, peer: Peer) -> Script:
    for line in SAID.splitlines(keepends=True):
        peer.say(line)
    peer.end()
    yield


def not_there_yet(sock: Socket, peer: Peer) -> Script:
    yield
    peer.say(SAID)
    yield
    peer.end()


def a_part_of_each(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(SAID[:2])
    peer.say(SAID[2:5])
    yield
    for start in range(5, len(SAID), 3):
        peer.say(SAID[start : start + 3])
        yield
    peer.end()


def in_pieces_of_records(sock: Socket, peer: Peer) -> Script:
    wire = peer.encrypt(SAID[:6]) + peer.encrypt(SAID[6:])
    cuts = [0, 3, 6, len(wire) // 2, len(wire) - 1, len(wire)]  # a record's header has 5 bytes
    for start, end in itertools.pairwise(cuts):
        yield
        peer.send(wire[start:end])
    yield
    peer.end()


def ended_too_early(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(SAID[:2])
    peer.say(SAID[2:3])
    yield
    peer.end()


STATES_OF_READS = [
    pushed_back,
    arrived,
    arrived_with_the_end,
    not_there_yet,
    a_part_of_each,
    in_pieces_of_records,
    ended_too_early,
]


def usual_read(layer: str, read: object, state: object) -> bool:
    if read in (pluto_recv, pluto_peek, next_chunk, receive_some) or state is pushed_back:
        return layer == UNIX
    if layer == TCP:
        return state in (arrived, not_there_yet)
    return layer == UNIX or state in (
        (in_pieces_of_records, arrived_with_the_end, ended_too_early)
        if layer == "TLSv1_3 client"
        else (a_part_of_each,)
    )


@covers(*READS.values())
@pytest.mark.parametrize(
    ("layer", "read", "state"), grid(usual_read, LAYERS, READS, STATES_OF_READS)
)
async def test_a_cancelled_read_has_consumed_nothing(
    layer: str,
    read: Callable[[Socket, list[bytes]], Awaitable[None]],
    state: Callable[[Socket, Peer], Script],
    kit: Kit,
) -> None:
    said = SAID[:3] if state is ended_too_early else SAID

    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            script, got = state(sock, peer), []
            await attempt(lambda: read(sock, got), script)
            if state is ended_too_early and read in (recv_exactly, recv_until, one_line, all_lines):
                assert attempt.cancelled or isinstance(attempt.error, trisock.IncompleteReadError)
            else:
                assert attempt.error is None
            if read in (peek, pluto_peek):
                assert not got
            elif not attempt.cancelled and attempt.error is None:
                assert got
            for _ in script:
                pass
            while chunk := await sock.recv():
                got.append(chunk)
            assert b"".join(got) == said

    await at_every_moment(scenario)


# In the others the peer speaks last, but waits for us before it does.
@pytest.mark.parametrize("layer", ["TLSv1_2 client", "TLSv1_3 server"])
@pytest.mark.parametrize("read", [recv, recv_exactly, recv_until, receive_some, all_lines, peek])
async def test_a_cancelled_read_behind_the_handshake_has_consumed_nothing(
    layer: str, read: Callable[[Socket, list[bytes]], Awaitable[None]], kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer, greeting=SAID) as (sock, peer):
            got: list[bytes] = []
            peer.end()
            await attempt(lambda: read(sock, got))
            assert attempt.error is None
            while chunk := await sock.recv():
                got.append(chunk)
            assert b"".join(got) == SAID

    await at_every_moment(scenario)
