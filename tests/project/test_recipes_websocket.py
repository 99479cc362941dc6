"""The recipes websocket_server and websocket_client."""

from __future__ import annotations

import functools
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_websocket
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketRequest

import trisock
from helpers.examples import command, load, running
from helpers.pairs import all_served, read_all
from helpers.programs import run
from helpers.server import bound, logged
from trisock import ClientTLS, ServerTLS, Socket

handle = load("websocket_server").handle
recipe = load("websocket_client")

KEY = b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
UPGRADE = (
    b"GET / HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    + KEY
    + b"Sec-WebSocket-Version: 13\r\n\r\n"
)


def raises_alone(error: type[Exception], check: Callable[[Any], bool] = lambda _: True) -> Any:
    """Expect exactly one exception, in an exception group."""
    return pytest.RaisesGroup(pytest.RaisesExc(error, check=check), flatten_subgroups=True)


@pytest.fixture(params=["plain", "tls"])
def roles(
    request: pytest.FixtureRequest, client_tls: ClientTLS, server_tls: ServerTLS
) -> tuple[ClientTLS | None, ServerTLS | None]:
    return (client_tls, server_tls) if request.param == "tls" else (None, None)


@pytest.fixture
def stopping() -> trio.Event:
    return trio.Event()


@pytest.fixture
async def server(
    roles: tuple[ClientTLS | None, ServerTLS | None], stopping: trio.Event
) -> AsyncIterator[trisock.Server]:
    handler = functools.partial(handle, stopping)
    async with bound(handler, host="127.0.0.1", tls=roles[1]) as server:
        yield server


@pytest.fixture
async def sock(server: trisock.Server, roles: tuple[ClientTLS | None, ServerTLS | None]) -> Socket:
    return await trisock.connect("127.0.0.1", server.port, tls=roles[0])


async def test_every_kind_of_message_comes_back(sock: Socket) -> None:
    messages = ["", "gr\u00fc\u00df dich", b"", bytes(range(256)) * 1000]
    async with recipe.websocket_over(sock, "example.org", "/chat") as websocket:
        for message in messages:
            await websocket.send_message(message)
            assert await websocket.get_message() == message
        await websocket.ping()
    assert not sock.isopen()


async def test_many_messages_may_be_in_flight(sock: Socket) -> None:
    async with recipe.websocket_over(sock, "example.org", "/") as websocket:
        async with trio.open_nursery() as nursery:

            async def send() -> None:
                for number in range(1000):
                    await websocket.send_message(f"message {number}")

            nursery.start_soon(send)
            for number in range(1000):
                assert await websocket.get_message() == f"message {number}"


async def test_the_client_closes_the_websocket_cleanly(
    client_tls: ClientTLS, server_tls: ServerTLS
) -> None:
    reasons = []

    async def note_the_reason(request: WebSocketRequest) -> None:
        websocket = await request.accept()
        with pytest.raises(ConnectionClosed) as caught:
            await websocket.get_message()
        reasons.append(caught.value.reason.code)

    async with trio.open_nursery() as nursery:
        server = await nursery.start(
            trio_websocket.serve_websocket, note_the_reason, "127.0.0.1", 0, None
        )
        sock = await trisock.connect("127.0.0.1", server.port)
        async with recipe.websocket_over(sock, "example.org", "/"):
            pass
        while not reasons:
            await trio.lowlevel.checkpoint()
        nursery.cancel_scope.cancel()
    assert reasons == [1000]


async def test_the_client_of_trio_websocket_talks_to_the_server(stopping: trio.Event) -> None:
    handler = functools.partial(handle, stopping)
    async with bound(handler, host="127.0.0.1") as server:
        url = f"ws://127.0.0.1:{server.port}/"
        async with trio_websocket.open_websocket_url(url) as websocket:
            await websocket.send_message("hello")
            assert await websocket.get_message() == "hello"


async def test_a_stopping_server_closes_websockets_with_code_1001(
    sock: Socket, stopping: trio.Event
) -> None:
    with raises_alone(ConnectionClosed, lambda exc: exc.reason.code == 1001):
        async with recipe.websocket_over(sock, "example.org", "/") as websocket:
            stopping.set()
            await websocket.get_message()


async def test_a_message_over_the_limit_closes_the_websocket(
    sock: Socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "MAX_MESSAGE", 2**30)  # the client's limit, not the server's
    with raises_alone(ConnectionClosed, lambda exc: exc.reason.code == 1009):
        async with recipe.websocket_over(sock, "example.org", "/") as websocket:
            await websocket.send_message(b"x" * (1024 * 1024 + 1))
            await websocket.get_message()


async def test_a_refusal_raises_connection_rejected() -> None:
    async def refuse(sock: Socket) -> None:
        await sock.recv_until(b"\r\n\r\n")
        await sock.send(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    async with bound(refuse, host="127.0.0.1") as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        with raises_alone(ConnectionRejected, lambda exc: exc.status_code == 403):
            async with recipe.websocket_over(sock, "example.org", "/"):
                raise AssertionError("the client opened a WebSocket despite the refusal")
    assert not sock.isopen()


@pytest.mark.parametrize("beginning", [b"", b"HTTP/1.1 101 Swi"])
async def test_a_missing_or_incomplete_response_raises_too_slow_error(
    beginning: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "TIMEOUT", 0.1)

    async def hang_up(sock: Socket) -> None:
        await sock.recv_until(b"\r\n\r\n")
        await sock.send(beginning)

    async with bound(hang_up, host="127.0.0.1") as server:
        sock = await trisock.connect("127.0.0.1", server.port)
        with raises_alone(trio.TooSlowError):
            async with recipe.websocket_over(sock, "example.org", "/"):
                pass
    assert not sock.isopen()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the handshake timeout of the server that is started next."""
    monkeypatch.setitem(handle.__globals__, "HANDSHAKE_TIMEOUT", 0.1)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("leave", ["close", "abort"])
@pytest.mark.parametrize(
    "sent",
    [
        b"",
        b"GET / HT",
        b"SSH-2.0-OpenSSH\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        UPGRADE.replace(KEY, b""),
        UPGRADE,
        UPGRADE + b"\x81\x85",
        UPGRADE + b"\xff" * 50,
        UPGRADE + b"\x88\x80\x00\x00\x00\x00",
    ],
)
async def test_hostile_clients_end_only_their_own_connection(
    sent: bytes,
    leave: str,
    server: trisock.Server,
    sock: Socket,
    caplog: pytest.LogCaptureFixture,
) -> None:
    await sock.send(sent)
    if leave == "close":
        async with sock:
            if not sock.istls():
                await sock.send_eof()
                await read_all(sock)
    else:
        sock.abort()
    await all_served(server, 1)
    assert not logged(caplog, logging.ERROR)


async def test_the_client_program_talks_to_the_server_program(
    pem: Path,
) -> None:
    options = ["--cert", f"{pem}/chain.pem", "--key", f"{pem}/key.pem"]
    async with running("websocket_server", *options) as server:
        url = f"wss://localhost:{server.port}/path?a=b"
        result = await run(
            *command("websocket_client", "--ca", f"{pem}/ca.pem", url, "one", "gr\u00fc\u00df")
        )
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout.decode().splitlines() == ["one", "gr\u00fc\u00df"]


async def test_the_client_program_reports_a_refusal_in_one_line() -> None:
    async with running("http_and_https") as server:
        result = await run(*command("websocket_client", f"ws://127.0.0.1:{server.port}/", "one"))
    assert (result.returncode, result.stdout) == (1, b"")
    assert result.stderr.decode() == "the server refused to open a WebSocket: status 200\n"
