"""The configurations in docs/deploying.md run as they stand, but for their ports."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

import trisock
from helpers.documents import ROOT
from helpers.examples import started
from helpers.programs import running

PAGE = (ROOT / "docs/deploying.md").read_text()


def block(section: str, language: str) -> str:
    """Return the code of this language in a section."""
    text = PAGE.split(f"\n## {section}\n")[1].split("\n## ")[0]
    found = re.search(rf"```{language}\n(.*?)```", text, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_units_in_the_page_are_those_of_the_example() -> None:
    for unit in ("submission.socket", "submission.service"):
        assert f"```ini\n{(ROOT / 'examples/systemd' / unit).read_text()}```" in PAGE


async def ready(port: int) -> bool:
    async with await connect(port) as sock:
        await sock.send(b"GET / HTTP/1.0\r\n\r\n")
        return await sock.recv_line() == b"HTTP/1.0 200 OK\r"


async def connect(port: int) -> trisock.Socket:
    """Connect, once somebody listens."""
    while True:
        try:
            return await trisock.connect("127.0.0.1", port)
        except ConnectionRefusedError:
            continue


@pytest.mark.needs("haproxy")
async def test_haproxy_and_the_program_of_the_page_run(tmp_path: Path) -> None:
    ports = {}
    for number in ("2525", "12525", "18080"):
        with socket.create_server(("127.0.0.1", 0)) as free:
            ports[number] = str(free.getsockname()[1])

    def with_free_ports(text: str) -> str:
        return re.sub(r"\b(2525|12525|18080)\b", lambda found: ports[found[1]], text)

    config = tmp_path / "haproxy.cfg"
    config.write_text(with_free_ports(block("HAProxy", "text")))
    program = [sys.executable, "-c", with_free_ports(block("HAProxy", "python"))]
    health = int(ports["18080"])
    async with started(program) as server:
        assert await ready(health)
        async with running("haproxy", "-db", "-f", config):
            async with await connect(int(ports["2525"])) as client:
                await client.send(b"hello\n")
                assert await client.recv_line() == f"{client.getlocal()} said hello".encode()
                server.process.terminate()
                while await ready(health):
                    pass
                await client.send(b"still there\n")  # during the delay
                assert (await client.recv_line()).endswith(b" said still there")
                server.process.terminate()  # at once
                assert await server.process.wait() == 0
