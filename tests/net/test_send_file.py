"""send_file: the bytes of the file and no others, and a wait that can be given up."""

from __future__ import annotations

import contextlib
import fcntl
import gzip
import io
import os
import pty
import select
import socket
import threading
import tty
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import clog, closing, pair, small_pair, tcp_pair, tls_pair, unix_pair
from trisock import ClientTLS, ServerTLS, Socket, TLSError
from trisock._net import transport as _transport

MIB = 1024 * 1024
CONTENT = os.urandom(3 * MIB + 7)


async def until_full(sock: Socket) -> None:
    while select.select([], [sock], [], 0)[1]:
        await trio.lowlevel.checkpoint()


class Unknown(io.RawIOBase):
    """A class of the program's: it reads, and seeks, and cannot be hashed."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, content: bytes) -> None:
        self._file = io.BytesIO(content)

    def __eq__(self, other: object) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._file.seek(offset, whence)

    def read(self, size: int = -1) -> bytes:
        return self._file.read(size)


def make_file(kind: str, directory: Path, content: bytes = CONTENT) -> Any:
    path = directory / "file"
    if kind == "memory":
        return io.BytesIO(content)
    if kind == "unknown":
        return Unknown(content)
    if kind == "gzip":
        path.write_bytes(gzip.compress(content, 0))
        return gzip.open(path)
    path.write_bytes(content)
    return open(path, "rb", buffering=0 if kind == "unbuffered" else -1)


# ---- whose bytes ----


@pytest.mark.parametrize("layer", ["plain", "no sendfile", "tls"])
@pytest.mark.parametrize("kind", ["file", "unbuffered", "memory", "unknown", "gzip"])
async def test_three_sends_share_a_file(
    layer: str,
    kind: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layer == "no sendfile":
        monkeypatch.setattr(_transport, "HAS_SENDFILE", False)
    pairs = [await pair(layer, client_tls, server_tls) for _ in range(3)]
    async with closing(*(sock for each in pairs for sock in each)):
        got: dict[int, bytes] = {}

        async def send(sock: Socket, offset: int) -> None:
            assert await sock.send_file(file, offset) == len(CONTENT) - offset
            await sock.close()

        async def receive(sock: Socket, offset: int) -> None:
            got[offset] = b"".join([chunk async for chunk in sock])

        with make_file(kind, tmp_path) as file:
            async with trio.open_nursery() as nursery:
                for number, (a, b) in enumerate(pairs):
                    nursery.start_soon(send, a, number * MIB)
                    nursery.start_soon(receive, b, number * MIB)
        for offset, data in got.items():
            assert data == CONTENT[offset:]


@pytest.mark.parametrize("layer", ["plain", "no sendfile", "tls"])
async def test_another_file_under_the_same_number_is_not_sent(
    layer: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layer == "no sendfile":
        monkeypatch.setattr(_transport, "HAS_SENDFILE", False)
    (tmp_path / "key").write_bytes(b"secret" * MIB)
    a, b = await small_pair(layer, client_tls, server_tls)
    async with closing(a, b):
        file = make_file("file", tmp_path)
        number = file.fileno()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send_file, file)
            await until_full(a)
            file.close()
            with open(tmp_path / "key", "rb") as key:
                assert key.fileno() == number
                assert await b.recv_exactly(len(CONTENT)) == CONTENT


@pytest.mark.parametrize("layer", ["plain", "no sendfile", "tls"])
@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_a_file_that_grows_is_sent_as_it_was_at_the_call(
    layer: str,
    kind: str,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layer == "no sendfile":
        monkeypatch.setattr(_transport, "HAS_SENDFILE", False)
    a, b = await small_pair(layer, client_tls, server_tls)
    async with closing(a, b):
        with make_file(kind, tmp_path) as file:
            sent: list[int] = []

            async def send() -> None:
                sent.append(await a.send_file(file))

            def grow() -> None:
                if isinstance(file, io.BytesIO):
                    file.seek(0, os.SEEK_END)
                    file.write(b"more" * MIB)
                else:
                    with open(tmp_path / "file", "ab") as more:
                        more.write(b"more" * MIB)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                await until_full(a)
                grow()
                assert await b.recv_exactly(len(CONTENT)) == CONTENT
            assert sent == [len(CONTENT)]
            await a.send(b"!")
            assert await b.recv() == b"!"


async def test_a_class_that_reads_its_own_way_is_asked_to_read(tmp_path: Path) -> None:
    class Shouting(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:
            return (super().read(size) or b"").upper()

    (tmp_path / "file").write_bytes(b"hello")
    a, b = await tcp_pair()
    async with closing(a, b):
        with Shouting(tmp_path / "file") as file:
            assert await a.send_file(file) == 5  # type: ignore[arg-type]
        assert await b.recv() == b"HELLO"


async def test_the_position_of_a_file_on_disk_stays(tmp_path: Path) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with make_file("file", tmp_path, b"0123456789") as file:
            assert file.read(3) == b"012"
            assert await a.send_file(file, 5) == 5
            assert file.read() == b"3456789"
        assert await b.recv() == b"56789"


# ---- waiting ----


@contextlib.contextmanager
def silent(kind: str) -> Iterator[tuple[BinaryIO, Callable[[bytes], object]]]:
    """Give a file that says nothing by itself, and a function that makes it say something."""
    if kind in ("pipe", "buffered pipe"):
        reading, writing = os.pipe()
    elif kind == "terminal":
        writing, reading = pty.openpty()
        tty.setraw(reading)
    else:
        one, other = socket.socketpair()
        with one, other:
            file = one.makefile("rb", buffering=0 if kind == "raw socket" else -1)
            with file:
                yield file, other.sendall  # type: ignore[misc]
        return
    with open(reading, "rb", buffering=0 if kind == "pipe" else -1) as file:
        try:
            yield file, lambda data: os.write(writing, data)  # type: ignore[misc]
        finally:
            os.close(writing)


SILENT = ["pipe", "buffered pipe", "terminal", "socket", "raw socket"]


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("kind", SILENT)
async def test_a_send_of_a_silent_file_can_be_cancelled(
    kind: str, layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await pair(layer, client_tls, server_tls)
    async with closing(a, b):
        with silent(kind) as (file, say):
            flags = fcntl.fcntl(file.fileno(), fcntl.F_GETFL)
            descriptors = os.listdir("/proc/self/fd")
            ended = trio.Event()

            async def send() -> None:
                try:
                    await a.send_file(file)
                finally:
                    ended.set()

            async with trio.open_nursery() as nursery, trio.open_nursery() as sending:
                sending.start_soon(send)
                await trio.testing.wait_all_tasks_blocked()
                sending.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await trio.testing.wait_all_tasks_blocked(0.01)
                    given_up = ended.is_set()
                    say(b"kept")  # also for a thread that would wait on
                nursery.cancel_scope.cancel()
            assert given_up
            assert os.listdir("/proc/self/fd") == descriptors
            assert fcntl.fcntl(file.fileno(), fcntl.F_GETFL) == flags
            # Nothing was lost, here or there.
            await a.send(b"free ")
            assert await a.send_file(file, count=4) == 4
            assert await b.recv_exactly(9) == b"free kept"


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("how", ["close", "abort", "cancelled close"])
async def test_closing_the_socket_ends_a_send_of_a_silent_file(
    how: str, layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await pair(layer, client_tls, server_tls)
    async with closing(a, b):
        with silent("pipe") as (file, say):
            ended = trio.Event()

            async def send() -> None:
                with pytest.raises(trio.ClosedResourceError):
                    await a.send_file(file)
                ended.set()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                say(b"a part")
                assert await b.recv() == b"a part"
                await trio.testing.wait_all_tasks_blocked(0.01)
                if how == "abort":
                    a.abort()
                else:
                    with trio.CancelScope() as scope:
                        if how != "close":
                            scope.cancel()
                        await a.close()
                await trio.testing.wait_all_tasks_blocked(0.01)
                was_woken = ended.is_set()
                say(b"also for a thread that would wait on")
            assert was_woken
        if layer == "tls":
            with pytest.raises(trio.BrokenResourceError):
                await b.recv()


@pytest.mark.parametrize("kind", SILENT)
async def test_nothing_is_taken_from_a_pipe_before_it_can_be_sent(kind: str) -> None:
    a, b = unix_pair()
    async with closing(a, b):
        await clog(a)
        with silent(kind) as (file, say):
            say(b"kept")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_file, file)
                await trio.testing.wait_all_tasks_blocked(0.01)
                nursery.cancel_scope.cancel()
            assert file.read(4) == b"kept"
        assert a.info().isopen
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.send, b"sending goes on")
            while not (await b.recv()).endswith(b"sending goes on"):
                pass


async def test_what_was_read_ahead_of_a_pipe_is_sent_at_once() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with silent("buffered pipe") as (file, say):
            say(b"header\nbody")
            assert file.readline() == b"header\n"
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_file, file)
                assert await b.recv_exactly(4) == b"body"
                say(b" and more")
                assert await b.recv_exactly(9) == b" and more"
                nursery.cancel_scope.cancel()


async def test_three_sends_share_a_pipe_and_each_byte_is_sent_once() -> None:
    pairs = [await tcp_pair() for _ in range(3)]
    async with closing(*(sock for each in pairs for sock in each)):
        with silent("pipe") as (file, say):
            async with trio.open_nursery() as nursery:
                for a, _ in pairs:
                    nursery.start_soon(a.send_file, file)
                got = 0
                for number in range(30):
                    await trio.testing.wait_all_tasks_blocked()
                    say(b"%02d" % number)
                    await trio.testing.wait_all_tasks_blocked()
                    got += sum([len((await b.peek() and await b.recv()) or b"") for _, b in pairs])
                nursery.cancel_scope.cancel()
            assert got == 60


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("kind", ["file", "gzip", "memory", "unknown"])
async def test_files_do_not_wait_for_name_lookups(
    layer: str, kind: str, tmp_path: Path, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    threads = trio.to_thread.current_default_thread_limiter()
    holders = [object() for _ in range(int(threads.available_tokens))]
    a, b = await pair(layer, client_tls, server_tls)
    async with closing(a, b):
        with make_file(kind, tmp_path, b"content") as file:
            for holder in holders:
                threads.acquire_on_behalf_of_nowait(holder)
            try:
                with trio.fail_after(10):
                    assert await a.send_file(file) == 7
            finally:
                for holder in holders:
                    threads.release_on_behalf_of(holder)
        assert await b.recv() == b"content"


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("kind", ["file", "memory", "pipe", "gzip", "unknown"])
@pytest.mark.parametrize("count", [None, 0])
async def test_send_file_is_a_cancel_point_whatever_it_is_given(
    layer: str,
    kind: str,
    count: int | None,
    tmp_path: Path,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
) -> None:
    a, b = await pair(layer, client_tls, server_tls)
    async with closing(a, b), contextlib.AsyncExitStack() as stack:
        if kind == "pipe":
            file, _ = stack.enter_context(silent("pipe"))
        else:
            file = stack.enter_context(make_file(kind, tmp_path, b""))
        if count == 0:
            with trio.testing.assert_checkpoints():
                assert await a.send_file(file, count=count) == 0
        with trio.CancelScope() as scope:
            scope.cancel()
            await a.send_file(file, count=count)
        assert scope.cancelled_caught
        await a.send(b"free")
        assert await b.recv() == b"free"


async def test_a_disk_that_does_not_answer_can_be_given_up(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    autojump_clock: trio.testing.MockClock,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
) -> None:
    answers, ended, real = threading.Event(), threading.Event(), os.pread
    asked = threading.Event()

    def pread(*args: int) -> bytes:
        asked.set()
        answers.wait(30)
        try:
            return real(*args)
        finally:
            ended.set()

    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        with make_file("file", tmp_path) as file:
            descriptors = set(os.listdir("/proc/self/fd"))
            monkeypatch.setattr(os, "pread", pread)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_file, file)
                while not asked.is_set():
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            assert not ended.is_set()
            await a.send(b"free")
            assert await b.recv() == b"free"
            answers.set()
            assert ended.wait(30)
            while not set(os.listdir("/proc/self/fd")) <= descriptors:  # the thread closes its own
                await trio.lowlevel.checkpoint()


# ---- what a clean end says ----


@pytest.mark.parametrize("kind", ["file", "memory", "gzip", "unknown", "pipe"])
@pytest.mark.parametrize("length", [0, 5])
async def test_no_close_notify_follows_a_file_that_was_too_short(
    kind: str, length: int, tmp_path: Path, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    content = b"12345"[:length]
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b), contextlib.AsyncExitStack() as stack:
        if kind == "pipe":
            reading, writing = os.pipe()
            os.write(writing, content)
            os.close(writing)
            file = stack.enter_context(open(reading, "rb"))
        else:
            file = stack.enter_context(make_file(kind, tmp_path, content))
        await a.send(b"header")
        with pytest.raises(EOFError, match=f"after {length} of 6 bytes"):
            await a.send_file(file, count=6)
        with make_file("memory", tmp_path, b", that is all") as excuse:
            await a.send_file(excuse)  # a later file that is whole vouches for nothing but itself
        await a.close()
        assert await b.recv_exactly(19 + length) == b"header" + content + b", that is all"
        with pytest.raises(TLSError, match="close_notify"):
            await b.recv()


@pytest.mark.parametrize("offset", [2**40, 2**62, 2**63 - 1])
async def test_an_offset_behind_the_end_of_any_file_is_an_early_end(
    offset: int, tmp_path: Path
) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with make_file("file", tmp_path) as file, pytest.raises(EOFError, match="after 0 of 6"):
            await a.send_file(file, offset, 6)
        await a.send(b"goes on")
        assert await b.recv() == b"goes on"


async def test_stoptls_does_not_follow_a_file_that_was_too_short(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        with pytest.raises(EOFError):
            await a.send_file(io.BytesIO(b"12345"), count=6)
        with pytest.raises(TLSError, match="a file was sent in part only"):
            await a.stoptls()
        assert not a.isopen()
        assert await b.recv_exactly(5) == b"12345"
        with pytest.raises(TLSError, match="close_notify"):
            await b.recv()


async def test_no_close_notify_follows_a_file_that_has_shrunk(
    tmp_path: Path, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await small_pair("tls", client_tls, server_tls)
    async with closing(a, b):
        with make_file("file", tmp_path) as file:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(a.send_file, file)
                await until_full(a)
                os.truncate(tmp_path / "file", 2 * MIB)
                assert await b.recv_exactly(2 * MIB) == CONTENT[: 2 * MIB]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(a.close)
            with pytest.raises(trisock.TLSError, match="close_notify"):
                await b.recv()


@pytest.mark.parametrize("kind", ["file", "memory", "gzip", "unknown", "proc"])
async def test_close_notify_follows_a_file_that_was_whole(
    kind: str, tmp_path: Path, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        with open("/proc/version", "rb") if kind == "proc" else make_file(kind, tmp_path) as file:
            async with trio.open_nursery() as nursery:

                async def send() -> None:
                    await a.send_file(file)
                    await a.close()

                nursery.start_soon(send)
                got = b"".join([chunk async for chunk in b])
        assert got == (Path("/proc/version").read_bytes() if kind == "proc" else CONTENT)
