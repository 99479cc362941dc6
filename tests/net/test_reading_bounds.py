"""A peer can cost its reader only a bounded amount of CPU time, memory and log lines."""

from __future__ import annotations

import logging
import time

import pytest
import trio

from helpers.memory import held
from trisock import IncompleteReadError, LimitExceededError, Socket
from trisock.testing import serving

MIB = 1024 * 1024

# One read receives at most this many bytes from the kernel.
ONE_READ = 128 * 1024


async def time_to_skip(sock: Socket, size: int, delimiter: bytes) -> float:
    """Skip a long line piece by piece, as a server does. Return the CPU time in seconds."""
    max_bytes = 64
    sock.unrecv(b"\r" * size)
    start = time.process_time()
    while sock.info().buffered > max_bytes:
        with pytest.raises(LimitExceededError):
            await sock.recv_until(delimiter, max_bytes=max_bytes)
        await sock.recv_exactly(max_bytes - 1)
    taken = time.process_time() - start
    await sock.recv_exactly(sock.info().buffered)
    return taken


@pytest.mark.parametrize("delimiter", [pytest.param(b"\n", marks=pytest.mark.rare), b"\r\n"])
@pytest.mark.parametrize("family", ["unix"])
async def test_skipping_a_long_line_has_a_linear_cost(delimiter: bytes, a: Socket) -> None:
    await time_to_skip(a, 10_000, delimiter)
    short = await time_to_skip(a, MIB // 8, delimiter)
    long = await time_to_skip(a, 2 * MIB, delimiter)
    assert long < 40 * short  # a linear cost would be 16 times as high, a quadratic cost 256 times


@pytest.mark.parametrize("family", ["unix"])
async def test_failed_reads_at_eof_do_not_copy_unread_bytes(a: Socket, b: Socket) -> None:
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

    await b.send_eof()
    await fail(a, 2000)
    short = await fail(a, 2000)
    assert await fail(a, 16 * MIB) < 10 * short + 0.1  # copying would take 200 times as long


@pytest.mark.parametrize("layer", ["tls"])
async def test_memory_for_tiny_records_stays_near_the_limit(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            with pytest.raises((trio.BrokenResourceError, trio.ClosedResourceError)):
                while True:
                    for size in [1] * 255 + [256]:
                        await a.send(b"x" * size)

        nursery.start_soon(send)
        with pytest.raises(LimitExceededError):
            await b.recv_until(b"\n", max_bytes=50_000)
        assert held(b._connection.buffer) <= 2 * (50_000 + ONE_READ // 23) + 90_000
        b.abort()


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_buffered_data_never_exceeds_the_limit_plus_one_read(a: Socket, b: Socket) -> None:
    async with trio.open_nursery() as nursery:

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


@pytest.mark.parametrize(
    "how",
    [
        *("lines", "batches", "recv_until", "recv_line", "cut short", "recv_exactly"),
        *("skip_until", "frames", "recv_frame", "frame cut short"),
    ],
)
async def test_a_peers_protocol_error_is_not_a_handler_error(
    how: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def handler(sock: Socket) -> None:
        if how == "recv_until":
            await sock.recv_until(b"\n", max_bytes=512)
        elif how == "recv_line":
            await sock.recv_line(max_bytes=512)
        elif how == "skip_until":
            await sock.skip_until(b"\n")
        elif how == "recv_exactly":
            await sock.recv_exactly(1000)
        elif how == "recv_frame":
            await sock.recv_frame()
        elif how == "batches":
            await anext(sock.lines(max_bytes=512).batches())
        elif "frame" in how:  # ``b"xx"`` is read as the frame's length
            await anext(sock.frames(2, max_bytes=512 if how == "frames" else 65535))
        else:
            async for _ in sock.lines(max_bytes=512 if how == "lines" else 1000):
                pass

    caplog.set_level(logging.INFO, "trisock")
    async with serving(handler) as s:
        client = await s.connect()
        await client.send(b"x" * 512)
        await client.send_eof()
    record = caplog.records[-1]
    assert (record.levelno, record.exc_info) == (logging.INFO, None)
    assert b"xxx" not in record.getMessage().encode()
