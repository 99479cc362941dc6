"""nginx sends PROXY headers of version 1, and receives those of both versions."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

import trisock
from helpers.pairs import read_all
from helpers.programs import running
from trisock import Address, ProxyHeader, Socket
from trisock.testing import Authority, serving

STREAM_MODULE = Path("/usr/lib/nginx/modules/ngx_stream_module.so")

pytestmark = pytest.mark.needs("nginx")

NGINX = """
daemon off;
worker_processes 1;
error_log stderr crit;
pid {directory}/nginx.pid;
{module}
events {{}}
{content}
"""

STREAM = """
stream {{
    server {{
        listen 127.0.0.1:{port};
        proxy_pass 127.0.0.1:{backend};
        proxy_protocol on;
    }}
}}
"""

HTTP = """
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port} proxy_protocol;
        location / {{
            return 200 "$proxy_protocol_addr $proxy_protocol_port $proxy_protocol_server_addr";
        }}
    }}
}}
"""


@contextlib.asynccontextmanager
async def nginx(
    directory: Path, content: str, *, module: str = "", **fields: Any
) -> AsyncIterator[int]:
    """Run nginx on a socket that already listens. Yield the port."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        os.set_inheritable(listening.fileno(), True)
        content = content.format(directory=directory, port=port, **fields)
        config = NGINX.format(directory=directory, module=module, content=content)
        (directory / "nginx.conf").write_text(config)
        async with running(
            *("nginx", "-c", directory / "nginx.conf", "-p", directory, "-e", "stderr"),
            env={**os.environ, "NGINX": f"{listening.fileno()};"},  # nginx inherits the socket
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        ):
            yield port


@pytest.mark.skipif(not STREAM_MODULE.exists(), reason="libnginx-mod-stream is not installed")
@pytest.mark.parametrize("is_tls", [False, True])
async def test_behind_nginx_each_client_has_its_own_address(
    is_tls: bool, tmp_path: Path, authority: Authority
) -> None:
    async def handler(sock: Socket) -> None:
        header = sock.proxy_header
        assert header == ProxyHeader(version=1, source=sock.getpeer(), destination=sock.getlocal())
        await sock.send(str(sock.getpeer()).encode(), b" ", str(sock.getlocal()).encode())

    server_tls = authority.server_tls("localhost") if is_tls else None
    async with serving(handler, tls=server_tls, trusted_proxies=["127.0.0.1"]) as s:
        module = f"load_module {STREAM_MODULE};"
        async with nginx(tmp_path, STREAM, module=module, backend=s.server.port) as port:
            tls = authority.client_tls("localhost") if is_tls else None
            async with await trisock.connect("127.0.0.1", port, tls=tls) as sock:
                assert await read_all(sock) == f"{sock.getlocal()} {sock.getpeer()}".encode()


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize(
    "ends",
    [
        (Address("192.0.2.1", 50000), Address("198.51.100.2", 443)),
        (Address("2001:db8::1", 50000), Address("2001:db8::2", 443)),
    ],
)
async def test_nginx_accepts_the_header_that_connect_sends(
    version: Any, ends: tuple[Address, Address], tmp_path: Path
) -> None:
    tlvs = ((2, b"example.org"), (0xE0, bytes(500))) if version == 2 else ()
    header = ProxyHeader(version=version, source=ends[0], destination=ends[1], tlvs=tlvs)
    async with nginx(tmp_path, HTTP) as port:
        async with await trisock.connect("127.0.0.1", port, proxy_header=header) as sock:
            await sock.send(b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
            response = await read_all(sock)
    source, destination = ends
    if version == 2:
        assert response.endswith(f"{source.host} {source.port} {destination.host}".encode())
    else:  # nginx does not shorten an address from a version 1 header
        assert f" {source.port} ".encode() in response
