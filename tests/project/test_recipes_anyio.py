"""The recipe anyio_stream."""

from __future__ import annotations

import ast
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import trio
import trio.testing
from anyio.abc import SocketAttribute
from anyio.streams.buffered import BufferedByteReceiveStream
from anyio.streams.text import TextReceiveStream
from anyio.streams.tls import TLSAttribute, TLSStream

import trisock
from helpers.blocked import cancel_when_blocked
from helpers.examples import EXAMPLES, command, load, running
from helpers.pairs import closing
from helpers.programs import run
from helpers.server import bound, echo
from trisock import ServerTLS, Socket
from trisock.testing import socket_pair

recipe = load("anyio_stream")
AnyIOStream = recipe.AnyIOStream


@pytest.fixture(params=["plain", "tls"])
async def ends(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Socket, Socket]]:
    a, b = await socket_pair(tls=request.param == "tls")
    async with closing(a, b):
        yield a, b


def test_the_adapter_has_at_most_fifteen_lines() -> None:
    source = (EXAMPLES / "anyio_stream.py").read_text()
    (found,) = [
        ast.get_source_segment(source, node)
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef)
    ]
    assert found
    assert len([line for line in found.splitlines() if line.strip()]) <= 15


async def test_bytes_go_both_ways_and_then_the_stream_ends(a: Socket, b: Socket) -> None:
    stream = AnyIOStream(a)
    await stream.send(b"to the peer")
    assert await b.recv() == b"to the peer"
    await b.send(b"from the peer")
    assert await stream.receive(4) == b"from"
    assert await stream.receive() == b" the peer"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.close)
        for _ in range(2):
            with pytest.raises(anyio.EndOfStream):
                await stream.receive()
        await stream.aclose()


async def test_iteration_ends_at_the_end_of_the_stream(a: Socket, b: Socket) -> None:
    await b.send("gr\u00fc\u00df dich".encode())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(b.close)
        assert (
            "".join([text async for text in TextReceiveStream(AnyIOStream(a))])
            == "gr\u00fc\u00df dich"
        )
        await a.close()


async def test_buffered_streams_find_delimiters(a: Socket, b: Socket) -> None:
    await b.send(b"one\r\ntwo\r\nrest")
    buffered = BufferedByteReceiveStream(AnyIOStream(a))
    assert await buffered.receive_until(b"\r\n", 100) == b"one"
    assert await buffered.receive_until(b"\r\n", 100) == b"two"
    assert await buffered.receive_exactly(4) == b"rest"


async def test_send_eof_ends_one_direction(a: Socket, b: Socket) -> None:
    if a.istls():
        with pytest.raises(NotImplementedError):
            await AnyIOStream(a).send_eof()
        return
    await AnyIOStream(a).send_eof()
    assert await b.recv() == b""
    await b.send(b"still open")
    assert await AnyIOStream(a).receive() == b"still open"


async def test_failures_are_exceptions_of_anyio(a: Socket, b: Socket) -> None:
    stream = AnyIOStream(a)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(raises, anyio.ClosedResourceError, stream.receive)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(anyio.BusyResourceError):
            await stream.receive()
        await stream.aclose()
    for call in (stream.receive, lambda: stream.send(b"x"), stream.send_eof):
        await raises(anyio.ClosedResourceError, call)
    peer = AnyIOStream(b)
    a.abort()
    with pytest.raises((anyio.BrokenResourceError, anyio.EndOfStream)):
        await peer.receive()


async def raises(error: type[Exception], call: Any) -> None:
    with pytest.raises(error):
        await call()


async def test_a_reset_is_a_broken_resource(a: Socket, b: Socket) -> None:
    b.abort()
    await raises(anyio.BrokenResourceError, AnyIOStream(a).receive)
    await raises(anyio.BrokenResourceError, lambda: AnyIOStream(a).send(b"x"))


async def test_a_cancelled_receive_loses_nothing(a: Socket, b: Socket) -> None:
    await cancel_when_blocked(AnyIOStream(a).receive)
    await b.send(b"later")
    assert await AnyIOStream(a).receive() == b"later"


async def test_invalid_arguments_keep_their_exceptions(a: Socket, b: Socket) -> None:
    await b.send(b"x")
    await raises(ValueError, lambda: AnyIOStream(a).receive(0))


async def test_attributes_tell_addresses_and_tls(a: Socket, b: Socket) -> None:
    stream = AnyIOStream(a)
    assert stream.extra(SocketAttribute.family) == socket.AF_INET
    assert stream.extra(SocketAttribute.remote_address) == ("127.0.0.1", a.getpeer().port)
    assert stream.extra(SocketAttribute.local_address) == ("127.0.0.1", a.getlocal().port)
    assert stream.extra(SocketAttribute.remote_port) == a.getpeer().port
    assert stream.extra(SocketAttribute.local_port) == a.getlocal().port
    if a.tls:
        assert stream.extra(TLSAttribute.tls_version) == a.tls.version
        assert stream.extra(TLSAttribute.alpn_protocol) is None
        assert stream.extra(TLSAttribute.peer_certificate_binary) == a.tls.peer_certificate
    else:
        with pytest.raises(anyio.TypedAttributeLookupError):
            stream.extra(TLSAttribute.tls_version)


async def test_the_address_of_a_unix_socket_is_a_path(tmp_path: Path) -> None:
    path = str(tmp_path / "socket")
    async with await trisock.listen_unix(path) as listener:
        async with await trisock.connect_unix(path) as sock, await listener.accept():
            stream = AnyIOStream(sock)
            assert stream.extra(SocketAttribute.remote_address) == path
            assert stream.extra(SocketAttribute.remote_port, None) is None


async def test_anyios_tls_runs_over_the_stream(authority: Any, server_tls: ServerTLS) -> None:
    context = ssl.create_default_context(cadata=authority.ca.decode())
    async with bound(echo, host="127.0.0.1", tls=server_tls) as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        tls = await TLSStream.wrap(AnyIOStream(sock), hostname="localhost", ssl_context=context)
        async with tls:
            for size in (1, 100_000, 1_000_000):
                async with anyio.create_task_group() as group:
                    group.start_soon(tls.send, b"x" * size)
                    received = b""
                    while len(received) < size:
                        received += await tls.receive()
                assert received == b"x" * size
            assert tls.extra(SocketAttribute.remote_port) == server.port


def test_anyio_run_works_with_the_trio_backend() -> None:
    async def main() -> None:
        async with bound(echo, host="127.0.0.1") as server:
            async with AnyIOStream(await trisock.connect("127.0.0.1", server.port)) as stream:
                with anyio.fail_after(30):
                    await stream.send(b"hello")
                    assert await stream.receive() == b"hello"

    anyio.run(main, backend="trio")


async def test_the_program_prints_the_answers() -> None:
    async with running("echo_server") as server:
        result = await run(*command("anyio_stream", "--port", str(server.port), "one", "two"))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one\ntwo\n", b"")


async def test_the_program_reports_a_server_that_hangs_up() -> None:
    async def hang_up(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError):
            await sock.recv()

    async with bound(hang_up, host="127.0.0.1") as server:
        result = await run(*command("anyio_stream", "--port", str(server.port), "one"))
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.count(b"\n") == 1  # no traceback
