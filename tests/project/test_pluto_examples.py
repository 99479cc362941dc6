"""The examples from Pluto's page, run as programs."""

from __future__ import annotations

import pytest

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
