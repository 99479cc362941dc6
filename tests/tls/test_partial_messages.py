"""TLS messages and records that arrive in parts: which calls wait, and how the wait ends."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.pairs import closing, raw_unix_pair
from helpers.post_handshake import PostHandshakePeer, post_handshake_pair, start_until_blocked
from helpers.raw_tls import RawTLS, raw_client_context
from trisock import Certificate, ServerClosing, ServerTLS, Socket, TLSError
from trisock._net.server_state import ServerState
from trisock.testing import Authority


class PartialTicketPeer(PostHandshakePeer):
    """A server that has sent the first half of a session ticket."""

    second_half = b""

    def begin(self) -> None:
        self.handshake_unflushed()
        tickets = self.outgoing.read()
        half = 5 + int.from_bytes(tickets[3:5], "big")  # the first record
        self.raw.sendall(tickets[:half])
        self.second_half = tickets[half:]


@contextlib.asynccontextmanager
async def partial_ticket_pair(
    authority: Authority, wide_certificate: Certificate, *, https_compatible: bool = False
) -> AsyncIterator[tuple[Socket, PartialTicketPeer]]:
    """Yield a TLS client and its server. The client has received half of a session ticket."""
    server_tls = authority.server_tls(
        "example.org", client_ca=authority.ca, require_client_certificate=True
    )
    client_tls = authority.client_tls("example.org", certificate=wide_certificate)
    sock, raw = raw_unix_pair()
    peer = PartialTicketPeer(raw, server_tls._context(), server_side=True)
    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.begin)
                await sock.starttls(client_tls, https_compatible=https_compatible)
            raw.setblocking(False)
            yield sock, peer


@pytest.fixture
def https_compatible() -> bool:
    """The ``https_compatible`` argument of starttls. Tests can parametrize this fixture."""
    return False


@pytest.fixture
async def ends(
    authority: Authority, wide_certificate: Certificate, https_compatible: bool
) -> AsyncIterator[tuple[Socket, PartialTicketPeer]]:
    async with partial_ticket_pair(
        authority, wide_certificate, https_compatible=https_compatible
    ) as ends:
        yield ends


@pytest.fixture
def sock(ends: tuple[Socket, PartialTicketPeer]) -> Socket:
    return ends[0]


@pytest.fixture
def peer(ends: tuple[Socket, PartialTicketPeer]) -> PartialTicketPeer:
    return ends[1]


@pytest.mark.parametrize("first", ["reader", "sender"])
async def test_a_read_and_send_can_wait_for_the_same_message(
    first: str, sock: Socket, peer: PartialTicketPeer
) -> None:
    """OpenSSL cannot send until the message is complete. Only one task can read the rest of it."""
    assert peer.second_half
    got = b""

    async def read() -> None:
        nonlocal got
        got = await sock.recv()

    async with trio.open_nursery() as nursery:
        if first == "reader":
            await start_until_blocked(nursery, read)
            await start_until_blocked(nursery, sock.send, b"ping")
        else:
            assert await sock.peek() is None  # peek decrypts the first half
            await start_until_blocked(nursery, sock.send, b"ping")
            assert await sock.peek() is None
            await start_until_blocked(nursery, read)
        peer.ssl.write(b"pong")
        peer.raw.sendall(peer.second_half + peer.outgoing.read())
    assert got == b"pong"
    await trio.lowlevel.wait_readable(peer.raw)
    assert peer.received() == b"ping"
    await sock.close()
    peer.incoming.write(peer.raw.recv(65536))
    assert peer.ssl.read(1) == b""  # close_notify


async def test_a_send_during_a_partial_message_can_be_cancelled(
    sock: Socket, peer: PartialTicketPeer
) -> None:
    assert await sock.peek() is None
    async with trio.open_nursery() as nursery:
        await start_until_blocked(nursery, sock.send, b"never")
        nursery.cancel_scope.cancel()
    peer.ssl.write(b"pong")
    peer.raw.sendall(peer.second_half + peer.outgoing.read())
    with contextlib.suppress(trio.BrokenResourceError):
        assert await sock.recv() == b"pong"
        await sock.send(b"ping")
        assert peer.received() == b"ping"


@pytest.mark.parametrize(
    ("https_compatible", "words"),
    [(False, "without close_notify"), (True, "the peer has ended the connection")],
)
async def test_eof_inside_a_message_breaks_a_send(
    words: str, sock: Socket, peer: PartialTicketPeer
) -> None:
    assert await sock.peek() is None
    peer.raw.shutdown(socket.SHUT_WR)
    with pytest.raises(trio.BrokenResourceError, match=words):
        await sock.send(b"x")


@pytest.mark.parametrize("https_compatible", [True])
async def test_eof_inside_a_message_ends_read_and_send(
    sock: Socket, peer: PartialTicketPeer
) -> None:
    """With https_compatible, the read returns EOF, but the send still fails."""

    async def read() -> None:
        assert await sock.recv() == b""

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError, match="has ended"):
            await sock.send(b"x")

    async with trio.open_nursery() as nursery:
        await start_until_blocked(nursery, read)
        await start_until_blocked(nursery, send)
        peer.raw.shutdown(socket.SHUT_WR)


async def test_garbage_after_half_a_message_fails_a_send(
    sock: Socket, peer: PartialTicketPeer
) -> None:
    assert await sock.peek() is None
    peer.raw.sendall(peer.second_half[:5] + bytes(len(peer.second_half)))
    with pytest.raises(TLSError, match="forged or damaged"):
        await sock.send(b"x")


async def test_peek_does_not_overtake_a_sender_that_reads(
    authority: Authority, wide_certificate: Certificate, times: int
) -> None:
    """For one scheduler pass, the sender holds bytes that it has read. During this pass, peek
    must not read.

    The test is repeated, because Trio's scheduling order is random.
    """
    for _ in range(40 * times):
        async with partial_ticket_pair(authority, wide_certificate) as (sock, peer):
            assert await sock.peek() is None
            peer.ssl.write(b"pong")
            peer.raw.sendall(peer.second_half[:100])

            async def send_rest_and_peek(
                sock: Socket = sock, peer: PartialTicketPeer = peer
            ) -> None:
                peer.raw.sendall(peer.second_half[100:] + peer.outgoing.read())
                await sock.peek()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.send, b"ping")
                nursery.start_soon(send_rest_and_peek)
            assert await sock.recv() == b"pong"


async def test_valid_data_is_received_before_garbage_raises_an_error(authority: Authority) -> None:
    async with post_handshake_pair(authority) as (sock, peer):
        for word in (b"one", b"two"):
            peer.ssl.write(word)
        peer.raw.sendall(peer.outgoing.read() + b"\x17\x03\x03\x00\x20" + bytes(32))
        await trio.lowlevel.wait_readable(sock.fileno())
        assert [await sock.recv(), await sock.recv()] == [b"one", b"two"]
        for _ in range(2):
            with pytest.raises(TLSError, match="forged or damaged"):
                await sock.recv()


async def test_a_record_that_begins_during_the_handshake_is_read_whole(
    authority: Authority, server_tls: ServerTLS
) -> None:
    sock, raw = raw_unix_pair()
    peer = RawTLS(raw, raw_client_context(authority), server_hostname="example.org")
    rest = b""

    def client() -> None:
        nonlocal rest
        peer.handshake_unflushed()
        peer.ssl.write(b"first data")
        flight = peer.outgoing.read()
        rest = flight[-7:]  # set before the next thread sends these bytes
        raw.sendall(flight[:-7])

    with raw:
        async with closing(sock), trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, client)
            await sock.starttls(server_tls)
            nursery.start_soon(trio.to_thread.run_sync, lambda: raw.sendall(rest))
            assert await sock.recv() == b"first data"


async def test_an_idle_read_ends_although_a_sender_reads(
    authority: Authority, wide_certificate: Certificate
) -> None:
    owner = trio.Event()
    state = ServerState(owner)
    ended = trio.Event()

    async def read() -> None:
        with pytest.raises(ServerClosing), sock.idle():
            await sock.recv()
        ended.set()

    async with partial_ticket_pair(authority, wide_certificate) as (sock, peer):
        sock._connection.server_state = state
        assert await sock.peek() is None
        async with trio.open_nursery() as nursery:
            await start_until_blocked(nursery, sock.send, b"ping")
            await start_until_blocked(nursery, read)
            state.closing.set()
            sock._connection.interrupt_idle_read()
            await ended.wait()
            peer.raw.sendall(peer.second_half)
