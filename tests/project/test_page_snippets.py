"""The snippets of the documentation compile and type-check, and those that are programs run.

Other files test the snippets of the README, of docs/testing.md, of docs/deploying.md, and of the
reference.
"""

from __future__ import annotations

import re
import select
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest
import trio

import trisock
from helpers.documents import ROOT
from helpers.examples import Running, started
from helpers.page_snippets import as_module, is_program, snippets
from helpers.programs import run
from trisock.testing import Authority, Script, serving

PAGES = [
    "README.md",
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
]
WITH_SNIPPETS = [page for page in PAGES if snippets(page)]

# The programs of these pages are run by another test file.
RUN_ELSEWHERE = {
    *("README.md", "docs/deploying.md", "docs/testing.md"),
    *(page for page in PAGES if page.startswith("docs/api-")),
}


def program(source: str, *changes: tuple[str, str]) -> list[str]:
    """Return the command of a program, with these changes."""
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    return [sys.executable, "-X", "dev", "-c", source]


async def connect(port: int) -> trisock.Socket:
    """Connect as soon as a server listens."""
    while True:
        try:
            return await trisock.connect("127.0.0.1", port)
        except ConnectionRefusedError:
            await trio.lowlevel.checkpoint()


async def ask(port: int, *lines: bytes) -> list[bytes]:
    async with await connect(port) as client:
        await client.send(b"".join(line + b"\n" for line in lines))
        return [await client.recv_line() for _ in lines]


@asynccontextmanager
async def serving_program(command: list[str], cwd: Path | None = None) -> AsyncIterator[Running]:
    """Run a server. At the end, Ctrl-C stops it with status 0."""
    async with started(command, cwd=cwd) as running:
        yield running
        running.process.send_signal(signal.SIGINT)
        assert await running.process.wait() == 0


# ---- all pages ----


@pytest.mark.parametrize("page", WITH_SNIPPETS)
def test_each_snippet_compiles(page: str) -> None:
    for snippet in snippets(page):
        compile(as_module(snippet), page, "exec")


def test_the_snippets_type_check(tmp_path: Path) -> None:
    pytest.importorskip("mypy")  # nox -s lint installs mypy
    for page in WITH_SNIPPETS:
        for number, snippet in enumerate(snippets(page)):
            if page != "docs/testing.md" or not number:  # its snippets use each other's names
                name = re.sub(r"\W", "_", page.removesuffix(".md"))
                (tmp_path / f"{name}_{number}.py").write_text(as_module(snippet))
    command = [sys.executable, "-m", "mypy", "--check-untyped-defs", "--disable-error-code"]
    command += ["empty-body", "--cache-dir", str(tmp_path / "cache"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout


def test_each_program_has_a_test() -> None:
    source = Path(__file__).read_text(encoding="utf-8")
    for page in WITH_SNIPPETS:
        if page not in RUN_ELSEWHERE and any(map(is_program, snippets(page))):
            assert f'snippets("{page}")' in source, page


@pytest.mark.parametrize("page", PAGES)
def test_each_link_leads_to_a_page_or_file(page: str) -> None:
    text = re.sub(r"```.*?```|`[^`\n]*`", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S)
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / page).parent.joinpath(link).exists(), link


# ---- servers of lines ----


@pytest.mark.parametrize("page", ["docs/index.md", "docs/serving.md", "docs/writers.md"])
async def test_the_first_program_of_a_page_serves(page: str, free_port: int) -> None:
    sources = {
        "docs/index.md": snippets("docs/index.md"),
        "docs/serving.md": snippets("docs/serving.md"),
        "docs/writers.md": snippets("docs/writers.md"),
    }
    async with serving_program(program(sources[page][0], ("7777", str(free_port)))):
        assert await ask(free_port, b"a", b"b") == [b"you said a", b"you said b"]


async def test_a_chat_reaches_all_clients_and_drops_a_slow_client(free_port: int) -> None:
    chat = snippets("docs/writers.md")[2]
    command = program(chat, ("7777", str(free_port)), ("](1000)", "](3)"))
    async with serving_program(command):
        async with await connect(free_port) as talks, await connect(free_port) as silent:
            await silent.send(b"hello\n")
            assert await talks.recv_line() == b"hello"
            poller = select.poll()
            poller.register(silent.fileno(), 0)  # Reports a reset, and no other event.
            while not poller.poll(0):  # Until the server resets the silent client.
                await talks.send(b"x" * 500, b"\n")
                assert await talks.recv_line() == b"x" * 500


@pytest.mark.parametrize("number", [0, 1])
async def test_the_asyncio_server_and_its_port_answer_alike(number: int, free_port: int) -> None:
    command = program(snippets("docs/from-asyncio.md")[number], ("7777", str(free_port)))
    async with started(command):
        answers = await ask(free_port, b"set a 1", b"get a", b"get b", b"else")
        assert answers == [b"ok", b"1", b"", b"what?"]


@pytest.mark.parametrize("number", [0, 1])
async def test_the_trio_server_and_its_port_answer_alike(number: int, free_port: int) -> None:
    command = program(snippets("docs/from-trio.md")[number], ("7777", str(free_port)))
    async with started(command):
        assert await ask(free_port, b"a", b"b") == [b"you said a", b"you said b"]


# ---- the quickstart ----


async def test_the_quickstart_works_step_by_step(tmp_path: Path, free_port: int) -> None:
    server, client, tls_server, tls_client, attack, test = snippets("docs/quickstart.md")

    async def output(source: str, port: str, name: str = "localhost") -> bytes:
        changes = [(f'"localhost", {port}', f'"{name}", {free_port}')]
        result = await run_in(tmp_path, program(source, *changes))
        assert result.returncode == 0, result.stderr
        return result.stdout

    async with serving_program(program(server, ("7777", str(free_port)))):
        (await connect(free_port)).abort()
        assert await output(client, "7777", "127.0.0.1") == b"b'you said hello'\n"
    made = await run_in(tmp_path, [sys.executable, "-m", "trustme", "-q"])
    assert made.returncode == 0
    async with serving_program(program(tls_server, ("7778", str(free_port))), tmp_path):
        (await connect(free_port)).abort()
        printed = await output(tls_client, "7778", "127.0.0.1")
        assert printed.startswith(b"TLSv1.3 ")
        assert printed.endswith(b"b'hello alice'\n")
        printed = await output(attack, "7778", "127.0.0.1")
        assert printed.startswith(b"b'go ahead'\n")
        assert b"answer to the second command: b'" in printed
        assert b"mallory" not in printed
    assert (await run_in(tmp_path, program(test))).returncode == 0


async def run_in(cwd: Path, command: list[str]) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        command, cwd=cwd, capture_stdout=True, capture_stderr=True, check=False
    )


# ---- STARTTLS ----


async def test_the_imap_client_upgrades(authority: Authority, tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_bytes(authority.ca)
    role = f'trisock.ClientTLS("localhost", ca=pathlib.Path({str(tmp_path / "ca.pem")!r}))'
    server = Script().send(b"* OK ready\r\n").expect(b"a1 CAPABILITY\r\n")
    server.send(b"* CAPABILITY IMAP4rev1 STARTTLS\r\na1 OK done\r\n").expect(b"a2 STARTTLS\r\n")
    server.send(b"a2 OK go ahead\r\n").starttls(authority.server_tls())
    server.expect(b"a CAPABILITY\r\n").send(b"* CAPABILITY IMAP4rev1\r\na OK done\r\n")
    async with serving(server) as s:
        arguments = f'"127.0.0.1", {s.server.port}, tls={role}, starttls="imap"'
        source = snippets("docs/starttls.md")[0]
        changes = ('"mail.example.org", starttls="imap"', arguments)
        result = await run(*program("import pathlib\n" + source, changes))
        assert result.stdout == b"* CAPABILITY IMAP4rev1\na OK done\n"


# ---- datagrams ----


def send_from_port_0(port: int) -> None:
    """Send a datagram that nobody can answer. Its UDP header is our own, without a checksum."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP) as raw:
        raw.sendto(struct.pack("!4H", 0, port, 8, 0), ("127.0.0.1", 0))


async def test_the_udp_client_talks_to_the_udp_server(free_port: int) -> None:
    server, _, client = snippets("docs/datagrams.md")[:3]
    ready = ("udp = await service.open_udp(7777)\n", "udp = await service.open_udp(0)\n")
    say = "        print(udp.getlocal().port, flush=True)\n"
    async with serving_program(program(server, (ready[0], ready[1] + say))) as running:
        port = await running.line()
        with suppress(PermissionError):  # only root may forge a sender
            send_from_port_0(int(port))
        result = await run(*program(client, ('"localhost", 7777', f'"127.0.0.1", {port}')))
        assert result.stdout == b"b'hello'\n"


# ---- the dialects ----


async def test_plutos_script_talks_to_plutos_server(free_port: int) -> None:
    script, server = snippets("docs/pluto.md")[:2]
    async with started(program(server, ("8080", str(free_port)))):
        (await connect(free_port)).abort()
        result = await run(*program(script, ('"localhost", 8080', f'"127.0.0.1", {free_port}')))
        assert b"Hello, world!" in result.stdout


async def test_plutos_datagram_is_answered(free_port: int) -> None:
    script, server = snippets("docs/pluto.md")[3:]
    command = program(server, ("7777", str(free_port)))
    async with started([command[0], "-u", *command[1:]]) as running:
        assert await running.line() == f"port {free_port}"
        result = await run(*program(script, ('"localhost", 7777', f'"127.0.0.1", {free_port}')))
        assert result.stdout == b"b'hello'\n"


async def test_a_pluto_script_gives_up_waiting_for_a_datagram(free_port: int) -> None:
    script = snippets("docs/pluto.md")[3]
    changes = (
        ('"localhost", 7777', f'"127.0.0.1", {free_port}'),
        ("signal.ITIMER_REAL, 2", "signal.ITIMER_REAL, 0.01"),
    )
    result = await run(*program(script, *changes))
    assert result.stdout == b"no answer\n"


async def test_hammerspoons_client_prints_the_header() -> None:
    client = snippets("docs/hammerspoon.md")[0]
    peer = Script().expect(b"GET / HTTP/1.0\r\n\r\n").send(b"HTTP/1.0 200 OK\r\n\r\n")
    async with serving(peer) as s:
        changes = ('"localhost", 8080', f'"127.0.0.1", {s.server.port}')
        result = await run(*program(client, changes))
        assert result.stdout.strip() == b"b'HTTP/1.0 200 OK\\r\\n\\r\\n' -1"


async def test_hammerspoons_datagram_is_answered(free_port: int) -> None:
    client = snippets("docs/hammerspoon.md")[-1]
    command = program(client, ("9001", str(free_port)), ("sleep(1)", "sleep_forever()"))
    async with started([command[0], "-u", *command[1:]]) as running:
        assert (await running.line()).startswith("b'pong 1' ")
