"""EOF under TLS, with and without close_notify."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio
import trio.testing

from helpers.pairs import closing
from helpers.raw_tls import raw_client_context, tls_server_and_raw_client
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock._net import syscalls as _syscalls
from trisock.testing import Authority, socket_pair

# The size of a record with one byte of data: header, data, type and tag (RFC 8446, section 5.2).
RECORD_OF_ONE_BYTE = 5 + 1 + 1 + 16


async def test_isopen_is_false_under_tls_after_a_reset(a: Socket, b: Socket) -> None:
    assert b.isopen()
    await a.send(b"x")
    await a.send(b"y")
    await trio.lowlevel.wait_readable(b.fileno())
    assert await b.recv() == b"x"
    assert b.isopen()  # a record was read from the kernel but is not decrypted yet
    assert await b.recv() == b"y"
    assert b.isopen()
    a.abort()
    await trio.lowlevel.wait_readable(b.fileno())
    assert not b.isopen()


async def test_isopen_is_true_while_a_record_is_unread(a: Socket, b: Socket) -> None:
    await a.send(b"x")
    await a.send(b"y")
    await a.stream.send_eof()
    # Wait until the kernel has received both records. FIN follows them immediately.
    while _syscalls.unread_bytes(b.fileno()) < 2 * RECORD_OF_ONE_BYTE:
        await trio.lowlevel.checkpoint()
    assert await b.recv() == b"x"
    assert b.isopen()  # y is not decrypted yet, and the kernel has received FIN
    assert await b.recv() == b"y"
    assert not b.isopen()


async def test_isopen_is_false_after_close_notify_without_fin(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.stoptls)  # sends close_notify, and no FIN
        assert await b.recv() == b""
        assert not b.isopen()
        nursery.cancel_scope.cancel()


async def test_a_reset_under_tls_is_not_a_tls_error(a: Socket, b: Socket) -> None:
    a.abort()
    with pytest.raises(trio.BrokenResourceError, match="reset by peer") as caught:
        await b.recv()
    assert type(caught.value) is trio.BrokenResourceError


@pytest.mark.parametrize("ignored_by_context", [False, True])
async def test_eof_without_close_notify_raises_tls_error(
    ignored_by_context: bool, authority: Authority, server_tls: ServerTLS
) -> None:
    context = raw_client_context(authority)
    if ignored_by_context:
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 1 << 7)
    a, b = await socket_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(context, server_hostname="example.org")
        await b.send(b"pay 100")
        await b.stream.send_eof()  # as if an attacker had cut the stream short
        assert await a.recv() == b"pay 100"
        assert await a.peek() is None  # not b"": an attacker can forge this EOF
        for _ in range(2):
            with pytest.raises(TLSError, match="without close_notify: data may be missing"):
                await a.recv()
        assert not a.isopen()


async def https_compatible_pair(
    client_tls: ClientTLS, server_tls: ServerTLS, *, client_too: bool
) -> tuple[Socket, Socket]:
    a, b = await socket_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(lambda: b.starttls(server_tls, https_compatible=True))
        await a.starttls(client_tls, https_compatible=client_too)
    return a, b


async def test_an_https_compatible_reader_does_not_require_close_notify(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await https_compatible_pair(client_tls, server_tls, client_too=True)
    async with closing(a, b):
        await b.send(b"all of it")
        await b.close()
        assert await a.recv() == b"all of it"
        await trio.lowlevel.wait_readable(a.fileno())
        assert await a.peek() == b""
        assert await a.recv() == b""


async def test_an_https_compatible_close_sends_no_close_notify(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await https_compatible_pair(client_tls, server_tls, client_too=False)
    async with closing(a, b):
        await b.close()
        with pytest.raises(TLSError, match="without close_notify"):
            await a.recv()


async def test_close_sends_close_notify_despite_unread_data(a: Socket, b: Socket) -> None:
    """The unread data makes SSL_shutdown fail. The session tickets are still unsent."""
    for _ in range(3):
        await a.send(b"never read")
    await trio.lowlevel.wait_readable(b.fileno())
    assert await b.peek() == b"never read"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.close)
        assert await a.recv() == b""
        nursery.start_soon(a.close)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
async def test_a_close_after_close_notify_and_fin_does_not_wait(
    authority: Authority, server_tls: ServerTLS, version: str
) -> None:
    async with tls_server_and_raw_client(authority, server_tls, version) as (sock, peer):
        with pytest.raises(ssl.SSLWantReadError):
            peer.ssl.unwrap()
        peer.flush()
        assert await sock.recv() == b""
        assert not sock._connection.close_if_drained()  # no FIN yet: a close must wait
        peer.raw.shutdown(socket.SHUT_WR)
        await trio.lowlevel.wait_readable(sock.fileno())
        assert sock._connection.close_if_drained()
        assert not sock.isopen()
        assert sock.fileno() == -1
        peer.run(peer.ssl.unwrap)  # close_notify has arrived
        assert peer.raw.recv(1) == b""


async def test_a_tls_close_waits_until_the_peer_has_sent_fin(
    authority: Authority, server_tls: ServerTLS
) -> None:
    async with tls_server_and_raw_client(authority, server_tls) as (sock, peer):
        assert not sock._connection.close_if_drained()
        assert sock.isopen()
        peer.raw.shutdown(socket.SHUT_WR)  # without close_notify
        await trio.lowlevel.wait_readable(sock.fileno())
        assert not sock._connection.close_if_drained()
        with pytest.raises(TLSError, match="without close_notify"):
            await sock.recv()
