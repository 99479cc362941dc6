"""send and send_eof in the clear, and what is read after a send has failed."""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from helpers.pairs import closing, raw_pair, tcp_pair, tls_pair, unix_pair
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net import transport as _transport


async def test_send_sends_all_buffers_in_order() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        numbers = array.array("I", [1, 2, 3])
        square = memoryview(bytes(range(4))).cast("B", (2, 2))
        await a.send(
            b"one",
            bytearray(b"two"),
            b"",
            memoryview(b"xthreex")[1:-1],
            memoryview(numbers),
            square,
        )
        expected = b"onetwothree" + numbers.tobytes() + bytes(range(4))
        assert await b.recv_exactly(len(expected)) == expected
        await a.send(memoryview(b"a.b.c.")[::2])
        assert await b.recv() == b"abc"


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_more_buffers_than_one_system_call_takes_and_large_ones(
    layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    if layer == "plain":
        a, b = await tcp_pair()
    else:
        a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        many = [bytes([n % 256]) * (n % 7) for n in range(5 * _transport.IOV_MAX)]
        large = [os.urandom(3_000_000), b"-", os.urandom(1_000_000)]
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                await a.send(*many)
                await a.send(*large)

            nursery.start_soon(send)
            expected = b"".join(many + large)
            assert await b.recv_exactly(len(expected)) == expected


async def test_a_send_cancelled_before_its_first_byte_changes_nothing() -> None:
    a, b = unix_pair()
    async with closing(a, b):
        sent = 0
        with contextlib.suppress(BlockingIOError):
            while True:
                sent += os.write(a.fileno(), b"x" * 1000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"never sent")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert await b.recv_exactly(sent) == b"x" * sent
        await a.send(b"but this")
        assert await b.recv() == b"but this"


async def test_a_send_that_was_cut_off_ends_sending_only() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"x" * 50_000_000)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="cut off"):
                await a.send(b"y")
        await b.send(b"still here")
        assert await a.recv() == b"still here"


async def test_a_failed_send_hides_nothing_said_before() -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        with raw:
            await sock.send(b"a request that is not read")
            raw.sendall(b"421 too busy\r\n")
        with pytest.raises(trio.BrokenResourceError, match="connection is broken"):
            while True:
                await sock.send(b"more")
        assert sock.isopen()
        assert await sock.recv() == b"421 too busy\r\n"
        assert not sock.isopen()
        with contextlib.suppress(trio.BrokenResourceError):
            assert await sock.recv() == b""


async def test_a_reset_met_by_a_send_is_no_clean_end() -> None:
    """The kernel reports it once, to whoever comes first; after that a read finds the end."""
    sock, raw = raw_pair()
    async with closing(sock):
        raw.sendall(b"the first half of an answer")
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            while True:
                await sock.send(b"x")
        assert await sock.recv() == b"the first half of an answer"
        for _ in range(2):
            with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
                await sock.recv()


async def test_a_reset_is_told_to_each_read() -> None:
    """Not the first only, as the kernel does."""
    sock, raw = raw_pair()
    async with closing(sock):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        for read in (sock.recv, lambda: sock.recv_exactly(1), sock.lines().__anext__):
            with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
                await read()


async def test_many_small_buffers_do_not_keep_other_tasks_from_running() -> None:
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        passes = 0

        async def count() -> None:
            nonlocal passes
            while True:
                await trio.lowlevel.checkpoint()
                passes += 1

        nursery.start_soon(count)
        nursery.start_soon(b.recv_exactly, 100_000)
        await a.send(*[b"x"] * 100_000)
        assert passes >= 100_000 // _transport.IOV_MAX // 2
        nursery.cancel_scope.cancel()


async def test_send_eof_ends_one_direction() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await a.send(b"question")
        await a.send_eof()
        await a.send_eof()
        with pytest.raises(trio.ClosedResourceError, match="send_eof"):
            await a.send(b"x")
        with pytest.raises(trio.ClosedResourceError, match="send_eof"):
            await a.starttls("example.org")
        assert await b.recv() == b"question"
        assert await b.recv() == b""
        await b.send(b"answer")
        assert await a.recv() == b"answer"


class CountingSends:
    """A socket below a Transport that keeps how many buffers each system call was given."""

    def __init__(self, sock: Socket) -> None:
        self.calls: list[int] = []
        self._real = sock._connection.transport._raw
        sock._connection.transport._raw = self  # type: ignore[assignment]

    def send(self, data: object, flags: int) -> int:
        self.calls.append(1)
        return self._real.send(data, flags)  # type: ignore[arg-type]

    def sendmsg(
        self, buffers: Sequence[bytes | memoryview], ancillary: tuple[()], flags: int
    ) -> int:
        self.calls.append(len(buffers))
        return self._real.sendmsg(buffers, ancillary, flags)


async def test_send_takes_one_system_call_for_many_buffers() -> None:
    for a, b in (await tcp_pair(), unix_pair()):  # a socket of our own, and one that was adopted
        async with closing(a, b):
            counting = CountingSends(a)
            await a.send(b"one", b"two", b"", b"three")
            await a.send(b"four")
            assert counting.calls == [3, 1]
            assert await b.recv_exactly(15) == b"onetwothreefour"


async def test_a_clean_end_stays_one_though_a_send_has_failed() -> None:
    """EPIPE: the peer had ended its side cleanly before it stopped listening."""
    sock, raw = raw_pair()
    async with closing(sock):
        raw.sendall(b"bye")
        raw.close()
        with pytest.raises(trio.BrokenResourceError, match="Broken pipe"):
            while True:
                await sock.send(b"more")
        assert await sock.recv() == b"bye"
        assert await sock.recv() == b""
