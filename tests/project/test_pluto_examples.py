"""The programs of Pluto's page, run as their users do."""

from __future__ import annotations

import os
import pathlib
import signal

import pytest

from helpers.examples import command, running
from helpers.programs import curl, run

SERVERS = ["pluto_hello_server", "pluto_https_server"]
ANSWER = "HTTP/1.1 200 OK\r\nConnection: Close\r\nContent-Length: 13\r\n\r\nHello, world!"


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_a_server_with_status_0_and_no_complaint(
    name: str, signum: signal.Signals
) -> None:
    async with running(name) as server:
        server.ask_to_stop(signum)
        await server.stop()


@pytest.mark.parametrize("name", [*SERVERS, "pluto_client"])
async def test_help_tells_how_to_run_it(name: str) -> None:
    result = await run(*command(name, "--help"))
    assert result.returncode == 0
    assert f"python examples/{name}.py" in result.stdout.decode()


@pytest.mark.needs("curl")
async def test_hello_server_answers_curl() -> None:
    async with running("pluto_hello_server") as server:
        for host in ("127.0.0.1", "localhost"):
            result = await curl(f"http://{host}:{server.port}/")
            assert (result.returncode, result.stdout, result.stderr) == (0, b"Hello, world!", b"")


@pytest.mark.needs("curl")
async def test_https_server_answers_curl_which_verifies_it(ca: str) -> None:
    async with running("pluto_https_server", "--write-ca", ca) as server:
        result = await curl("--cacert", ca, f"https://localhost:{server.port}/")
        assert (result.returncode, result.stdout, result.stderr) == (0, b"Hello, world!", b"")


@pytest.mark.needs("curl")
async def test_https_server_is_refused_by_a_curl_that_trusts_another_ca_and_lives_on(
    ca: str, other_ca: str
) -> None:
    async with running("pluto_https_server", "--write-ca", ca) as server:
        url = f"https://localhost:{server.port}/"
        assert (await curl("--cacert", other_ca, url)).returncode == 60
        assert (await curl("--cacert", ca, url)).returncode == 0


async def test_https_server_says_in_one_line_that_trustme_is_missing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trustme.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    result = await run(*command("pluto_https_server", "--port", "0"))
    assert result.returncode == 1
    assert result.stderr == b"install trustme, which makes certificates for a try\n"


async def test_client_prints_what_the_server_says() -> None:
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


async def test_client_says_in_one_line_that_nobody_listens() -> None:
    async with running("pluto_hello_server") as server:
        pass
    result = await run(*command("pluto_client", "--port", str(server.port)))
    assert (result.returncode, result.stdout, result.stderr) == (1, b"", b"Failed to connect.\n")
