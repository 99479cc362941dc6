"""Cancel reads at every cancel point (see helpers/cancellation.py)."""

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
    Connections,
    at_every_cancel_point,
    covers,
    grid,
    pluto_socket,
)
from helpers.peers import Peer, Script
from trisock import Socket

# These bytes are lines, and also frames with a header of one byte.
DATA = b"\4one\n\4two\n\6three\n"


async def recv(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv())


async def recv_2_bytes(sock: Socket, got: list[bytes]) -> None:
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


async def recv_line(sock: Socket, got: list[bytes]) -> None:
    got.append(await sock.recv_line() + b"\n")


async def all_batches(sock: Socket, got: list[bytes]) -> None:
    async for batch in sock.lines(keep_ends=True).batches():
        got += batch


async def recv_frame(sock: Socket, got: list[bytes]) -> None:
    body = await sock.recv_frame(1)
    got.append(bytes([len(body)]) + body)


async def all_frames(sock: Socket, got: list[bytes]) -> None:
    async for body in sock.frames(1):
        got.append(bytes([len(body)]) + body)


async def peek(sock: Socket, got: list[bytes]) -> None:
    assert DATA.startswith(await sock.peek() or b"")


async def peek_and_wait(sock: Socket, got: list[bytes]) -> None:
    chunk = await sock.peek(wait=True)
    assert chunk
    assert DATA.startswith(chunk)


async def pluto_recv(sock: Socket, got: list[bytes]) -> None:
    got.append(await pluto_socket(sock).recv() or b"")


async def pluto_peek(sock: Socket, got: list[bytes]) -> None:
    assert DATA.startswith(await pluto_socket(sock).peek() or b"")


READS = {
    recv: "Socket.recv",
    recv_2_bytes: "Socket.recv",
    recv_exactly: "Socket.recv_exactly",
    recv_until: "Socket.recv_until",
    receive_some: "Socket.receive_some",
    next_chunk: "Socket.__anext__",
    all_chunks: "Socket.__anext__",
    recv_line: "Socket.recv_line",
    one_line: "Lines.__anext__",
    all_lines: "Lines.__anext__",
    all_batches: "LineBatches.__anext__",
    recv_frame: "Socket.recv_frame",
    all_frames: "Frames.__anext__",
    peek: "Socket.peek",
    peek_and_wait: "Socket.peek",
    pluto_recv: "pluto.socket.recv",
    pluto_peek: "pluto.socket.peek",
}

PEEKS = (peek, peek_and_wait, pluto_peek)
# These reads need more than the first bytes of DATA.
WHOLE_ITEMS = (
    *(recv_exactly, recv_until, recv_line, one_line, all_lines),
    *(all_batches, recv_frame, all_frames),
)


# Before its first yield, each function prepares the connection for the read. The steps after the
# first yield run during the read.


def pushed_back(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(DATA)
    yield
    peer.end()


def arrived(sock: Socket, peer: Peer) -> Script:
    peer.say(DATA)
    yield
    peer.end()


def arrived_with_eof(sock: Socket, peer: Peer) -> Script:
    for line in DATA.splitlines(keepends=True):
        peer.say(line)
    peer.end()
    yield


def arriving_later(sock: Socket, peer: Peer) -> Script:
    yield
    peer.say(DATA)
    yield
    peer.end()


def partly_pushed_back(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(DATA[:2])
    peer.say(DATA[2:5])
    yield
    for start in range(5, len(DATA), 3):
        peer.say(DATA[start : start + 3])
        yield
    peer.end()


def in_partial_records(sock: Socket, peer: Peer) -> Script:
    wire = peer.encrypt(DATA[:6]) + peer.encrypt(DATA[6:])
    cuts = [0, 3, 6, len(wire) // 2, len(wire) - 1, len(wire)]  # a record header has 5 bytes
    for start, end in itertools.pairwise(cuts):
        yield
        peer.send(wire[start:end])
    yield
    peer.end()


def cut_short(sock: Socket, peer: Peer) -> Script:
    sock.unrecv(DATA[:2])
    peer.say(DATA[2:3])
    yield
    peer.end()


STATES = [
    pushed_back,
    arrived,
    arrived_with_eof,
    arriving_later,
    partly_pushed_back,
    in_partial_records,
    cut_short,
]


def usual_read(layer: str, read: object, state: object) -> bool:
    if read in (pluto_recv, pluto_peek, next_chunk, receive_some) or state is pushed_back:
        return layer == UNIX
    if layer == TCP:
        return state in (arrived, arriving_later)
    return layer == UNIX or state in (
        (in_partial_records, arrived_with_eof, cut_short)
        if layer == "TLSv1_3 client"
        else (partly_pushed_back,)
    )


@covers(*READS.values())
@pytest.mark.parametrize(("layer", "read", "state"), grid(usual_read, LAYERS, READS, STATES))
@at_every_cancel_point
async def test_a_cancelled_read_loses_nothing(
    attempt: Attempt,
    layer: str,
    read: Callable[[Socket, list[bytes]], Awaitable[None]],
    state: Callable[[Socket, Peer], Script],
    connections: Connections,
) -> None:
    async with connections.pair(layer) as (sock, peer):
        script = state(sock, peer)
        got: list[bytes] = []
        await attempt(lambda: read(sock, got), script)
        if state is cut_short and read in WHOLE_ITEMS:
            assert attempt.cancelled or isinstance(attempt.error, trisock.IncompleteReadError)
        else:
            assert attempt.error is None
        if read in PEEKS:
            assert not got
        elif not attempt.cancelled and attempt.error is None:
            assert got
        for _ in script:
            pass
        got += [chunk async for chunk in sock]
        assert b"".join(got) == (DATA[:3] if state is cut_short else DATA)


def usual_skip(layer: str, state: object) -> bool:
    return layer in (UNIX, "TLSv1_3 client")


@covers("Socket.skip_until")
@pytest.mark.parametrize(("layer", "state"), grid(usual_skip, LAYERS, STATES))
@at_every_cancel_point
async def test_a_cancelled_skip_can_be_called_again(
    attempt: Attempt,
    layer: str,
    state: Callable[[Socket, Peer], Script],
    connections: Connections,
) -> None:
    """Before it is cancelled, the call may drop bytes, but no part of the delimiter."""
    async with connections.pair(layer) as (sock, peer):
        script = state(sock, peer)
        await attempt(lambda: sock.skip_until(b"two\n"), script)
        for _ in script:
            pass
        if state is cut_short:
            if not attempt.cancelled:
                assert isinstance(attempt.error, trisock.IncompleteReadError)
                assert not attempt.error.at_boundary
            with pytest.raises(trisock.IncompleteReadError):
                await sock.skip_until(b"two\n")
            assert await sock.recv() == b""
            return
        assert attempt.error is None
        if attempt.cancelled:
            await sock.skip_until(b"two\n")
        else:
            assert attempt.value == DATA.index(b"two\n") + 4
        assert b"".join([chunk async for chunk in sock]) == b"\6three\n"


# With these layers, the peer sends the last flight of the handshake, and may add data to it.
@pytest.mark.parametrize("layer", ["TLSv1_2 client", "TLSv1_3 server"])
@pytest.mark.parametrize(
    "read",
    [
        *(recv, recv_exactly, recv_until, receive_some, all_lines, peek),
        *(peek_and_wait, all_batches, all_frames),
    ],
)
@at_every_cancel_point
async def test_a_cancelled_read_right_after_the_handshake_loses_nothing(
    attempt: Attempt,
    layer: str,
    read: Callable[[Socket, list[bytes]], Awaitable[None]],
    connections: Connections,
) -> None:
    async with connections.pair(layer, greeting=DATA) as (sock, peer):
        got: list[bytes] = []
        peer.end()
        await attempt(lambda: read(sock, got))
        assert attempt.error is None
        got += [chunk async for chunk in sock]
        assert b"".join(got) == DATA
