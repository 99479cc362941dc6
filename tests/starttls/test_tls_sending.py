"""Sending under TLS: what becomes of the stream when a send is cancelled or fails."""

from __future__ import annotations

import socket
import ssl

import pytest
import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import closing, tcp_pair, tls_pair, unix_pair
from helpers.raw_tls import upgrade
from trisock import ClientTLS, ServerTLS, TLSError
from trisock._tls.records import pieces


async def test_after_a_cancelled_tls_send_the_connection_is_over(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"x" * 50_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.send(b"y")
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.recv()
        assert not a.isopen()
        assert await a.peek() is None


async def test_a_tls_send_cancelled_before_its_first_byte_changes_nothing(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await upgrade(a, client_tls, b, server_tls)
        sent = 0
        while a._connection.transport.writable_now():
            await a.send(b"x" * 1000)
            sent += 1000
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"never sent")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await b.recv_exactly(sent) == b"x" * sent
        await a.send(b"but this")
        assert await b.recv() == b"but this"
        await b.send(b"and back")
        assert await a.recv() == b"and back"


async def test_a_failed_tls_send_leaves_the_news_to_a_reader(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"421 too busy")
        b.abort()
        with a._connection.reading, pytest.raises(trio.BrokenResourceError):
            while True:
                await a.send(b"more")
        assert a.info().buffered == 0
        assert await a.recv() == b"421 too busy"


async def test_what_a_failed_tls_send_looks_at_is_bounded(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        last_words = b"x" * 200_000
        b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 500_000)
        a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 500_000)
        await b.send(last_words)
        await b.stream.send_eof()
        b.abort()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await a.send(b"more")
        assert a.info().buffered <= 2 * 65536
        assert a.isopen()


async def test_a_file_that_cannot_be_read_at_all_changes_nothing() -> None:
    class Broken:
        def read(self, size: int) -> bytes:
            raise OSError("the disk is broken")

    a, b = await tcp_pair()
    async with closing(a, b):
        with pytest.raises(OSError, match="the disk is broken"):
            await a.send_file(Broken())  # type: ignore[arg-type]
        await a.send(b"no harm done")
        assert await b.recv() == b"no harm done"


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("passes", range(6))
async def test_cancelling_never_cuts_off_a_tls_send_with_room(
    passes: int, version: str, authority: Authority, server_tls: ServerTLS
) -> None:
    """Whenever it comes: all of it was sent or nothing was."""
    context = ssl.create_default_context(cadata=authority.pem.decode())
    context.maximum_version = ssl.TLSVersion[version]
    context.check_hostname = False
    a, b = await tls_pair(context, server_tls)
    async with closing(a, b):
        sent = False
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                nonlocal sent
                await a.send(b"first ")
                sent = True

            nursery.start_soon(send)
            for _ in range(passes):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
        await a.send(b"second")
        expected = b"first second" if sent else b"second"
        assert await b.recv_exactly(len(expected)) == expected


async def test_a_file_that_fails_before_its_end_is_not_vouched_for(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    class Broken:
        parts = [b"the first half"]

        def read(self, size: int) -> bytes:
            if self.parts:
                return self.parts.pop()
            raise OSError("the disk is broken")

    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        with pytest.raises(OSError, match="the disk is broken"):
            await a.send_file(Broken())  # type: ignore[arg-type]
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.send(b"x")
        await b.send(b"still heard")
        assert await a.recv() == b"still heard"
        assert await b.recv() == b"the first half"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            with pytest.raises(TLSError, match="without close_notify"):
                await b.recv()
            await b.close()
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        Broken.parts.append(b"the first half")
        with pytest.raises(OSError, match="the disk is broken"):
            await a.send_file(Broken())  # type: ignore[arg-type]
        with pytest.raises(TLSError, match="cut off before"):
            await a.stoptls()
        assert not a.isopen()


async def test_no_starttls_after_a_send_that_was_cut_off(client_tls: ClientTLS) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"x" * 50_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.starttls(client_tls)


async def test_a_failed_tls_send_hides_nothing_said_before(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        await b.send(b"421 too busy")
        b.abort()
        with pytest.raises(trio.BrokenResourceError):
            while True:
                await a.send(b"more")
        with pytest.raises(trio.BrokenResourceError):
            await a.send(b"more")
        assert await a.recv() == b"421 too busy"
        with pytest.raises(trio.BrokenResourceError):
            await a.recv()


def test_what_is_encrypted_at_a_time_is_bounded() -> None:
    views = [memoryview(b"a" * 10)] * 1000 + [memoryview(b"b" * 1_000_000)] + [memoryview(b"c")] * 5
    found = list(pieces(views))
    assert b"".join(found) == b"".join(views)
    assert max(map(len, found)) <= 65536
    assert len(found) <= 20
