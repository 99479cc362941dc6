"""The example tls_proxy, between a real HAProxy and a backend that reads PROXY headers."""

from __future__ import annotations

import functools
import socket
from pathlib import Path

import pytest
import trio

import trisock
from helpers.examples import running
from helpers.haproxy import haproxy
from trisock import ProxyHeader, Socket
from trisock.testing import Authority, serving

behind_proxy = functools.partial(serving, trusted_proxies=["127.0.0.1"])


class Backend:
    """Records PROXY headers, and answers each line with the client's address."""

    def __init__(self) -> None:
        self.headers: list[ProxyHeader] = []
        self.checked = trio.Event()

    async def __call__(self, sock: Socket) -> None:
        assert sock.proxy_header is not None
        self.headers.append(sock.proxy_header)
        if sock.proxy_header.command == "LOCAL":
            self.checked.set()
        async for line in sock.lines():
            await sock.send(line, b" from ", str(sock.getpeer()).encode(), b"\n")


def arguments(pem: Path, port: int) -> list[str]:
    files = ["--cert", str(pem / "chain.pem"), "--key", str(pem / "key.pem")]
    return [*files, "--backend", f"127.0.0.1:{port}"]


@pytest.mark.needs("haproxy")
async def test_the_backend_behind_two_proxies_sees_the_client(
    pem: Path, authority: Authority
) -> None:
    backend = Backend()
    tls = authority.client_tls("localhost")
    async with (
        behind_proxy(backend) as s,
        running("tls_proxy", *arguments(pem, s.server.port)) as proxy,
        haproxy("127.0.0.1", proxy.port, pem, server="send-proxy-v2") as port,
    ):
        for text in (b"one", b"two"):
            async with await trisock.connect("127.0.0.1", port, tls=tls) as client:
                await client.send(text + b"\n")
                answer = await client.recv_line()
                assert answer == text + f" from {client.getlocal()}".encode()
                header = backend.headers[-1]
                assert header.destination == client.getpeer()
                assert header.authority == "localhost"
                assert header.ssl is not None
                assert header.ssl.version == "TLSv1.3"
                assert header.ssl.verified is False


@pytest.mark.needs("haproxy")
async def test_a_health_check_reaches_the_backend(pem: Path) -> None:
    backend = Backend()
    check = f"send-proxy-v2 check inter 100ms check-ssl check-sni localhost ca-file {pem}/ca.pem"
    async with (
        behind_proxy(backend) as s,
        running("tls_proxy", *arguments(pem, s.server.port)) as proxy,
        haproxy("127.0.0.1", proxy.port, pem, server=check),
    ):
        await backend.checked.wait()
    assert set(backend.headers) == {ProxyHeader(command="LOCAL")}


async def test_a_backend_that_is_down_resets_the_client(
    pem: Path, authority: Authority, free_port: int
) -> None:
    header = ProxyHeader(version=1)
    async with running("tls_proxy", *arguments(pem, free_port)) as proxy:
        tls = authority.client_tls("localhost")
        async with await trisock.connect(
            "127.0.0.1", proxy.port, proxy_header=header, tls=tls
        ) as client:
            with pytest.raises(trio.BrokenResourceError):
                await client.recv()
            peer = client.getlocal()
        proxy.complaints = (
            f"reset the connection with {peer}: [Errno 111] cannot connect to "
            f"127.0.0.1:{free_port}: Connection refused\n"
        )


async def test_the_proxy_refuses_a_client_without_a_header(pem: Path) -> None:
    async with running("tls_proxy", *arguments(pem, 1)) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as raw:
            raw.setblocking(False)
            raw.send(b"\x16\x03\x01\0\x05hello")
            await trio.lowlevel.wait_readable(raw)
            with pytest.raises(ConnectionResetError):
                raw.recv(1)
