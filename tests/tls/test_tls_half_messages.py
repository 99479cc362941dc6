"""Messages of TLS that come by halves: what waits for the rest, and what ends the wait."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import closing, raw_unix_pair
from helpers.raw_tls import RawTLS
from helpers.tls_questions import asked, heard, start
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError


@contextlib.asynccontextmanager
async def half_a_message(
    authority: Authority, wide_certificate: Certificate, *, https_compatible: bool = False
) -> AsyncIterator[tuple[Socket, RawTLS, bytes]]:
    """Give a client that was sent the first half of a session ticket, and the second half."""
    server_tls = ServerTLS(
        authority.issue("example.org"), client_ca=authority.pem, require_client_certificate=True
    )
    client_tls = ClientTLS("example.org", ca=authority.pem, certificate=wide_certificate)
    sock, raw = raw_unix_pair()
    peer = RawTLS(raw, server_tls._context(), server_side=True)
    tickets = b""

    def shake_hands() -> None:
        nonlocal tickets
        while True:
            try:
                peer.ssl.do_handshake()
            except ssl.SSLWantReadError:
                raw.sendall(peer.outgoing.read())
                peer.incoming.write(raw.recv(65536))
            else:
                tickets = peer.outgoing.read()
                return

    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, shake_hands)
                await sock.starttls(client_tls, https_compatible=https_compatible)
            raw.setblocking(False)
            half = 5 + int.from_bytes(tickets[3:5], "big")  # the first record
            raw.sendall(tickets[:half])
            yield sock, peer, tickets[half:]


@pytest.mark.parametrize("first", ["reader", "sender"])
async def test_reading_and_sending_go_on_over_half_a_message(
    first: str, authority: Authority, wide_certificate: Certificate
) -> None:
    """OpenSSL does not write before it has the rest; one task only may wait for that."""
    async with half_a_message(authority, wide_certificate) as (sock, peer, rest):
        assert rest
        got = b""

        async def read() -> None:
            nonlocal got
            got = await sock.recv()

        async with trio.open_nursery() as nursery:
            if first == "reader":
                await start(nursery, read)
                await start(nursery, sock.send, b"ping")
            else:
                assert await sock.peek() is None  # it has seen the first half
                await start(nursery, sock.send, b"ping")
                assert await sock.peek() is None
                await start(nursery, read)
            peer.ssl.write(b"pong")
            peer.raw.sendall(rest + peer.outgoing.read())
        assert got == b"pong"
        await trio.lowlevel.wait_readable(peer.raw)
        assert heard(peer) == b"ping"
        await sock.close()
        peer.incoming.write(peer.raw.recv(65536))
        assert peer.ssl.read(1) == b""  # close_notify


async def test_a_send_that_waits_for_the_rest_can_be_cancelled(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with half_a_message(authority, wide_certificate) as (sock, peer, rest):
        assert await sock.peek() is None
        async with trio.open_nursery() as nursery:
            await start(nursery, sock.send, b"never")
            nursery.cancel_scope.cancel()
        peer.ssl.write(b"pong")
        peer.raw.sendall(rest + peer.outgoing.read())
        with contextlib.suppress(trio.BrokenResourceError):
            assert await sock.recv() == b"pong"
            await sock.send(b"ping")
            assert heard(peer) == b"ping"


async def test_the_end_inside_a_message_breaks_a_send(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with half_a_message(authority, wide_certificate) as (sock, peer, _):
        assert await sock.peek() is None
        peer.raw.shutdown(socket.SHUT_WR)
        with pytest.raises(trio.BrokenResourceError):
            await sock.send(b"x")


async def test_the_end_inside_a_message_breaks_an_https_compatible_send(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with half_a_message(authority, wide_certificate, https_compatible=True) as (
        sock,
        peer,
        _,
    ):
        assert await sock.peek() is None
        peer.raw.shutdown(socket.SHUT_WR)
        with pytest.raises(trio.BrokenResourceError, match="the peer has ended the connection"):
            await sock.send(b"x")


async def test_garbage_behind_half_a_message_fails_a_send(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with half_a_message(authority, wide_certificate) as (sock, peer, rest):
        assert await sock.peek() is None
        peer.raw.sendall(rest[:5] + bytes(len(rest)))
        with pytest.raises(TLSError, match="forged or damaged"):
            await sock.send(b"x")


async def test_what_came_before_garbage_is_read_before_its_error(authority: Authority) -> None:
    async with asked(authority) as (sock, peer):
        for word in (b"one", b"two"):
            peer.ssl.write(word)
        peer.raw.sendall(peer.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        await trio.lowlevel.wait_readable(sock.fileno())
        assert [await sock.recv(), await sock.recv()] == [b"one", b"two"]
        for _ in range(2):
            with pytest.raises(TLSError, match="forged or damaged"):
                await sock.recv()


async def test_half_a_record_behind_the_handshake_is_read_when_whole(
    authority: Authority,
) -> None:
    server_tls = ServerTLS(authority.issue("example.org"))
    sock, raw = raw_unix_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")
    rest = b""

    def shake_hands_and_talk() -> None:
        nonlocal rest
        while True:
            try:
                peer.ssl.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.flush()
                peer.incoming.write(raw.recv(65536))
        peer.ssl.write(b"early bird")
        said = peer.outgoing.read()
        rest = said[-7:]  # before the other thread may send it
        raw.sendall(said[:-7])

    with raw:
        async with closing(sock), trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, shake_hands_and_talk)
            await sock.starttls(server_tls)
            nursery.start_soon(trio.to_thread.run_sync, lambda: raw.sendall(rest))
            assert await sock.recv() == b"early bird"


async def test_peek_does_not_overtake_a_sender_that_reads(
    authority: Authority, wide_certificate: Certificate
) -> None:
    """The sender holds what came first for a pass through the scheduler; Trio draws lots."""
    for _ in range(40):
        async with half_a_message(authority, wide_certificate) as (sock, peer, rest):
            assert await sock.peek() is None
            peer.ssl.write(b"pong")
            peer.raw.sendall(rest[:100])

            async def look(sock: Socket = sock, raw: socket.socket = peer.raw) -> None:
                raw.sendall(rest[100:] + peer.outgoing.read())
                await sock.peek()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.send, b"ping")
                nursery.start_soon(look)
            assert await sock.recv() == b"pong"


async def test_a_read_and_a_send_that_wait_for_the_rest_end(
    authority: Authority, wide_certificate: Certificate
) -> None:
    """With https_compatible the reader gets the end, the sender an error all the same."""
    async with half_a_message(authority, wide_certificate, https_compatible=True) as (
        sock,
        peer,
        _,
    ):

        async def read() -> None:
            assert await sock.recv() == b""

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError, match="has ended"):
                await sock.send(b"x")

        async with trio.open_nursery() as nursery:
            await start(nursery, read)
            await start(nursery, send)
            peer.raw.shutdown(socket.SHUT_WR)
