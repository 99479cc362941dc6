"""Reading and sending on a plain connection."""

from __future__ import annotations

import array
import contextlib
import errno
import gzip
import io
import os
import socket
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, raw_pair, tcp_pair, tls_pair, unix_pair
from trisock import ClientTLS, IncompleteReadError, LimitExceededError, ServerTLS, Socket
from trisock._net import send_file as _send_file
from trisock._net import transport as _transport

# ---- adopting ----


async def test_a_socket_adopts_a_trio_stream() -> None:
    a, b = trio.socket.socketpair()
    with b:
        stream = trio.SocketStream(a)
        sock = Socket(stream)
        assert sock.stream is stream
        assert sock.getside() == "client"
        assert sock.fileno() == a.fileno()
        await sock.send(b"x")
        assert await b.recv(1) == b"x"
        await sock.close()


async def test_only_a_trio_socket_stream_can_be_adopted() -> None:
    with pytest.raises(TypeError, match=r"needs a trio\.SocketStream"):
        Socket(object())  # type: ignore[arg-type]
    a, b = trio.socket.socketpair()
    with a, b, pytest.raises(ValueError, match="the side is"):
        Socket(trio.SocketStream(a), side="middle")  # type: ignore[arg-type]


async def test_a_stream_that_is_not_connected_is_an_oserror() -> None:
    with trio.socket.socket() as unconnected, pytest.raises(OSError, match="not connected"):
        Socket(trio.SocketStream(unconnected))


async def test_what_is_known_about_a_connection() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        assert a.getpeer() == b.getlocal() == ("127.0.0.1", b.getlocal().port)
        assert b.getpeer() == a.getlocal()
        assert (a.getside(), b.getside()) == ("client", "server")
        assert not a.istls()
        assert a.tls is None
        a.unrecv(b"abc")
        assert a.info() == trisock.ConnectionInfo(
            local=a.getlocal(),
            peer=a.getpeer(),
            side="client",
            isopen=True,
            istls=False,
            tls=None,
            buffered=3,
        )
        assert "client 127.0.0.1:" in repr(a)
        assert repr(a).endswith("clear open>")


async def test_socket_options() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        assert a.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        assert len(a.getsockopt(socket.SOL_SOCKET, socket.SO_LINGER, 8)) == 8
        with pytest.raises(TypeError, match="a value, or None and a length"):
            a.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, None)  # type: ignore[call-overload]
        with pytest.raises(OSError, match=r"."):  # reaches the system, which has no such option
            a.setsockopt(socket.SOL_SOCKET, 9999, None, 4)


# ---- recv, peek, unrecv ----


async def test_recv_gives_chunks_as_they_arrived_and_then_the_end_for_ever() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"one")
        assert await a.recv() == b"one"
        await b.send(b"two")
        assert await a.recv(2) == b"tw"
        assert await a.recv(2) == b"o"
        await b.send_eof()
        for _ in range(3):
            assert await a.recv() == b""
            assert await a.peek() == b""


async def test_unrecv_makes_the_last_pushed_the_first_received() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        a.unrecv(b"World")
        hello = bytearray(b"Hello")
        a.unrecv(hello)
        hello[:] = b"it was copied"
        a.unrecv(b"")
        a.unrecv(memoryview(b"xx")[:0])
        assert await a.recv() == b"Hello"
        assert await a.recv() == b"World"


async def test_after_the_end_pushed_back_data_is_read_first() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send_eof()
        assert await a.recv() == b""
        assert not a.isopen()
        a.unrecv(b"once more")
        assert a.isopen()
        assert await a.peek() == b"once more"
        assert await a.recv() == b"once more"
        assert await a.recv() == b""


async def test_peek_shows_what_recv_would_return_and_does_not_wait() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        assert await a.peek() is None
        await b.send(b"hello")
        await trio.lowlevel.wait_readable(a.fileno())
        assert await a.peek() == b"hello"  # out of the kernel
        assert await a.peek() == b"hello"
        assert a.info().buffered == 5
        assert await a.recv(2) == b"he"
        assert await a.peek() == b"llo"
        assert await a.recv() == b"llo"
        assert await a.peek() is None


async def test_peek_leaves_the_peers_errors_to_recv() -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        raw.close()
        await trio.lowlevel.wait_readable(sock.fileno())
        assert not sock.isopen()
        assert await sock.peek() is None
        assert not sock.isopen()
        for _ in range(2):  # it does not turn into a clean end
            with pytest.raises(trio.BrokenResourceError, match="reset by peer"):
                await sock.recv()


async def test_isopen_takes_nothing_away_from_the_reader() -> None:
    sock, raw = raw_pair()
    async with closing(sock):
        with raw:
            assert sock.isopen()
            raw.sendall(b"bye")
        await trio.lowlevel.wait_readable(sock.fileno())
        assert sock.isopen()  # something is left to read
        assert await sock.recv() == b"bye"
        await trio.lowlevel.wait_readable(sock.fileno())
        assert not sock.isopen()
        assert await sock.recv() == b""


@pytest.mark.parametrize("bad", ["str", None, 1, [b"x"]])
async def test_where_bytes_belong_anything_else_is_a_type_error(bad: object) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with pytest.raises(TypeError, match="bytes are needed"):
            a.unrecv(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="bytes are needed"):
            await a.send(b"not sent", bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="bytes are needed"):
            await a.recv_until(bad)  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="bytes are needed"):
            a.lines(delimiter=bad)  # type: ignore[arg-type]
        assert await b.peek() is None


async def test_numbers_are_checked() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        for call in (
            lambda: a.recv(0),
            lambda: a.receive_some(-1),
            lambda: a.recv_exactly(-1),
            lambda: a.recv_until(b"\n", max_bytes=0),
            lambda: a.recv_until(b""),
        ):
            with pytest.raises(ValueError, match=r"must be|at least"):
                await call()
        for call in (lambda: a.recv(1.5), lambda: a.recv_exactly("1")):  # type: ignore[arg-type]
            with pytest.raises(TypeError):
                await call()


# ---- one reader, one sender ----


@pytest.mark.parametrize("layer", ["plain", "tls"])
async def test_a_second_reader_or_sender_gets_busy_and_harms_nobody(
    layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = unix_pair()
    if layer == "tls":
        async with trio.open_nursery() as nursery:
            nursery.start_soon(b.starttls, server_tls)
            await a.starttls(client_tls)
    async with closing(a, b):
        message = b"x" * 5_000_000
        got = []

        async def read() -> None:
            got.append(await a.recv_exactly(5))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            nursery.start_soon(a.send, message)
            await trio.testing.wait_all_tasks_blocked()
            for call in (
                a.recv,
                a.peek,
                a.receive_some,
                lambda: a.recv_exactly(0),
                lambda: a.recv_until(b"\n"),
            ):
                with pytest.raises(trio.BusyResourceError, match="reading"):
                    await call()
            with pytest.raises(trio.BusyResourceError, match="reading"):
                a.unrecv(b"x")
            with open(__file__, "rb") as file:
                for call in (
                    lambda: a.send(b"y"),
                    lambda: a.send_all(b""),
                    a.wait_send_all_might_not_block,
                    lambda: a.send_file(file),
                    a.send_eof,
                ):
                    with pytest.raises(trio.BusyResourceError, match="sending"):
                        await call()
            with pytest.raises(trio.BusyResourceError):
                await a.starttls(client_tls)
            with pytest.raises(trio.BusyResourceError):
                await a.stoptls()
            assert await b.recv_exactly(len(message)) == message
            await b.send(b"hello")
        assert got == [b"hello"]


# ---- counts, delimiters, lines ----


async def test_recv_exactly_takes_what_it_was_asked_for_however_it_came() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        a.unrecv(b"abc")
        async with trio.open_nursery() as nursery:
            got = []

            async def read() -> None:
                got.append(await a.recv_exactly(8))

            nursery.start_soon(read)
            for part in (b"d", b"ef", b"ghij"):
                await trio.testing.wait_all_tasks_blocked()
                await b.send(part)
        assert got == [b"abcdefgh"]
        assert await a.recv_exactly(0) == b""
        assert await a.recv_exactly(2) == b"ij"


async def test_an_incomplete_read_loses_nothing() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"abc")
        await b.send_eof()
        for _ in range(2):
            with pytest.raises(IncompleteReadError) as caught:
                await a.recv_exactly(4)
            assert (caught.value.partial, caught.value.expected) == (b"abc", 4)
            with pytest.raises(IncompleteReadError) as caught:
                await a.recv_until(b"\n")
            assert (caught.value.partial, caught.value.expected) == (b"abc", None)
        assert await a.recv_exactly(3) == b"abc"
        with pytest.raises(IncompleteReadError) as caught:
            await a.recv_exactly(1)
        assert caught.value.partial == b""


async def test_recv_until_returns_up_to_and_including_the_delimiter() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        got = []

        async def read() -> None:
            got.append(await a.recv_until(b"\r\n"))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            for part in (b"EH", b"LO\r", b"\nNEXT\r\n"):
                await trio.testing.wait_all_tasks_blocked()
                await b.send(part)
        assert got == [b"EHLO\r\n"]
        assert await a.recv_until(bytearray(b"\r\n")) == b"NEXT\r\n"


async def test_a_line_over_the_limit_is_an_error_that_loses_nothing() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        a.unrecv(b"0123456789\nrest")
        for limit in (1, 10):
            with pytest.raises(LimitExceededError) as caught:
                await a.recv_until(b"\n", max_bytes=limit)
            assert caught.value.limit == limit
        assert await a.recv_until(b"\n", max_bytes=11) == b"0123456789\n"
        assert await a.recv() == b"rest"


async def test_a_peer_that_never_ends_its_line_cannot_make_us_hold_more_than_the_limit() -> None:
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:

        async def flood() -> None:
            with contextlib.suppress(trio.BrokenResourceError):
                await b.send(b"x" * 50_000_000)

        nursery.start_soon(flood)
        with pytest.raises(LimitExceededError):
            await a.recv_until(b"\n", max_bytes=100_000)
        assert a.info().buffered <= 100_000 + _transport.RECEIVE_SIZE
        a.abort()


async def test_a_cancelled_read_loses_nothing() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        for read in (lambda: a.recv_exactly(100), lambda: a.recv_until(b"\n")):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await b.send(b"abc")
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
        assert await a.recv_exactly(6) == b"abcabc"


async def test_lines_are_iterated_over_and_the_loop_can_be_left_at_any_time() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"one\ntwo\n\nthree\nfour\n")
        await b.send_eof()
        async for line in a.lines():
            if line == b"two":
                break
        assert await a.recv_exactly(1) == b"\n"
        with pytest.raises(ZeroDivisionError):
            async for line in a.lines(keep_ends=True):
                assert line == b"three\n"
                1 / 0  # noqa: B018
        assert [line async for line in a.lines(delimiter=b"r\n")] == [b"fou"]
        assert await a.recv() == b""


async def test_a_line_that_was_cut_off_is_not_taken_for_a_whole_one() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"DELETE /tmp/x\nDELETE /")
        await b.send_eof()
        got = []
        with pytest.raises(IncompleteReadError) as caught:
            async for line in a.lines():
                got.append(line)
        assert got == [b"DELETE /tmp/x"]
        assert caught.value.partial == b"DELETE /"


async def test_lines_have_a_limit() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"x" * 100)
        with pytest.raises(LimitExceededError):
            async for _ in a.lines(max_bytes=99):
                pass
        await b.send(b"\nfits\n" + b"x" * 9 + b"\nrest")
        assert await a.recv_exactly(101) == b"x" * 100 + b"\n"
        got = []
        with pytest.raises(LimitExceededError):  # though the line is there, and in one chunk
            async for line in a.lines(max_bytes=9):
                got.append(line)
        assert got == [b"fits"]
        assert await a.recv_exactly(14) == b"x" * 9 + b"\nrest"


async def test_a_socket_can_be_iterated_over_by_chunks() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        await b.send(b"abc")
        await b.send_eof()
        a.unrecv(b"first")
        assert [chunk async for chunk in a] == [b"first", b"abc"]


# ---- send ----


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
async def test_large_buffers_and_more_of_them_than_one_system_call_takes(
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


async def test_a_send_that_was_cancelled_before_its_first_byte_changes_nothing() -> None:
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


async def test_after_a_send_that_was_cut_off_sending_is_over_and_reading_is_not() -> None:
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


async def test_a_send_that_failed_hides_nothing_that_the_peer_said_before() -> None:
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


async def test_a_reset_that_a_send_has_met_does_not_turn_into_a_clean_end() -> None:
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


# ---- send_file ----


@pytest.fixture
def content() -> bytes:
    return os.urandom(3_000_000)


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize(
    "kind", ["file", "unbuffered", "temporary", "memory", "gzip", "trio", "no sendfile"]
)
async def test_send_file_sends_any_binary_file(
    layer: str,
    kind: str,
    content: bytes,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = tmp_path / "file"
    path.write_bytes(content)
    if kind == "no sendfile":
        monkeypatch.setattr(_transport, "HAS_SENDFILE", False)
    if layer == "plain":
        a, b = await tcp_pair()
    else:
        a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b), contextlib.AsyncExitStack() as stack:
        file: object
        if kind in ("file", "no sendfile"):
            file = stack.enter_context(open(path, "rb"))
        elif kind == "unbuffered":
            file = stack.enter_context(open(path, "rb", buffering=0))
        elif kind == "temporary":
            file = stack.enter_context(tempfile.TemporaryFile())
            file.write(content)  # some of it is still in Python's buffer
        elif kind == "memory":
            file = io.BytesIO(content)
        elif kind == "gzip":
            path.write_bytes(gzip.compress(content, 0))
            file = stack.enter_context(gzip.open(path))
        else:
            file = await stack.enter_async_context(await trio.open_file(path, "rb"))
        progress: list[int] = []
        async with trio.open_nursery() as nursery:
            sent = []

            async def send() -> None:
                sent.append(await a.send_file(file, progress=progress.append))  # type: ignore[arg-type]
                sent.append(await a.send_file(file, 1_000, 5_000))  # type: ignore[arg-type]
                sent.append(await a.send_file(file, len(content) - 7))  # type: ignore[arg-type]
                sent.append(await a.send_file(file, len(content) + 7))  # type: ignore[arg-type]
                sent.append(await a.send_file(file, count=0))  # type: ignore[arg-type]

            nursery.start_soon(send)
            assert await b.recv_exactly(len(content)) == content
            assert await b.recv_exactly(5_000) == content[1_000:6_000]
            assert await b.recv_exactly(7) == content[-7:]
        assert sent == [len(content), 5_000, 7, 0, 0]
        assert progress == sorted(progress)
        assert progress[-1] == len(content)


@pytest.mark.parametrize("kind", ["kernel", "chunks"])
async def test_a_file_that_ends_before_its_count_is_an_error_that_says_how_much_was_sent(
    kind: str, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "rb") as on_disk:
            file = on_disk if kind == "kernel" else io.BytesIO(b"12345")
            with pytest.raises(EOFError, match="after 5 of 6 bytes"):
                await a.send_file(file, count=6)
        assert await b.recv() == b"12345"


@pytest.mark.parametrize("kind", ["kernel", "chunks"])
async def test_a_file_that_was_cut_off_ends_sending(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 50_000_000)
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "rb") as on_disk:
            file = on_disk if kind == "kernel" else io.BytesIO(b"x" * 50_000_000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_file, file)
                await trio.testing.wait_all_tasks_blocked(0.1)
                nursery.cancel_scope.cancel()
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.send(b"y")


@pytest.mark.parametrize("kind", ["kernel", "chunks"])
async def test_a_progress_callback_that_fails_ends_sending(kind: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "rb") as on_disk, pytest.raises(ZeroDivisionError):
            file = on_disk if kind == "kernel" else io.BytesIO(b"content")
            await a.send_file(file, progress=lambda sent: 1 // (sent - 7))
        with pytest.raises(trio.BrokenResourceError, match="cut off"):
            await a.send(b"y")


async def test_a_peer_that_leaves_ends_send_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 50_000_000)
    sock, raw = raw_pair()
    async with closing(sock):
        with open(tmp_path / "file", "rb") as file:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    with pytest.raises(trio.BrokenResourceError):
                        await sock.send_file(file)

                nursery.start_soon(send)
                await trio.testing.wait_all_tasks_blocked(0.05)
                raw.close()


async def test_a_file_that_cannot_be_read_is_not_the_connections_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> int:
        raise OSError(errno.EIO, "the disk is broken")

    monkeypatch.setattr(os, "sendfile", fail)
    (tmp_path / "file").write_bytes(b"content")
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "rb") as file, pytest.raises(OSError, match="the disk"):
            await a.send_file(file)
        await a.send(b"no harm done")
        assert await b.recv() == b"no harm done"


async def test_what_is_no_regular_file_is_read() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        reading, writing = os.pipe()
        os.write(writing, b"through a pipe")
        os.close(writing)
        with os.fdopen(reading, "rb", buffering=0) as pipe:
            assert await a.send_file(pipe) == 14
        assert await b.recv_exactly(14) == b"through a pipe"
        with open("/proc/version", "rb") as file:  # whose size is said to be 0
            expected = file.read()
            assert await a.send_file(file) == len(expected)
        assert await b.recv_exactly(len(expected)) == expected


async def test_a_file_that_the_kernel_refuses_to_send_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As some file systems do: sendfile(2) says EINVAL."""

    def refuse(*_: object) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "sendfile", refuse)
    (tmp_path / "file").write_bytes(b"content")
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "rb") as file:
            assert await a.send_file(file) == 7
        assert await b.recv() == b"content"


async def test_send_file_wants_a_binary_file_and_numbers_that_can_be() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        for bad in (io.StringIO("text"), "path", None):
            with pytest.raises(TypeError, match="binary file"):
                await a.send_file(bad)  # type: ignore[arg-type]
        with tempfile.NamedTemporaryFile() as named, open(named.name, "wb") as write_only:
            with pytest.raises(ValueError, match="open for reading"):
                await a.send_file(write_only)

        class OnlyRead:
            """All that is needed: a read method."""

            parts = [b"ab", b"c"]

            def read(self, size: int) -> bytes:
                return self.parts.pop(0) if self.parts else b""

        assert await a.send_file(OnlyRead()) == 3  # type: ignore[arg-type]
        assert await b.recv_exactly(3) == b"abc"
        for offset, count in ((-1, None), (0, -1)):
            with pytest.raises(ValueError, match="0 or more"):
                await a.send_file(io.BytesIO(), offset, count)


async def test_the_chunks_of_a_file_are_bounded() -> None:
    assert _send_file.FILE_CHUNK <= 1 << 20
    assert _transport._SENDFILE_SIZE <= 1 << 20


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


@pytest.mark.parametrize("buffering", ["some", "all"])
async def test_what_was_written_to_a_file_and_not_flushed_is_sent(
    buffering: str, tmp_path: Path
) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "w+b") as file:
            file.write(b"first ")
            if buffering == "some":
                file.flush()
            file.write(b"second")
            assert await a.send_file(file) == 12
        assert await b.recv_exactly(12) == b"first second"


async def test_after_the_last_line_of_a_chunk_the_next_read_waits_for_more() -> None:
    a, b = await tcp_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        await b.send(b"one\ntwo\n")
        lines = a.lines()
        assert [await lines.__anext__(), await lines.__anext__()] == [b"one", b"two"]
        got = []

        async def read() -> None:
            got.append(await a.recv())

        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        await b.send(b"more")
    assert got == [b"more"]
