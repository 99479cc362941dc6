"""One side closes while a message, a file or a response is only partly sent."""

from __future__ import annotations

import contextlib
import io
import socket
import threading

import pytest
import trio
import trio.testing

from helpers.pairs import clog
from helpers.post_handshake import post_handshake_pair, start_until_blocked
from trisock import Certificate, Socket
from trisock.testing import Authority


async def test_a_peer_that_closes_mid_message_breaks_the_send(authority: Authority) -> None:
    async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await sock.send(bytes(1 << 20))

        await start_until_blocked(nursery, send)
        peer.raw.close()


class SlowFile(io.RawIOBase):
    """A file that returns one part, and then blocks until ``resume`` is set."""

    def __init__(self) -> None:
        self.waiting = threading.Event()
        self.resume = threading.Event()
        self._parts = iter([b"a part"])

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        for part in self._parts:
            return part
        self.waiting.set()
        self.resume.wait()
        return b""


async def test_no_close_notify_is_sent_inside_a_file(authority: Authority) -> None:
    file = SlowFile()
    async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with contextlib.suppress(trio.ClosedResourceError):
                await sock.send_file(file)

        nursery.start_soon(send)
        try:
            await trio.to_thread.run_sync(file.waiting.wait)
            nursery.start_soon(sock.close)
            assert await peer.receive_to_end() == (b"a part", False)
        finally:
            file.resume.set()


async def test_no_close_notify_is_sent_inside_a_message(authority: Authority, times: int) -> None:
    """The test is repeated, because Trio chooses at random which task runs first."""
    for _ in range(10 * times):
        async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 17)

            async def send(sock: Socket = sock) -> None:
                with contextlib.suppress(trio.ClosedResourceError):
                    await sock.send(bytes(1 << 20))

            await start_until_blocked(nursery, send)  # sends whole records, then waits
            nursery.start_soon(sock.close)
            data, close_notify = await peer.receive_to_end()
            assert data
            assert not close_notify


async def test_close_notify_is_sent_after_half_a_response(
    authority: Authority, wide_certificate: Certificate
) -> None:
    """All data was sent, so the peer must not think that data is missing."""
    async with (
        post_handshake_pair(authority, wide_certificate) as (sock, peer),
        trio.open_nursery() as nursery,
    ):
        await sock.send(b"all of it")
        peer.request_certificate()
        async with trio.open_nursery() as readers:
            await start_until_blocked(readers, sock.recv)  # sends only a part of the response
            readers.cancel_scope.cancel()
        nursery.start_soon(sock.close)
        assert await peer.receive_to_end() == (b"all of it", True)


@pytest.mark.parametrize("closed_by", ["us", "the peer"])
async def test_closing_ends_a_read_whose_response_is_unsent(
    closed_by: str, authority: Authority, wide_certificate: Certificate
) -> None:
    error = trio.ClosedResourceError if closed_by == "us" else trio.BrokenResourceError
    async with (
        post_handshake_pair(authority, wide_certificate) as (sock, peer),
        trio.open_nursery() as nursery,
    ):

        async def read() -> None:
            with pytest.raises(error):
                await sock.recv()

        await clog(sock)
        peer.request_certificate()
        await start_until_blocked(nursery, read)
        if closed_by == "us":
            sock.abort()
        else:
            peer.raw.close()
