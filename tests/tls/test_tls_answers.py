"""What OpenSSL wants to say while it reads: no byte of ours, theirs or its own gets lost over it.

A TLS 1.3 server that asks for a certificate after the handshake (RFC 8446, section 4.6.2) makes a
client answer while it reads.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import socket
import ssl
import threading
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
import trustme

from helpers.authority import Authority, certificate
from helpers.pairs import clog, closing, raw_pair, raw_unix_pair
from helpers.raw_tls import RawTLS
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError
from trisock._net import tls_stream as _tls_connection
from trisock._net import transport as _transport


@contextlib.asynccontextmanager
async def asked(
    authority: Authority, wide_certificate: Certificate | None = None
) -> AsyncIterator[tuple[Socket, RawTLS]]:
    """Give a client under TLS 1.3, and a server that can ask it for a certificate at any time."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue("example.org").load_into(server_context)
    server_context.load_verify_locations(cadata=authority.pem.decode())
    server_context.verify_mode = ssl.CERT_OPTIONAL
    server_context.post_handshake_auth = True
    client_context = ssl.create_default_context(cadata=authority.pem.decode())
    client_context.post_handshake_auth = True
    if wide_certificate is not None:
        wide_certificate.load_into(client_context)
    sock, raw = raw_unix_pair()
    peer = RawTLS(raw, server_context, server_side=True)
    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(client_context, server_hostname="example.org")
            raw.setblocking(False)
            # So little room that a message does not fit in, and waits in the middle of it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            yield sock, peer


def say(peer: RawTLS, data: bytes, *, asking: bool) -> None:
    if asking:
        peer.ssl.verify_client_post_handshake()
    peer.ssl.write(data)
    peer.raw.sendall(peer.outgoing.read())


def ask(peer: RawTLS) -> None:
    peer.ssl.verify_client_post_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.ssl.do_handshake()
    peer.raw.sendall(peer.outgoing.read())


def heard(peer: RawTLS) -> bytes:
    """Return everything that the peer can decrypt now."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := peer.raw.recv(65536):
            peer.incoming.write(chunk)
    with contextlib.suppress(ssl.SSLWantReadError):
        while part := peer.ssl.read(65536):
            data += part
    return data


async def start(nursery: trio.Nursery, function: object, *args: object) -> None:
    nursery.start_soon(function, *args)  # type: ignore[arg-type]
    await trio.testing.wait_all_tasks_blocked()


async def test_a_read_that_is_cancelled_before_its_answer_is_out_does_not_garble_what_is_sent_later(
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


async def test_a_reader_that_is_cancelled_as_it_takes_what_came_has_lost_nothing(
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


async def test_a_reader_gets_what_came_although_its_answer_has_to_wait(
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


@pytest.fixture(scope="session")
def wide_certificate(authority: Authority) -> Certificate:
    """A certificate so large that a session ticket with it takes more than one record."""
    names = [f"{number}.{'x' * 60}.example.org" for number in range(300)]
    return certificate(authority.ca.issue_cert(*names, key_type=trustme.KeyType.ECDSA))


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
async def test_reading_and_sending_go_on_over_a_message_of_tls_that_came_by_halves(
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


async def test_a_send_that_waits_for_the_rest_of_a_message_can_be_cancelled(
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


async def test_a_peer_that_leaves_in_the_middle_of_a_message_is_a_broken_connection_for_a_sender(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with half_a_message(authority, wide_certificate) as (sock, peer, _):
        assert await sock.peek() is None
        peer.raw.shutdown(socket.SHUT_WR)
        with pytest.raises(trio.BrokenResourceError):
            await sock.send(b"x")


async def test_the_same_where_the_end_of_the_connection_is_the_end_of_the_stream(
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


@pytest.mark.parametrize("first", ["answer", "send"])
async def test_an_answer_and_a_send_may_wait_for_room_at_the_same_time(
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


async def test_a_peer_that_takes_no_answers_cannot_make_us_keep_them_without_end(
    authority: Authority, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_tls_connection, "_MAX_RESPONSES", 100)
    async with asked(authority) as (sock, peer):
        await clog(sock)
        ask(peer)
        with pytest.raises(TLSError, match="asks for responses but does not read them"):
            await sock.recv()


async def test_garbage_behind_half_a_message_is_a_tls_error_for_a_sender(
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


async def test_a_record_that_came_by_half_with_the_handshake_is_read_when_it_is_whole(
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
        raw.sendall(said[:-7])
        rest = said[-7:]

    with raw:
        async with closing(sock), trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, shake_hands_and_talk)
            await sock.starttls(server_tls)
            nursery.start_soon(trio.to_thread.run_sync, lambda: raw.sendall(rest))
            assert await sock.recv() == b"early bird"


async def test_a_peer_that_leaves_while_a_message_is_half_out_breaks_the_send(
    authority: Authority,
) -> None:
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises(trio.BrokenResourceError):
                await sock.send(bytes(1 << 20))

        await start(nursery, send)
        peer.raw.close()


class _Slow(io.RawIOBase):
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


async def test_a_close_in_the_middle_of_a_file_does_not_vouch_for_it(
    authority: Authority,
) -> None:
    file = _Slow()
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


async def test_a_close_in_the_middle_of_a_message_does_not_vouch_for_it(
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


async def ends(peer: RawTLS) -> tuple[bytes, bool]:
    """Read to the end; return what came, and whether close_notify was the end."""
    data = b""
    while True:
        try:
            part = peer.ssl.read(65536)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(peer.raw)
            chunk = peer.raw.recv(65536)
            if not chunk:
                peer.raw.close()
                return data, False
            peer.incoming.write(chunk)
        else:
            if not part:
                peer.raw.shutdown(socket.SHUT_WR)
                return data, True
            data += part


async def test_an_answer_that_found_a_send_in_its_way_goes_out_after_it(
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


async def test_an_answer_that_found_no_room_goes_out_when_there_is_some(
    authority: Authority, wide_certificate: Certificate
) -> None:
    async with asked(authority, wide_certificate) as (sock, peer), trio.open_nursery() as nursery:
        await clog(sock)
        ask(peer)
        await start(nursery, sock.recv)
        await answered(peer)
        nursery.cancel_scope.cancel()


async def answered(peer: object) -> None:
    """Wait until the peer has the answer to its question: then it can ask again."""
    while True:
        heard(peer)  # type: ignore[arg-type]
        with contextlib.suppress(Exception):
            peer.ssl.verify_client_post_handshake()  # type: ignore[attr-defined]
            return
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(peer.raw)  # type: ignore[attr-defined]


async def test_a_close_after_a_part_of_an_answer_still_says_goodbye(
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


async def test_a_peer_that_leaves_while_an_answer_waits_for_room_is_a_broken_connection(
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


async def test_a_close_while_an_answer_waits_for_room_is_a_closed_socket_for_the_reader(
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


async def test_a_peer_that_does_not_take_the_answers_it_asks_for_is_given_up(
    authority: Authority,
) -> None:
    async with asked(authority) as (sock, peer), trio.open_nursery() as nursery:
        await start(nursery, sock.send, bytes(1 << 16))  # stuck
        for _ in range(10):
            peer.raw.sendall(b"".join(next_key_update(peer, asking=True) for _ in range(500)))
            if await sock.peek() is None and sock._connection.tls.failure is not None:  # type: ignore[union-attr]
                break
        with pytest.raises(TLSError, match="asks for responses"):
            await sock.recv()
        nursery.cancel_scope.cancel()


async def test_a_read_and_a_send_that_are_both_in_need_of_the_rest_end_with_the_connection(
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


async def test_peek_does_not_go_on_for_as_long_as_a_peer_likes(
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


def next_key_update(peer: RawTLS, *, asking: bool = False) -> bytes:
    """Let OpenSSL change its keys, which the ssl module cannot."""
    import _ssl

    libssl = ctypes.CDLL(_ssl.__file__)
    libssl.SSL_key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
    libssl.SSL_do_handshake.argtypes = [ctypes.c_void_p]
    # PySSLSocket: the object's head, a weak reference to a socket, the SSL.
    address = id(peer.ssl._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)
    pointer = ctypes.c_void_p.from_address(address).value
    assert libssl.SSL_key_update(pointer, int(asking)) == 1
    libssl.SSL_do_handshake(pointer)
    return peer.outgoing.read()
