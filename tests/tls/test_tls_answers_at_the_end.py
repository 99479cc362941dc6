"""Answers and the end: a close, or a peer that leaves, while something is half out."""

from __future__ import annotations

import contextlib
import io
import socket
import threading

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import clog
from helpers.tls_questions import ask, asked, ends, start
from trisock import Certificate, Socket


async def test_a_peer_that_leaves_mid_message_breaks_the_send(
    authority: Authority,
) -> None:
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await sock.send(bytes(1 << 20))

        await start(nursery, send)
        peer.raw.close()


class SlowFile(io.RawIOBase):
    """A file of which a part can be read, and then nothing before it is told to go on."""

    def __init__(self) -> None:
        self.asked_for_more = threading.Event()
        self.go_on = threading.Event()
        self._parts = iter([b"a part"])

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        for part in self._parts:
            return part
        self.asked_for_more.set()
        self.go_on.wait()
        return b""


async def test_a_close_inside_a_file_does_not_vouch_for_it(
    authority: Authority,
) -> None:
    file = SlowFile()
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with contextlib.suppress(trio.ClosedResourceError):
                await sock.send_file(file)

        nursery.start_soon(send)
        try:
            await trio.to_thread.run_sync(file.asked_for_more.wait)
            nursery.start_soon(sock.close)
            assert await ends(peer) == (b"a part", False)
        finally:
            file.go_on.set()


async def test_a_close_inside_a_message_does_not_vouch_for_it(
    authority: Authority,
) -> None:
    """Whichever of the two tasks runs first: Trio draws lots."""
    for _ in range(10):
        async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)

            async def send(sock: Socket = sock) -> None:
                with contextlib.suppress(trio.ClosedResourceError):
                    await sock.send(bytes(1 << 20))

            await start(nursery, send)  # whole records are out, and it waits for room
            nursery.start_soon(sock.close)
            data, vouched = await ends(peer)
            assert data
            assert not vouched


async def test_a_close_after_half_an_answer_says_goodbye(
    authority: Authority, wide_certificate: Certificate
) -> None:
    """All that was sent was sent whole: the peer must not think that something is missing."""
    async with asked(authority, wide_certificate) as (sock, peer), trio.open_nursery() as nursery:
        await sock.send(b"all of it")
        ask(peer)
        async with trio.open_nursery() as readers:
            await start(readers, sock.recv)  # a part of the answer is out: it is a large one
            readers.cancel_scope.cancel()
        nursery.start_soon(sock.close)
        assert await ends(peer) == (b"all of it", True)


async def test_a_peer_that_leaves_breaks_a_read_that_answers(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with asked(authority, wide_certificate) as (sock, peer), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await sock.recv()

        await clog(sock)
        ask(peer)
        await start(nursery, read)
        peer.raw.close()


async def test_a_close_ends_a_read_that_answers(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with asked(authority, wide_certificate) as (sock, peer), trio.open_nursery() as nursery:

        async def read() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await sock.recv()

        await clog(sock)
        ask(peer)
        await start(nursery, read)
        sock.abort()
