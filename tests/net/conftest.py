"""Fixtures: the two ends of a connection, and files of every kind to send."""

from __future__ import annotations

import contextlib
import gzip
import io
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from helpers.pairs import closing, raw_pair, raw_unix_pair, unix_pair
from helpers.raw_tls import upgrade
from trisock import ClientTLS, ServerTLS, Socket
from trisock._net import send_file as _send_file
from trisock.testing import socket_pair


@pytest.fixture
def family() -> str:
    """The kind of connection: ``"tcp"`` or ``"unix"``. A Unix connection has small buffers.

    Tests parametrize this fixture.
    """
    return "tcp"


@pytest.fixture
def layer() -> str:
    """``"plain"``, ``"tls"``, or ``"no sendfile"`` (plain, without sendfile(2)).

    Tests parametrize this fixture.
    """
    return "plain"


@pytest.fixture
async def ends(
    family: str,
    layer: str,
    client_tls: ClientTLS,
    server_tls: ServerTLS,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[tuple[Socket, Socket]]:
    a, b = unix_pair() if family == "unix" else await socket_pair()
    async with closing(a, b):
        if layer == "tls":
            await upgrade(a, client_tls, b, server_tls)
        elif layer == "no sendfile":
            monkeypatch.setattr(_send_file, "HAS_SENDFILE", False)
        yield a, b


@pytest.fixture
def other_runs(nursery: trio.Nursery) -> Callable[[], int]:
    """Start a task that is always ready to run. Return a function that counts the task's runs."""
    runs = 0

    async def run() -> None:
        nonlocal runs
        while True:
            await trio.lowlevel.checkpoint()
            runs += 1

    nursery.start_soon(run)
    return lambda: runs


@pytest.fixture
async def raw_ends(family: str) -> AsyncIterator[tuple[Socket, socket.socket]]:
    sock, raw = raw_unix_pair() if family == "unix" else raw_pair()
    async with closing(sock):
        with raw:
            yield sock, raw


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A path for a Unix socket. It does not exist yet."""
    return tmp_path / "socket"


@pytest.fixture
def sock(raw_ends: tuple[Socket, socket.socket]) -> Socket:
    """The Socket at one end of a connection. Its peer is ``raw``."""
    return raw_ends[0]


@pytest.fixture
def raw(raw_ends: tuple[Socket, socket.socket]) -> socket.socket:
    """The peer of ``sock``: a blocking socket of the standard library."""
    return raw_ends[1]


class CustomFile(io.RawIOBase):
    """A file of a user-defined class: readable and seekable, but not hashable."""

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


@pytest.fixture
def make_file(tmp_path: Path) -> Iterator[Callable[[str, bytes], Any]]:
    """Return a function that opens a file of a given kind. The files are closed after the test."""
    with contextlib.ExitStack() as stack:

        def make(kind: str, content: bytes) -> Any:
            if kind == "memory":
                return io.BytesIO(content)
            if kind == "custom":
                return CustomFile(content)
            if kind == "temporary":
                file: Any = stack.enter_context(tempfile.TemporaryFile())
                file.write(content)  # some bytes may stay in Python's write buffer
                return file
            if kind == "pipe":  # the content must fit into the pipe
                reading, writing = os.pipe()
                os.write(writing, content)
                os.close(writing)
                return stack.enter_context(open(reading, "rb"))
            path = tmp_path / "file"
            if kind == "gzip":
                path.write_bytes(gzip.compress(content, 0))
                return stack.enter_context(gzip.open(path))
            path.write_bytes(content)
            buffering = 0 if kind == "unbuffered" else -1
            file = stack.enter_context(open(path, "rb", buffering=buffering))
            return trio.wrap_file(file) if kind == "trio" else file

        yield make
