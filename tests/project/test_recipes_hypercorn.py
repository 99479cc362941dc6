"""The recipe hypercorn_server."""

from __future__ import annotations

import functools
import logging
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
import trio_websocket
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.utils import wrap_app

import trisock
from helpers.examples import command, load, running, started
from helpers.pairs import all_served, read_all
from helpers.programs import curl
from helpers.server import bound, logged
from trisock import ClientTLS, ServerTLS, Socket

recipe = load("hypercorn_server")
websocket_over = load("websocket_client").websocket_over

Roles = tuple[ClientTLS | None, ServerTLS | None]

GET = b"GET /path HTTP/1.1\r\nHost: x\r\n\r\n"


@pytest.fixture(params=["plain", "tls"])
def roles(request: pytest.FixtureRequest, client_tls: ClientTLS, server_tls: ServerTLS) -> Roles:
    return (client_tls, server_tls) if request.param == "tls" else (None, None)


@asynccontextmanager
async def hosting(
    app: Any, roles: Roles, config: Config | None = None
) -> AsyncIterator[tuple[trisock.Server, WorkerContext]]:
    """Serve an ASGI application without a lifespan."""
    context = WorkerContext(None)
    config = config or Config()
    handler = functools.partial(recipe.handle, wrap_app(app, 1000, "asgi"), config, context, {})
    async with bound(handler, host="127.0.0.1", tls=roles[1]) as server:
        yield server, context
        await context.terminated.set()


async def connect(server: trisock.Server, roles: Roles) -> Socket:
    return await trisock.connect("127.0.0.1", server.port, tls=roles[0])


async def read_response(sock: Socket) -> bytes:
    head = await sock.recv_until(b"\r\n\r\n")
    fields = dict(line.lower().split(b": ") for line in head.splitlines()[1:-1])
    return await sock.recv_exactly(int(fields[b"content-length"]))


async def test_requests_follow_each_other_on_one_connection(roles: Roles) -> None:
    async with hosting(recipe.hello, roles) as (server, _):
        async with await connect(server, roles) as sock:
            for _ in range(3):
                await sock.send(GET)
                body = await read_response(sock)
                assert body == b"Hello! You asked for /path over HTTP/1.1\n"
        assert server.stats().accepted == 1


async def test_the_application_learns_addresses_and_scheme(roles: Roles) -> None:
    scopes = []

    async def note_the_scope(scope: Any, receive: Any, send: Any) -> None:
        scopes.append(scope)
        await recipe.hello(scope, receive, send)

    async with hosting(note_the_scope, roles) as (server, _):
        async with await connect(server, roles) as sock:
            await sock.send(GET)
            await read_response(sock)
            assert scopes[0]["client"] == tuple(sock.getlocal())
            assert scopes[0]["server"] == ("127.0.0.1", server.port)
            assert scopes[0]["scheme"] == ("https" if sock.istls() else "http")


async def echo_body(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    more = True
    while more:
        event = await receive()
        more = event.get("more_body", False)
        await send({"type": "http.response.body", "body": event["body"], "more_body": more})


@pytest.mark.needs("curl")
async def test_a_large_body_goes_both_ways() -> None:
    sent = bytes(range(256)) * 4000
    async with hosting(echo_body, (None, None)) as (server, _):
        url = f"http://127.0.0.1:{server.port}/"
        result = await curl("--data-binary", "@-", url, stdin=sent)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == sent


async def echo_websocket(scope: Any, receive: Any, send: Any) -> None:
    assert (await receive())["type"] == "websocket.connect"
    await send({"type": "websocket.accept"})
    while (event := await receive())["type"] == "websocket.receive":
        await send({"type": "websocket.send", "text": event["text"]})


async def test_a_websocket_works(roles: Roles) -> None:
    async with hosting(echo_websocket, roles) as (server, _):
        sock = await connect(server, roles)
        async with websocket_over(sock, "example.org", "/") as websocket:
            await websocket.send_message("hello")
            assert await websocket.get_message() == "hello"


@pytest.mark.parametrize("leave", [Socket.close, Socket.abort])
@pytest.mark.parametrize("sent", [b"", b"GET / HT", b"SSH-2.0\r\n\r\n", GET, GET * 10])
async def test_a_vanished_client_ends_only_its_own_connection(
    roles: Roles, sent: bytes, leave: Any, caplog: pytest.LogCaptureFixture
) -> None:
    config = Config()
    config.keep_alive_timeout = 0.1  # hypercorn waits this long after a client leaves
    async with hosting(recipe.hello, roles, config) as (server, _):
        sock = await connect(server, roles)
        await sock.send(sent)
        if (ending := leave(sock)) is not None:
            await ending
        await all_served(server, 1)
        async with await connect(server, roles) as sock:
            await sock.send(GET)
            await read_response(sock)
    assert not logged(caplog, logging.ERROR)


async def test_stopping_closes_idle_connections_immediately(roles: Roles) -> None:
    async with hosting(recipe.hello, roles) as (server, context):
        async with await connect(server, roles) as sock:
            await sock.send(GET)
            await read_response(sock)
            async with trio.open_nursery() as nursery:
                server.stop(grace=600)
                nursery.start_soon(recipe.finish, server, context, 600)
                assert await read_all(sock) == b""


async def test_stopping_ends_a_send_that_is_stuck(roles: Roles) -> None:
    sending = trio.Event()

    async def send_much(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        sending.set()
        await send({"type": "http.response.body", "body": b"x" * 50_000_000})

    async with hosting(send_much, roles) as (server, context):
        async with await connect(server, roles) as sock:
            await sock.send(GET)
            await sending.wait()
            server.stop(grace=0.1)
            await recipe.finish(server, context, 0.1)
            await server.wait_closed()
            with pytest.raises(trio.BrokenResourceError):
                await read_all(sock)


@pytest.mark.needs("curl")
@pytest.mark.parametrize("version", ["1.1", "2"])
async def test_alpn_selects_the_http_version(pem: Path, version: str) -> None:
    options = ["--cert", f"{pem}/chain.pem", "--key", f"{pem}/key.pem"]
    async with running("hypercorn_server", *options) as server:
        result = await curl(
            "--cacert", f"{pem}/ca.pem", f"--http{version}",
            "--write-out", "%{http_version} %{num_connects}\n",
            f"https://localhost:{server.port}/one", f"https://localhost:{server.port}/two",
        )  # fmt: skip
    assert result.returncode == 0
    assert result.stdout.decode().splitlines() == [
        f"Hello! You asked for /one over HTTP/{version}",
        f"{version} 1",
        f"Hello! You asked for /two over HTTP/{version}",
        f"{version} 0",
    ]


APP = """
import trio

async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        await receive()
        scope["state"]["text"] = b"from the startup"
        await send({"type": "lifespan.startup.complete"})
        await receive()
        print("shutdown", flush=True)
        await send({"type": "lifespan.shutdown.complete"})
    else:
        print("request", flush=True)
        await trio.sleep(0.2)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": scope["state"]["text"]})
"""


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_the_users_application_finishes_its_requests(
    tmp_path: Path, signum: signal.Signals
) -> None:
    (tmp_path / "own.py").write_text(APP)
    program = command("hypercorn_server", "--port", "0", "--app", "own:app")
    async with started(program, cwd=tmp_path) as server:
        port = int((await server.line()).split()[-1])
        async with await trisock.connect("127.0.0.1", port) as sock:
            await sock.send(GET)
            assert await server.line() == "request"
            server.ask_to_stop(signum)
            assert b"from the startup" in await read_all(sock)
        assert await server.line() == "shutdown"
        await server.stop()


async def test_the_programs_default_application_refuses_a_websocket() -> None:
    async with hosting(recipe.hello, (None, None)) as (server, _):
        sock = await trisock.connect("127.0.0.1", server.port)
        with pytest.RaisesGroup(trio_websocket.ConnectionRejected, flatten_subgroups=True):
            async with websocket_over(sock, "example.org", "/"):
                pass
