"""send_file sends exactly the bytes of a file, for every kind of file object."""

from __future__ import annotations

import errno
import io
import os
import socket
import ssl
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from helpers.pairs import closing, read_all, until_full
from trisock import Socket
from trisock._net import send_file as _send_file
from trisock.testing import socket_pair

MIB = 1024 * 1024
CONTENT = os.urandom(3 * MIB + 7)

KINDS = ["file", "unbuffered", "temporary", "memory", "custom", "gzip", "trio"]
ALL_LAYERS = pytest.mark.parametrize("layer", ["plain", "no sendfile", "tls"])

MakeFile = Callable[..., Any]


# ---- which bytes are sent ----


@ALL_LAYERS
@pytest.mark.parametrize("kind", KINDS)
async def test_send_file_sends_any_part_of_any_binary_file(
    kind: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    file = make_file(kind, CONTENT)
    for offset, count, total in (
        (0, None, 3 * MIB + 7),
        (0, 2 * MIB, 2 * MIB),
        (MIB, 2 * MIB + 1, 2 * MIB + 1),  # progress counts from the offset
        (1_000, 5_000, 5_000),
        (3 * MIB, None, 7),
        (3 * MIB + 7, None, 0),
        (3 * MIB + 14, None, 0),
        (0, 0, 0),
    ):
        progress: list[int] = []
        async with trio.open_nursery() as nursery:

            async def receive(expected: bytes) -> None:
                assert await b.recv_exactly(len(expected)) == expected

            nursery.start_soon(receive, CONTENT[offset:][:total])
            assert await a.send_file(file, offset, count, progress=progress.append) == total
        assert progress == sorted(set(progress))
        assert (progress or [0])[-1] == total
        assert 0 not in progress
        # progress is called at least once per MiB.
        assert max(map(int.__sub__, progress, [0, *progress]), default=0) <= MIB


@ALL_LAYERS
@pytest.mark.parametrize("kind", ["file", "unbuffered"])
async def test_send_file_ignores_and_keeps_the_position_of_a_file(
    kind: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    file = make_file(kind, b"0123456789")
    for position in (0, 5, 10, 1000):
        file.seek(position)
        start = file.read(3)
        assert await a.send_file(file) == 10
        assert await a.send_file(file, 7) == 3
        assert start + file.read() == b"0123456789"[position:]
        assert await b.recv_exactly(13) == b"0123456789789"


@ALL_LAYERS
@pytest.mark.parametrize("kind", KINDS)
async def test_three_sends_can_share_a_file(
    layer: str,
    kind: str,
    make_file: MakeFile,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if layer == "no sendfile":
        monkeypatch.setattr(_send_file, "HAS_SENDFILE", False)
    file = make_file(kind, CONTENT)
    pairs = [await socket_pair(tls=layer == "tls") for _ in range(3)]
    async with closing(*(sock for each in pairs for sock in each)):

        async def send(sock: Socket, offset: int) -> None:
            assert await sock.send_file(file, offset) == len(CONTENT) - offset
            await sock.close()

        async def receive(sock: Socket, offset: int) -> None:
            assert await read_all(sock) == CONTENT[offset:]

        async with trio.open_nursery() as nursery:
            for number, (a, b) in enumerate(pairs):
                nursery.start_soon(send, a, number * MIB)
                nursery.start_soon(receive, b, number * MIB)


@ALL_LAYERS
@pytest.mark.parametrize("family", ["unix"])
async def test_another_file_with_the_same_descriptor_is_not_sent(
    a: Socket, b: Socket, make_file: MakeFile, tmp_path: Path
) -> None:
    (tmp_path / "key").write_bytes(b"secret" * MIB)
    file = make_file("file", CONTENT)
    descriptor = file.fileno()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_file, file)
        await until_full(a)
        file.close()
        with open(tmp_path / "key", "rb") as key:
            assert key.fileno() == descriptor
            assert await b.recv_exactly(len(CONTENT)) == CONTENT


@ALL_LAYERS
@pytest.mark.parametrize("family", ["unix"])
@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_bytes_appended_during_send_file_are_not_sent(
    kind: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    file = make_file(kind, CONTENT)

    async def send() -> None:
        assert await a.send_file(file) == len(CONTENT)
        await a.send(b"!")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await until_full(a)
        if kind == "memory":
            file.seek(0, os.SEEK_END)
            file.write(b"more" * MIB)
        else:
            with open(file.name, "ab") as more:
                more.write(b"more" * MIB)
        assert await b.recv_exactly(len(CONTENT) + 1) == CONTENT + b"!"


async def test_unflushed_bytes_of_a_growing_file_are_sent(a: Socket, b: Socket) -> None:
    with tempfile.TemporaryFile() as file:
        file.write(b"one")
        assert await a.send_file(file) == 3
        file.write(b"two")
        assert await a.send_file(file) == 6
        file.write(b"three")
        assert await a.send_file(file, 3, 5) == 5
        assert await a.send_file(file, 10) == 1
    assert await b.recv_exactly(15) == b"oneonetwotwothe"


@pytest.mark.parametrize("layer", ["tls"])
async def test_an_empty_file_that_grows_after_the_call_sends_nothing(
    a: Socket, tmp_path: Path
) -> None:
    with open(tmp_path / "file", "w+b", buffering=0) as file:
        source = _send_file.open_source(file)
        file.write(b"too late")  # between the call and the first read
        assert await source.read(0, 100) == b""
        await source.close()
        file.truncate(0)
        assert await a.send_file(file) == 0


# ---- how the file is read ----


class UpperCaseFile(io.FileIO):
    def read(self, size: int | None = -1) -> bytes:
        return (super().read(size) or b"").upper()


class UpperCaseReader(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size).upper()


@pytest.mark.parametrize(
    "own_class",
    [UpperCaseFile, lambda path: UpperCaseReader(io.FileIO(path))],
    ids=["raw", "buffered"],
)
async def test_the_read_method_of_a_subclass_is_used(
    own_class: Callable[[Path], Any], a: Socket, b: Socket, tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"hello")
    with own_class(tmp_path / "file") as file:
        assert await a.send_file(file) == 5
    assert await b.recv_exactly(5) == b"HELLO"


class OnlyRead:
    """A file object whose only method is ``read``."""

    def __init__(self, *results: bytes | None) -> None:
        self._results = list(results)

    def read(self, size: int) -> bytes | None:
        return self._results.pop(0) if self._results else b""


async def test_send_file_accepts_an_object_with_only_a_read_method(a: Socket, b: Socket) -> None:
    assert await a.send_file(OnlyRead(b"ab", b"c")) == 3
    assert await b.recv_exactly(3) == b"abc"


@pytest.mark.parametrize(
    ("result", "error", "words"),
    [
        (None, BlockingIOError, "nothing to read"),
        (b"x" * 15, ValueError, "15 bytes, more than the requested 5"),
    ],
)
async def test_send_file_fails_if_read_returns_none_or_too_much(
    result: bytes | None, error: type[Exception], words: str, a: Socket
) -> None:
    with pytest.raises(error, match=words):
        await a.send_file(OnlyRead(result), count=5)


def test_a_file_over_an_ssl_socket_is_read_through_tls() -> None:
    one, other = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    options = {"server_hostname": "example.org", "do_handshake_on_connect": False}
    with other, context.wrap_socket(one, **options) as encrypted:
        for sock, by_its_methods in ((encrypted, True), (other, False)):
            with socket.SocketIO(sock, "r") as file:
                source = _send_file.open_source(file)
                assert (type(source) is _send_file._FileObject) == by_its_methods
                trio.run(source.close)


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("kind", ["file", "gzip", "memory", "custom"])
async def test_send_file_works_while_the_default_thread_limiter_is_exhausted(
    kind: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    threads = trio.to_thread.current_default_thread_limiter()
    holders = [object() for _ in range(int(threads.available_tokens))]
    file = make_file(kind, b"content")
    for holder in holders:
        threads.acquire_on_behalf_of_nowait(holder)
    try:
        with trio.fail_after(10):
            assert await a.send_file(file) == 7
    finally:
        for holder in holders:
            threads.release_on_behalf_of(holder)
    assert await b.recv() == b"content"


def test_a_piece_of_a_file_is_at_most_1_mib() -> None:
    assert _send_file.FILE_CHUNK <= MIB
    assert _send_file._SENDFILE_SIZE <= MIB


# ---- errors that leave the connection intact ----


async def test_send_file_checks_its_arguments(a: Socket) -> None:
    for bad in (io.StringIO("text"), "path", None):
        with pytest.raises(TypeError, match="binary file"):
            await a.send_file(bad)
    with tempfile.NamedTemporaryFile() as named, open(named.name, "wb") as write_only:
        with pytest.raises(ValueError, match="open for reading"):
            await a.send_file(write_only)
    for offset, count in ((-1, None), (0, -1)):
        with pytest.raises(ValueError, match=r"0 or more, and less than .*, not -1$"):
            await a.send_file(io.BytesIO(), offset, count)


def break_sendfile(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "sendfile", fail)


async def test_an_unreadable_file_does_not_break_the_connection(
    a: Socket, b: Socket, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_sendfile(monkeypatch, errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        await a.send_file(make_file("file", b"content"))
    await a.send(b"no harm done")
    assert await b.recv() == b"no harm done"


async def test_a_file_without_sendfile_support_is_read_instead(
    a: Socket, b: Socket, make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On some file systems, sendfile(2) fails with EINVAL."""
    break_sendfile(monkeypatch, errno.EINVAL)
    assert await a.send_file(make_file("file", b"content")) == 7
    assert await b.recv() == b"content"


def test_a_failed_fstat_leaves_no_descriptor_open(
    make_file: MakeFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(descriptor: int) -> os.stat_result:
        raise OSError(errno.EIO, "the disk has failed")

    file = make_file("file", b"content")
    before = os.listdir("/proc/self/fd")
    with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk has failed"):
        patch.setattr(_send_file.os, "fstat", broken)
        _send_file.open_source(file)
    assert os.listdir("/proc/self/fd") == before


async def test_reading_a_closed_file_source_returns_no_bytes(make_file: MakeFile) -> None:
    source = _send_file.open_source(make_file("file", b"content"))
    assert isinstance(source, _send_file._OnDisk)
    await source.close()
    assert source._read(0, 100) == b""
