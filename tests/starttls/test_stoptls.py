"""Back to the clear in mid-conversation."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import RESET, closing, raw_pair, tls_pair
from helpers.raw_tls import RawTLS
from trisock import ClientTLS, ServerTLS, Socket, TLSError


async def test_stoptls_refuses_while_decrypted_bytes_are_waiting(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"one")
        await b.send(b"two")
        await trio.lowlevel.wait_readable(a.fileno())
        assert await a.recv() == b"one"
        with pytest.raises(RuntimeError, match="read them first"):
            await a.stoptls()
        assert a.istls()
        a.unrecv(b"pushed back")
        with pytest.raises(RuntimeError, match="read them first"):
            await a.stoptls()
        assert await a.recv() == b"pushed back"
        assert await a.recv() == b"two"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.stoptls)
            await a.stoptls()


@contextlib.asynccontextmanager
async def early_bird(
    authority: Authority, server_tls: ServerTLS
) -> AsyncIterator[tuple[Socket, socket.socket]]:
    """Give a server to which the end of the handshake and data came in one segment."""
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")

    def shake_hands_and_talk() -> None:
        while True:
            try:
                peer.ssl.do_handshake()
                break
            except ssl.SSLWantReadError:
                peer.flush()
                peer.incoming.write(raw.recv(65536))
        peer.ssl.write(b"early bird")
        peer.flush()

    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, shake_hands_and_talk)
                await sock.starttls(server_tls)
            yield sock, raw


async def test_a_cancelled_read_of_what_came_with_the_handshake_loses_nothing(
    authority: Authority, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with early_bird(authority, server_tls) as (sock, _):
        assert sock._connection.tls is not None
        real = sock._connection.tls._read_record

        def read_and_cancel() -> bytes | None:
            scope.cancel()
            return real()

        monkeypatch.setattr(sock._connection.tls, "_read_record", read_and_cancel)
        with trio.CancelScope() as scope:
            assert await sock.recv() == b"early bird"
        assert not scope.cancelled_caught


async def test_stoptls_refuses_while_bytes_from_the_handshake_are_waiting(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with early_bird(authority, server_tls) as (sock, raw):
        raw.shutdown(socket.SHUT_WR)
        await trio.lowlevel.wait_readable(sock.fileno())
        assert sock.isopen()  # the kernel is at its end, TLS is not
        with pytest.raises(RuntimeError, match="decrypted bytes are waiting"):
            await sock.stoptls()
        assert sock.isopen()
        assert await sock.recv() == b"early bird"


async def test_stoptls_fails_on_encrypted_data_in_flight(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"in flight")
        with pytest.raises(TLSError, match="still sending encrypted data"):
            await a.stoptls()
        assert a.fileno() == -1


async def test_clear_bytes_right_behind_close_notify_are_read_as_clear(
    authority: Authority, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")

    def talk() -> None:
        peer.run(peer.ssl.do_handshake)
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.ssl.unwrap()
        raw.sendall(peer.outgoing.read() + b"clear again")

    async with closing(sock):
        with raw:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, talk)
                await sock.starttls(server_tls)
            assert await sock.recv() == b""  # the end of the encrypted stream
            await sock.stoptls()
            assert not sock.istls()
            assert await sock.recv() == b"clear again"


async def test_stoptls_with_a_peer_that_leaves_after_its_close_notify(
    authority: Authority, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    peer = RawTLS(raw, context, server_hostname="example.org")
    async with closing(sock):
        with raw:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(server_tls)
            with contextlib.suppress(ssl.SSLWantReadError):
                peer.ssl.unwrap()
            peer.flush()
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(TLSError, match="the peer closed the connection"):
            await sock.stoptls()


@pytest.mark.parametrize("how", ["end", "reset", "garbage"])
async def test_stoptls_with_a_peer_that_does_not_do_the_same(
    how: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        if how == "end":
            await b.stream.send_eof()
        elif how == "reset":
            b.abort()
            await trio.lowlevel.wait_readable(a.fileno())
        else:
            await b.stream.send_all(b"clear text where TLS belongs")
        with pytest.raises(TLSError, match="failed"):
            await a.stoptls()
        assert not a.isopen()
        with pytest.raises(trio.ClosedResourceError):
            await a.recv()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_stoptls_takes_an_alert_for_no_end(
    version: str, authority: Authority, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """OpenSSL takes it for one, and leaves its error to the next connection that it works for."""
    sock, raw = raw_pair()
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.maximum_version = ssl.TLSVersion[version]
    peer = RawTLS(raw, context, server_hostname="example.org")
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(sock, a, b):
        with raw:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(server_tls)
            peer.incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))  # a forged record
            with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac"):
                peer.ssl.read()
            peer.flush()
            await trio.lowlevel.wait_readable(sock.fileno())
            with pytest.raises(TLSError, match="the peer refused, with the alert 'bad record mac'"):
                await sock.stoptls()
        assert await a.peek() is None
        await b.send(b"x")
        assert await a.recv() == b"x"


async def test_a_cancelled_stoptls_closes(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.stoptls)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await a.recv()
            with pytest.raises(trio.BusyResourceError):
                await a.send(b"x")
            nursery.cancel_scope.cancel()
        assert a.fileno() == -1
