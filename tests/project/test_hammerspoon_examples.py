"""The examples of trisock.hammerspoon, run as programs."""

from __future__ import annotations

import signal

import pytest

import trisock
from helpers.examples import command, running
from helpers.pairs import closing
from helpers.programs import run
from trisock.testing import serving

HEADER = "HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\n"


async def get(answer: bytes) -> tuple[bytes, str]:
    """Run the HTTP client. Its server sends ``answer``. Return the client's request and output."""
    requests = []

    async def handler(sock: trisock.Socket) -> None:
        requests.append(await sock.recv_until(b"\r\n\r\n"))
        await sock.send(answer)

    async with serving(handler) as s:
        result = await run(*command("hammerspoon_http_client", "127.0.0.1", str(s.server.port)))
    assert (result.returncode, result.stderr) == (0, b"")
    [request] = requests
    return request, result.stdout.decode()


async def test_http_client_prints_the_header_and_the_body() -> None:
    request, printed = await get(HEADER.encode() + b"<html>\nhello\n\n")
    assert request == b"GET /index.html HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
    assert printed == f"1 TAG_HTTP_HEADER\n{HEADER}\n2 TAG_HTTP_CONTENT\n<html>\nhello\n\n\n"


async def test_http_client_prints_a_header_without_content_length() -> None:
    header = "HTTP/1.0 204 No Content\r\n\r\n"
    _, printed = await get(header.encode())
    assert printed == f"1 TAG_HTTP_HEADER\n{header}\n"


@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        ("", ""),
        ("HTTP/1.0", ""),
        (HEADER + "too short", f"1 TAG_HTTP_HEADER\n{HEADER}\n"),
    ],
)
async def test_http_client_exits_when_the_connection_ends(answer: str, printed: str) -> None:
    assert (await get(answer.encode()))[1] == printed


async def test_server_greets_clients_and_sends_each_line_to_all() -> None:
    async with running("hammerspoon_server") as server:
        one = await trisock.connect("127.0.0.1", server.port)
        async with closing(one):
            assert await one.recv_until(b"\n") == b"* hello, 1 online\r\n"
            two = await trisock.connect("127.0.0.1", server.port)
            async with closing(two):
                for client in (one, two):
                    assert await client.recv_until(b"\n") == b"* hello, 2 online\r\n"
                for number in range(3):
                    for speaker in (two, one):
                        await speaker.send(b"line %d\r\n" % number)
                        for client in (one, two):
                            assert await client.recv_until(b"\n") == b"> line %d\r\n" % number


async def test_server_continues_when_a_client_leaves() -> None:
    async with running("hammerspoon_server") as server:
        stays = await trisock.connect("127.0.0.1", server.port)
        async with closing(stays):
            assert await stays.recv_until(b"\n") == b"* hello, 1 online\r\n"
            for _ in range(2):
                leaves = await trisock.connect("127.0.0.1", server.port)
                async with closing(leaves):
                    for client in (stays, leaves):
                        assert await client.recv_until(b"\n") == b"* hello, 2 online\r\n"
                    await leaves.send(b"and goodbye\n")
                    await leaves.send_eof()
                    assert await leaves.recv_until(b"\n") == b"> and goodbye\n"
                    assert await leaves.recv() == b""
                assert await stays.recv_until(b"\n") == b"> and goodbye\n"
                assert await stays.recv_until(b"\n") == b"* hello, 1 online\r\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_server_and_ends_its_connections(signum: signal.Signals) -> None:
    async with running("hammerspoon_server") as server:
        client = await trisock.connect("127.0.0.1", server.port)
        async with closing(client):
            await client.recv_until(b"\n")
            server.ask_to_stop(signum)
            await server.stop()
            assert await client.recv() == b""
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", server.port)


async def test_server_reports_a_port_in_use() -> None:
    async with await trisock.listen(0) as listener:
        result = await run(*command("hammerspoon_server", "--port", str(listener.port)))
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"cannot listen" in result.stderr
    assert result.stderr.count(b"\n") == 1
