"""Tests of send and send_eof, mostly without TLS, and of reads after a failed send."""

from __future__ import annotations

import array
import contextlib
import itertools
import os
import socket
import sys
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.pairs import clog, closing, raw_pair, reset, until_full
from helpers.reads import READS
from trisock import Socket
from trisock._net import transport as _transport
from trisock._net.conflicts import SendLock
from trisock._server.broadcast import broadcast_to

IOV_MAX = _transport.IOV_MAX
MIB = 1024 * 1024

# The fixtures create a TCP Socket with trisock.connect, and a Unix Socket from a trio.SocketStream.
BOTH_FAMILIES = pytest.mark.parametrize("family", ["tcp", "unix"])


class Calls:
    """Wraps a Transport's raw socket.

    For each call, records the sizes of the buffers and the number of bytes sent.
    """

    def __init__(self, sock: Socket) -> None:
        self.calls: list[tuple[list[int], int]] = []
        self._real = sock._connection.transport._raw
        sock._connection.transport._raw = self  # type: ignore[assignment]

    def fileno(self) -> int:
        return self._real.fileno()

    def send(self, data: bytes | memoryview, flags: int) -> int:
        sent = self._real.send(data, flags)
        self.calls.append(([len(data)], sent))
        return sent

    def sendmsg(
        self, buffers: Sequence[bytes | memoryview], ancillary: tuple[()], flags: int
    ) -> int:
        sent = self._real.sendmsg(buffers, ancillary, flags)
        self.calls.append(([len(each) for each in buffers], sent))
        return sent


# ---- many buffers ----


async def test_send_sends_all_buffers_in_order(a: Socket, b: Socket) -> None:
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


@pytest.mark.parametrize(("family", "layer"), [("tcp", "plain"), ("unix", "plain"), ("tcp", "tls")])
async def test_a_partial_send_continues_where_the_kernel_stopped(
    layer: str, a: Socket, b: Socket
) -> None:
    a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # the minimum
    kinds = itertools.cycle([bytes, bytearray, lambda data: memoryview(b"<" + data + b">")[1:-1]])
    buffers = [
        kind(bytes([number % 251]) * (number * 37 % 211))
        for number, kind in zip(range(5 * IOV_MAX + 7), kinds, strict=False)
    ]
    buffers += [b"", os.urandom(MIB), b"", b"z"]
    before = [bytes(each) for each in buffers]
    expected = b"".join(before)
    below = Calls(a)
    got = bytearray()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send, *buffers)
        await until_full(a)
        for size in itertools.cycle([1, 7, 1000, 49_999]):
            got += await b.recv(size)
            if len(got) >= len(expected):
                break
    assert got == expected
    assert [bytes(each) for each in buffers] == before
    if layer == "plain":
        # Some calls sent the first buffer and stopped in the middle of a later one.
        inside = 0
        for given, sent in below.calls:
            assert len(given) <= IOV_MAX
            borders = list(itertools.accumulate(given))
            inside += sent > borders[0] and sent not in borders
        assert inside


@BOTH_FAMILIES
async def test_many_buffers_need_few_system_calls(a: Socket, b: Socket) -> None:
    below = Calls(a)
    await a.send(b"one", b"two", b"", b"three")
    await a.send(b"four")
    assert below.calls == [([3, 3, 5], 11), ([4], 4)]
    assert await b.recv_exactly(15) == b"onetwothreefour"
    for number, calls in ((1, 1), (IOV_MAX, 1), (IOV_MAX + 1, 2), (5 * IOV_MAX, 5)):
        below.calls.clear()
        await a.send(*[b"", b"x", b""] * number)
        assert len(below.calls) == calls
        assert await b.recv_exactly(number) == b"x" * number


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's struct tcp_info")
async def test_buffers_of_one_send_share_a_segment(a: Socket) -> None:
    def segments_with_data() -> int:
        info = a.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        if len(info) < 160:
            pytest.skip("this kernel does not count segments with data")
        return int.from_bytes(info[156:160], sys.byteorder)  # tcpi_data_segs_out

    await a.send(b"HTTP/1.1 200 OK\r\n", b"content-length: 5\r\n", b"\r\n", bytearray(b"hello"))
    assert segments_with_data() == 1
    await a.send(*[b"x"] * IOV_MAX)
    assert segments_with_data() == 2


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("number", [0, 1, 2 * IOV_MAX])
async def test_empty_buffers_send_nothing(number: int, a: Socket, b: Socket) -> None:
    await a.send(*[b"", bytearray(), memoryview(b"")][:number], *[b""] * (number - 3))
    await a.send(b"x")
    assert await b.recv() == b"x"


async def test_other_tasks_run_while_many_small_buffers_are_sent(
    a: Socket, b: Socket, other_runs: Callable[[], int]
) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.recv_exactly, 100_000)
        before = other_runs()
        await a.send(*[b"x"] * 100_000)
        assert other_runs() - before >= 100_000 // IOV_MAX // 2


# ---- memory ----


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the peak memory, in bytes, allocated since the block began."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


async def discard(sock: Socket, count: int) -> None:
    """Read ``count`` bytes from the stream below a Socket, into one buffer of 1 MiB."""
    room = bytearray(MIB)
    while count > 0:
        count -= await sock.stream.socket.recv_into(room)


@pytest.mark.parametrize(
    ("layer", "kind", "limit"),
    [
        ("plain", bytes, 2 * MIB),
        ("plain", bytearray, 2 * MIB),
        ("plain", memoryview, 2 * MIB),
        ("tls", bytearray, 3 * MIB),
    ],
)
async def test_send_copies_no_plain_text_and_encrypts_piecewise(
    kind: Callable[[bytes], Any], limit: int, a: Socket, b: Socket
) -> None:
    large = kind(bytes(32 * MIB))
    small = kind(bytes(100))
    with peak_memory() as peak:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(discard, b, 64 * MIB + 300)
            await a.send(large)
            await a.send(small, large, b"", small, small)
        assert MIB <= peak() < limit  # discard() itself allocates 1 MiB


@pytest.mark.parametrize(
    ("layer", "kind"), [("plain", "file"), ("no sendfile", "file"), ("plain", "custom")]
)
async def test_send_file_never_holds_the_whole_file(
    kind: str, a: Socket, b: Socket, make_file: Any
) -> None:
    file = make_file(kind, bytes(32 * MIB))
    with peak_memory() as peak:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(discard, b, 32 * MIB)
            await a.send_file(file)
        assert MIB <= peak() < 3 * MIB


# ---- cancellation ----


@pytest.mark.parametrize("family", ["unix"])
@pytest.mark.parametrize("buffers", [(b"never sent",), (b"never", b"", b"sent")])
async def test_a_send_cancelled_before_its_first_byte_changes_nothing(
    buffers: tuple[bytes, ...], a: Socket, b: Socket
) -> None:
    await clog(a)
    await cancel_when_blocked(a.send, *buffers)
    while await b.peek() is not None:
        assert set(await b.recv()) == {ord("x")}
    await a.send(b"but ", b"this")
    await a.send(b" too")
    assert await b.recv_exactly(12) == b"but this too"


@BOTH_FAMILIES
@pytest.mark.parametrize(
    "buffers", [(b"first" + b"x" * 50_000_000,), (b"first", b"x" * 50_000_000, b"last")]
)
async def test_a_send_cut_short_breaks_sending_but_not_reading(
    buffers: tuple[bytes, ...], a: Socket, b: Socket
) -> None:
    await cancel_when_blocked(a.send, *buffers)
    for more in ((b"y",), (b"y",), (b"y", b"z"), ()):
        with pytest.raises(trio.BrokenResourceError, match="cut short"):
            await a.send(*more)
    assert await b.recv_exactly(6) == b"firstx"
    await b.send(b"still here")
    assert await a.recv() == b"still here"


async def test_a_cancelled_wait_for_the_send_lock_leaves_no_conflict() -> None:
    lock = SendLock("sending on", "a socket")
    await lock.acquire()
    async with trio.open_nursery() as nursery:

        async def send() -> None:
            async with lock:
                raise AssertionError("the lock is not free")

        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    lock.check()
    lock.release()
    async with lock:
        pass


@pytest.mark.parametrize("family", ["unix"])
async def test_starttls_fails_after_a_broadcast_was_cut_short(
    a: Socket, autojump_clock: trio.testing.MockClock
) -> None:
    await clog(a)
    delivered: list[bool] = []

    async def broadcast() -> None:
        delivered.append(await broadcast_to(a._connection, b"news", a._connection.generation, 5))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(broadcast)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BrokenResourceError):
            await a.starttls("example.org", handshake_timeout=20)
    assert delivered == [False]


# ---- reads after a failed send ----


async def test_received_data_can_be_read_after_a_failed_send(
    sock: Socket, raw: socket.socket
) -> None:
    await sock.send(b"a request that is not read")
    raw.sendall(b"421 too busy\r\n")
    raw.close()
    with pytest.raises(
        trio.BrokenResourceError, match=f"the connection with {sock.getpeer()} is broken"
    ):
        while True:
            await sock.send(b"more")
    assert sock.isopen()
    assert await sock.recv() == b"421 too busy\r\n"
    assert not sock.isopen()
    with contextlib.suppress(trio.BrokenResourceError):
        assert await sock.recv() == b""


async def test_recv_raises_a_reset_that_the_kernel_reported_to_send(
    sock: Socket, raw: socket.socket
) -> None:
    """The kernel reports a reset only once: here, to ``send``. Then it reports EOF."""
    raw.sendall(b"the first half of a response")
    reset(raw)
    with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
        while True:
            await sock.send(b"x")
    assert await sock.recv() == b"the first half of a response"
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
            await sock.recv()


async def test_every_read_raises_after_a_reset(sock: Socket, raw: socket.socket) -> None:
    """The kernel reports a reset only to the first read, so the Socket must remember the reset."""
    reset(raw)
    for name, read in READS.items():
        if name not in {"peek", "recv_exactly nothing"}:  # these two reads never report a reset
            with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
                await read(sock)


async def test_a_clean_eof_stays_clean_after_a_failed_send(
    sock: Socket, raw: socket.socket
) -> None:
    """A send fails with EPIPE if the peer sent EOF before it closed. EPIPE is not a reset."""
    raw.sendall(b"bye")
    raw.close()
    with pytest.raises(trio.BrokenResourceError, match="Broken pipe"):
        while True:
            await sock.send(b"more")
    assert await sock.recv() == b"bye"
    assert await sock.recv() == b""


# ---- send_eof ----


async def test_send_eof_closes_only_one_direction(a: Socket, b: Socket) -> None:
    await a.send(b"question")
    await a.send_eof()
    await a.send_eof()
    for buffers in ((b"x",), (), (b"",), (b"", b"")):
        with pytest.raises(trio.ClosedResourceError, match="send_eof"):
            await a.send(*buffers)
    with pytest.raises(trio.ClosedResourceError, match="send_eof"):
        await a.starttls("example.org")
    assert await b.recv() == b"question"
    assert await b.recv() == b""
    await b.send(b"answer")
    assert await a.recv() == b"answer"


@BOTH_FAMILIES
async def test_send_eof_fails_after_a_send_was_cut_short(a: Socket, b: Socket) -> None:
    """FIN would claim that the data is complete."""
    await cancel_when_blocked(a.send, b"x" * 50_000_000)
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match="cut short"):
            await a.send_eof()
    assert not a._connection.transport.eof_sent


@pytest.mark.parametrize("adopted", [False, True])
async def test_send_after_send_eof_does_not_hide_a_reset(adopted: bool) -> None:
    """The kernel reports a reset only once.

    If ``send`` hid the reset, a truncated download would look complete.
    """
    if adopted:
        sock, raw = raw_pair()
    else:
        with socket.create_server(("127.0.0.1", 0)) as listening:
            sock = await trisock.connect("127.0.0.1", listening.getsockname()[1])
            raw, _ = listening.accept()
    async with closing(sock):
        await sock.send_eof()
        reset(raw)
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(trio.ClosedResourceError):
            await sock.send(b"a mistake")
        with pytest.raises(trio.BrokenResourceError):
            await sock.recv()
