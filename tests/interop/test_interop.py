"""Real programs that no one here wrote, as clients and as servers.

(The SMTP example is talked to by ``openssl s_client -starttls smtp`` and ``smtplib`` in
``test_smtp_examples.py``; curl meets an unread POST in ``test_close.py``.)
"""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
from pathlib import Path

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import Authority
from helpers.pairs import all_served, closing, tcp_pair
from helpers.programs import lines_of, running
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError


async def http(sock: Socket) -> None:
    """Answer one request."""
    head = await sock.recv_until(b"\r\n\r\n")
    body = b"you asked for " + head.split()[1]
    await sock.send(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body), body)


# ---- curl ----


async def curl(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
    return await trio.run_process(
        ["curl", "--silent", "--show-error", "--noproxy", "*", *map(str, arguments)],
        capture_stdout=True,
        capture_stderr=True,
        check=False,
    )


@pytest.mark.needs("curl")
async def test_curl_over_http_and_https_and_with_a_wrong_ca(
    pem: Path, other_authority: Authority
) -> None:
    tls = ServerTLS(
        Certificate.from_files(pem / "chain.pem", pem / "key.pem"), alpn_protocols=["http/1.1"]
    )
    (pem / "other.pem").write_bytes(other_authority.pem)
    async with trio.open_nursery() as nursery:
        plain = await trisock.bind(nursery, 0, http)
        secure = await trisock.bind(nursery, 0, http, tls=tls)
        for host in ("127.0.0.1", "[::1]", "localhost"):
            done = await curl(f"http://{host}:{plain.port}/plain")
            assert (done.returncode, done.stdout) == (0, b"you asked for /plain")
        for options in (["--tlsv1.3"], ["--tls-max", "1.2"]):
            done = await curl(
                *options, "--cacert", pem / "ca.pem", f"https://localhost:{secure.port}/secure"
            )
            assert (done.returncode, done.stdout) == (0, b"you asked for /secure")
        done = await curl("--cacert", pem / "other.pem", f"https://localhost:{secure.port}/")
        assert done.returncode == 60  # "peer certificate cannot be authenticated"
        await all_served(secure, 3)
        secure.stop()
        plain.stop()
        await secure.wait_closed()
        assert secure.stats() == trisock.ServerStats(accepted=3, failed_handshakes=1)


# ---- openssl ----


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
async def test_an_openssl_server(version: str, pem: Path, authority: Authority) -> None:
    command = ["openssl", "s_server", "-accept", "127.0.0.1:0", "-rev", version]
    files = ["-cert", pem / "chain.pem", "-key", pem / "key.pem"]
    async with running(
        *command, *files, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as server:
        assert server.stdout is not None
        async with contextlib.aclosing(lines_of(server.stdout)) as lines:
            async for line in lines:
                if line.startswith(b"ACCEPT "):
                    port = int(line.rpartition(b":")[2])
                    break
        with pytest.raises(TLSError, match="Hostname mismatch"):
            await trisock.connect("127.0.0.1", port, tls=ClientTLS("example.net", ca=authority.pem))
        async with await trisock.connect(
            "127.0.0.1", port, tls=ClientTLS(ca=authority.pem)
        ) as sock:
            assert sock.tls is not None
            assert sock.tls.version == {"-tls1_2": "TLSv1.2", "-tls1_3": "TLSv1.3"}[version]
            await sock.send(b"hello\n")
            assert await sock.recv_until(b"\n") == b"olleh\n"


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("cancel_after", [None, 0, 1, 2, 3, 4])
async def test_a_key_update_loses_nothing_also_when_the_read_is_cancelled(
    cancel_after: int | None, pem: Path, server_tls: ServerTLS
) -> None:
    """RFC 8446, section 4.6.3: the peer asks us to change keys, and sends data right behind."""
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        where = f"127.0.0.1:{listener.port}"
        async with running(
            *("openssl", "s_client", "-connect", where, "-tls1_3", "-CAfile", pem / "ca.pem"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as client:
            assert client.stdin is not None
            assert client.stdout is not None
            sock = await listener.accept()
            async with closing(sock):
                await sock.starttls(server_tls)
                await client.stdin.send_all(b"K\n")
                await trio.lowlevel.wait_readable(sock.fileno())
                assert await sock.peek() is None  # it was no data
                await client.stdin.send_all(b"K\n")
                await trio.lowlevel.wait_readable(sock.fileno())
                await client.stdin.send_all(b"hello\n")
                got = b""
                if cancel_after is not None:
                    async with trio.open_nursery() as nursery:

                        async def read() -> None:
                            nonlocal got
                            got += await sock.recv()

                        nursery.start_soon(read)
                        for _ in range(cancel_after):
                            await trio.lowlevel.checkpoint()
                        nursery.cancel_scope.cancel()
                got += await sock.recv_exactly(6 - len(got))
                assert got == b"hello\n"
                await sock.send(b"with new keys\n")
                async with contextlib.aclosing(lines_of(client.stdout)) as lines:
                    async for line in lines:
                        if line == b"with new keys":
                            break


@pytest.mark.needs("openssl")
async def test_garbage_behind_a_key_update_is_a_tls_error(pem: Path, server_tls: ServerTLS) -> None:
    async with await trisock.listen(0, host="127.0.0.1") as listener:
        where = f"127.0.0.1:{listener.port}"
        async with running(
            *("openssl", "s_client", "-connect", where, "-tls1_3", "-CAfile", pem / "ca.pem"),
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        ) as client:
            assert client.stdin is not None
            in_the_middle = await listener.accept()
            ours, theirs = await tcp_pair()
            async with closing(in_the_middle, ours, theirs), trio.open_nursery() as nursery:

                async def back() -> None:
                    async for chunk in ours:
                        await in_the_middle.send(chunk)

                async def forth() -> None:
                    async for chunk in in_the_middle:
                        await ours.send(chunk)

                nursery.start_soon(back)
                with trio.CancelScope() as passing_on:
                    async with trio.open_nursery() as inner:
                        inner.start_soon(forth)
                        await theirs.starttls(server_tls)
                        passing_on.cancel()

                async def expect_failure() -> None:
                    with pytest.raises(TLSError, match="forged or damaged"):
                        await theirs.recv()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(expect_failure)
                for _ in range(2):  # OpenSSL answers the first when it meets the second
                    await client.stdin.send_all(b"K\n")
                    await ours.send(await in_the_middle.recv())
                    await trio.testing.wait_all_tasks_blocked(0.01)
                await ours.send(b"\x17\x03\x03\x00\x20" + bytes(32))


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
async def test_a_stock_nginx_with_tls(
    pem: Path, authority: Authority, other_authority: Authority
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        (pem / "nginx.conf").write_text(NGINX.format(directory=pem, port=port))
        os.set_inheritable(listening.fileno(), True)
        async with running(
            *("nginx", "-c", pem / "nginx.conf", "-p", pem, "-e", "stderr"),
            env={**os.environ, "NGINX": f"{listening.fileno()};"},  # it takes the socket over
            pass_fds=[listening.fileno()],
            stderr=subprocess.DEVNULL,
        ):
            for tls in (ClientTLS(ca=authority.pem), ClientTLS("localhost", ca=authority.pem)):
                async with await trisock.connect("127.0.0.1", port, tls=tls) as sock:
                    await sock.send(
                        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                    )
                    answer = b"".join([chunk async for chunk in sock])
                    assert answer.endswith(b"\r\n\r\nhello from nginx\n")
            for tls, words in [
                (ClientTLS(ca=other_authority.pem), "local issuer"),
                (ClientTLS("example.net", ca=authority.pem), "Hostname mismatch"),
            ]:
                with pytest.raises(TLSError, match=words):
                    await trisock.connect("127.0.0.1", port, tls=tls)
