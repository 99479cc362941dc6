"""Our server behind HAProxy, which sends PROXY headers."""

from __future__ import annotations

import contextlib
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

import trisock
from helpers import starttls_servers as servers
from helpers.pairs import all_served
from helpers.programs import running
from helpers.starttls_servers import Proxied, Site
from helpers.starttls_sites import FILE, serving
from trisock import Socket
from trisock.testing import Authority

pytestmark = pytest.mark.needs("haproxy")

HAPROXY = """
defaults
    mode tcp
    timeout connect 60s
    timeout client 60s
    timeout server 60s
listen proxy
    bind fd@{fd} {bind}
    option tcp-check
    tcp-check send hello\\n
    tcp-check expect string hello
    server only 127.0.0.1:{port} {server}
"""


@contextlib.asynccontextmanager
async def haproxy(
    where: str | Path, port: int, directory: Path, *, server: str, bind: str = ""
) -> AsyncIterator[int]:
    """Run HAProxy on a socket that already listens. HAProxy forwards to ``port``.

    Yield HAProxy's own port, or 0 if it listens on a path.
    """
    if isinstance(where, Path):
        family: int = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in where else socket.AF_INET
    with socket.socket(family) as listening:
        listening.bind(str(where) if isinstance(where, Path) else (where, 0))
        listening.listen()
        fd = listening.fileno()
        config = directory / "haproxy.cfg"
        config.write_text(HAPROXY.format(fd=fd, port=port, server=server, bind=bind))
        async with running(
            *("haproxy", "-db", "-f", config), pass_fds=[fd], stderr=subprocess.DEVNULL
        ):
            yield 0 if isinstance(where, Path) else listening.getsockname()[1]


class BehindProxy:
    """Records PROXY headers. Sends each line back, with the client's address in front of it."""

    def __init__(self, *, read_ahead: bool = False) -> None:
        self.read_ahead = read_ahead
        self.headers: list[Proxied] = []
        self.checked = trio.Event()  # set after a health check

    async def __call__(self, site: Site, sock: Socket) -> None:
        if self.read_ahead:  # read until part of the ClientHello has arrived
            start = b""
            while b"\x16\x03" not in start:
                start += await sock.recv()
            sock.unrecv(start)
        header = await servers.receive_proxy_header(sock)
        self.headers.append(header)
        first = await sock.recv(1)
        sock.unrecv(first)
        if first == b"\x16":  # a ClientHello
            await sock.starttls(site.tls)
        async for line in sock.lines(max_bytes=len(FILE) + 1):
            await sock.send(str(header.client).encode(), b" ", line, b"\n")
            if header.client is None:
                self.checked.set()


@pytest.mark.parametrize("how", ["plain", "TLS", "TLS, read ahead"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy_each_client_has_its_own_address(
    server: str, host: str, how: str, site: Site, pem: Path, authority: Authority
) -> None:
    behind = BehindProxy(read_ahead=how == "TLS, read ahead")
    tls = None if how == "plain" else authority.client_tls("localhost")
    line = FILE.replace(b"\n", b"")
    served = 0

    async def visit(port: int) -> None:
        nonlocal served
        async with await trisock.connect(host, port, tls=tls) as sock:
            await sock.send(line, b"\n")
            answer = await sock.recv_until(b"\n", max_bytes=len(FILE) + 100)
            assert answer == str(sock.getlocal()).encode() + b" " + line + b"\n"
        served += 1

    async with serving(behind, site) as bound:
        async with haproxy(host, bound.port, pem, server=server) as port:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(visit, port)
            await all_served(bound, 5)
    assert served == len(behind.headers) == 5
    assert bound.stats().peer_errors == 0


@pytest.mark.parametrize("tls", [False, True])
async def test_haproxy_health_checks_have_no_client_address(
    tls: bool, site: Site, pem: Path
) -> None:
    behind = BehindProxy()
    check = "send-proxy-v2 check inter 100ms"  # PROXY version 1 cannot mark health checks
    if tls:
        check += f" check-ssl check-sni localhost verify required ca-file {pem}/ca.pem"
    async with serving(behind, site) as bound:
        async with haproxy("127.0.0.1", bound.port, pem, server=check):
            await behind.checked.wait()
    assert {header.client for header in behind.headers} == {None}


@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy_a_unix_client_has_no_address(
    server: str, site: Site, pem: Path, authority: Authority
) -> None:
    path = pem / "socket"
    behind = BehindProxy()
    async with (
        serving(behind, site) as bound,
        haproxy(path, bound.port, pem, server=server),
        await trisock.connect_unix(path, tls=authority.client_tls("localhost")) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == b"None hello\n"


async def test_haproxy_reports_the_tls_that_it_terminated(
    site: Site, pem: Path, authority: Authority
) -> None:
    combined = pem / "combined.pem"
    combined.touch(mode=0o600)
    combined.write_bytes((pem / "chain.pem").read_bytes() + (pem / "key.pem").read_bytes())
    behind = BehindProxy()
    async with (
        serving(behind, site) as bound,
        haproxy(
            *("127.0.0.1", bound.port, pem),
            bind=f"ssl crt {combined}",
            server="send-proxy-v2 proxy-v2-options ssl,authority,crc32c",
        ) as port,
        await trisock.connect("127.0.0.1", port, tls=authority.client_tls("localhost")) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == f"{sock.getlocal()} hello\n".encode()
    (header,) = behind.headers
    assert header.fields[0x02] == b"localhost"
    assert header.fields[0x20][0] & 1  # PP2_CLIENT_SSL
    assert servers.split_tlv(header.fields[0x20][5:])[0x21] == b"TLSv1.3"
