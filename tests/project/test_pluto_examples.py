"""The examples from Pluto's page, run as programs."""

from __future__ import annotations

import socket

import pytest
import trio

from helpers.deadline import DEADLINE
from helpers.examples import command, running
from helpers.programs import curl, run

ANSWER = "HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 13\r\n\r\nHello, world!"


@pytest.mark.needs("curl")
async def test_hello_server_answers_curl() -> None:
    async with running("pluto_hello_server") as server:
        for host in ("127.0.0.1", "localhost"):
            result = await curl(f"http://{host}:{server.port}/")
            assert (result.returncode, result.stdout, result.stderr) == (0, b"Hello, world!", b"")


@pytest.mark.needs("curl")
async def test_curl_verifies_https_server(ca: str) -> None:
    async with running("pluto_https_server", "--write-ca", ca) as server:
        result = await curl("--cacert", ca, f"https://localhost:{server.port}/")
        assert (result.returncode, result.stdout, result.stderr) == (0, b"Hello, world!", b"")


@pytest.mark.needs("curl")
async def test_curl_with_another_ca_refuses_https_server(ca: str, other_ca: str) -> None:
    async with running("pluto_https_server", "--write-ca", ca) as server:
        url = f"https://localhost:{server.port}/"
        assert (await curl("--cacert", other_ca, url)).returncode == 60
        assert (await curl("--cacert", ca, url)).returncode == 0


async def test_client_prints_the_response() -> None:
    async with running("pluto_hello_server") as server:
        result = await run(*command("pluto_client", "--port", str(server.port)))
        assert (result.returncode, result.stdout.decode(), result.stderr) == (0, ANSWER, b"")


async def test_client_verifies_the_server(
    ca: str, other_ca: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running("pluto_https_server", "--write-ca", ca) as server:
        arguments = command("pluto_client", "--port", str(server.port), "--tls")
        monkeypatch.setenv("SSL_CERT_FILE", ca)
        result = await run(*arguments)
        assert (result.returncode, result.stdout.decode(), result.stderr) == (0, ANSWER, b"")
        monkeypatch.setenv("SSL_CERT_FILE", other_ca)
        result = await run(*arguments)
        assert (result.returncode, result.stdout) == (1, b"")
        assert result.stderr == b"Failed to establish secure connection.\n"


async def test_udp_echo_answers_each_client() -> None:
    def talk(port: int) -> None:
        clients = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(3)]
        try:
            for number, client in enumerate(clients):
                client.settimeout(DEADLINE)
                client.connect(("127.0.0.1", port))
                client.send(b"")  # is dropped, and does not end the server
                client.send(b"hello from %d" % number)
            for number, client in enumerate(clients):
                assert client.recv(100) == b"hello from %d" % number
                data = bytes(range(256)) * 255
                client.send(data)
                assert client.recv(70_000) == data
        finally:
            for client in clients:
                client.close()

    async with running("pluto_udp_echo") as server:
        await trio.to_thread.run_sync(talk, server.port)


async def test_udp_echo_reports_an_occupied_port() -> None:
    async with running("pluto_udp_echo") as server:
        result = await run(*command("pluto_udp_echo", "--port", str(server.port)))
        assert (result.returncode, result.stdout) == (1, b"")
        assert result.stderr == b"Failed to bind the port.\n"


@pytest.mark.parametrize("mac", ["00:11:22:aa:BB:cc", "00-11-22-AA-BB-CC", "001122aabbcc"])
async def test_wake_on_lan_broadcasts_the_magic_packet(mac: str) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as card:
        card.bind(("", 0))
        card.settimeout(DEADLINE)
        where = ["--host", "127.255.255.255", "--port", str(card.getsockname()[1])]
        result = await run(*command("pluto_wake_on_lan", mac, *where))
        assert (result.returncode, result.stdout, result.stderr) == (0, b"", b"")
        packet = await trio.to_thread.run_sync(card.recv, 1000)
    assert packet == b"\xff" * 6 + b"\x00\x11\x22\xaa\xbb\xcc" * 16


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["00:11:22:33:44"], "This is not a MAC address.\n"),
        (["00:11:22:33:44:55:66"], "This is not a MAC address.\n"),
        (["00:11:22:33:44:55", "--port", "65536"], "Failed to connect.\n"),
        (["00:11:22:33:44:55", "--host", "a..b"], "Failed to connect.\n"),
    ],
)
async def test_wake_on_lan_reports_a_mistake_in_one_line(
    arguments: list[str], complaint: str
) -> None:
    result = await run(*command("pluto_wake_on_lan", *arguments))
    assert (result.returncode, result.stdout, result.stderr.decode()) == (1, b"", complaint)
