"""What a peer can cost a reader: work, memory, and lines in the log."""

from __future__ import annotations

import gc
import logging
import sys
import time

import pytest
import trio

import trisock
from helpers.pairs import closing, tcp_pair, tls_pair, unix_pair
from trisock import ClientTLS, IncompleteReadError, LimitExceededError, ServerTLS, Socket

MIB = 1024 * 1024

# One read takes at most this from the kernel.
ONE_READ = 128 * 1024


def held(*roots: object) -> int:
    """Return the size of all objects that some keep alive, each once."""
    seen: dict[int, object] = {}
    waiting = list(roots)
    while waiting:
        each = waiting.pop()
        if id(each) not in seen and isinstance(each, (bytes, tuple, list)):
            seen[id(each)] = each
            waiting += gc.get_referents(each)
    return sum(map(sys.getsizeof, seen.values()))


async def skipped_in(sock: Socket, size: int, *, delimiter: bytes, max_bytes: int) -> float:
    """Skip a long line as servers do it; return the CPU time."""
    sock.unrecv(b"\r" * size)
    start = time.process_time()
    while sock.info().buffered > max_bytes:
        with pytest.raises(LimitExceededError):
            await sock.recv_until(delimiter, max_bytes=max_bytes)
        await sock.recv_exactly(max_bytes - 1)
    taken = time.process_time() - start
    await sock.recv_exactly(sock.info().buffered)
    return taken


@pytest.mark.parametrize("delimiter", [b"\n", b"\r\n"])
async def test_skipping_a_long_line_costs_the_same_for_each_byte(delimiter: bytes) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await skipped_in(a, 10_000, delimiter=delimiter, max_bytes=64)
        short = await skipped_in(a, MIB // 4, delimiter=delimiter, max_bytes=64)
        long = await skipped_in(a, 4 * MIB, delimiter=delimiter, max_bytes=64)
        assert long < 40 * short  # 16 times; it was 256 times as much


async def test_reads_that_fail_at_the_end_do_not_copy_what_is_left() -> None:
    async def fail(sock: Socket, size: int) -> float:
        sock.unrecv(b"x" * size)
        start = time.process_time()
        for _ in range(1000):
            with pytest.raises(IncompleteReadError) as caught:
                await sock.recv_exactly(100 * MIB)
            await sock.recv_exactly(1)
        taken = time.process_time() - start
        assert caught.value.partial == b"x" * (size - 999)
        await sock.recv_exactly(size - 1000)
        return taken

    a, b = unix_pair()
    async with closing(a, b):
        await b.send_eof()
        await fail(a, 2000)
        short = await fail(a, 2000)
        assert await fail(a, 16 * MIB) < 10 * short + 0.1  # it was 200 times as much


async def test_tiny_records_cost_at_most_a_small_factor_of_the_limit(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    client, server = await tls_pair(client_tls, server_tls)
    async with closing(client, server), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                while True:
                    for size in [1] * 255 + [256]:
                        await client.send(b"x" * size)

        nursery.start_soon(send)
        with pytest.raises(LimitExceededError):
            await server.recv_until(b"\n", max_bytes=50_000)
        buffer = server._connection.buffer
        parts = [getattr(buffer, name) for name in buffer.__slots__]
        assert held(*parts) <= 2 * (50_000 + ONE_READ // 23) + 90_000
        server.abort()


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_a_limit_and_one_read_more_is_all_that_is_held(
    layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await (tcp_pair() if layer == "plain" else tls_pair(client_tls, server_tls))
    async with closing(a, b), trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                await b.send(b"x" * 20_000_000)

        nursery.start_soon(send)
        for _ in range(3):
            with pytest.raises(LimitExceededError):
                await a.recv_until(b"\n", max_bytes=100)
            with pytest.raises(LimitExceededError):
                await anext(a.lines(max_bytes=100))
        assert a.info().buffered <= 100 + ONE_READ
        a.abort()


@pytest.mark.parametrize("how", ["lines", "recv_until", "cut short", "recv_exactly"])
async def test_a_peer_that_breaks_the_rules_is_not_the_handlers_error(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        if how == "recv_until":
            await sock.recv_until(b"\n", max_bytes=512)
        elif how == "recv_exactly":
            await sock.recv_exactly(1000)
        else:
            async for _ in sock.lines(max_bytes=512 if how == "lines" else 1000):
                pass

    caplog.set_level(logging.INFO, "trisock")
    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        client = await trisock.connect("127.0.0.1", server.port)
        async with closing(client):
            await client.send(b"x" * 512)
            await client.send_eof()
            while server.stats().active or not server.stats().accepted:
                await trio.lowlevel.checkpoint()
        server.stop()
    assert server.stats().handler_errors == 0
    record = caplog.records[-1]
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert b"xxx" not in record.getMessage().encode()
