"""Sends that are cancelled at every moment (helpers/cancellation.py tells how)."""

from __future__ import annotations

import io
import itertools
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
    Kit,
    at_every_moment,
    covers,
    grid,
    pluto_socket,
)
from helpers.pairs import clog
from helpers.peers import Script, alongside
from trisock import Socket

SMALL = b"some, to be sent"


async def send_parts(sock: Socket, data: bytes) -> None:
    await sock.send(data[:3], b"", bytearray(data[3:7]), memoryview(data)[7:])


async def send_file(sock: Socket, data: bytes) -> None:
    sizes: list[int] = []
    descriptor = os.memfd_create("a file")
    with open(descriptor, "w+b") as file:
        file.write(data)
        assert await sock.send_file(file, progress=sizes.append) == len(data)
    assert sizes[-1] == len(data)


async def send_file_by_chunks(sock: Socket, data: bytes) -> None:
    assert await sock.send_file(io.BytesIO(data)) == len(data)


class Unknown:
    """A file of which nothing is known: it is read, and sought in, in a thread."""

    def __init__(self, data: bytes) -> None:
        self._file = io.BytesIO(data)
        self.seek, self.read = self._file.seek, self._file.read


async def send_unknown_file(sock: Socket, data: bytes) -> None:
    assert await sock.send_file(Unknown(data)) == len(data)  # type: ignore[arg-type]


async def send_shared_file(sock: Socket, data: bytes) -> None:
    """Somebody moves in the file all the time."""
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
    Socket.send_all: "Socket.send_all",
    send_file: "Socket.send_file",
    send_file_by_chunks: "Socket.send_file",
    send_unknown_file: "Socket.send_file",
    send_shared_file: "Socket.send_file",
    pluto_send: "pluto.socket.send",
    wait_and_send: "Socket.wait_send_all_might_not_block",
}


def usual_send(layer: str, send: object, state: str) -> bool:
    if send in (Socket.send_all, pluto_send):
        return layer == UNIX
    return layer in (UNIX, "TLSv1_3 server") or (send is Socket.send and layer in TLS)


@covers(*SENDS.values())
@pytest.mark.parametrize(
    ("layer", "send", "state"),
    grid(usual_send, [UNIX, *TLS], SENDS, ["room", "clogged", "room for a part"]),
)
async def test_a_cancelled_send_has_changed_nothing_or_ends_sending(
    layer: str,
    send: Callable[[Socket, bytes], Awaitable[None]],
    state: str,
    kit: Kit,
) -> None:
    data = LARGE if state == "room for a part" else SMALL

    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            if state == "clogged":
                await clog(sock)
            before = peer.arrived()
            await attempt(lambda: send(sock, data), itertools.chain([None], peer.acting()))
            assert attempt.error is None
            went_out = peer.arrived() - before
            peer.act()
            heard = bytes(peer.heard).lstrip(b"x")  # which it was clogged with
            if not attempt.cancelled:
                assert heard == data
            elif not went_out:
                async with alongside(peer.acting()):
                    await sock.send(b"after it")
                peer.act()
                assert bytes(peer.heard).lstrip(b"x") == b"after it"
            else:
                assert data.startswith(heard)
                with pytest.raises(trio.BrokenResourceError, match="cut short"):
                    await sock.send(b"after it")
                peer.say(b"more")
                try:
                    assert await sock.recv() == b"more"
                except trio.BrokenResourceError:
                    assert layer in TLS
                else:  # between two pieces of a file the records are whole
                    assert layer == UNIX or SENDS[send] == "Socket.send_file"
                peer.act()
                assert bytes(peer.heard).lstrip(b"x") == heard

    await at_every_moment(scenario)


@covers("Socket.send_file")
@pytest.mark.parametrize("state", ["room", "clogged", "silent"])
@pytest.mark.parametrize("buffering", [0, -1])
@pytest.mark.parametrize("layer", [UNIX, *TLS])
async def test_a_cancelled_pipe_send_has_taken_nothing_or_ends_sending(
    layer: str, buffering: int, state: str, kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        reading, writing = os.pipe()
        with open(reading, "rb", buffering=buffering) as pipe, open(writing, "wb", 0) as end:
            async with kit.pair(layer) as (sock, peer):
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
                rest = pipe.read()
                if not attempt.cancelled:
                    assert (attempt.value, rest) == (len(SMALL), b"")
                elif rest:
                    async with alongside(peer.acting()):
                        await sock.send(rest)
                else:
                    with pytest.raises(trio.BrokenResourceError, match="cut short"):
                        await sock.send(b"after it")
                peer.act()
                heard = bytes(peer.heard).lstrip(b"x")
                if rest or not attempt.cancelled:
                    assert heard == SMALL
                else:
                    assert SMALL.startswith(heard)

    await at_every_moment(scenario)


@pytest.mark.parametrize("send", SENDS)
@pytest.mark.parametrize("layer", [UNIX, *TLS])
async def test_a_cancelled_send_to_nobody_takes_nothing_from_reading(
    layer: str, send: Callable[[Socket, bytes], Awaitable[None]], kit: Kit
) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            peer.say(b"good")
            peer.say(b"bye")
            peer.raw.close()
            await attempt(lambda: send(sock, SMALL))
            assert attempt.cancelled or isinstance(
                attempt.error, AssertionError if send is pluto_send else trio.BrokenResourceError
            )
            assert await sock.recv_exactly(7) == b"goodbye"

    await at_every_moment(scenario)


@covers("Socket.send_eof")
@pytest.mark.parametrize("layer", [UNIX, TCP])
async def test_a_cancelled_send_eof_has_changed_nothing(layer: str, kit: Kit) -> None:
    async def scenario(attempt: Attempt) -> None:
        async with kit.pair(layer) as (sock, peer):
            await attempt(sock.send_eof)
            if attempt.cancelled:
                await sock.send(SMALL)
                await sock.send_eof()
            peer.say(b"answer")
            assert await sock.recv() == b"answer"
            peer.act()
            assert peer.heard == (SMALL if attempt.cancelled else b"")
            assert peer.gone

    await at_every_moment(scenario)
