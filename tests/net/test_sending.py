"""Sending in detail: many buffers, nothing copied, files that shrink, peers that leave."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import re
import select
import socket
import ssl
import sys
import tempfile
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.pairs import (
    all_served,
    clog,
    closing,
    pair,
    raw_pair,
    small_pair,
    tcp_pair,
    tls_pair,
    unix_pair,
)
from helpers.raw_tls import RawTLS
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock._net import send_file as _send_file
from trisock._net import transport as _transport

IOV_MAX = _transport.IOV_MAX
MIB = 1024 * 1024


def writable(sock: Socket) -> bool:
    return bool(select.select([], [sock], [], 0)[1])


async def until_full(sock: Socket) -> None:
    """Wait until what another task sends does not fit into the kernel any more."""
    while writable(sock):
        await trio.lowlevel.checkpoint()


async def discard(sock: Socket, count: int) -> None:
    """Read bytes below a Socket and throw them away, without making any object of them."""
    room = bytearray(MIB)
    while count > 0:
        count -= await sock.stream.socket.recv_into(room)


def inside_of_something(data: bytes) -> memoryview:
    return memoryview(b"<" + data + b">")[1:-1]


class Calls:
    """What lies below a Transport, keeping for each call how much it was given and has sent."""

    def __init__(self, sock: Socket) -> None:
        self.calls: list[tuple[list[int], int]] = []
        self._real = sock._connection.transport._raw
        sock._connection.transport._raw = self  # type: ignore[assignment]

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


@pytest.mark.parametrize("family", ["unix", "tcp"])  # a socket that was adopted, and one of ours
async def test_what_the_kernel_takes_in_part_goes_on_where_it_stopped(family: str) -> None:
    a, b = unix_pair() if family == "unix" else await tcp_pair()
    async with closing(a, b):
        a.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)  # as small as it can be
        kinds = itertools.cycle([bytes, bytearray, inside_of_something])
        buffers = [
            kind(bytes([number % 251]) * (number * 37 % 211))
            for number, kind in zip(range(3 * IOV_MAX + 7), kinds, strict=False)
        ]
        buffers += [b"", b"y" * MIB, b"", b"z"]
        before = [bytes(each) for each in buffers]
        below = Calls(a)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, *buffers)
            await until_full(a)
            expected = b"".join(before)
            sizes = itertools.cycle([1, 7, 1000, 49_999])
            got = bytearray()
            while len(got) < len(expected):
                got += await b.recv(next(sizes))
        assert got == expected
        assert [bytes(each) for each in buffers] == before
        # Some calls have stopped within a buffer, and not in the first that they were given.
        inside = 0
        for given, sent in below.calls:
            assert len(given) <= IOV_MAX
            borders = list(itertools.accumulate(given))
            inside += sent > borders[0] and sent not in borders
        assert inside


async def test_as_many_system_calls_as_there_are_full_sets_of_buffers() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        for number, calls in ((1, 1), (IOV_MAX, 1), (IOV_MAX + 1, 2), (5 * IOV_MAX, 5)):
            below = Calls(a)
            await a.send(*[b"", b"x", b""] * number)
            assert len(below.calls) == calls
            assert await b.recv_exactly(number) == b"x" * number


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's struct tcp_info")
async def test_buffers_that_are_sent_together_travel_together() -> None:
    def segments_with_data(sock: Socket) -> int:
        info = sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 160)
        if len(info) < 160:
            pytest.skip("a kernel that does not count them")
        return int.from_bytes(info[156:160], sys.byteorder)  # tcpi_data_segs_out

    a, b = await tcp_pair()
    async with closing(a, b):
        await a.send(b"HTTP/1.1 200 OK\r\n", b"content-length: 5\r\n", b"\r\n", bytearray(b"hello"))
        assert segments_with_data(a) == 1
        await a.send(*[b"x"] * IOV_MAX)
        assert segments_with_data(a) == 2


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("number", [0, 1, 2 * IOV_MAX])
async def test_empty_buffers_send_nothing(
    layer: str, number: int, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await pair(layer, client_tls, server_tls)
    async with closing(a, b):
        await a.send(*[b"", bytearray(), memoryview(b"")][:number], *[b""] * (number - 3))
        await a.send(b"x")
        assert await b.recv() == b"x"


async def test_many_buffers_cancelled_before_the_first_byte_change_nothing() -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await clog(a)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"never", b"", b"sent")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        while await b.peek() is not None:
            assert set(await b.recv()) == {ord("x")}
        await a.send(b"but ", b"this")
        assert await b.recv() == b"but this"


async def test_many_buffers_cancelled_between_two_of_them_end_sending() -> None:
    a, b = unix_pair()
    async with closing(a, b):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"first", b"x" * 10 * MIB, b"last")
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        for send in (lambda: a.send(b"y", b"z"), lambda: a.send(b"y"), lambda: a.send()):
            with pytest.raises(trio.BrokenResourceError, match="cut off"):
                await send()
        assert await b.recv_exactly(6) == b"firstx"


# ---- nothing is copied ----


@contextlib.contextmanager
def peak_memory() -> Iterator[Callable[[], int]]:
    """Give a function that tells how much more memory there was at a time than at the beginning."""
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.reset_peak()
        yield lambda: tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_a_plain_send_copies_nothing(kind: Callable[[bytes], Any]) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        large = kind(bytes(32 * MIB))
        small = kind(bytes(100))
        with peak_memory() as peak:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(discard, b, 64 * MIB + 300)
                await a.send(large)
                await a.send(small, large, b"", small, small)
            assert MIB <= peak() < 2 * MIB  # what the peer reads into


async def test_a_tls_send_never_holds_the_whole_message_encrypted(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        message = bytearray(32 * MIB)
        with peak_memory() as peak:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(discard, b, 64 * MIB)
                await a.send(message)
                await a.send(message[:0], message)
            assert MIB <= peak() < 3 * MIB


@pytest.mark.parametrize("kind", ["kernel", "chunks"])
async def test_send_file_never_holds_the_whole_file(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 32 * MIB)
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(path, "rb") as file, peak_memory() as peak:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(discard, b, 32 * MIB)
                await a.send_file(file if kind == "kernel" else OnlyRead(file))  # type: ignore[arg-type]
            assert MIB <= peak() < 3 * MIB


# ---- files ----


class OnlyRead:
    """A file that can do nothing else: it is read by chunks."""

    def __init__(self, file: BinaryIO) -> None:
        self.read = file.read


@contextlib.contextmanager
def opened(path: Path, way: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[BinaryIO]:
    """Open a file for one of the ways to send it."""
    if way == "chunks":
        monkeypatch.setattr(_transport, "HAS_SENDFILE", False)
    with open(path, "rb", buffering=0) as file:
        yield file  # type: ignore[misc]


WAYS = ["kernel", "chunks", "tls"]


@pytest.mark.parametrize("way", WAYS)
async def test_progress_grows_with_each_piece_and_ends_at_the_number_returned(
    way: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(3 * MIB + 7))
    a, b = await pair(way, client_tls, server_tls)
    async with closing(a, b):
        with opened(path, way, monkeypatch) as file:
            for offset, count, total in (
                (0, None, 3 * MIB + 7),
                (0, 2 * MIB, 2 * MIB),
                (MIB, 2 * MIB + 1, 2 * MIB + 1),  # counted from the offset
                (3 * MIB, None, 7),
                (3 * MIB + 7, None, 0),
                (0, 0, 0),
            ):
                seen: list[int] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(b.recv_exactly, total)
                    assert await a.send_file(file, offset, count, progress=seen.append) == total
                assert seen == sorted(set(seen))
                assert (seen or [0])[-1] == total
                assert 0 not in seen
                # Told often enough to be of use.
                assert max(map(int.__sub__, seen, [0, *seen]), default=0) <= MIB


@pytest.mark.parametrize("way", WAYS)
async def test_a_file_is_sent_from_its_offset_wherever_it_was_read_to(
    way: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"0123456789")
    a, b = await pair(way, client_tls, server_tls)
    async with closing(a, b):
        with opened(path, way, monkeypatch) as file:
            for position in (0, 5, 10, 1000):
                file.seek(position)
                assert await a.send_file(file) == 10
                file.seek(position)
                assert await a.send_file(file, 7) == 3
                assert await b.recv_exactly(13) == b"0123456789789"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("counted", [True, False])
async def test_a_file_that_shrinks_while_it_is_sent_is_sent_up_to_where_it_then_ends(
    way: str,
    counted: bool,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 4 * MIB
    content = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(content)
    a, b = await small_pair(way, client_tls, server_tls)
    async with closing(a, b):
        with opened(path, way, monkeypatch) as file:
            seen = [0]
            returned: list[int] = []
            errors: list[EOFError] = []

            async def send() -> None:
                count = size if counted else None
                try:
                    returned.append(await a.send_file(file, count=count, progress=seen.append))
                except EOFError as exc:
                    errors.append(exc)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await until_full(a)
                # Further than has been read, also by those who read a piece at a time.
                end = seen[-1] + 2 * _send_file.FILE_CHUNK + 1000
                assert end < size
                os.truncate(path, end)
                assert await b.recv_exactly(end) == content[:end]
            if counted:
                assert f"ended after {end} of {size} bytes" in str(errors[0])
            else:
                assert returned == [end]
            assert seen[-1] == end
        # It was the file's fault, and whoever said how much would come knows how much came.
        await a.send(b"go on")
        assert await b.recv_exactly(5) == b"go on"


@pytest.mark.parametrize("way", [*WAYS, "memory"])
async def test_when_the_peer_leaves_the_error_says_how_much_of_the_file_was_sent(
    way: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    size = 8 * MIB
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, size)
    a, b = await small_pair(way, client_tls, server_tls)
    async with closing(a, b):
        with opened(path, way, monkeypatch) as on_disk:
            file = io.BytesIO(bytes(size)) if way == "memory" else on_disk
            seen = [0]
            caught: list[trio.BrokenResourceError] = []

            async def send() -> None:
                try:
                    await a.send_file(file, 1000, progress=seen.append)
                except trio.BrokenResourceError as exc:
                    caught.append(exc)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await b.recv_exactly(MIB)
                await until_full(a)
                b.abort()
        (error,) = caught
        match = re.search(r"after (\d+) bytes of the file$", str(error))
        assert match, error
        number = int(match[1])
        assert number == seen[-1]
        assert 0 < number < size
        if way != "kernel":
            assert number % _send_file.FILE_CHUNK == 0
        assert error.__cause__ is not None
        assert str(error).startswith(str(error.__cause__))
        with pytest.raises(trio.BrokenResourceError):
            await a.send(b"x")


@pytest.mark.parametrize("way", WAYS)
async def test_a_file_that_could_not_be_begun_was_sent_for_0_bytes(
    way: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    a, b = await pair(way, client_tls, server_tls)
    async with closing(a, b):
        b.abort()
        await trio.lowlevel.wait_readable(a.fileno())  # the reset has arrived
        with opened(path, way, monkeypatch) as file:
            for _ in range(2):
                with pytest.raises(trio.BrokenResourceError, match=r"after 0 bytes of the file$"):
                    await a.send_file(file)


@pytest.mark.parametrize("way", ["kernel", "chunks"])
async def test_what_the_peer_said_before_it_left_can_be_read_after_a_file_that_failed(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"413 too large\r\n")
        with opened(path, way, monkeypatch) as file:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    with pytest.raises(trio.BrokenResourceError, match=r"bytes of the file$"):
                        await a.send_file(file)

                nursery.start_soon(send)
                await until_full(a)
                b.stream.socket.close()  # with unread input: a reset
        assert await a.recv() == b"413 too large\r\n"


async def test_the_alert_that_ends_a_file_stays_one_and_says_how_much_was_sent(
    authority: Authority, tmp_path: Path
) -> None:
    """TLS 1.3: a client without a certificate learns that it needs one while it is sending."""
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)
    a, b = await tcp_pair()
    async with closing(a, b):

        async def refuse() -> None:
            with pytest.raises(TLSError, match="showed no certificate"):
                await b.starttls(
                    ServerTLS(
                        authority.issue("example.org"),
                        client_ca=authority.pem,
                        require_client_certificate=True,
                    )
                )

        async with trio.open_nursery() as nursery:
            nursery.start_soon(refuse)
            await a.starttls(ClientTLS("example.org", ca=authority.pem))
            await trio.lowlevel.wait_readable(a.fileno())
        with open(path, "rb") as file:
            words = r"'certificate required', after \d+ bytes of the file$"
            with pytest.raises(TLSError, match=words) as caught:
                await a.send_file(file)
        assert caught.value.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


async def test_a_download_that_is_broken_off_is_no_fault_of_the_handler(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.touch()
    os.truncate(path, 64 * MIB)

    async def handler(sock: Socket) -> None:
        with open(path, "rb") as file:
            await sock.send_file(file)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        client = await trisock.connect("127.0.0.1", server.port)
        await client.recv_exactly(1000)
        client.abort()
        await all_served(server, 1)
        assert server.stats().handler_errors == 0
        server.stop()


async def test_a_pipe_that_is_slow_keeps_nobody_waiting_but_its_reader() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        reading, writing = os.pipe()
        asked_for = [threading.Event() for _ in range(3)]
        in_time: list[bool] = []

        def write() -> None:
            with open(writing, "wb", buffering=0) as pipe:
                for event in asked_for:
                    in_time.append(event.wait(10))  # not set, if the reader blocks everybody
                    pipe.write(b"piece ")

        sent: list[int] = []
        seen: list[int] = []
        with open(reading, "rb", buffering=0) as pipe:

            async def send() -> None:
                sent.append(await a.send_file(pipe, progress=seen.append))

            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, write)
                await trio.testing.wait_all_tasks_blocked()
                nursery.start_soon(send)
                for number, event in enumerate(asked_for):
                    await trio.testing.wait_all_tasks_blocked()  # reading, and not yet at the end
                    assert seen == [6, 12][:number]
                    event.set()
                    assert await b.recv_exactly(6) == b"piece "
                    await b.send(b"thanks")
                    assert await a.recv() == b"thanks"
        assert in_time == [True] * 3
        assert sent == [18]
        assert seen == [6, 12, 18]


async def test_a_part_of_what_cannot_be_sought_in_is_refused_before_anything_is_sent() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        reading, writing = os.pipe()
        os.write(writing, b"12345")
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            with pytest.raises(OSError, match=r"[Ii]llegal seek|not seekable"):
                await a.send_file(pipe, 2)
            assert await a.send_file(pipe, count=3) == 3
        await a.send(b"!")
        assert await b.recv_exactly(4) == b"123!"


async def test_a_file_that_grows_is_sent_up_to_the_count() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with tempfile.TemporaryFile() as file:
            file.write(b"one")
            assert await a.send_file(file) == 3
            file.write(b"two")
            assert await a.send_file(file, 3, 2) == 2
            assert await a.send_file(file, 5) == 1
        assert await b.recv_exactly(6) == b"onetwo"


async def test_a_peers_alert_is_what_ends_send_file(authority: Authority) -> None:
    """TLS 1.3: the server refuses the client's certificate after the client's handshake."""
    server_context = ServerTLS(
        authority.issue("example.org"), client_ca=authority.pem, require_client_certificate=True
    )._context()
    sock, raw = raw_pair()
    peer = RawTLS(raw, server_context, server_side=True)

    def refuse() -> None:
        with contextlib.suppress(ssl.SSLError):
            peer.run(peer.ssl.do_handshake)
        raw.close()

    async with closing(sock):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, refuse)
            await sock.starttls(trisock.ClientTLS("example.org", ca=authority.pem))
        await trio.lowlevel.wait_readable(sock.fileno())
        with pytest.raises(
            trisock.TLSError, match=r"certificate required.*after .* bytes"
        ) as caught:
            await sock.send_file(io.BytesIO(bytes(1 << 24)))
        assert caught.value.reason is not None
