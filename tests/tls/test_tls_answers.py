"""What OpenSSL wants to say while it reads: no byte of ours, theirs or its own gets lost over it.

A TLS 1.3 server that asks for a certificate after the handshake (RFC 8446, section 4.6.2) makes a
client answer while it reads.
"""

from __future__ import annotations

import contextlib
import ssl

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import clog, closing, raw_pair
from helpers.raw_tls import RawTLS
from helpers.tls_questions import answered, ask, asked, ends, heard, next_key_update, say, start
from trisock import Certificate, ServerTLS, TLSError
from trisock._net import tls_stream as _tls_stream
from trisock._net import transport as _transport


async def test_a_read_cancelled_before_its_answer_is_out_garbles_nothing(
    authority: Authority,
) -> None:
    async with asked(authority) as (sock, peer):
        size = 1 << 20
        async with trio.open_nursery() as nursery:
            await start(nursery, sock.send, bytes(size))  # stuck: the peer does not read
            ask(peer)
            async with trio.open_nursery() as readers:
                await start(readers, sock.recv)
                readers.cancel_scope.cancel()
            got = 0
            while got < size:  # and now it does
                await trio.lowlevel.wait_readable(peer.raw)
                got += len(heard(peer))
        assert got == size
        say(peer, b"after", asking=False)
        assert await sock.recv() == b"after"
        with contextlib.suppress(trio.BrokenResourceError):  # nothing, or what can be decrypted
            await sock.send(b"more")
            assert heard(peer) == b"more"


async def test_a_cancelled_read_that_was_answering_has_lost_nothing(authority: Authority) -> None:
    async with asked(authority) as (sock, peer):
        got = b""

        async def read() -> None:
            nonlocal got
            got += await sock.recv()

        async with trio.open_nursery() as nursery:
            async with trio.open_nursery() as readers:
                ask(peer)
                await start(readers, read)  # it has answered, and waits
                assert heard(peer) == b""
                await start(nursery, sock.send, bytes(1 << 20))  # stuck
                say(peer, b"precious", asking=True)
                await trio.testing.wait_all_tasks_blocked()
                readers.cancel_scope.cancel()
            if not got:
                say(peer, b" and more", asking=False)
                got += await sock.recv()
            nursery.cancel_scope.cancel()
        assert got.startswith(b"precious")


async def test_a_reader_cancelled_as_it_takes_data_has_lost_nothing(
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
    async with asked(authority) as (sock, peer):

        async def read() -> None:
            got.append(await sock.recv())

        await clog(sock)
        async with trio.open_nursery() as readers:
            ask(peer)
            await start(readers, read)  # it waits for data, and for room to answer
            waiting = True
            say(peer, b"precious", asking=False)
        waiting = False
        if not got:
            await read()
    assert got == [b"precious"]


async def test_a_reader_gets_data_although_its_answer_waits(
    authority: Authority,
) -> None:
    """Two programs that send much to each other before they read must not wait for ever."""
    async with asked(authority) as (sock, peer):
        async with trio.open_nursery() as nursery:
            await start(nursery, sock.send, bytes(1 << 20))  # stuck until the peer reads
            ask(peer)
            say(peer, b"read this first", asking=False)
            assert await sock.recv() == b"read this first"
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("first", ["answer", "send"])
async def test_an_answer_and_a_send_may_both_wait_for_room(
    first: str, authority: Authority, wide_certificate: Certificate
) -> None:
    """One task reads and one sends: neither is a second one, though both have to send."""
    async with asked(authority, wide_certificate) as (sock, peer):
        await clog(sock)

        async def ask_and_read() -> None:
            ask(peer)
            assert await sock.recv() == b"thanks"

        async with trio.open_nursery() as nursery:
            if first == "answer":
                await start(nursery, ask_and_read)
                await start(nursery, sock.send, b"from us")
            else:
                await start(nursery, sock.send, b"from us")
                await start(nursery, ask_and_read)
            got = b""
            while not got.endswith(b"from us"):
                await trio.lowlevel.wait_readable(peer.raw)
                got += heard(peer)
            say(peer, b"thanks", asking=False)
        while peer.ssl.getpeercert(binary_form=True) is None:
            await trio.lowlevel.wait_readable(peer.raw)
            assert heard(peer) == b""


async def test_an_answer_that_was_cut_off_garbles_nothing(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with asked(authority, wide_certificate) as (sock, peer):
        ask(peer)
        async with trio.open_nursery() as readers:
            await start(readers, sock.recv)  # a part of the answer is out
            readers.cancel_scope.cancel()
        say(peer, b"hello", asking=False)

        async def send() -> None:
            assert await sock.recv() == b"hello"
            with contextlib.suppress(trio.BrokenResourceError):  # or nothing more is sent
                await sock.send(b"from us")
            await sock.close()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            data, vouched = await ends(peer)
            assert (data, vouched) in [(b"from us", True), (b"", False)]


async def test_answers_that_the_peer_does_not_take_are_bounded(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tls_stream, "_MAX_RESPONSES", 100)
    async with asked(authority) as (sock, peer):
        await clog(sock)
        ask(peer)
        with pytest.raises(TLSError, match="asks for responses but does not read them"):
            await sock.recv()


async def test_a_reader_leaves_the_queue_to_a_sender_that_waits_for_room(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traffic in both directions must not open a nursery for each read."""

    async def unexpected(self: _tls_stream.TLSStream) -> bool:
        raise AssertionError("the reader flushes what the sender will send")

    monkeypatch.setattr(_tls_stream.TLSStream, "_receive_and_flush", unexpected)
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:
        await start(nursery, sock.send, bytes(1 << 16))  # stuck: the peer does not read
        say(peer, b"one", asking=False)
        assert await sock.recv() == b"one"
        nursery.cancel_scope.cancel()


async def test_an_answer_goes_out_after_a_send_in_its_way(
    authority: Authority,
) -> None:
    """The peer may be waiting for it, and nothing else need ever be sent."""
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:
        size = 1 << 16  # encrypted at once: no more comes after it
        sent = trio.Event()

        async def send() -> None:
            await sock.send(bytes(size))
            sent.set()

        await start(nursery, send)  # stuck in the middle of it: the peer does not read
        ask(peer)
        await start(nursery, sock.recv)
        got = 0
        while got < size:
            await trio.lowlevel.wait_readable(peer.raw)
            got += len(heard(peer))
        await sent.wait()
        await answered(peer)
        nursery.cancel_scope.cancel()


async def test_an_answer_goes_out_when_there_is_room(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with asked(authority, wide_certificate) as (sock, peer), trio.open_nursery() as nursery:
        await clog(sock)
        ask(peer)
        await start(nursery, sock.recv)
        await answered(peer)
        nursery.cancel_scope.cancel()


async def test_a_peer_that_takes_no_answers_is_given_up(
    authority: Authority,
) -> None:
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:
        await start(nursery, sock.send, bytes(1 << 16))  # stuck
        for _ in range(10):
            peer.raw.sendall(b"".join(next_key_update(peer, asking=True) for _ in range(500)))
            if await sock.peek() is None and sock._connection.tls.engine.failure is not None:  # type: ignore[union-attr]
                break
        with pytest.raises(TLSError, match="asks for responses"):
            await sock.recv()
        nursery.cancel_scope.cancel()


async def test_peek_takes_a_bounded_number_of_records(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Records without data (key updates) come without end: peek must not stop the program."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    sock, raw = raw_pair()
    peer = RawTLS(raw, context, server_hostname="example.org")
    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(ServerTLS(authority.issue("example.org")))
            reads = 0

            def key_update() -> bytes:
                nonlocal reads
                reads += 1
                if reads > 1000:
                    raise BlockingIOError
                return next_key_update(peer)

            monkeypatch.setattr(
                type(sock._connection.transport), "receive_nowait", lambda _: key_update()
            )
            assert await sock.peek() is None
            assert reads <= 100
