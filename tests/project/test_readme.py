"""The first program of the README."""

from __future__ import annotations

import contextlib
import re
import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

import trisock
from helpers.documents import ROOT
from helpers.services import program, systemd
from trisock.testing import Authority


def first_program() -> str:
    found = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert found is not None
    return found[1].replace("run(7777,", "run(listener,")


async def test_the_first_program_of_the_readme_serves(tmp_path: Path) -> None:
    source = first_program()
    with systemd(tmp_path / "notify") as manager:
        async with program(source, NOTIFY_SOCKET=manager.path) as running:
            assert await manager.receive() == b"READY=1"
            async with await trisock.connect("127.0.0.1", running.port) as client:
                await client.send(b"hello\nworld\n")
                assert [await client.recv_line() for _ in range(2)] == [b"hello", b"world"]
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
            assert await client.recv_line() == b"hello"
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
