"""The snippets of the README run unchanged, except for ports and paths."""

from __future__ import annotations

import contextlib
import re
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

import trisock
from helpers.documents import ROOT
from helpers.programs import run
from helpers.services import program, systemd
from trisock.testing import Authority, check_handler

README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def first_program() -> str:
    return server_program(SNIPPETS[0])


def server_program(source: str) -> str:
    """Return the program, with a listener on a free port instead of its port."""
    changed = re.sub(r"\brun\(\d+,", "run(listener,", source)
    assert changed != source
    return changed


def client_program(source: str, port: int) -> list[str]:
    changed = re.sub(r'connect\("localhost", \d+\)', f'connect("127.0.0.1", {port})', source)
    assert changed != source
    return [sys.executable, "-X", "dev", "-c", changed]


def test_each_snippet_has_a_test() -> None:
    server, client, starttls_server = SNIPPETS
    assert "run(7777" in server
    assert "recv_line" in client
    assert "sock.starttls(tls)" in starttls_server


async def test_the_first_client_talks_to_the_first_server() -> None:
    async with program(first_program()) as running:
        result = await run(*client_program(SNIPPETS[1], running.port))
        assert (result.returncode, result.stdout) == (0, b"b'you said hello'\n")
        running.ask_to_stop(signal.SIGINT)
        await running.stop()


def snippets_handler(source: str, monkeypatch: pytest.MonkeyPatch, pem: Path) -> trisock.Handler:
    """Return the handler of a snippet that is a server."""
    names: dict[str, Any] = {}
    monkeypatch.setattr(trisock, "run", lambda *arguments, **options: None)
    for name, path in ("server.pem", pem / "chain.pem"), ("server.key", pem / "key.pem"):
        source = source.replace(name, str(path))
    exec(source, names)
    handler: trisock.Handler = names["handler"]
    return handler


async def test_check_handler_finds_no_fault_in_the_servers(
    pem: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await check_handler(snippets_handler(SNIPPETS[0], monkeypatch, pem))
    await check_handler(snippets_handler(SNIPPETS[2], monkeypatch, pem), starttls=b"STARTTLS\r\n")


async def test_the_first_program_of_the_readme_serves(tmp_path: Path) -> None:
    source = first_program()
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            async with await trisock.connect("127.0.0.1", running.port) as client:
                await client.send(b"hello\nworld\n")
                expected = [b"you said hello", b"you said world"]
                assert [await client.recv_line() for _ in range(2)] == expected
            await running.stop()


@pytest.mark.parametrize("tls", [False, pytest.param(True, marks=pytest.mark.rare)])
async def test_the_first_program_stops_with_a_thousand_idle_clients(
    tls: bool, authority: Authority, pem: Path, tmp_path: Path
) -> None:
    """Each client has sent a line, and sees a clean end. The server stops before they close."""
    source, role = first_program(), None
    if tls:
        files = f"{str(pem / 'chain.pem')!r}, {str(pem / 'key.pem')!r}"
        certificate = f"trisock.Certificate.from_files({files})"
        source = source.replace("handler)\n", f"handler, tls={certificate})\n")
        role = authority.client_tls("localhost")
    clients: list[trisock.Socket] = []

    async def visit(limiter: trio.CapacityLimiter) -> None:
        async with limiter:
            client = await trisock.connect("127.0.0.1", running.port, tls=role)
            await client.send(b"hello\n")
            assert await client.recv_line() == b"you said hello"
            clients.append(client)

    with systemd(tmp_path / "notify") as manager, descriptors(2_000):
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            limiter = trio.CapacityLimiter(50)
            async with trio.open_nursery() as nursery:
                for _ in range(1_000):
                    nursery.start_soon(visit, limiter)
            begin = trio.current_time()
            running.process.terminate()
            await running.process.wait()
            print(f"stopped in {trio.current_time() - begin:.2f} s")
            for client in clients:
                assert await client.recv() == b""
                client.abort()
            assert running.process.returncode == 0


@contextlib.contextmanager
def descriptors(number: int) -> Iterator[None]:
    """Raise the limit of descriptors, which the program inherits."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, number), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
