"""Ended connections are freed immediately, without the garbage collector."""

from __future__ import annotations

import contextlib
import gc
import socket
import ssl
import weakref
from collections.abc import Awaitable, Callable, Iterator

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, raw_pair
from helpers.raw_tls import RawTLS, handshake
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net.tls_stream import SendState
from trisock.testing import Authority, socket_pair

End = Callable[[Socket, Socket], Awaitable[object]]
BROKEN = contextlib.suppress(trio.BrokenResourceError)


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def alive(references: list[weakref.ref[object]]) -> list[object]:
    return [reference() for reference in references if reference() is not None]


async def closed(a: Socket, b: Socket) -> None:
    await a.send(b"x")
    assert await b.recv() == b"x"


async def aborted(a: Socket, b: Socket) -> None:
    a.abort()
    with BROKEN:
        await b.recv()
    for _ in range(2):
        with BROKEN:
            await b.send(b"x")
        with BROKEN:
            await b.recv()


async def failed_reads(a: Socket, b: Socket) -> None:
    await a.send(b"half a line")
    a.abort()
    for _ in range(2):
        with contextlib.suppress(trio.BrokenResourceError, trisock.IncompleteReadError):
            await b.recv_until(b"\n")


async def exceeded_limits(a: Socket, b: Socket) -> None:
    await a.send(b"a line of 21 bytes...\n")
    reads: list[Callable[[], Awaitable[object]]] = [
        lambda: b.recv_until(b"\n", max_bytes=9),
        lambda: b.recv_line(max_bytes=9),
        lambda: anext(b.lines(max_bytes=9)),
        lambda: anext(b.lines(max_bytes=9).batches()),
        lambda: b.recv_frame(1, max_bytes=9),
        lambda: anext(b.frames(1, max_bytes=9)),
    ]
    for read in reads:
        with contextlib.suppress(trisock.LimitExceededError):
            await read()


async def cancelled_close(a: Socket, b: Socket) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await a.close()
    with BROKEN:
        await b.recv()


@pytest.mark.parametrize("end", [closed, aborted, failed_reads, exceeded_limits, cancelled_close])
@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_an_ended_connection_is_freed_immediately(layer: str, end: End) -> None:
    a, b = await socket_pair(tls=layer == "tls")
    references = [weakref.ref(each) for each in (a, b, a.stream, b.stream)]
    references += [weakref.ref(each._connection.tls) for each in (a, b) if each._connection.tls]
    async with closing(a, b):
        await end(a, b)
    del a, b
    await trio.lowlevel.checkpoint()
    assert alive(references) == []


@pytest.mark.parametrize("tickets", [0, 1, 2, 3])
async def test_a_client_that_read_session_tickets_is_freed_immediately(
    tickets: int, client_tls: ClientTLS, authority: Authority
) -> None:
    """OpenSSL's servers send two tickets by default, in records before the first data."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.num_tickets = tickets
    authority.certificate("example.org").load_into(context)
    sock, raw = raw_pair()
    peer = RawTLS(raw, context, server_side=True)
    with raw:
        await handshake(sock, client_tls, peer)
        peer.ssl.write(b"data")
        peer.flush()
        assert await sock.recv() == b"data"
        references = [weakref.ref(each) for each in (sock, sock._connection.tls)]
        sock.abort()
    del sock
    await trio.lowlevel.checkpoint()
    assert alive(references) == []


async def test_a_failed_connection_with_a_queued_response_is_freed_immediately() -> None:
    async def read(sock: Socket) -> None:
        with BROKEN:
            await sock.recv()

    a, b = await socket_pair(tls=True)
    tls = a._connection.tls
    assert tls is not None
    tls.engine.put_back(b"a response")
    tls.send_state = SendState.OVER  # every later send fails, so the response stays queued
    references = [weakref.ref(each) for each in (a, tls)]
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(read, a)
            await trio.testing.wait_all_tasks_blocked()
            b.abort()
    del a, b, tls, nursery
    await trio.lowlevel.checkpoint()
    assert alive(references) == []


async def test_stoptls_frees_all_tls_state() -> None:
    a, b = await socket_pair(tls=True)
    references = [weakref.ref(each._connection.tls) for each in (a, b) if each._connection.tls]
    assert len(references) == 2
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.stoptls)
            await b.stoptls()
        await trio.lowlevel.checkpoint()
        assert alive(references) == []


async def failing(sock: Socket, raw: socket.socket, _: ClientTLS, server_tls: ServerTLS) -> None:
    raw.sendall(b"GET / HTTP/1.1\r\n\r\n")
    raw.shutdown(socket.SHUT_WR)
    with contextlib.suppress(trisock.TLSError):
        await sock.starttls(server_tls)
    await sock.close()


async def aborting(sock: Socket, raw: socket.socket, client_tls: ClientTLS, _: ServerTLS) -> None:
    async def start() -> None:
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            await sock.starttls(client_tls)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(start)
        await trio.testing.wait_all_tasks_blocked()
        sock.abort()


@pytest.mark.parametrize("attempt", [failing, aborting])
async def test_a_socket_is_freed_immediately_after_a_failed_handshake(
    attempt: Callable[..., Awaitable[None]], client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    sock, raw = raw_pair()
    reference = weakref.ref(sock)
    with raw:
        await attempt(sock, raw, client_tls, server_tls)
    del sock
    await trio.lowlevel.checkpoint()
    assert reference() is None
