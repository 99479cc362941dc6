"""Cancel a send at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

import io
import os
import tempfile
from collections.abc import Awaitable, Callable

import pytest
import trio
import trio.testing

from helpers.cancellation import (
    LARGE,
    TCP,
    TLS,
    UNIX,
    Attempt,
    Connections,
    at_every_cancel_point,
    covers,
    during,
    grid,
    pluto_socket,
)
from helpers.pairs import clog
from helpers.peers import Peer, Script, alongside
from trisock import Socket

SMALL = b"less than 20 bytes"


async def send_parts(sock: Socket, data: bytes) -> None:
    await sock.send(data[:3], b"", bytearray(data[3:7]), memoryview(data)[7:])


async def send_file(sock: Socket, data: bytes) -> None:
    sizes: list[int] = []
    descriptor = os.memfd_create("a file")
    with open(descriptor, "w+b") as file:
        file.write(data)
        assert await sock.send_file(file, progress=sizes.append) == len(data)
    assert sizes[-1] == len(data)


async def send_file_in_chunks(sock: Socket, data: bytes) -> None:
    assert await sock.send_file(io.BytesIO(data)) == len(data)


class PlainFile:
    """A file object whose type trisock does not know, so trisock reads it in a thread."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.seek, self.read = self._file.seek, self._file.read


async def send_file_of_unknown_type(sock: Socket, data: bytes) -> None:
    assert await sock.send_file(PlainFile(data)) == len(data)  # type: ignore[arg-type]


async def send_shared_file(sock: Socket, data: bytes) -> None:
    """Send a file. Move its position after each chunk, as another user of the file might."""
    with tempfile.TemporaryFile() as file:
        file.write(data)
        assert await sock.send_file(file, progress=lambda _: file.seek(3)) == len(data)  # type: ignore[arg-type]


async def pluto_send(sock: Socket, data: bytes) -> None:
    assert await pluto_socket(sock).send(data) is True


async def wait_and_send(sock: Socket, data: bytes) -> None:
    await sock.wait_send_all_might_not_block()
    await sock.send(data)


SENDS = {
    Socket.send: "Socket.send",
    send_parts: "Socket.send",
    Socket.send_frame: "Socket.send_frame",
    Socket.send_all: "Socket.send_all",
    send_file: "Socket.send_file",
    send_file_in_chunks: "Socket.send_file",
    send_file_of_unknown_type: "Socket.send_file",
    send_shared_file: "Socket.send_file",
    pluto_send: "pluto.socket.send",
    wait_and_send: "Socket.wait_send_all_might_not_block",
}


def heard_after_clog(peer: Peer) -> bytes:
    """Return the bytes that the peer has received, without the filler from ``clog``."""
    peer.act()
    return bytes(peer.heard).lstrip(b"x")


def usual_send(layer: str, send: object, state: str) -> bool:
    if send in (Socket.send_all, pluto_send):
        return layer == UNIX
    return layer in (UNIX, "TLSv1_3 server") or (send is Socket.send and layer in TLS)


@covers(*SENDS.values())
@pytest.mark.parametrize(
    ("layer", "send", "state"),
    grid(usual_send, [UNIX, *TLS], SENDS, ["room for all", "clogged", "room for part"]),
)
@at_every_cancel_point
async def test_later_sends_fail_after_a_cancelled_partial_send(
    attempt: Attempt,
    layer: str,
    send: Callable[[Socket, bytes], Awaitable[None]],
    state: str,
    connections: Connections,
) -> None:
    data = LARGE if state == "room for part" else SMALL
    wire = len(data).to_bytes(4, "big") + data if send is Socket.send_frame else data
    async with connections.pair(layer) as (sock, peer):
        if state == "clogged":
            await clog(sock)
        before = peer.arrived()
        await attempt(lambda: send(sock, data), during(peer.acting()))
        assert attempt.error is None
        sent = peer.arrived() - before
        heard = heard_after_clog(peer)
        if not attempt.cancelled:
            assert heard == wire
        elif not sent:
            async with alongside(peer.acting()):
                await sock.send(b"next")
            assert heard_after_clog(peer) == b"next"
        else:
            assert wire.startswith(heard)
            with pytest.raises(trio.BrokenResourceError, match="cut short"):
                await sock.send(b"next")
            peer.say(b"more")
            try:
                assert await sock.recv() == b"more"
            except trio.BrokenResourceError:
                assert layer in TLS
            else:  # a send_file that is cancelled between two chunks leaves complete records
                assert layer == UNIX or SENDS[send] == "Socket.send_file"
            assert heard_after_clog(peer) == heard


@covers("Socket.send_file")
@pytest.mark.parametrize("state", ["room", "clogged", "silent"])
@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("layer", [UNIX, *TLS])
@at_every_cancel_point
async def test_a_cancelled_send_from_a_pipe_never_silently_loses_data(
    attempt: Attempt, layer: str, buffering: int, state: str, connections: Connections
) -> None:
    """Either the pipe still holds all bytes that were not sent, or later sends fail."""
    reading, writing = os.pipe()
    with open(reading, "rb", buffering=buffering) as pipe, open(writing, "wb", 0) as end:
        async with connections.pair(layer) as (sock, peer):
            if state == "clogged":
                await clog(sock)

            left = [SMALL]

            def write() -> None:
                while left:
                    end.write(left.pop())
                end.close()

            def script() -> Script:
                if state != "silent":
                    write()
                for _ in peer.acting():
                    yield
                    write()

            await attempt(lambda: sock.send_file(pipe), script())
            assert attempt.error is None
            write()
            unread = pipe.read()
            if not attempt.cancelled:
                assert (attempt.value, unread) == (len(SMALL), b"")
            elif unread:
                async with alongside(peer.acting()):
                    await sock.send(unread)
            else:
                with pytest.raises(trio.BrokenResourceError, match="cut short"):
                    await sock.send(b"next")
            heard = heard_after_clog(peer)
            if unread or not attempt.cancelled:
                assert heard == SMALL
            else:
                assert SMALL.startswith(heard)


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("layer", [UNIX, *TLS])
@at_every_cancel_point
async def test_a_cancelled_send_to_a_closed_peer_keeps_unread_data(
    attempt: Attempt,
    layer: str,
    send: Callable[[Socket, bytes], Awaitable[None]],
    connections: Connections,
) -> None:
    async with connections.pair(layer) as (sock, peer):
        peer.say(b"good")
        peer.say(b"bye")
        peer.raw.close()
        await attempt(lambda: send(sock, SMALL))
        assert attempt.cancelled or isinstance(
            attempt.error, AssertionError if send is pluto_send else trio.BrokenResourceError
        )
        assert await sock.recv_exactly(7) == b"goodbye"


@covers("Socket.send_eof")
@pytest.mark.parametrize("layer", [UNIX, TCP])
@at_every_cancel_point
async def test_a_cancelled_send_eof_changes_nothing(
    attempt: Attempt, layer: str, connections: Connections
) -> None:
    async with connections.pair(layer) as (sock, peer):
        await attempt(sock.send_eof)
        if attempt.cancelled:
            await sock.send(SMALL)
            await sock.send_eof()
        peer.say(b"answer")
        assert await sock.recv() == b"answer"
        peer.act()
        assert peer.heard == (SMALL if attempt.cancelled else b"")
        assert peer.gone
