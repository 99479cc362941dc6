"""While OpenSSL reads, it responds to some messages. Its responses must not lose or damage data.

In most of these tests, a TLS 1.3 server requests a certificate after the handshake (RFC 8446,
section 4.6.2). The client responds as soon as it reads the request.
"""

from __future__ import annotations

import contextlib

import pytest
import trio
import trio.testing

from helpers.pairs import clog, closing, raw_pair
from helpers.post_handshake import PostHandshakePeer, post_handshake_pair, start_until_blocked
from helpers.raw_tls import handshake, raw_client_context
from trisock import Certificate, ServerTLS, TLSError
from trisock._net import tls_stream as _tls_stream
from trisock._net import transport as _transport
from trisock.testing import Authority


async def test_a_cancelled_read_corrupts_no_data_while_responses_are_unsent(
    authority: Authority,
) -> None:
    async with post_handshake_pair(authority) as (sock, peer):
        message = bytes(1 << 20)
        async with trio.open_nursery() as nursery:
            await start_until_blocked(nursery, sock.send, message)  # the peer does not read
            peer.request_certificate()
            async with trio.open_nursery() as readers:
                await start_until_blocked(readers, sock.recv)
                readers.cancel_scope.cancel()
            got = await peer.receive_until(lambda data: len(data) >= len(message))
        assert got == message
        peer.send(b"after")
        assert await sock.recv() == b"after"
        # This send may fail. If it succeeds, the peer must be able to decrypt the data.
        with contextlib.suppress(trio.BrokenResourceError):
            await sock.send(b"more")
            assert peer.received() == b"more"


async def test_cancelling_a_read_that_has_responded_loses_no_data(authority: Authority) -> None:
    async with post_handshake_pair(authority) as (sock, peer):
        got = b""

        async def read() -> None:
            nonlocal got
            got += await sock.recv()

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as readers:
                peer.request_certificate()
                await start_until_blocked(readers, read)  # read() has responded and waits for data
                assert peer.received() == b""
                await start_until_blocked(nursery, sock.send, bytes(1 << 20))
                peer.request_certificate(b"precious")
                await trio.testing.wait_all_tasks_blocked()
                readers.cancel_scope.cancel()
            if not got:
                peer.send(b" and more")
                got += await sock.recv()
            nursery.cancel_scope.cancel()
        assert got.startswith(b"precious")


async def test_cancelling_a_read_when_data_arrives_loses_no_data(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = _transport.Transport.receive
    got: list[bytes] = []
    waiting = False

    async def receive_and_cancel(self: _transport.Transport) -> bytes:
        data = await real(self)
        if waiting:
            readers.cancel_scope.cancel()
        return data

    monkeypatch.setattr(_transport.Transport, "receive", receive_and_cancel)
    async with post_handshake_pair(authority) as (sock, peer):

        async def read() -> None:
            got.append(await sock.recv())

        await clog(sock)
        async with trio.open_nursery() as readers:
            peer.request_certificate()
            await start_until_blocked(
                readers, read
            )  # the read waits for data, and for room to respond
            waiting = True
            peer.send(b"precious")
        waiting = False
        if not got:
            await read()
    assert got == [b"precious"]


async def test_a_reader_receives_data_while_its_response_waits(authority: Authority) -> None:
    """If a read had to send its response first, two peers that both send could deadlock."""
    async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:
        await start_until_blocked(nursery, sock.send, bytes(1 << 20))  # the peer does not read
        peer.request_certificate()
        peer.send(b"read this first")
        assert await sock.recv() == b"read this first"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("first", ["response", "send"])
async def test_a_response_and_a_send_can_both_wait_for_room(
    first: str, authority: Authority, wide_certificate: Certificate
) -> None:
    """A reader and a sender do not conflict, even if the reader has to send a response."""
    async with post_handshake_pair(authority, wide_certificate) as (sock, peer):
        await clog(sock)

        async def respond() -> None:
            peer.request_certificate()
            assert await sock.recv() == b"thanks"

        async def send() -> None:
            await sock.send(b"from us")

        async with trio.open_nursery() as nursery:
            for task in (respond, send) if first == "response" else (send, respond):
                await start_until_blocked(nursery, task)
            await peer.receive_until(lambda data: data.endswith(b"from us"))
            peer.send(b"thanks")
        while peer.ssl.getpeercert(binary_form=True) is None:
            await trio.lowlevel.wait_readable(peer.raw)
            assert peer.received() == b""


async def test_a_partly_sent_response_damages_nothing(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with post_handshake_pair(authority, wide_certificate) as (sock, peer):
        peer.request_certificate()
        async with trio.open_nursery() as readers:
            await start_until_blocked(readers, sock.recv)  # sends only a part of the response
            readers.cancel_scope.cancel()
        peer.send(b"hello")

        async def send() -> None:
            assert await sock.recv() == b"hello"
            # This send may fail. If it fails, the peer must receive no data.
            with contextlib.suppress(trio.BrokenResourceError):
                await sock.send(b"from us")
            await sock.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            data, close_notify = await peer.receive_to_end()
            assert (data, close_notify) in [(b"from us", True), (b"", False)]


async def test_responses_to_a_peer_that_does_not_read_are_bounded(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tls_stream, "_MAX_RESPONSE_BYTES", 100)
    async with post_handshake_pair(authority) as (sock, peer):
        await clog(sock)
        peer.request_certificate()
        with pytest.raises(TLSError, match="asks for responses but does not read them"):
            await sock.recv()


async def test_endless_key_updates_break_a_connection_that_cannot_respond(
    authority: Authority,
) -> None:
    async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:
        await start_until_blocked(nursery, sock.send, bytes(1 << 16))  # the peer does not read
        for _ in range(10):
            peer.raw.sendall(b"".join(peer.key_update(request=True) for _ in range(500)))
            if await sock.peek() is None and sock._connection.tls.engine.failure is not None:  # type: ignore[union-attr]
                break
        with pytest.raises(TLSError, match="asks for responses"):
            await sock.recv()
        nursery.cancel_scope.cancel()


async def test_a_reader_leaves_the_send_queue_to_a_waiting_sender(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the reader flushed the queue itself, each read would open a nursery, which is slow."""

    async def unexpected(self: _tls_stream.TLSStream) -> bool:
        raise AssertionError("the reader flushes the sender's queue")

    monkeypatch.setattr(_tls_stream.TLSStream, "_receive_and_flush", unexpected)
    async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:
        await start_until_blocked(nursery, sock.send, bytes(1 << 16))  # the peer does not read
        peer.send(b"one")
        assert await sock.recv() == b"one"
        nursery.cancel_scope.cancel()


async def test_a_delayed_response_is_sent_right_after_the_send(authority: Authority) -> None:
    """The peer may wait for the response, and the program may never send again."""
    async with post_handshake_pair(authority) as (sock, peer), trio.open_nursery() as nursery:
        message = bytes(1 << 16)  # encrypted in one call, before the response exists
        sent = trio.Event()

        async def send() -> None:
            await sock.send(message)
            sent.set()

        await start_until_blocked(nursery, send)  # sends only a part: the peer does not read
        peer.request_certificate()
        await start_until_blocked(nursery, sock.recv)
        await peer.receive_until(lambda data: len(data) >= len(message))
        await sent.wait()
        await peer.wait_for_response()
        nursery.cancel_scope.cancel()


async def test_a_response_is_sent_when_there_is_room(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with (
        post_handshake_pair(authority, wide_certificate) as (sock, peer),
        trio.open_nursery() as nursery,
    ):
        await clog(sock)
        peer.request_certificate()
        await start_until_blocked(nursery, sock.recv)
        await peer.wait_for_response()
        nursery.cancel_scope.cancel()


async def test_peek_decrypts_a_bounded_number_of_records(
    authority: Authority, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A peer can send records without data (key updates) forever."""
    sock, raw = raw_pair()
    peer = PostHandshakePeer(raw, raw_client_context(authority), server_hostname="example.org")
    with raw:
        async with closing(sock):
            await handshake(sock, server_tls, peer)
            reads = 0

            def receive_key_update(_: object) -> bytes:
                nonlocal reads
                reads += 1
                if reads > 1000:
                    raise BlockingIOError
                return peer.key_update()

            transport = type(sock._connection.transport)
            monkeypatch.setattr(transport, "receive_nowait", receive_key_update)
            assert await sock.peek() is None
            assert reads <= 100
