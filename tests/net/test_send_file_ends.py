"""send_file with files that are too short, peers that leave, and cancellation."""

from __future__ import annotations

import os
import re
import socket
import ssl
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from helpers.pairs import read_all, until_full
from helpers.raw_tls import RawTLS
from trisock import Socket, TLSError
from trisock._net import send_file as _send_file
from trisock.testing import Authority, serving

MIB = 1024 * 1024
CONTENT = os.urandom(4 * MIB)

ALL_LAYERS = pytest.mark.parametrize("layer", ["plain", "no sendfile", "tls"])
PLAIN_LAYERS = pytest.mark.parametrize("layer", ["plain", "no sendfile"])
SMALL = pytest.mark.parametrize("family", ["unix"])  # a Unix connection has small buffers

MakeFile = Callable[..., Any]


@pytest.fixture
def large_file(make_file: MakeFile) -> Any:
    """64 MiB of zeros, which is more than a connection can buffer."""
    file = make_file("file", b"")
    os.truncate(file.name, 64 * MIB)
    return file


# ---- files that are too short ----


@ALL_LAYERS
@pytest.mark.parametrize("kind", ["file", "memory", "gzip", "custom", "pipe"])
@pytest.mark.parametrize("length", [0, 5])
async def test_a_short_file_raises_eoferror_and_prevents_close_notify(
    kind: str, length: int, layer: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    content = b"12345"[:length]
    await a.send(b"header")
    with pytest.raises(EOFError, match=f"after {length} of 6 bytes"):
        await a.send_file(make_file(kind, content), count=6)
    # There will be no close_notify, even if a later file is sent whole.
    await a.send_file(make_file("memory", b", that is all"))
    await a.close()
    assert await b.recv_exactly(19 + length) == b"header" + content + b", that is all"
    if layer == "tls":
        with pytest.raises(TLSError, match="close_notify"):
            await b.recv()
    else:
        assert await b.recv() == b""


@pytest.mark.parametrize("offset", [2**40, 2**62, 2**63 - 1])
async def test_an_offset_beyond_the_end_raises_eoferror(
    offset: int, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    with pytest.raises(EOFError, match="after 0 of 6"):
        await a.send_file(make_file("file", CONTENT), offset, 6)
    await a.send(b"goes on")
    assert await b.recv() == b"goes on"


@pytest.mark.parametrize("layer", ["tls"])
async def test_stoptls_fails_after_a_short_file(a: Socket, b: Socket, make_file: MakeFile) -> None:
    with pytest.raises(EOFError):
        await a.send_file(make_file("memory", b"12345"), count=6)
    with pytest.raises(TLSError, match="a file was sent only in part"):
        await a.stoptls()
    assert not a.isopen()
    assert await b.recv_exactly(5) == b"12345"
    with pytest.raises(TLSError, match="close_notify"):
        await b.recv()


@SMALL
@ALL_LAYERS
@pytest.mark.parametrize("counted", [True, False])
async def test_a_shrinking_file_is_sent_up_to_its_new_end(
    counted: bool, layer: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    size = len(CONTENT)
    file = make_file("file", CONTENT)
    progress = [0]

    async def send() -> None:
        if counted:
            with pytest.raises(EOFError) as caught:
                await a.send_file(file, count=size, progress=progress.append)
            assert f"ended after {end} of {size} bytes" in str(caught.value)
        else:
            assert await a.send_file(file, progress=progress.append) == end

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await until_full(a)
        # The new end lies beyond all bytes that were read, even if a chunk was read ahead.
        end = progress[-1] + 2 * _send_file.FILE_CHUNK + 1000
        assert end < size
        os.truncate(file.name, end)
        assert await b.recv_exactly(end) == CONTENT[:end]
    assert progress[-1] == end
    # The connection is intact.
    await a.send(b"go on")
    assert await b.recv_exactly(5) == b"go on"


@SMALL
@pytest.mark.parametrize("layer", ["tls"])
async def test_no_close_notify_follows_a_file_that_shrank(
    a: Socket, b: Socket, make_file: MakeFile
) -> None:
    file = make_file("file", CONTENT)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_file, file)
        await until_full(a)
        os.truncate(file.name, 2 * MIB)
        assert await b.recv_exactly(2 * MIB) == CONTENT[: 2 * MIB]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.close)
        with pytest.raises(TLSError, match="close_notify"):
            await b.recv()


@pytest.mark.parametrize("layer", ["plain", "tls"])
@pytest.mark.parametrize("kind", ["file", "memory", "gzip", "custom", "pipe", "proc"])
async def test_a_clean_eof_follows_a_whole_file(
    kind: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    content = {"proc": Path("/proc/version").read_bytes(), "pipe": CONTENT[:1000]}.get(
        kind, CONTENT
    )

    async def send() -> None:
        # A file in /proc reports a size of 0.
        with open("/proc/version", "rb") if kind == "proc" else make_file(kind, content) as file:
            assert await a.send_file(file) == len(content)
        await a.close()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        assert await read_all(b) == content


# ---- sends that are cut short ----


@PLAIN_LAYERS
@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_send_fails_after_cancellation_has_cut_a_file_short(
    kind: str, a: Socket, make_file: MakeFile
) -> None:
    file = make_file(kind, bytes(50_000_000))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(a.send_file, file)
        await until_full(a)
        nursery.cancel_scope.cancel()
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.send(b"y")


@PLAIN_LAYERS
@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_send_fails_after_a_progress_callback_has_raised(
    kind: str, a: Socket, make_file: MakeFile
) -> None:
    with pytest.raises(ZeroDivisionError):
        await a.send_file(make_file(kind, b"content"), progress=lambda sent: 1 // (sent - 7))
    with pytest.raises(trio.BrokenResourceError, match="cut short"):
        await a.send(b"y")


# ---- peers that leave ----


@SMALL
@pytest.mark.parametrize(
    ("kind", "layer"),
    [("file", "plain"), ("file", "no sendfile"), ("file", "tls"), ("memory", "plain")],
)
async def test_the_error_counts_the_bytes_sent_before_the_peer_left(
    kind: str, layer: str, a: Socket, b: Socket, make_file: MakeFile
) -> None:
    size = 8 * MIB
    file = make_file(kind, bytes(size))
    progress = [0]

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError) as caught:
            await a.send_file(file, 1000, progress=progress.append)
        message = str(caught.value)
        match = re.search(r"after (\d+) bytes of the file$", message)
        assert match, message
        number = int(match[1])
        assert number == progress[-1]
        assert 0 < number < size
        if (kind, layer) != ("file", "plain"):
            assert number % _send_file.FILE_CHUNK == 0
        assert caught.value.__cause__ is not None
        assert message.startswith(str(caught.value.__cause__))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await b.recv_exactly(MIB)
        await until_full(a)
        b.abort()
    with pytest.raises(trio.BrokenResourceError):
        await a.send(b"x")


@ALL_LAYERS
async def test_send_file_to_a_peer_that_left_reports_0_bytes(
    a: Socket, b: Socket, make_file: MakeFile
) -> None:
    file = make_file("unbuffered", b"content")
    b.abort()
    await trio.lowlevel.wait_readable(a.fileno())  # the reset has arrived
    for _ in range(2):
        with pytest.raises(trio.BrokenResourceError, match=r"after 0 bytes of the file$"):
            await a.send_file(file)


@PLAIN_LAYERS
async def test_a_response_can_be_read_after_a_failed_send_file(
    a: Socket, b: Socket, large_file: Any
) -> None:
    await b.send(b"413 too large\r\n")

    async def send() -> None:
        with pytest.raises(trio.BrokenResourceError, match=r"bytes of the file$"):
            await a.send_file(large_file)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await until_full(a)
        b.stream.socket.close()  # data is unread, so the kernel sends a reset
    assert await a.recv() == b"413 too large\r\n"


@pytest.mark.parametrize("peer", ["trisock", "ssl"])
async def test_an_alert_during_send_file_is_a_tls_error(
    peer: str, a: Socket, b: Socket, authority: Authority, large_file: Any
) -> None:
    """A TLS 1.3 client completes its handshake before the server can refuse the client."""
    server_tls = authority.server_tls(
        "example.org", client_ca=authority.ca, require_client_certificate=True
    )

    async def refuse() -> None:
        if peer == "trisock":
            with pytest.raises(TLSError, match="sent no certificate"):
                await b.starttls(server_tls)
            return
        with socket.socket(fileno=b.stream.socket.detach()) as raw:
            raw.setblocking(True)
            server = RawTLS(raw, server_tls._context(), server_side=True)
            with pytest.raises(ssl.SSLError):
                await trio.to_thread.run_sync(server.run, server.ssl.do_handshake)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(refuse)
        await a.starttls(authority.client_tls("example.org"))
        await trio.lowlevel.wait_readable(a.fileno())
    words = r"'certificate required' .*, after \d+ bytes of the file$"
    with pytest.raises(TLSError, match=words) as caught:
        await a.send_file(large_file)
    assert caught.value.reason == "TLSV13_ALERT_CERTIFICATE_REQUIRED"


async def test_an_aborted_download_is_not_a_handler_error(large_file: Any) -> None:
    async def handler(sock: Socket) -> None:
        await sock.send_file(large_file)

    async with serving(handler) as s:
        client = await s.connect()
        await client.recv_exactly(1000)
        client.abort()
