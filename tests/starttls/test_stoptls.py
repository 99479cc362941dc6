"""stoptls: return to plain text on the same connection."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.pairs import RESET, closing, raw_pair
from helpers.raw_tls import RawTLS, raw_client_context, tls_server_and_raw_client
from trisock import ServerTLS, Socket, TLSError
from trisock.testing import Authority


async def test_stoptls_is_refused_while_decrypted_bytes_are_unread(a: Socket, b: Socket) -> None:
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
async def data_after_the_handshake(
    authority: Authority, server_tls: ServerTLS
) -> AsyncIterator[tuple[Socket, socket.socket]]:
    """Yield a server and its client's raw socket.

    The client's last handshake message and its first data have arrived in one segment.
    """
    sock, raw = raw_pair()
    peer = RawTLS(raw, raw_client_context(authority), server_hostname="example.org")

    def client() -> None:
        peer.handshake_unflushed()
        peer.ssl.write(b"first data")
        peer.flush()

    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, client)
                await sock.starttls(server_tls)
            yield sock, raw


async def test_a_cancelled_read_right_after_the_handshake_loses_nothing(
    authority: Authority, server_tls: ServerTLS, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with data_after_the_handshake(authority, server_tls) as (sock, _):
        assert sock._connection.tls is not None
        real = sock._connection.tls._read_record

        def read_and_cancel() -> bytes | None:
            scope.cancel()
            return real()

        monkeypatch.setattr(sock._connection.tls, "_read_record", read_and_cancel)
        with trio.CancelScope() as scope:
            assert await sock.recv() == b"first data"
        assert not scope.cancelled_caught


async def test_stoptls_is_refused_while_data_after_the_handshake_is_unread(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with data_after_the_handshake(authority, server_tls) as (sock, raw):
        raw.shutdown(socket.SHUT_WR)
        await trio.lowlevel.wait_readable(sock.fileno())
        assert sock.isopen()  # FIN has arrived, but no close_notify
        with pytest.raises(RuntimeError, match="decrypted bytes are unread"):
            await sock.stoptls()
        assert sock.isopen()
        assert await sock.recv() == b"first data"


async def test_stoptls_fails_while_encrypted_data_is_in_flight(a: Socket, b: Socket) -> None:
    await b.send(b"in flight")
    with pytest.raises(TLSError, match="still sending encrypted data"):
        await a.stoptls()
    assert a.fileno() == -1


async def test_plain_text_right_after_close_notify_is_read(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with tls_server_and_raw_client(authority, server_tls) as (sock, peer):
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.ssl.unwrap()
        peer.raw.sendall(peer.outgoing.read() + b"plain text")
        assert await sock.recv() == b""  # EOF of the encrypted stream
        await sock.stoptls()
        assert not sock.istls()
        assert await sock.recv() == b"plain text"


async def test_stoptls_fails_if_the_peer_resets_after_close_notify(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with tls_server_and_raw_client(authority, server_tls) as (sock, peer):
        with contextlib.suppress(ssl.SSLWantReadError):
            peer.ssl.unwrap()
        peer.flush()
        peer.raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        peer.raw.close()
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(TLSError, match="the peer closed the connection"):
            await sock.stoptls()


@pytest.mark.parametrize("how", ["EOF", "reset", "plain text"])
async def test_stoptls_fails_if_the_peer_does_not_send_close_notify(
    how: str, a: Socket, b: Socket
) -> None:
    if how == "EOF":
        await b.stream.send_eof()
    elif how == "reset":
        b.abort()
        await trio.lowlevel.wait_readable(a.fileno())
    else:
        await b.stream.send_all(b"plain text where TLS belongs")
    with pytest.raises(TLSError, match="failed"):
        await a.stoptls()
    assert not a.isopen()
    with pytest.raises(trio.ClosedResourceError):
        await a.recv()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_stoptls_does_not_accept_another_alert_as_close_notify(
    version: str, authority: Authority, server_tls: ServerTLS, a: Socket, b: Socket
) -> None:
    """OpenSSL mistakes the alert for close_notify, and leaves an error in its error queue.

    All connections of the thread share that queue.
    """
    async with tls_server_and_raw_client(authority, server_tls, version) as (sock, peer):
        peer.incoming.write(b"\x17\x03\x03\x00\x20" + bytes(32))  # a forged record
        with pytest.raises(ssl.SSLError, match=r"(?i)bad record mac|record layer failure"):
            peer.ssl.read()
        peer.flush()
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(TLSError, match="the peer refused, with the alert 'bad record mac'"):
            await sock.stoptls()
    assert await a.peek() is None
    await b.send(b"x")
    assert await a.recv() == b"x"


async def test_a_cancelled_stoptls_closes_the_connection(a: Socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.stoptls)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await a.recv()
        with pytest.raises(trio.BusyResourceError):
            await a.send(b"x")
        nursery.cancel_scope.cancel()
    assert a.fileno() == -1
