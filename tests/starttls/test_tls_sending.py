"""The state of a TLS connection after a cancelled or failed send."""

from __future__ import annotations

import socket

import pytest
import trio
import trio.testing

from helpers.pairs import closing, unix_pair
from helpers.raw_tls import raw_client_context, upgrade
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock.testing import Authority, socket_pair


async def cancel_while_blocked(sock: Socket, data: bytes) -> None:
    """Send data that does not fit in the kernel, and cancel the send while it waits."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sock.send, data)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()


async def send_until_broken(sock: Socket) -> None:
    with pytest.raises(trio.BrokenResourceError):
        while True:
            await sock.send(b"more")


async def test_a_cancelled_tls_send_breaks_the_connection(a: Socket) -> None:
    await cancel_while_blocked(a, b"x" * 50_000_000)
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.send(b"y")
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.recv()
    assert not a.isopen()
    assert await a.peek() is None


@pytest.mark.parametrize("layer", ["plain"])
async def test_starttls_fails_after_a_cancelled_send(a: Socket, client_tls: ClientTLS) -> None:
    await cancel_while_blocked(a, b"x" * 50_000_000)
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.starttls(client_tls)


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
        await cancel_while_blocked(a, b"never sent")
        assert await b.recv_exactly(sent) == b"x" * sent
        await a.send(b"but this")
        assert await b.recv() == b"but this"
        await b.send(b"and back")
        assert await a.recv() == b"and back"


async def test_a_failed_tls_send_leaves_received_data_to_the_reader(a: Socket, b: Socket) -> None:
    await b.send(b"421 too busy")
    b.abort()
    with a._connection.reading:
        await send_until_broken(a)
    assert a.info().buffered == 0
    assert await a.recv() == b"421 too busy"


async def test_received_data_can_be_read_after_a_failed_tls_send(a: Socket, b: Socket) -> None:
    await b.send(b"421 too busy")
    b.abort()
    await send_until_broken(a)
    with pytest.raises(trio.BrokenResourceError):
        await a.send(b"more")
    assert await a.recv() == b"421 too busy"
    with pytest.raises(trio.BrokenResourceError):
        await a.recv()


async def test_decryption_after_a_failed_tls_send_is_bounded(a: Socket, b: Socket) -> None:
    b.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 500_000)
    a.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 500_000)
    await b.send(b"x" * 200_000)
    await b.stream.send_eof()
    b.abort()
    await send_until_broken(a)
    assert a.info().buffered <= 2 * 65536
    assert a.isopen()


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize("passes", range(6))
async def test_a_cancelled_short_tls_send_sends_all_or_nothing(
    passes: int, version: str, authority: Authority, server_tls: ServerTLS
) -> None:
    context = raw_client_context(authority, version)
    context.check_hostname = False
    a, b = await socket_pair()
    async with closing(a, b):
        await upgrade(a, context, b, server_tls)
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


class BrokenFile:
    """A file whose reads return ``parts`` and then fail."""

    def __init__(self, *parts: bytes) -> None:
        self._parts = iter(parts)

    def read(self, size: int) -> bytes:
        for part in self._parts:
            return part
        raise OSError("the disk is broken")


async def send_broken_file(sock: Socket, *parts: bytes) -> None:
    with pytest.raises(OSError, match="the disk is broken"):
        await sock.send_file(BrokenFile(*parts))  # type: ignore[arg-type]


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_sending_works_after_a_files_first_read_fails(a: Socket, b: Socket) -> None:
    await send_broken_file(a)
    await a.send(b"no harm done")
    assert await b.recv() == b"no harm done"


async def test_no_close_notify_follows_a_file_cut_short(a: Socket, b: Socket) -> None:
    await send_broken_file(a, b"the first half")
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.send(b"x")
    await b.send(b"still received")
    assert await a.recv() == b"still received"
    assert await b.recv() == b"the first half"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.close)
        with pytest.raises(TLSError, match="without close_notify"):
            await b.recv()
        await b.close()


async def test_stoptls_fails_after_a_file_cut_short(a: Socket) -> None:
    await send_broken_file(a, b"the first half")
    with pytest.raises(TLSError, match="an earlier send was cut short"):
        await a.stoptls()
    assert not a.isopen()
