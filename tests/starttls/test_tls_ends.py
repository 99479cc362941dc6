"""The end of an encrypted stream, with close_notify and without."""

from __future__ import annotations

import ssl

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import closing, tcp_pair, tls_pair
from trisock import ClientTLS, ServerTLS, TLSError
from trisock._net import syscalls as _syscalls


async def test_isopen_under_tls(client_tls: ClientTLS, server_tls: ServerTLS) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        assert server.isopen()
        await client.send(b"x")
        await client.send(b"y")
        await trio.lowlevel.wait_readable(server.fileno())
        assert await server.recv() == b"x"
        assert server.isopen()  # a record was read from the kernel and not decrypted yet
        assert await server.recv() == b"y"
        assert server.isopen()
        client.abort()
        await trio.lowlevel.wait_readable(server.fileno())
        assert not server.isopen()


async def test_a_reset_under_tls_is_no_fault_of_tls(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        client.abort()
        with pytest.raises(trio.BrokenResourceError, match="reset by peer") as caught:
            await server.recv()
        assert type(caught.value) is trio.BrokenResourceError


@pytest.mark.parametrize("ignored_by_context", [False, True])
async def test_an_end_without_close_notify_is_an_error(
    ignored_by_context: bool, authority: Authority, server_tls: ServerTLS
) -> None:
    context = ssl.create_default_context(cadata=authority.pem.decode())
    if ignored_by_context:
        context.options |= getattr(ssl, "OP_IGNORE_UNEXPECTED_EOF", 1 << 7)
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(context, server_hostname="example.org")
        await b.send(b"pay 100")
        await b.stream.send_eof()  # somebody in the middle cuts off the rest
        assert await a.recv() == b"pay 100"
        assert await a.peek() is None  # no end that could be trusted
        for _ in range(2):
            with pytest.raises(TLSError, match="without close_notify: data may be missing"):
                await a.recv()
        assert not a.isopen()


async def test_an_https_compatible_connection_neither_sends_nor_misses_close_notify(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: b.starttls(server_tls, https_compatible=True))
            await a.starttls(client_tls, https_compatible=True)
        await b.send(b"all of it")
        await b.close()
        assert await a.recv() == b"all of it"
        await trio.lowlevel.wait_readable(a.fileno())
        assert await a.peek() == b""
        assert await a.recv() == b""
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: b.starttls(server_tls, https_compatible=True))
            await a.starttls(client_tls)
        await b.close()
        with pytest.raises(TLSError, match="without close_notify"):
            await a.recv()


async def test_close_notify_is_sent_though_there_is_unread_data(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """SSL_shutdown fails then, and the session tickets have not been sent yet, either."""
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        for _ in range(3):
            await a.send(b"never read")
        await trio.lowlevel.wait_readable(b.fileno())
        assert await b.peek() == b"never read"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.close)
            assert await a.recv() == b""
            nursery.start_soon(a.close)


async def test_isopen_is_true_while_a_record_is_left(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server):
        await client.send(b"x")
        await client.send(b"y")
        await client.stream.send_eof()
        while (
            _syscalls.unread_bytes(server.fileno()) < 2 * 23
        ):  # two records, and the end is behind
            await trio.lowlevel.checkpoint()
        assert await server.recv() == b"x"
        assert server.isopen()  # y is in OpenSSL's BIO, the kernel is at its end
        assert await server.recv() == b"y"
        assert not server.isopen()


async def test_isopen_is_false_after_close_notify_without_fin(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server), trio.open_nursery() as nursery:
        nursery.start_soon(client.stoptls)  # close_notify, and no FIN
        assert await server.recv() == b""
        assert not server.isopen()
        nursery.cancel_scope.cancel()
