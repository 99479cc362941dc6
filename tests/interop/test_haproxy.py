"""Our server behind HAProxy, and HAProxy behind our client, with PROXY headers."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import trio

import trisock
from helpers.authority import issue
from helpers.haproxy import haproxy
from helpers.pairs import all_served
from helpers.starttls_sites import FILE
from trisock import Address, ClientTLS, ProxyHeader, ServerTLS, Socket
from trisock.testing import Authority, serving

pytestmark = pytest.mark.needs("haproxy")

LINE = FILE.replace(b"\n", b"")

# HAProxy's health check.
CHECK = """
    option tcp-check
    tcp-check send hello\\n
    tcp-check expect string hello
"""


class Behind:
    """Records PROXY headers. Sends each line back, with the client's address in front of it."""

    def __init__(self) -> None:
        self.headers: list[ProxyHeader] = []
        self.connected = trio.Event()
        self.checked = trio.Event()  # set after a connection without a client's address

    async def __call__(self, sock: Socket) -> None:
        assert sock.proxy_header is not None
        self.headers.append(sock.proxy_header)
        self.connected.set()
        async for line in sock.lines(max_bytes=len(FILE) + 1):
            await sock.send(str(sock.getpeer()).encode(), b" ", line, b"\n")
            if sock.proxy_header.source is None:
                self.checked.set()


behind_proxy = functools.partial(serving, trusted_proxies=["127.0.0.1"])


@pytest.fixture
def localhost(authority: Authority) -> ServerTLS:
    return authority.server_tls("localhost")


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy_each_client_has_its_own_address(
    server: str, host: str, is_tls: bool, pem: Path, authority: Authority, localhost: ServerTLS
) -> None:
    behind = Behind()
    served = 0

    async def visit(port: int) -> None:
        nonlocal served
        tls = authority.client_tls("localhost") if is_tls else None
        async with await trisock.connect(host, port, tls=tls) as sock:
            await sock.send(LINE, b"\n")
            answer = await sock.recv_until(b"\n", max_bytes=len(FILE) + 100)
            assert answer == str(sock.getlocal()).encode() + b" " + LINE + b"\n"
            assert behind.headers[0].destination == sock.getpeer()
        served += 1

    async with behind_proxy(behind, tls=localhost if is_tls else None) as s:
        async with haproxy(host, s.server.port, pem, server=server) as port:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(visit, port)
            await all_served(s.server, 5)
    assert served == len(behind.headers) == 5
    assert s.server.stats() == trisock.ServerStats(accepted=5)


@pytest.mark.parametrize("is_tls", [False, True])
async def test_haproxy_health_checks_have_no_client_address(
    is_tls: bool, pem: Path, localhost: ServerTLS
) -> None:
    behind = Behind()
    check = "send-proxy-v2 check inter 100ms"
    if is_tls:
        check += f" check-ssl check-sni localhost verify required ca-file {pem}/ca.pem"
    async with behind_proxy(behind, tls=localhost if is_tls else None) as s:
        async with haproxy("127.0.0.1", s.server.port, pem, server=check, lines=CHECK):
            await behind.checked.wait()
    assert set(behind.headers) == {ProxyHeader(command="LOCAL")}


@pytest.mark.parametrize("version", [1, 2])
async def test_haproxy_can_send_headers_for_health_checks_only(version: int, pem: Path) -> None:
    # Version 1 cannot mark health checks: the header has HAProxy's own address.
    behind = Behind()
    sent = "send-proxy" if version == 1 else "send-proxy-v2"
    check = f"{sent} check check-send-proxy inter 100ms"
    async with behind_proxy(behind) as s:
        async with haproxy("127.0.0.1", s.server.port, pem, server=check, lines=CHECK):
            await behind.connected.wait()
    (header, *_) = behind.headers
    assert header.version == version
    assert s.server.stats().bad_proxy_headers == 0


@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy_a_unix_client_has_no_address(
    server: str, pem: Path, authority: Authority, localhost: ServerTLS
) -> None:
    path = pem / "socket"
    behind = Behind()
    async with (
        behind_proxy(behind, tls=localhost) as s,
        haproxy(path, s.server.port, pem, server=server),
        await trisock.connect_unix(path, tls=authority.client_tls("localhost")) as sock,
    ):
        await sock.send(b"hello\n")
        answer = await sock.recv_until(b"\n")
        assert answer.startswith(b"127.0.0.1:")  # HAProxy's own address
    assert behind.headers[0].source is None


@pytest.mark.parametrize("with_certificate", [False, True])
@pytest.mark.parametrize("option", ["send-proxy-v2-ssl-cn", "send-proxy-v2 proxy-v2-options ssl"])
async def test_haproxy_reports_the_tls_that_it_terminated(
    option: str, with_certificate: bool, pem: Path, authority: Authority
) -> None:
    combined = pem / "combined.pem"
    combined.touch(mode=0o600)
    combined.write_bytes((pem / "chain.pem").read_bytes() + (pem / "key.pem").read_bytes())
    behind = Behind()
    certificate = issue(authority, "client.example", common_name="J\u00fcrgen")
    tls = ClientTLS(
        "localhost",
        ca=authority.ca,
        alpn_protocols=["proto"],
        certificate=certificate if with_certificate else None,
    )
    options = "cert-cn,ssl-cipher,cert-sig,cert-key,authority,crc32c,unique-id"
    if "options" not in option:
        option += " proxy-v2-options ssl"
    async with (
        behind_proxy(behind) as s,
        haproxy(
            *("127.0.0.1", s.server.port, pem),
            bind=f"ssl crt {combined} alpn proto verify optional ca-file {pem}/ca.pem",
            server=f"{option},{options}",
            lines="unique-id-format id-%cp",
        ) as port,
        await trisock.connect("127.0.0.1", port, tls=tls) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == f"{sock.getlocal()} hello\n".encode()
        client_port = sock.getlocal().port
    (header,) = behind.headers
    assert header.authority == "localhost"
    assert header.alpn == b"proto"
    assert header.unique_id == f"id-{client_port}".encode()
    ssl = header.ssl
    assert ssl is not None
    assert ssl.client & 1
    assert ssl.verified is with_certificate
    assert ssl.version == "TLSv1.3"
    assert ssl.cn == ("J\u00fcrgen" if with_certificate else None)
    assert ssl.cipher is not None
    assert ssl.cipher.startswith("TLS_")
    assert ssl.sig_alg is not None
    assert ssl.key_alg == "EC256"


# ---- HAProxy as the receiver ----

CLIENT4, SERVER4 = Address("192.0.2.1", 50000), Address("198.51.100.2", 443)
CLIENT6, SERVER6 = Address("2001:db8::1", 50000), Address("2001:db8::2", 443)


@pytest.mark.parametrize("is_tls", [False, True])
@pytest.mark.parametrize("ends", [(CLIENT4, SERVER4), (CLIENT6, SERVER6), (CLIENT4, SERVER6)])
@pytest.mark.parametrize(
    "options",
    [{"version": 1}, {}, {"tlvs": ((5, b"id"), (0x30, b"ns"), (0xE0, bytes(200)), (2, b"a.b"))}],
)
async def test_haproxy_accepts_the_header_that_connect_sends(
    options: dict[str, Any],
    ends: tuple[Address, Address],
    is_tls: bool,
    pem: Path,
    authority: Authority,
    localhost: ServerTLS,
) -> None:
    behind = Behind()
    tls = authority.client_tls("localhost") if is_tls else None
    header = ProxyHeader(source=ends[0], destination=ends[1], **options)
    async with (
        behind_proxy(behind, tls=localhost if is_tls else None) as s,
        haproxy(
            "127.0.0.1", s.server.port, pem, bind="accept-proxy", server="send-proxy-v2"
        ) as port,
        await trisock.connect("127.0.0.1", port, proxy_header=header, tls=tls) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == f"{ends[0]} hello\n".encode()
    assert [(each.source, each.destination) for each in behind.headers] == [ends]


@pytest.mark.parametrize("header", [ProxyHeader(version=1), ProxyHeader(command="LOCAL")])
async def test_haproxy_accepts_a_header_without_addresses(header: ProxyHeader, pem: Path) -> None:
    behind = Behind()
    async with (
        behind_proxy(behind) as s,
        haproxy(
            "127.0.0.1", s.server.port, pem, bind="accept-proxy", server="send-proxy-v2"
        ) as port,
        await trisock.connect("127.0.0.1", port, proxy_header=header) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == f"{sock.getlocal()} hello\n".encode()
