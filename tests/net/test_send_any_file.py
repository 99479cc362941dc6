"""send_file, of files of every kind."""

from __future__ import annotations

import contextlib
import errno
import gzip
import io
import os
import tempfile
from pathlib import Path

import pytest
import trio
import trio.testing

from helpers.pairs import closing, raw_pair, tcp_pair, tls_pair
from trisock import ClientTLS, ServerTLS
from trisock._net import send_file as _send_file
from trisock._net import transport as _transport


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
async def test_a_file_shorter_than_its_count_says_how_much_was_sent(
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


async def test_an_unreadable_file_is_not_the_connections_fault(
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


async def test_send_file_wants_a_binary_file_and_possible_numbers() -> None:
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


@pytest.mark.parametrize("buffering", ["some", "all"])
async def test_what_a_file_has_not_flushed_is_sent(buffering: str, tmp_path: Path) -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with open(tmp_path / "file", "w+b") as file:
            file.write(b"first ")
            if buffering == "some":
                file.flush()
            file.write(b"second")
            assert await a.send_file(file) == 12
        assert await b.recv_exactly(12) == b"first second"
