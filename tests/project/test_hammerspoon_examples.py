"""The examples of trisock.hammerspoon, as their users run them."""

from __future__ import annotations

import signal

import pytest
import trio

import trisock
from helpers.examples import command, running
from helpers.pairs import closing
from helpers.programs import run


async def get(answer: bytes) -> tuple[bytes, str]:
    """Run the HTTP client against a server that gives an answer; return request and output."""
    requests = []

    async def handler(sock: trisock.Socket) -> None:
        requests.append(await sock.recv_until(b"\r\n\r\n"))
        await sock.send(answer)

    async with trio.open_nursery() as nursery:
        server = await trisock.bind(nursery, 0, handler, host="127.0.0.1")
        result = await run(*command("hammerspoon_http_client", "127.0.0.1", str(server.port)))
        server.stop()
    assert (result.returncode, result.stderr) == (0, b"")
    [request] = requests
    return request, result.stdout.decode()


@pytest.mark.parametrize("name", ["hammerspoon_http_client", "hammerspoon_server"])
async def test_help_tells_how_to_run_it(name: str) -> None:
    result = await run(*command(name, "--help"))
    assert result.returncode == 0
    assert f"python examples/{name}.py" in result.stdout.decode()


async def test_http_client_prints_the_header_and_the_body() -> None:
    header = "HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\n"
    request, printed = await get(header.encode() + b"<html>\nhello\n\n")
    assert request == b"GET /index.html HTTP/1.0\r\nHost: 127.0.0.1\r\n\r\n"
    assert printed == (f"1 TAG_HTTP_HEADER\n{header}\n2 TAG_HTTP_CONTENT\n<html>\nhello\n\n\n")


async def test_http_client_prints_the_header_where_it_gives_no_length() -> None:
    header = "HTTP/1.0 204 No Content\r\n\r\n"
    _, printed = await get(header.encode())
    assert printed == f"1 TAG_HTTP_HEADER\n{header}\n"


async def test_http_client_ends_with_the_connection() -> None:
    header = "HTTP/1.0 200 OK\r\nContent-Length: 14\r\n\r\n"
    for answer, expected in [
        (b"", ""),
        (b"HTTP/1.0", ""),
        (header.encode() + b"too short", f"1 TAG_HTTP_HEADER\n{header}\n"),
    ]:
        _, printed = await get(answer)
        assert printed == expected


async def test_http_client_says_that_nobody_listens() -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        pass
    result = await run(*command("hammerspoon_http_client", "127.0.0.1", str(listener.port)))
    assert result.stdout == b""
    assert b"Connection refused" in result.stderr
    assert result.stderr.count(b"\n") == 1  # no traceback


async def test_server_greets_and_tells_each_line_to_all() -> None:
    async with running("hammerspoon_server") as server:
        one = await trisock.connect("127.0.0.1", server.port)
        async with closing(one):
            assert await one.recv_until(b"\n") == b"* hello, 1 are here\r\n"
            two = await trisock.connect("127.0.0.1", server.port)
            async with closing(two):
                for client in (one, two):
                    assert await client.recv_until(b"\n") == b"* hello, 2 are here\r\n"
                for number in range(3):
                    for speaker in (two, one):
                        await speaker.send(b"line %d\r\n" % number)
                        for client in (one, two):
                            assert await client.recv_until(b"\n") == b"> line %d\r\n" % number


async def test_server_goes_on_when_a_client_leaves() -> None:
    async with running("hammerspoon_server") as server:
        stays = await trisock.connect("127.0.0.1", server.port)
        async with closing(stays):
            assert await stays.recv_until(b"\n") == b"* hello, 1 are here\r\n"
            for _ in range(2):
                leaves = await trisock.connect("127.0.0.1", server.port)
                async with closing(leaves):
                    for client in (stays, leaves):
                        assert await client.recv_until(b"\n") == b"* hello, 2 are here\r\n"
                    await leaves.send(b"and goodbye\n")
                    await leaves.send_eof()
                    assert await leaves.recv_until(b"\n") == b"> and goodbye\n"
                    assert await leaves.recv() == b""
                assert await stays.recv_until(b"\n") == b"> and goodbye\n"
                assert await stays.recv_until(b"\n") == b"* hello, 1 are here\r\n"


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_the_server_with_status_0_and_no_complaint(
    signum: signal.Signals,
) -> None:
    async with running("hammerspoon_server") as server:
        client = await trisock.connect("127.0.0.1", server.port)
        async with closing(client):
            await client.recv_until(b"\n")
            server.ask_to_stop(signum)
            await server.stop()
            assert await client.recv() == b""
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", server.port)


async def test_server_says_that_its_port_is_taken() -> None:
    async with await trisock.listen(0) as listener:
        result = await run(*command("hammerspoon_server", "--port", str(listener.port)))
    assert (result.returncode, result.stdout) == (1, b"")
    assert b"cannot listen" in result.stderr
    assert result.stderr.count(b"\n") == 1
