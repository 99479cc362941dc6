"""The recipe h11_client."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import h11
import pytest
import trio

import trisock
from helpers.examples import command, load, running
from helpers.programs import run
from helpers.server import bound
from helpers.shared_examples import SharedServer
from trisock import ClientTLS, ServerTLS, Socket

recipe = load("h11_client")

OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n7;x=y\r\n, world\r\n0\r\n\r\n"
CHUNKED_WITH_TRAILERS = CHUNKED.removesuffix(b"\r\n") + b"X-Sum: 1\r\n\r\n"
WITH_LENGTH = OK + b"Content-Length: 12\r\n\r\nhello, world"
UNTIL_EOF = OK + b"\r\nhello, world"
AFTER_100 = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\n\r\n" + WITH_LENGTH


@asynccontextmanager
async def talking(
    *answers: bytes, piece: int = 100_000, tls: tuple[ClientTLS, ServerTLS] | None = None
) -> AsyncIterator[tuple[Any, list[bytes]]]:
    """Connect to a server that gives each request the next answer, in pieces, and then closes.

    Yields the client's connection, and the requests that the server has received.
    """
    requests: list[bytes] = []

    async def respond(sock: Socket) -> None:
        with contextlib.suppress(trio.BrokenResourceError, trisock.IncompleteReadError):
            for answer in answers:
                requests.append(await sock.recv_until(b"\r\n\r\n"))
                for start in range(0, len(answer), piece):
                    await sock.send(answer[start : start + piece])
                    await trio.lowlevel.checkpoint()

    client_tls, server_tls = tls or (None, None)
    async with bound(respond, host="127.0.0.1", tls=server_tls) as server:
        async with await trisock.connect("127.0.0.1", server.port, tls=client_tls) as sock:
            yield recipe.HTTPConnection(sock, "example.org"), requests


@pytest.mark.parametrize("piece", [1, 7, 100_000])
@pytest.mark.parametrize(
    "answer", [CHUNKED, CHUNKED_WITH_TRAILERS, WITH_LENGTH, UNTIL_EOF, AFTER_100]
)
async def test_a_body_is_read_however_its_length_is_given(answer: bytes, piece: int) -> None:
    async with talking(answer, piece=piece) as (connection, requests):
        response, body = await connection.get("/path?a=b")
        assert (response.status_code, body) == (200, b"hello, world")
        assert requests == [b"GET /path?a=b HTTP/1.1\r\nHost: example.org\r\n\r\n"]
        assert connection.reusable == (answer != UNTIL_EOF)


async def test_requests_follow_each_other_on_one_connection(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    answers = [CHUNKED, WITH_LENGTH, CHUNKED]
    async with talking(*answers, tls=(client_tls, server_tls)) as (connection, requests):
        for _ in answers:
            assert connection.reusable
            _, body = await connection.get("/")
            assert body == b"hello, world"
        assert len(requests) == 3


async def test_a_connection_that_the_server_ends_is_not_reusable() -> None:
    answer = WITH_LENGTH.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    async with talking(answer) as (connection, _):
        await connection.get("/")
        assert not connection.reusable
        with pytest.raises(h11.LocalProtocolError):
            await connection.get("/")


async def test_bytes_after_a_response_make_the_connection_unusable() -> None:
    async with talking(WITH_LENGTH + OK) as (connection, _):
        await connection.get("/")
        assert not connection.reusable


@pytest.mark.parametrize("answer", [CHUNKED[:-1], WITH_LENGTH[:-1]])
async def test_a_body_that_is_cut_short_is_an_error(answer: bytes) -> None:
    async with talking(answer) as (connection, _):
        with pytest.raises(h11.RemoteProtocolError):
            await connection.get("/")
        assert not connection.reusable


async def test_tls_that_is_cut_short_does_not_end_a_body(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    async def cut_short(sock: Socket) -> None:
        await sock.recv_until(b"\r\n\r\n")
        await sock.send(UNTIL_EOF)
        await sock.stream.send_eof()  # an attacker's FIN: no close_notify

    async with bound(cut_short, host="127.0.0.1", tls=server_tls) as server:
        sock = await trisock.connect("127.0.0.1", server.port, tls=client_tls)
        async with sock:
            with pytest.raises(trisock.TLSError):
                await recipe.HTTPConnection(sock, "example.org").get("/")


async def test_a_server_that_closed_before_its_response_is_an_eof_error() -> None:
    async with talking(WITH_LENGTH) as (connection, _):
        await connection.get("/")
        with pytest.raises((EOFError, trio.BrokenResourceError)):
            await connection.get("/")
    for answer in (b"", b"HTTP/1.1 2", OK):
        async with talking(answer) as (connection, _):
            with pytest.raises(EOFError):
                await connection.get("/")
            assert not connection.reusable


@pytest.mark.parametrize(
    "endless",
    [
        lambda: OK + b"Content-Length: 1000000\r\n\r\n" + b"x" * 1001,
        lambda: OK + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 1001,
        lambda: OK + b"\r\n" + b"x" * 1001,
    ],
)
async def test_a_body_over_the_limit_is_an_error(
    endless: Callable[[], bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "MAX_BODY", 1000)
    async with talking(endless()) as (connection, _):
        with pytest.raises(ValueError, match="more than 1000 bytes"):
            await connection.get("/")


async def test_an_endless_header_is_an_error() -> None:
    async with talking(OK + b"X: y\r\n" * 100_000) as (connection, _):
        with pytest.raises(h11.RemoteProtocolError):
            await connection.get("/")


async def test_the_program_fetches_pages_over_one_connection(https: SharedServer) -> None:
    url = f"https://localhost:{https.port}/one?a=b#c"
    result = await run(*command("h11_client", "--ca", https.ca, url, "/two", "/three"))
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().splitlines() == [
        line
        for target in ("/one?a=b", "/two", "/three")
        for line in ("200 OK", f"Hello! You asked for {target}")
    ]


async def test_the_program_connects_again_where_the_server_closes() -> None:
    async with running("http_and_https") as server:
        result = await run(*command("h11_client", f"http://127.0.0.1:{server.port}", "/two"))
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == b"200 OK\nHTTP, unencrypted\n" * 2


@pytest.mark.parametrize("answer", [b"", WITH_LENGTH[:-1], b"SSH-2.0\r\n\r\n"])
async def test_the_program_reports_a_bad_response_in_one_line(answer: bytes) -> None:
    async def respond(sock: Socket) -> None:
        await sock.recv_until(b"\r\n\r\n")
        await sock.send(answer)

    async with bound(respond, host="127.0.0.1") as server:
        result = await run(*command("h11_client", f"http://127.0.0.1:{server.port}/"))
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.count(b"\n") == 1  # no traceback
