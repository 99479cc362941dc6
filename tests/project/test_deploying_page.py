"""The configurations in docs/deploying.md run unchanged, except for their ports."""

from __future__ import annotations

import contextlib
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
    """Connect as soon as a server listens."""
    while True:
        try:
            return await trisock.connect("127.0.0.1", port)
        except ConnectionRefusedError:
            continue


class Ports(dict[str, int]):
    """A free port for each port number in the page."""

    def __init__(self) -> None:
        with contextlib.ExitStack() as stack:  # all at the same time, so that they differ
            for name in ("2525", "12525", "18080", "22525", "28080"):
                free = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
                self[name] = free.getsockname()[1]

    def put_into(self, text: str) -> str:
        return re.sub(rf"\b({'|'.join(self)})\b", lambda found: str(self[found[1]]), text)

    def program(self, *changes: tuple[str, str]) -> list[str]:
        """Return the command of the page's program, with these changes."""
        source = block("HAProxy", "python")
        for old, new in changes:
            assert old in source
            source = source.replace(old, new)
        return [sys.executable, "-c", self.put_into(source)]


async def ask(sock: trisock.Socket) -> None:
    await sock.send(b"hello\n")
    assert await sock.recv_line() == f"{sock.getlocal()} said hello".encode()


@pytest.mark.needs("haproxy")
async def test_new_clients_go_to_the_second_server_during_a_stop(tmp_path: Path) -> None:
    ports = Ports()
    config = tmp_path / "haproxy.cfg"
    config.write_text(ports.put_into(block("HAProxy", "text")))
    one = ports.program()
    two = ports.program(("12525", "22525"), ("18080", "28080"))
    async with started(one) as server, started(two) as other:
        assert await ready(ports["18080"])
        assert await ready(ports["28080"])
        async with running("haproxy", "-db", "-f", config):
            async with (
                await connect(ports["2525"]) as first,
                await connect(ports["2525"]) as second,
            ):
                await ask(first)
                await ask(second)
                server.process.terminate()
                while await ready(ports["18080"]):
                    pass
                await ask(first)  # during the delay
                await ask(second)
                server.process.terminate()  # at once
                assert await server.process.wait() == 0
            for _ in range(4):
                async with await connect(ports["2525"]) as late:
                    await late.send(b"hello\n")
                    assert (await late.recv_line()).endswith(b" said hello")
        other.process.terminate()
        other.process.terminate()


@pytest.mark.needs("haproxy")
async def test_with_one_server_clients_wait_during_a_restart(tmp_path: Path) -> None:
    """Use the page's configuration without health checks, and its program without a delay."""
    ports = Ports()
    text = re.sub(r".*(option httpchk|server two).*\n| check .*", "", block("HAProxy", "text"))
    config = tmp_path / "haproxy.cfg"
    config.write_text(ports.put_into(text))
    program = ports.program(("delay=5", "delay=0"))
    async with running("haproxy", "-db", "-f", config):
        async with started(program) as server:
            assert await ready(ports["18080"])
            async with await connect(ports["2525"]) as client:
                await ask(client)
                server.process.terminate()
                assert await client.recv() == b""
            assert await server.process.wait() == 0
        async with await connect(ports["2525"]) as waits:
            await waits.send(b"hello\n")
            async with started(program):
                assert await waits.recv_line() == f"{waits.getlocal()} said hello".encode()
