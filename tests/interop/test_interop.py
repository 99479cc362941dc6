"""curl, OpenSSL and nginx as peers.

See also ``test_smtp_examples.py`` (``openssl s_client -starttls smtp`` and ``smtplib``) and
``test_close.py`` (curl sends a POST that the server does not read).
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing, read_all
from helpers.programs import curl, lines_of, running
from helpers.tls_programs import Case, openssl_client
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError
from trisock.testing import Authority, serving, socket_pair


async def http(sock: Socket) -> None:
    """Answer one request."""
    head = await sock.recv_until(b"\r\n\r\n")
    body = b"body of " + head.split()[1]
    await sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)


# ---- curl ----


@pytest.mark.needs("curl")
async def test_curl_fetches_over_http_and_verified_https(
    pem: Path, other_authority: Authority
) -> None:
    tls = ServerTLS(
        Certificate.from_files(pem / "chain.pem", pem / "key.pem"), alpn_protocols=["http/1.1"]
    )
    (pem / "other.pem").write_bytes(other_authority.ca)
    async with serving(http, host=None) as plain, serving(http, host=None, tls=tls) as secure:
        for host in ("127.0.0.1", "[::1]", "localhost"):
            done = await curl(f"http://{host}:{plain.server.port}/plain")
            assert (done.returncode, done.stdout) == (0, b"body of /plain")
        for options in (["--tlsv1.3"], ["--tls-max", "1.2"]):
            done = await curl(
                *options,
                "--cacert",
                f"{pem}/ca.pem",
                f"https://localhost:{secure.server.port}/secure",
            )
            assert (done.returncode, done.stdout) == (0, b"body of /secure")
        done = await curl(
            "--cacert", f"{pem}/other.pem", f"https://localhost:{secure.server.port}/"
        )
        assert done.returncode == 60  # the peer's certificate cannot be authenticated
    assert secure.server.stats() == trisock.ServerStats(accepted=3, failed_handshakes=1)


# ---- openssl ----


@contextlib.asynccontextmanager
async def s_client(pem: Path) -> AsyncIterator[tuple[trio.abc.SendStream, trio.Process, Socket]]:
    """Run s_client with TLS 1.3. Yield its stdin, its process, and the accepted connection."""
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        command = openssl_client(Case("TLSv1.3"), listener.port, pem / "ca.pem", None)
        pipe = subprocess.PIPE
        async with running(*command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL) as client:
            assert client.stdin is not None
            async with closing(sock := await listener.accept()):
                yield client.stdin, client, sock


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("cancel_after", [None, 0, 1, 2, 3, 4])
async def test_cancelling_a_read_during_a_key_update_loses_nothing(
    cancel_after: int | None, pem: Path, server_tls: ServerTLS
) -> None:
    """The peer requests new keys (RFC 8446, section 4.6.3), and immediately sends data."""
    async with s_client(pem) as (stdin, client, sock):
        await sock.starttls(server_tls)
        await stdin.send_all(b"K\n")
        await trio.lowlevel.wait_readable(sock.fileno())
        assert await sock.peek() is None  # a key update is not data
        await stdin.send_all(b"K\n")
        await trio.lowlevel.wait_readable(sock.fileno())
        await stdin.send_all(b"hello\n")
        received = b""

        async def read() -> None:
            nonlocal received
            received += await sock.recv()

        if cancel_after is not None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                for _ in range(cancel_after):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
        received += await sock.recv_exactly(6 - len(received))
        assert received == b"hello\n"
        await sock.send(b"with new keys\n")
        assert client.stdout is not None
        async with contextlib.aclosing(lines_of(client.stdout)) as lines:
            async for line in lines:
                if line == b"with new keys":
                    break


@pytest.mark.needs("openssl")
async def test_garbage_after_a_key_update_raises_tls_error(
    pem: Path, server_tls: ServerTLS
) -> None:
    async with s_client(pem) as (stdin, _, from_client):
        to_server, server = await socket_pair()
        async with closing(to_server, server), trio.open_nursery() as nursery:

            async def forward(source: Socket, target: Socket) -> None:
                async for chunk in source:
                    await target.send(chunk)

            async def expect_failure() -> None:
                with pytest.raises(TLSError, match="forged or damaged"):
                    await server.recv()
                nursery.cancel_scope.cancel()

            nursery.start_soon(forward, to_server, from_client)
            async with trio.open_nursery() as handshake:
                handshake.start_soon(forward, from_client, to_server)
                await server.starttls(server_tls)
                handshake.cancel_scope.cancel()
            nursery.start_soon(expect_failure)
            for _ in range(2):  # OpenSSL answers the first update when it reads the second
                await stdin.send_all(b"K\n")
                await to_server.send(await from_client.recv())
                await trio.testing.wait_all_tasks_blocked(0.01)
            await to_server.send(b"\x17\x03\x03\x00\x20" + bytes(32))


# ---- nginx ----

NGINX = """
daemon off;
worker_processes 1;
error_log stderr crit;
pid {directory}/nginx.pid;
events {{}}
http {{
    access_log off;
    client_body_temp_path {directory}/body;
    proxy_temp_path {directory}/proxy;
    fastcgi_temp_path {directory}/fastcgi;
    uwsgi_temp_path {directory}/uwsgi;
    scgi_temp_path {directory}/scgi;
    server {{
        listen 127.0.0.1:{port} ssl;
        ssl_certificate {directory}/chain.pem;
        ssl_certificate_key {directory}/key.pem;
        location / {{ return 200 "hello from nginx\\n"; }}
    }}
}}
"""


@pytest.mark.needs("nginx")
async def test_a_client_fetches_only_from_a_verified_nginx(
    pem: Path, authority: Authority, other_authority: Authority
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        (pem / "nginx.conf").write_text(NGINX.format(directory=pem, port=port))
        os.set_inheritable(listening.fileno(), True)
        async with running(
            *("nginx", "-c", pem / "nginx.conf", "-p", pem, "-e", "stderr"),
            env={**os.environ, "NGINX": f"{listening.fileno()};"},  # nginx inherits the socket
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        ):
            for tls in (ClientTLS(ca=authority.ca), authority.client_tls("localhost")):
                async with await trisock.connect("127.0.0.1", port, tls=tls) as sock:
                    await sock.send(
                        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                    )
                    response = await read_all(sock)
                    assert response.endswith(b"\r\n\r\nhello from nginx\n")
            for tls, words in [
                (ClientTLS(ca=other_authority.ca), "local issuer"),
                (authority.client_tls("example.net"), "Hostname mismatch"),
            ]:
                with pytest.raises(TLSError, match=words):
                    await trisock.connect("127.0.0.1", port, tls=tls)
