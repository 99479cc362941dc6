"""While ``starttls`` or ``stoptls`` waits, every read is refused and consumes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.pairs import clog, closing, unix_pair
from helpers.reads import READS
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock._net.lines import Lines
from trisock.testing import serving

# More bytes than the kernel can hold: the broadcast ends only after the client reads them.
BROADCAST_SIZE = 8_000_000

# Every way to read: all reads of a socket, and an iterator that has already split more lines.
WAYS = [*READS, "split lines"]


async def read(way: str, sock: Socket, lines: Lines) -> None:
    await (anext(lines) if way == "split lines" else READS[way](sock))


@contextlib.asynccontextmanager
async def handler_behind_a_broadcast(
    text: bytes, server_tls: ServerTLS | None = None, client_tls: ClientTLS | None = None
) -> AsyncIterator[tuple[Socket, Lines, Socket]]:
    """Yield a handler's socket, its line iterator and the client.

    A broadcast to the client is in flight. A call of starttls or stoptls waits for the end of the
    broadcast. The iterator has returned the first line of ``text``, and has already split the
    other lines.
    """
    sock: Socket
    lines: Lines
    ready = trio.Event()

    async def handler(accepted: Socket) -> None:
        nonlocal sock, lines
        sock, lines = accepted, accepted.lines()
        await anext(lines)
        ready.set()
        await trio.sleep_forever()

    async with serving(handler, tls=server_tls) as s, trio.open_nursery() as nursery:
        client = await s.connect(tls=client_tls)
        await client.send(text)
        await ready.wait()
        nursery.start_soon(s.server.broadcast, bytes(BROADCAST_SIZE))
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield sock, lines, client
        nursery.cancel_scope.cancel()
        s.server.stop(grace=0)


@pytest.mark.parametrize("change", ["starttls", "stoptls"])
@pytest.mark.parametrize("way", WAYS)
async def test_every_read_is_refused_while_tls_begins_or_ends(
    way: str, change: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """No read may return plain text that was injected after a STARTTLS command."""
    roles = (server_tls, client_tls) if change == "stoptls" else (None, None)
    text = b"STARTTLS\nRSET\nINJECTED\n"
    async with handler_behind_a_broadcast(text, *roles) as (sock, lines, _):

        async def begin() -> None:
            with pytest.raises((trio.ClosedResourceError, RuntimeError)):
                await (sock.starttls(server_tls) if change == "starttls" else sock.stoptls())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(3):
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    await read(way, sock, lines)
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    sock.unrecv(b"x")
            assert sock.info().buffered == len(b"RSET\nINJECTED\n")
            sock.abort()
            with pytest.raises(trio.ClosedResourceError):
                await read(way, sock, lines)


@pytest.mark.parametrize("way", WAYS)
async def test_injected_lines_fail_the_handshake_despite_attempted_reads(
    way: str, server_tls: ServerTLS
) -> None:
    async def begin() -> None:
        with pytest.raises(TLSError, match="does not speak TLS"):
            await sock.starttls(server_tls)

    text = b"STARTTLS\nMAIL FROM:<evil@example.org>\nDATA\n"
    async with handler_behind_a_broadcast(text) as (sock, lines, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await read(way, sock, lines)
            assert await client.recv_exactly(BROADCAST_SIZE)  # now the handshake begins


async def test_lines_that_were_split_before_stoptls_are_kept(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async def end() -> None:
        with pytest.raises(RuntimeError, match="decrypted bytes are unread"):
            await sock.stoptls()

    text = b"CCC\ntwo\nthree\n"
    async with handler_behind_a_broadcast(text, server_tls, client_tls) as (sock, lines, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await anext(lines)
            assert await client.recv_exactly(BROADCAST_SIZE)
        assert [await anext(lines), await anext(lines)] == [b"two", b"three"]


async def test_lines_are_refused_while_another_task_reads() -> None:
    a, b = unix_pair()
    async with closing(a, b):
        lines = a.lines()
        a.unrecv(b"one\ntwo\n")
        assert await anext(lines) == b"one"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.recv_exactly, 100)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await anext(lines)
            nursery.cancel_scope.cancel()
        assert await anext(lines) == b"two"


@pytest.mark.parametrize("way", WAYS)
async def test_every_read_after_an_abort_raises_closed_resource_error(way: str) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        lines = a.lines()
        a.unrecv(b"one\ntwo\n")
        assert await anext(lines) == b"one"

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.recv_exactly(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            a.abort()  # the reader is woken, but has not run yet
            with pytest.raises(trio.ClosedResourceError):
                await read(way, a, lines)
            with pytest.raises(trio.ClosedResourceError):
                a.unrecv(b"x")


async def test_a_send_after_an_abort_raises_closed_resource_error() -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await clog(a)

        async def send() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.send(b"x")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            await trio.testing.wait_all_tasks_blocked()
            a.abort()
            with pytest.raises(trio.ClosedResourceError):
                await a.send(b"y")
