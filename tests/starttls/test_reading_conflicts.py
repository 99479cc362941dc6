"""While ``starttls`` or ``stoptls`` waits, every other read is refused and takes nothing."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import clog, closing, unix_pair
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net.lines import Lines

# Each way to read: it gets the socket, and an iterator that has lines split already.
READS: dict[str, Callable[[Socket, Lines], Awaitable[object]]] = {
    "recv": lambda sock, _: sock.recv(),
    "recv, a part": lambda sock, _: sock.recv(1),
    "receive_some": lambda sock, _: sock.receive_some(),
    "async for": lambda sock, _: sock.__anext__(),
    "recv_exactly": lambda sock, _: sock.recv_exactly(1),
    "recv_exactly, nothing": lambda sock, _: sock.recv_exactly(0),
    "recv_until": lambda sock, _: sock.recv_until(b"\n"),
    "peek": lambda sock, _: sock.peek(),
    "a new line iterator": lambda sock, _: anext(sock.lines()),
    "lines": lambda _, lines: anext(lines),
}


@asynccontextmanager
async def handler_with(sock_of: list[Socket]) -> AsyncIterator[tuple[trisock.Server, Socket]]:
    """Serve one Unix connection whose handler gives its socket away; yield its client too."""
    import tempfile

    async def handler(sock: Socket) -> None:
        sock_of.append(sock)
        await done.wait()

    done = trio.Event()
    with tempfile.TemporaryDirectory() as directory:
        listener = await trisock.listen_unix(f"{directory}/s")
        async with trio.open_nursery() as nursery:
            server = await trisock.bind(nursery, listener, handler)
            client = await trisock.connect_unix(f"{directory}/s")
            async with closing(client):
                while not sock_of:
                    await trio.lowlevel.checkpoint()
                yield server, client
                done.set()
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("change", ["starttls", "stoptls"])
@pytest.mark.parametrize("way", READS)
async def test_every_read_is_refused_while_tls_begins_or_ends(
    way: str,
    change: str,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
) -> None:
    socks: list[Socket] = []
    async with handler_with(socks) as (server, client):
        sock = socks[0]
        if change == "stoptls":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sock.starttls, server_tls)
                await client.starttls(client_tls)
        lines = sock.lines()
        await client.send(b"STARTTLS\nRSET\nINJECTED\n")
        assert await anext(lines) == b"STARTTLS"

        async def begin() -> None:
            with pytest.raises((trio.ClosedResourceError, RuntimeError)):
                await (sock.starttls(server_tls) if change == "starttls" else sock.stoptls())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.broadcast, b"x" * 8_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked()  # behind the broadcast
            for _ in range(3):
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    await READS[way](sock, lines)
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    sock.unrecv(b"x")
            assert sock.info().buffered == len(b"RSET\nINJECTED\n")
            sock.abort()
            with pytest.raises(trio.ClosedResourceError):
                await READS[way](sock, lines)


async def test_injected_lines_fail_the_handshake_though_a_reader_asks_for_them(
    server_tls: ServerTLS,
) -> None:
    socks: list[Socket] = []
    async with handler_with(socks) as (server, client):
        sock = socks[0]
        lines = sock.lines()
        await client.send(b"STARTTLS\nMAIL FROM:<evil@example.org>\nDATA\n")
        assert await anext(lines) == b"STARTTLS"

        async def begin() -> None:
            with pytest.raises(trisock.TLSError, match="does not speak TLS"):
                await sock.starttls(server_tls)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.broadcast, b"x" * 8_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(begin)
            await trio.testing.wait_all_tasks_blocked()
            for _ in range(2):
                with pytest.raises(trio.BusyResourceError):
                    await anext(lines)
            assert await client.recv_exactly(8_000_000)


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


@pytest.mark.parametrize("way", READS)
async def test_a_closed_socket_is_closed_for_reads_before_its_reader_has_left(way: str) -> None:
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
            a.abort()  # the reader is woken and has not run yet
            with pytest.raises(trio.ClosedResourceError):
                await READS[way](a, lines)
            with pytest.raises(trio.ClosedResourceError):
                a.unrecv(b"x")


async def test_a_send_on_a_closed_socket_is_not_a_conflict() -> None:
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
