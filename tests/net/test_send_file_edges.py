"""send_file of odd file objects, and of files that change at the wrong moment."""

from __future__ import annotations

import io
import os
import socket
import ssl
from pathlib import Path

import pytest
import trio

from helpers.pairs import closing, tcp_pair, tls_pair
from trisock import ClientTLS, ServerTLS
from trisock._net import send_file as _send_file


class Silent(io.RawIOBase):
    """A non-blocking file object that has nothing to read."""

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> None:  # type: ignore[override]
        return None


async def test_a_file_object_with_nothing_to_read_is_an_error() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with pytest.raises(BlockingIOError, match="nothing to read"):
            await a.send_file(Silent())


class Shouting(io.BufferedReader):
    """A class of the program's, over a raw file of its own."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size).upper()


async def test_a_subclass_with_its_own_read_is_asked_to_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"quiet")
    a, b = await tcp_pair()
    async with closing(a, b):
        with Shouting(io.FileIO(tmp_path / "file")) as file:
            assert await a.send_file(file) == 5
        assert await b.recv_exactly(5) == b"QUIET"


def test_a_file_over_an_ssl_socket_is_not_read_below_tls() -> None:
    one, other = socket.socketpair()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    with (
        other,
        context.wrap_socket(
            one, server_hostname="example.org", do_handshake_on_connect=False
        ) as encrypted,
    ):
        with socket.SocketIO(encrypted, "r") as file:
            source = _send_file.open_source(file)
            assert type(source) is _send_file._FileObject
            trio.run(source.close)
        with socket.SocketIO(other, "r") as file:
            source = _send_file.open_source(file)
            assert type(source) is not _send_file._FileObject
            trio.run(source.close)


def test_a_descriptor_that_cannot_be_looked_at_leaves_none_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"content")

    def broken(descriptor: int) -> os.stat_result:
        raise OSError(5, "the disk is gone")

    with open(tmp_path / "file", "rb") as file:
        before = os.listdir("/proc/self/fd")
        with monkeypatch.context() as patch, pytest.raises(OSError, match="the disk is gone"):
            patch.setattr(_send_file.os, "fstat", broken)
            _send_file.open_source(file)
        assert os.listdir("/proc/self/fd") == before


async def test_a_file_that_was_empty_at_the_call_sends_nothing(
    tmp_path: Path, client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    (tmp_path / "file").touch()
    a, b = await tls_pair(client_tls, server_tls)
    async with closing(a, b):
        with open(tmp_path / "file", "r+b", buffering=0) as file:
            source = _send_file.open_source(file)
            file.write(b"too late")  # between the call and the first read
            assert await source.read(0, 100) == b""
            await source.close()
            file.truncate(0)
            assert await a.send_file(file) == 0


async def test_a_read_that_was_given_up_before_it_began_reads_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    with open(tmp_path / "file", "rb") as file:
        source = _send_file.open_source(file)
        assert isinstance(source, _send_file._OnDisk)
        await source.close()
        assert source._read(0, 100) == b""


class Generous(Silent):
    """A file object that returns more than it was asked for."""

    def read(self, size: int = -1) -> bytes:  # type: ignore[override]
        return b"x" * (size + 10)


async def test_a_file_object_that_returns_too_much_is_an_error() -> None:
    a, b = await tcp_pair()
    async with closing(a, b):
        with pytest.raises(ValueError, match="15 bytes where 5 were asked for"):
            await a.send_file(Generous(), count=5)
