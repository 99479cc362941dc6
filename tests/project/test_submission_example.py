"""The example submission_server: STARTTLS on one port, TLS on another, sockets from systemd."""

from __future__ import annotations

import os
import signal
import smtplib
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio

import trisock
from helpers.documents import ROOT
from helpers.examples import Running, started
from helpers.pem import pems
from helpers.programs import running
from trisock.testing import Authority

SERVER = str(ROOT / "examples/submission_server.py")
MESSAGE = "Subject: hello\r\n\r\nHello.\r\n"


@asynccontextmanager
async def submission(pem: Path) -> AsyncIterator[tuple[Running, int, int]]:
    files = ["--cert", str(pem / "chain.pem"), "--key", str(pem / "key.pem")]
    async with started([sys.executable, SERVER, *files, "--ports", "0", "0"]) as server:
        *_, starttls, implicit = (await server.line()).split()
        yield server, int(starttls), int(implicit)


def submit(port: int, pem: Path, *, implicit: bool) -> None:
    context = ssl.create_default_context(cafile=str(pem / "ca.pem"))
    if implicit:
        client: smtplib.SMTP = smtplib.SMTP_SSL(
            "localhost", port, "me", timeout=30, context=context
        )
    else:
        client = smtplib.SMTP("localhost", port, "me", timeout=30)
    with client:
        if not implicit:
            client.starttls(context=context)
        assert client.sendmail("me@example.org", "you@example.org", MESSAGE) == {}


async def test_mail_is_submitted_on_both_ports(pem: Path) -> None:
    async with submission(pem) as (server, starttls, implicit):
        for port, is_implicit in ((starttls, False), (implicit, True)):
            await trio.to_thread.run_sync(lambda p=port, i=is_implicit: submit(p, pem, implicit=i))
            assert (await server.line()).startswith("mail from <me@example.org>")
        server.process.terminate()
        assert await server.process.wait() == 0


async def test_an_idle_client_gets_a_goodbye_when_the_server_stops(
    pem: Path, authority: Authority
) -> None:
    async with submission(pem) as (server, starttls, implicit):
        tls = authority.client_tls("localhost")
        upgraded = await trisock.connect("127.0.0.1", starttls, tls=tls, starttls="smtp")
        secure = await trisock.connect("127.0.0.1", implicit, tls=tls)
        assert (await secure.recv_line()).startswith(b"220")
        for client in (upgraded, secure):
            await client.send(b"NOOP\r\n")
            assert (await client.recv_line()).startswith(b"250")
        server.process.terminate()
        for client in (upgraded, secure):
            assert (await client.recv_line()).startswith(b"421")
            assert await client.recv() == b""
            await client.close()
        assert await server.process.wait() == 0


async def test_mail_in_plain_text_is_refused(pem: Path) -> None:
    async with submission(pem) as (server, starttls, _):
        async with await trisock.connect("127.0.0.1", starttls) as client:
            await client.send(b"EHLO me\r\nMAIL FROM:<me@example.org>\r\nQUIT\r\n")
            replies = [line[:4] async for line in client.lines(delimiter=b"\r\n")]
            assert replies == [b"220 ", b"250-", b"250 ", b"530 ", b"221 "]
        server.process.terminate()
        assert await server.process.wait() == 0


async def test_sighup_renews_the_certificate_of_both_ports(pem: Path, authority: Authority) -> None:
    async def shown(port: int, *, implicit: bool) -> bytes | None:
        async with await trisock.connect(
            "127.0.0.1",
            port,
            tls=authority.client_tls("localhost"),
            starttls=None if implicit else "smtp",
        ) as sock:
            return sock.tls.peer_certificate if sock.tls else None

    async with submission(pem) as (server, starttls, implicit):
        before = await shown(starttls, implicit=False)
        chain, key = pems(authority, "localhost")
        (pem / "chain.pem").write_bytes(chain)
        (pem / "key.pem").write_bytes(key)
        renewed = ssl.PEM_cert_to_DER_cert(chain.decode())
        server.process.send_signal(signal.SIGHUP)
        while await shown(implicit, implicit=True) != renewed:
            pass
        assert await shown(starttls, implicit=False) == renewed != before
        server.process.terminate()
        assert await server.process.wait() == 0


@pytest.mark.needs("systemd-socket-activate")
async def test_systemd_passes_both_sockets(pem: Path, authority: Authority) -> None:
    ports = []
    for _ in range(2):
        with trisock.listen_nowait(0, host="127.0.0.1").sockets[0] as sock:
            ports.append(sock.getsockname()[1])
    files = ["--cert", str(pem / "chain.pem"), "--key", str(pem / "key.pem")]
    options = [
        *(f"--listen=127.0.0.1:{port}" for port in ports),
        "--fdname=submission:submissions",
        f"--setenv=PYTHONPATH={os.environ.get('PYTHONPATH', '')}",
    ]
    async with running("systemd-socket-activate", *options, sys.executable, SERVER, *files):
        for port, tls in zip(ports, (None, authority.client_tls("localhost")), strict=True):
            while True:
                try:
                    sock = await trisock.connect("127.0.0.1", port, tls=tls)
                    break
                except ConnectionRefusedError:
                    continue
            async with sock:
                assert (await sock.recv_line()).startswith(b"220")


@pytest.mark.needs("systemd-analyze")
def test_the_units_are_valid(tmp_path: Path) -> None:
    """The program of the unit is not installed here, so another one stands in for it."""
    for unit in (ROOT / "examples/systemd").iterdir():
        text = unit.read_text().replace("/srv/mail/venv/bin/python", sys.executable)
        (tmp_path / unit.name).write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "verify", *map(str, sorted(tmp_path.iterdir()))],
        capture_output=True,
        text=True,
        check=False,
    )
    complaints = [line for line in done.stderr.splitlines() if "submission" in line]
    assert not complaints
