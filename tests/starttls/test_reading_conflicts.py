"""While ``starttls`` or ``stoptls`` waits, every read is refused and consumes nothing."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

from helpers.pairs import clog, closing, unix_pair
from helpers.reads import READS
from trisock import ClientTLS, Frames, Lines, ServerTLS, Socket, TLSError
from trisock.testing import serving

# More bytes than the kernel can hold: the broadcast ends only after the client reads them.
BROADCAST_SIZE = 8_000_000

# Every way to read: all reads of a socket, and iterators whose next items are already split.
WAYS = [*READS, "split lines", "batches after split lines", "split frames"]

Items = Lines | Frames


async def read(way: str, sock: Socket, items: Items) -> None:
    if way.startswith("batches"):
        assert isinstance(items, Lines)
        await anext(items.batches())
    else:
        await (anext(items) if way.startswith("split") else READS[way](sock))


def encoded(way: str, *items: bytes) -> bytes:
    """Return the items as lines, or as frames with a one-byte header: both have the same length."""
    if way == "split frames":
        return b"".join(bytes([len(item)]) + item for item in items)
    return b"".join(item + b"\n" for item in items)


@contextlib.asynccontextmanager
async def handler_behind_a_broadcast(
    way: str,
    text: bytes,
    server_tls: ServerTLS | None = None,
    client_tls: ClientTLS | None = None,
) -> AsyncIterator[tuple[Socket, Items, Socket]]:
    """Yield a handler's socket, its iterator and the client.

    A broadcast to the client is in flight. A call of starttls or stoptls waits for the end of the
    broadcast. The iterator has returned the first item (line or frame) of ``text``, and has already
    split the other items.
    """
    sock: Socket
    items: Items
    ready = trio.Event()

    async def handler(accepted: Socket) -> None:
        nonlocal sock, items
        sock = accepted
        items = accepted.frames(1) if way == "split frames" else accepted.lines()
        await anext(items)
        ready.set()
        await trio.sleep_forever()

    async with serving(handler, tls=server_tls) as s, trio.open_nursery() as nursery:
        client = await s.connect(tls=client_tls)
        await client.send(text)
        await ready.wait()
        nursery.start_soon(s.server.broadcast, bytes(BROADCAST_SIZE))
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield sock, items, client
        nursery.cancel_scope.cancel()
        s.server.stop(grace=0)


@pytest.mark.parametrize("change", ["starttls", "stoptls"])
@pytest.mark.parametrize("way", WAYS)
async def test_every_read_is_refused_while_tls_begins_or_ends(
    way: str, change: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    """No read may return plain text that was injected after a STARTTLS command."""
    roles = (server_tls, client_tls) if change == "stoptls" else (None, None)
    text = encoded(way, b"STARTTLS", b"RSET", b"INJECTED")
    async with handler_behind_a_broadcast(way, text, *roles) as (sock, items, _):

        async def begin() -> None:
            with pytest.raises((trio.ClosedResourceError, RuntimeError)):
                await (sock.starttls(server_tls) if change == "starttls" else sock.stoptls())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(3):
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    await read(way, sock, items)
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    sock.unrecv(b"x")
            assert sock.info().buffered == len(b"RSET\nINJECTED\n")
            sock.abort()
            with pytest.raises(trio.ClosedResourceError):
                await read(way, sock, items)


@pytest.mark.parametrize("way", WAYS)
async def test_injected_lines_fail_the_handshake_despite_attempted_reads(
    way: str, server_tls: ServerTLS
) -> None:
    async def begin() -> None:
        with pytest.raises(TLSError, match="does not speak TLS"):
            await sock.starttls(server_tls)

    text = encoded(way, b"STARTTLS", b"MAIL FROM:<evil@example.org>", b"DATA")
    async with handler_behind_a_broadcast(way, text) as (sock, items, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await read(way, sock, items)
            assert await client.recv_exactly(BROADCAST_SIZE)  # now the handshake begins


@pytest.mark.parametrize("way", ["split lines", "split frames"])
async def test_items_that_were_split_before_stoptls_are_kept(
    way: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async def end() -> None:
        with pytest.raises(RuntimeError, match="decrypted bytes are unread"):
            await sock.stoptls()

    text = encoded(way, b"CCC", b"two", b"three")
    behind_a_broadcast = handler_behind_a_broadcast(way, text, server_tls, client_tls)
    async with behind_a_broadcast as (sock, items, client):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(end)
            await trio.testing.wait_all_tasks_blocked(0.01)
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await anext(items)
            assert await client.recv_exactly(BROADCAST_SIZE)
        assert [await anext(items), await anext(items)] == [b"two", b"three"]


@pytest.mark.parametrize("way", ["split lines", "split frames"])
async def test_split_items_are_refused_while_another_task_reads(way: str) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        items: Items = a.frames(1) if way == "split frames" else a.lines()
        a.unrecv(encoded(way, b"one", b"two"))
        assert await anext(items) == b"one"
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.recv_exactly, 100)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await anext(items)
            nursery.cancel_scope.cancel()
        assert await anext(items) == b"two"


@pytest.mark.parametrize("way", ["split lines", "batches after split lines", "split frames"])
async def test_split_items_are_refused_during_the_checkpoint_of_another_read(
    way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A read that is served from the buffer lets other tasks run before it consumes bytes."""
    a, b = unix_pair()
    async with closing(a, b):
        items: Items = a.frames(1) if way == "split frames" else a.lines()
        a.unrecv(encoded(way, b"one", b"two"))
        assert await anext(items) == b"one"
        async with trio.open_nursery() as nursery:
            with monkeypatch.context() as patch:
                patch.setattr(trio.lowlevel, "checkpoint", trio.sleep_forever)
                nursery.start_soon(a.receive_some)
                await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(trio.BusyResourceError):
                await read(way, a, items)
            nursery.cancel_scope.cancel()
        assert await anext(items) == b"two"


@pytest.mark.parametrize("way", WAYS)
async def test_every_read_after_an_abort_raises_closed_resource_error(way: str) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        items: Items = a.frames(1) if way == "split frames" else a.lines()
        a.unrecv(encoded(way, b"one", b"two"))
        assert await anext(items) == b"one"

        async def wait() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await a.recv_exactly(100)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            a.abort()  # the reader is woken, but has not run yet
            with pytest.raises(trio.ClosedResourceError):
                await read(way, a, items)
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
