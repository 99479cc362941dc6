"""The examples as their users run them: programs of their own, driven by clients of others."""

from __future__ import annotations

import errno
import os
import pathlib
import signal
import smtplib
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import trisock
from helpers.authority import Authority
from helpers.client_hellos import client_hello, handshake_of, hello_with, name_extension, split
from helpers.examples import Running, command, name_or_value_error, running, sni_router, started
from helpers.pairs import closing, read_all, tcp_pair
from helpers.programs import curl, run
from trisock import ClientTLS, Socket

SERVERS = [
    "echo_server",
    "https_server",
    "smtp_server",
    "http_and_https",
    "sni_router",
    "chat_room",
]
TLS_SERVERS = ["https_server", "smtp_server", "http_and_https"]


def trusting(ca: str, **options: Any) -> ClientTLS:
    return ClientTLS("localhost", ca=pathlib.Path(ca).read_bytes(), **options)


# ---- all of them ----


@pytest.mark.parametrize("name", SERVERS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_stops_a_server_with_status_0_and_no_complaint(
    name: str, signum: signal.Signals
) -> None:
    async with running(name) as server:
        server.ask_to_stop(signum)
        await server.stop()
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", server.port)


@pytest.mark.parametrize("name", [*SERVERS, "echo_client"])
async def test_help_tells_how_to_run_it(name: str) -> None:
    result = await run(*command(name, "--help"))
    assert result.returncode == 0
    assert f"python examples/{name}.py" in result.stdout.decode()


@pytest.mark.parametrize("name", TLS_SERVERS)
async def test_without_a_certificate_and_trustme_it_says_what_to_do(
    name: str, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trustme.py").write_text("raise ImportError")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    result = await run(*command(name, "--port", "0"))
    assert result.returncode == 1
    complaint = result.stderr.decode()
    assert "install trustme" in complaint
    assert complaint.count("\n") == 1  # no traceback


@pytest.mark.parametrize("name", TLS_SERVERS)
async def test_a_tls_server_takes_a_certificate_and_its_key_from_one_file(
    name: str, tmp_path: pathlib.Path, authority: Authority
) -> None:
    path = tmp_path / "both.pem"
    authority.ca.issue_cert("given.example").private_key_and_cert_chain_pem.write_to_path(str(path))
    async with running(name, "--cert", str(path)) as server:
        async with await trisock.connect("127.0.0.1", server.port) as sock:
            if name == "smtp_server":
                await reply(sock)
                assert await codes(sock, b"STARTTLS\r\n") == [220]
            await sock.starttls(ClientTLS("given.example", ca=authority.pem))


# ---- echo_server, echo_client ----


async def test_echo_server_returns_every_byte_and_ends_when_the_client_does() -> None:
    sent = bytes(range(256)) * 4096
    async with running("echo_server") as server:
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            received = bytearray()

            async def send() -> None:
                await stream.send_all(sent)
                await stream.send_eof()

            async with trio.open_nursery() as nursery:
                nursery.start_soon(send)
                async for chunk in stream:
                    received += chunk
        assert received == sent


async def test_echo_client_sends_its_arguments_and_prints_the_answers() -> None:
    async with running("echo_server") as server:
        result = await run(*command("echo_client", "--port", str(server.port), "one", "two"))
    assert (result.returncode, result.stdout, result.stderr) == (0, b"one\ntwo\n", b"")


async def test_echo_client_sends_standard_input_and_prints_the_answers() -> None:
    # More than all buffers between the two hold: it must read while it sends.
    sent = b"".join(b"line %d\n" % number for number in range(500_000))
    async with running("echo_server") as server:
        result = await run(*command("echo_client", "--port", str(server.port)), stdin=sent)
    assert (result.returncode, result.stderr) == (0, b"")
    assert result.stdout == sent


async def test_echo_client_ends_with_the_server_while_standard_input_is_open() -> None:
    async with await trisock.listen(0, "127.0.0.1") as listener:
        arguments = command("echo_client", "--port", str(listener.port))
        async with started(arguments, stdin=subprocess.PIPE) as client:
            assert client.process.stdin is not None
            await client.process.stdin.send_all(b"hello\n")
            async with await listener.accept() as sock:
                assert await sock.recv_until(b"\n") == b"hello\n"
                await sock.send(b"goodbye\n")
            assert await client.line() == "goodbye"
            assert await client.process.wait() == 0
            assert client._read_stderr() == b""


async def test_echo_client_says_in_one_line_that_nobody_listens() -> None:
    async with await trisock.listen(0, "127.0.0.1") as listener:
        pass
    result = await run(*command("echo_client", "--port", str(listener.port), "hello"))
    assert result.returncode == 1
    assert "Connection refused" in result.stderr.decode()
    assert result.stderr.count(b"\n") == 1


# ---- https_server ----


@pytest.mark.needs("curl")
async def test_https_server_answers_curl_which_verifies_it(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        url = f"https://127.0.0.1:{server.port}/some/path"
        result = await curl("--cacert", ca, "--write-out", "%{http_version} %{http_code}", url)
        assert result.stderr == b""
        assert result.returncode == 0
        assert result.stdout == b"Hello! You asked for /some/path\n1.1 200"


@pytest.mark.needs("curl")
async def test_https_server_is_refused_by_a_curl_that_trusts_another_ca(
    ca: str, other_ca: str
) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        url = f"https://127.0.0.1:{server.port}/"
        assert (await curl("--cacert", other_ca, url)).returncode == 60
        assert (await curl("--cacert", ca, url)).returncode == 0  # and lives on


@pytest.mark.needs("curl")
async def test_https_server_keeps_a_connection_for_the_next_request(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        url = f"https://127.0.0.1:{server.port}/"
        result = await curl("--cacert", ca, "--write-out", "%{num_connects}\n", url, url, url)
        assert result.stdout.splitlines()[1::2] == [b"1", b"0", b"0"]


@pytest.mark.needs("curl")
async def test_https_server_reads_a_body_that_waits_to_be_asked_for(ca: str) -> None:
    body = bytes(range(256)) * 3000
    async with running("https_server", "--write-ca", ca) as server:
        url = f"https://127.0.0.1:{server.port}/"
        result = await curl(
            "--cacert", ca, "--data-binary", "@-", "--header", "Expect: 100-continue",
            "--expect100-timeout", "30", "--verbose", url, stdin=body,
        )  # fmt: skip
        assert result.returncode == 0
        assert result.stdout == body
        assert b"< HTTP/1.1 100 Continue" in result.stderr


@pytest.mark.needs("openssl")
async def test_https_server_says_to_openssl_by_alpn_that_it_speaks_http(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        result = await run(
            "openssl", "s_client", "-connect", f"127.0.0.1:{server.port}", "-CAfile", ca,
            "-verify_return_error", "-verify_ip", "127.0.0.1", "-alpn", "h2,http/1.1",
            "-ign_eof", "-nocommands",
            stdin=b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        )  # fmt: skip
        assert result.returncode == 0
        assert b"ALPN protocol: http/1.1" in result.stdout
        assert b"HTTP/1.1 200 OK\r\n" in result.stdout


async def ask(server: Running, ca: str, request: bytes) -> bytes:
    """Send a request and return all that comes until the connection ends."""
    async with await trisock.connect("127.0.0.1", server.port, tls=trusting(ca)) as sock:
        await sock.send(request)
        return await read_all(sock)


async def test_https_server_answers_requests_that_come_at_once_in_their_order(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        answers = await ask(
            server,
            ca,
            b"GET /one HTTP/1.1\r\nHost: x\r\n\r\n"
            b"\r\nPOST /two HTTP/1.1\r\nHost: x\r\nContent-Length: 7\r\n\r\nGET /no"
            b"GET /three HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
            b"GET /never HTTP/1.1\r\nHost: x\r\n\r\n",
        )
        bodies = [part.split(b"\r\n\r\n")[1] for part in answers.split(b"HTTP/1.1 200 OK\r\n")[1:]]
        assert bodies == [
            b"Hello! You asked for /one\n",
            b"GET /no",
            b"Hello! You asked for /three\n",
        ]


async def test_https_server_answers_head_with_the_length_of_a_body_and_none(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        answer = await ask(server, ca, b"HEAD / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"\r\nContent-Length: 23\r\n" in answer
        assert answer.endswith(b"\r\n\r\n")


async def test_https_server_survives_clients_that_vanish(ca: str) -> None:
    beginnings = [b"", b"GET / HT", b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nx"]
    async with running("https_server", "--write-ca", ca) as server:
        for sent in beginnings:
            for leave in (Socket.close, Socket.abort):
                sock = await trisock.connect("127.0.0.1", server.port, tls=trusting(ca))
                await sock.send(sent)
                if (ending := leave(sock)) is not None:
                    await ending
        request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
        assert (await ask(server, ca, request)).startswith(b"HTTP/1.1 200 OK\r\n")


BAD_REQUESTS = [
    (b"SSH-2.0-OpenSSH\r\n\r\n", 400),
    (b"\r\n\r\n", 400),
    (b"GET / HTTP/2.0\r\nHost: x\r\n\r\n", 400),
    (b"GET  / HTTP/1.1\r\nHost: x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost : x\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\r\n folded\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\nX: y\r\n\r\n", 400),
    (b"GET / HTTP/1.1\r\nHost: x\x00\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 1\r\n\r\nx", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: +1\r\n\r\nx", 400),
    (b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 1048577\r\n\r\n", 413),
    (b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
    (b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 501),
    (b"DELETE / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 501),
]


async def test_https_server_refuses_bad_requests_with_a_status_and_ends(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        for request, status in BAD_REQUESTS:
            # What comes behind a request that was not understood is no request.
            answer = await ask(server, ca, request + b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert answer.startswith(b"HTTP/1.1 %d " % status), request
            assert answer.count(b"HTTP/1.1 ") == 1, request
            assert b"\r\nConnection: close\r\n" in answer


async def test_https_server_ends_idle_connections_cleanly_when_it_stops(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        async with await trisock.connect("127.0.0.1", server.port, tls=trusting(ca)) as sock:
            await sock.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
            assert await sock.recv_until(b"for /\n")
            server.ask_to_stop()
            assert await sock.recv() == b""  # with close_notify, or it would be a TLSError


async def test_https_server_finishes_a_request_that_has_begun_when_it_stops(ca: str) -> None:
    async with running("https_server", "--write-ca", ca) as server:
        idle = await trisock.connect("127.0.0.1", server.port, tls=trusting(ca))
        async with idle, await trisock.connect("127.0.0.1", server.port, tls=trusting(ca)) as sock:
            await sock.send(b"POST / HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\n")
            await sock.send(b"Content-Length: 5\r\n\r\n")
            assert await sock.recv_until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            server.ask_to_stop()
            assert await idle.recv() == b""  # it is stopping
            await sock.send(b"hello")
            answer = await read_all(sock)
            assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
            assert b"\r\nConnection: close\r\n" in answer
            assert answer.endswith(b"\r\n\r\nhello")


# ---- http_and_https ----


@pytest.mark.needs("curl")
async def test_one_port_serves_http_and_https(ca: str, other_ca: str) -> None:
    async with running("http_and_https", "--write-ca", ca) as server:
        for _ in range(2):
            result = await curl(f"http://127.0.0.1:{server.port}/")
            assert (result.returncode, result.stdout) == (0, b"HTTP, in the clear\n")
            result = await curl("--cacert", ca, f"https://127.0.0.1:{server.port}/")
            assert (result.returncode, result.stdout) == (0, b"HTTPS by TLSv1.3\n")
            result = await curl("--cacert", other_ca, f"https://127.0.0.1:{server.port}/")
            assert result.returncode == 60


@pytest.mark.parametrize(
    ("sent", "answer"),
    [
        (b"", b""),
        (b"GE", b""),
        (b"hello\r\n\r\n", b"HTTP/1.1 400 Bad Request\r\n"),
        (b"x" * 20_000, b"HTTP/1.1 400 Bad Request\r\n"),
        (b"\x16\x03\x01\x00\x05hello", b"\x15\x03"),  # an alert
    ],
)
async def test_one_port_survives_what_is_neither_http_nor_https(
    sent: bytes, answer: bytes, ca: str
) -> None:
    async with running("http_and_https", "--write-ca", ca) as server:
        async with await trisock.connect("127.0.0.1", server.port) as sock:
            await sock.send(sent)
            await sock.send_eof()
            received = await read_all(sock)
            assert received.startswith(answer)
            assert bool(received) == bool(answer)
        async with await trisock.connect("127.0.0.1", server.port, tls=trusting(ca)) as sock:
            await sock.send(b"GET / HTTP/1.1\r\n\r\n")
            assert (await read_all(sock)).endswith(b"HTTPS by TLSv1.3\n")


# ---- smtp_server ----

MAIL = b"Subject: dots\r\n\r\n.\r\n..\r\n.hidden\r\nend\r\n"


def client_context(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca)


@contextmanager
def smtp_client(port: int) -> Iterator[smtplib.SMTP]:
    # A name of its own, or smtplib would ask the network for one.
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client", timeout=30) as client:
        yield client


async def in_thread(function: Callable[[], None]) -> None:
    await trio.to_thread.run_sync(function)


async def test_smtp_server_takes_mail_from_smtplib_by_starttls(ca: str) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:

        def send_mail() -> None:
            with smtp_client(server.port) as client:
                client.ehlo()
                assert client.has_extn("starttls")
                client.starttls(context=client_context(ca))
                client.ehlo()
                assert not client.has_extn("starttls")
                assert client.has_extn("size")
                for recipients in (["a@example.org"], ["b@example.org", "c@example.org"]):
                    client.sendmail("me@example.org", recipients, MAIL)

        await in_thread(send_mail)
        size = f"{len(MAIL)} bytes, TLSv1.3"
        assert await server.line() == f"mail from <me@example.org> to <a@example.org>: {size}"
        assert (
            await server.line()
            == f"mail from <me@example.org> to <b@example.org>, <c@example.org>: {size}"
        )


async def test_smtp_server_forgets_at_starttls_what_was_said_before(ca: str) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:

        def upgrade() -> None:
            with smtp_client(server.port) as client:
                client.ehlo()
                assert client.mail("me@example.org")[0] == 250
                assert client.rcpt("you@example.org")[0] == 250
                client.starttls(context=client_context(ca))
                assert client.docmd("DATA")[0] == 503
                assert client.docmd("MAIL FROM:<me@example.org>")[0] == 503  # no EHLO yet
                assert client.docmd("STARTTLS")[0] == 503
                client.ehlo()
                assert client.docmd("MAIL FROM:<me@example.org>")[0] == 250

        await in_thread(upgrade)


async def test_smtp_server_is_refused_by_smtplib_with_another_ca(ca: str, other_ca: str) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:

        def upgrade() -> None:
            with smtp_client(server.port) as client:
                client.starttls(context=client_context(other_ca))

        with pytest.raises(ssl.SSLCertVerificationError):
            await in_thread(upgrade)


@pytest.mark.needs("openssl")
async def test_smtp_server_speaks_starttls_with_openssl(ca: str) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:
        result = await run(
            "openssl", "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{server.port}",
            "-CAfile", ca, "-verify_return_error", "-verify_ip", "127.0.0.1",
            "-ign_eof", "-nocommands",
            stdin=b"EHLO client\r\nQUIT\r\n",
        )  # fmt: skip
        assert result.returncode == 0
        assert b"Verify return code: 0 (ok)" in result.stdout
        assert b"250-PIPELINING\r\n" in result.stdout
        assert b"STARTTLS" not in result.stdout
        assert b"221 goodbye\r\n" in result.stdout


@pytest.mark.needs("openssl")
async def test_smtp_server_is_refused_by_an_openssl_that_trusts_another_ca(
    ca: str, other_ca: str
) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:
        result = await run(
            "openssl", "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{server.port}",
            "-CAfile", other_ca, "-verify_return_error", stdin=b"QUIT\r\n",
        )  # fmt: skip
        assert result.returncode == 1
        assert b"221" not in result.stdout


@pytest.mark.needs("curl")
async def test_smtp_server_takes_mail_from_curl(ca: str) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:
        result = await curl(
            "--ssl-reqd", "--cacert", ca, f"smtp://127.0.0.1:{server.port}/client",
            "--mail-from", "me@example.org", "--mail-rcpt", "you@example.org",
            "--upload-file", "-", stdin=MAIL,
        )  # fmt: skip
        assert (result.returncode, result.stderr) == (0, b"")
        assert await server.line() == (
            f"mail from <me@example.org> to <you@example.org>: {len(MAIL)} bytes, TLSv1.3"
        )


async def smtp_connect(server: Running) -> Socket:
    """Connect and be greeted."""
    sock = await trisock.connect("127.0.0.1", server.port)
    assert (await reply(sock)).startswith("220 ")
    return sock


async def reply(sock: Socket) -> str:
    """Return a reply, of whatever number of lines, as text."""
    lines = []
    async for line in sock.lines(delimiter=b"\r\n"):
        lines.append(line.decode())
        if line[3:4] == b" ":
            return "\n".join(lines)
    raise AssertionError("the server has closed the connection")


async def codes(sock: Socket, sent: bytes) -> list[int]:
    """Send a line or more, at once, and return the codes of as many replies."""
    await sock.send(sent)
    return [int((await reply(sock))[:3]) for _ in range(sent.count(b"\r\n"))]


async def test_what_is_slipped_in_behind_starttls_is_never_obeyed(ca: str) -> None:
    async with running("smtp_server", "--write-ca", ca) as server:
        async with await smtp_connect(server) as sock:
            assert await codes(sock, b"EHLO client\r\n") == [250]
            await sock.send(
                b"STARTTLS\r\nEHLO evil\r\nMAIL FROM:<evil@example.org>\r\nRCPT TO:<you>\r\n"
            )
            assert (await reply(sock)).startswith("220 ")
            with pytest.raises(trisock.TLSError):
                await sock.starttls(trusting(ca))
        # All of it in the clear: no answer to it but the alert, and the end.
        async with await smtp_connect(server) as sock:
            await sock.send(b"STARTTLS\r\nNOOP\r\nQUIT\r\n")
            assert (await reply(sock)).startswith("220 ")
            rest = await read_all(sock)
            assert rest == b"" or rest.startswith(b"\x15\x03")
        # The next client is served.
        async with await smtp_connect(server) as sock:
            assert await codes(sock, b"STARTTLS\r\n") == [220]
            await sock.starttls(trusting(ca))
            assert await codes(sock, b"QUIT\r\n") == [221]


async def test_smtp_server_refuses_starttls_with_a_parameter_and_stays_in_the_clear() -> None:
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            assert await codes(sock, b"EHLO client\r\nSTARTTLS now\r\nNOOP\r\n") == [250, 501, 250]


async def test_smtp_server_knows_its_commands_and_their_order() -> None:
    dialogue = [
        (b"MAIL FROM:<me@example.org>\r\n", 503),
        (b"EHLO\r\n", 501),
        (b"HELO client\r\n", 250),
        (b"RCPT TO:<you@example.org>\r\n", 503),
        (b"DATA\r\n", 503),
        (b"mail from:<me@example.org>\r\n", 250),
        (b"MAIL FROM:<me@example.org>\r\n", 503),
        (b"RCPT TO:<>\r\n", 501),
        (b"RCPT you@example.org\r\n", 501),
        (b"RCPT TO:<you@example.org>\r\n", 250),
        (b"DATA now\r\n", 501),
        (b"RSET\r\n", 250),
        (b"DATA\r\n", 503),
        (b"MAIL FROM:<me@example.org> SIZE=4194305\r\n", 552),
        (b"MAIL FROM:<me@example.org> COLOUR=red\r\n", 501),
        (b"MAIL FROM:<a b@example.org>\r\n", 501),
        (b"MAIL FROM:<a\x1b[31m@example.org>\r\n", 501),
        (b"MAIL FROM:<> SIZE=100 BODY=8BITMIME\r\n", 250),
        (b"VRFY you\r\n", 252),
        (b"NOOP whatever\r\n", 250),
        (b"HELP\r\n", 500),
        (b"\xff\xfe\r\n", 500),
        (b"\r\n", 500),
        (b"QUIT\r\n", 221),
    ]
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            for line, code in dialogue:
                assert await codes(sock, line) == [code], line
            assert await sock.recv() == b""
        async with await smtp_connect(server) as sock:  # and all of it in one segment
            lines, expected = zip(*dialogue, strict=True)
            assert await codes(sock, b"".join(lines)) == list(expected)


async def test_smtp_server_drops_a_line_that_is_too_long_and_goes_on() -> None:
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            for size in (511, 65534, 65535, 65536, 1_000_000):
                assert await codes(sock, b"NOOP " + b"x" * (size - 5) + b"\r\nNOOP\r\n") == [
                    500,
                    250,
                ]
            assert await codes(sock, b"NOOP " + b"x" * 505 + b"\r\n") == [250]


async def test_smtp_server_drops_a_message_that_is_too_large_and_goes_on() -> None:
    envelope = b"EHLO client\r\nMAIL FROM:<me@example.org>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n"
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            for text, code in ((b"x" * 5_000_000, 552), (b".." * 3, 250), (b"\r\n" * 9, 250)):
                assert await codes(sock, envelope) == [250, 250, 250, 354]
                await sock.send(text, b"\r\n.\r\n")
                assert int((await reply(sock))[:3]) == code
        for size in (7, 20):
            assert (await server.line()).endswith(f": {size} bytes, in the clear")


async def test_only_a_dot_between_two_crlf_ends_a_message() -> None:
    text = b"a\n.\nb\r\n.\nc\n.\r\nd\r.\re\r\n"
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            await sock.send(b"HELO x\r\nMAIL FROM:<a>\r\nRCPT TO:<b>\r\nDATA\r\n" + text + b".\r\n")
            assert [int((await reply(sock))[:3]) for _ in range(5)] == [250, 250, 250, 354, 250]
            # The dot at the start of a line, which a client should have doubled, is taken away.
            size = len(text) - 1
            assert await server.line() == f"mail from <a> to <b>: {size} bytes, in the clear"
            await sock.send(b"DATA\r\n")
            assert (await reply(sock)).startswith("503 ")
            await sock.send(b"MAIL FROM:<a>\r\nRCPT TO:<b>\r\nDATA\r\n.\r\n")
            assert [int((await reply(sock))[:3]) for _ in range(4)] == [250, 250, 354, 250]
            assert await server.line() == "mail from <a> to <b>: 0 bytes, in the clear"


async def test_smtp_server_survives_clients_that_vanish() -> None:
    beginnings = [b"", b"EHL", b"STARTTLS\r\n", b"STARTTLS\r\n\x16\x03\x01", b"x" * 1000]
    async with running("smtp_server") as server:
        for sent in beginnings:
            async with await smtp_connect(server) as sock:
                await sock.send(sent)
            sock = await smtp_connect(server)
            await sock.send(sent)
            sock.abort()
        async with await smtp_connect(server) as sock:
            assert await codes(sock, b"QUIT\r\n") == [221]


# ---- sni_router ----


def handshake_message(name: str | None) -> bytes:
    return handshake_of(client_hello(name))


@pytest.mark.parametrize("name", ["example.org", "EXAMPLE.org", "a.b-c.example", "x" * 63 + ".org"])
def test_server_name_is_what_a_real_client_asks_for(name: str) -> None:
    assert sni_router.server_name(handshake_message(name)) == name.lower()


def test_server_name_is_none_where_a_client_asks_for_none() -> None:
    assert sni_router.server_name(handshake_message(None)) is None
    assert sni_router.server_name(handshake_message("127.0.0.1")) is None
    assert sni_router.server_name(hello_with(None)) is None
    assert sni_router.server_name(hello_with(b"")) is None


@pytest.mark.parametrize(
    "message",
    [
        b"",
        b"\2" + handshake_message("example.org")[1:],
        handshake_message("example.org") + b"\0",
        handshake_message("example.org")[:-1],
        hello_with(name_extension(b"one.example", b"two.example")),
        hello_with(name_extension(b"one.example") + name_extension(b"two.example")),
        hello_with(name_extension(b"")),
        hello_with(name_extension(b"b\xc3\xbccher.example")),
        hello_with(name_extension(b"one.example\0.two.example")),
        hello_with(b"\0\0\0\2\0\5"),
        hello_with(b"\0\0\0\3\0\0\0"),
    ],
)
def test_server_name_refuses_what_can_be_read_in_two_ways(message: bytes) -> None:
    with pytest.raises(ValueError, match="ClientHello") as caught:
        sni_router.server_name(message)
    assert caught.type is ValueError


REAL_HELLO = handshake_message("some.example.org")


@settings(database=None, deadline=None)
@given(st.binary(max_size=300))
def test_server_name_raises_nothing_but_value_error_on_garbage(garbage: bytes) -> None:
    name_or_value_error(garbage)
    name_or_value_error(b"\1" + len(garbage).to_bytes(3, "big") + garbage)
    name_or_value_error(hello_with(garbage))
    name_or_value_error(hello_with(name_extension(garbage)))


@settings(database=None, deadline=None)
@given(
    st.integers(0, len(REAL_HELLO)),
    st.integers(0, len(REAL_HELLO)),
    st.binary(max_size=8),
)
def test_server_name_raises_nothing_but_value_error_on_a_damaged_hello(
    start: int, end: int, replacement: bytes
) -> None:
    name_or_value_error(REAL_HELLO[:start] + replacement + REAL_HELLO[end:])


@pytest.mark.needs("curl")
async def test_router_leads_curl_to_the_server_it_asks_for(
    tmp_path: pathlib.Path, authority: Authority, other_authority: Authority
) -> None:
    cas = []
    async with AsyncExitStack() as stack:
        routes = []
        for name, issuer in (("one.example", authority), ("two.example", other_authority)):
            cert, key, ca = (str(tmp_path / f"{name}.{kind}") for kind in ("cert", "key", "ca"))
            issued = issuer.ca.issue_cert(name)
            issued.cert_chain_pems[0].write_to_path(cert)
            issued.private_key_pem.write_to_path(key)
            issuer.ca.cert_pem.write_to_path(ca)
            cas.append(ca)
            backend = await stack.enter_async_context(
                running("https_server", "--cert", cert, "--key", key)
            )
            routes += ["--route", f"{name}=127.0.0.1:{backend.port}"]
        router = await stack.enter_async_context(running("sni_router", *routes))

        async def get(name: str, ca: str) -> subprocess.CompletedProcess[bytes]:
            return await curl(
                "--resolve", f"{name}:{router.port}:127.0.0.1", "--cacert", ca,
                "--data", f"for {name}", f"https://{name}:{router.port}/",
            )  # fmt: skip

        for _ in range(2):
            one, two = await get("one.example", cas[0]), await get("TWO.example", cas[1])
            assert (one.returncode, one.stdout) == (0, b"for one.example")
            assert (two.returncode, two.stdout) == (0, b"for TWO.example")
            assert (await get("one.example", cas[1])).returncode == 60
            assert (await get("two.example", cas[0])).returncode == 60


def pieces_of_hello(cut: int) -> list[bytes]:
    """Return a ClientHello in records of 50 bytes, cut into pieces."""
    return split(client_hello("echo.example", largest_record=50), cut)


@pytest.mark.parametrize("cut", [1, 7, 10_000])
async def test_router_passes_on_every_byte_and_the_end_of_each_side(cut: int) -> None:
    async with (
        running("echo_server") as backend,
        running("sni_router", "--route", f"Echo.Example=127.0.0.1:{backend.port}") as router,
        await trio.open_tcp_stream("127.0.0.1", router.port) as stream,
    ):
        pieces = pieces_of_hello(cut)
        rest = bytes(range(256)) * 10_000
        received = bytearray()

        async def send() -> None:
            for piece in pieces:
                await stream.send_all(piece)
            await stream.send_all(rest)
            await stream.send_eof()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(send)
            async for chunk in stream:  # ends: the echo server has seen our end, and we see its own
                received += chunk
        assert received == b"".join(pieces) + rest


async def test_router_ends_the_other_side_when_one_breaks() -> None:
    async with await trisock.listen(0, "127.0.0.1") as backend:
        async with running("sni_router", "--default", f"127.0.0.1:{backend.port}") as router:
            hello = client_hello("any.example")
            for broken in ("client", "backend"):
                client = await trisock.connect("127.0.0.1", router.port)
                await client.send(hello)
                inner = await backend.accept()
                async with client, inner:
                    assert await inner.recv_exactly(len(hello)) == hello
                    one, other = (client, inner) if broken == "client" else (inner, client)
                    one.abort()
                    assert await other.recv() == b""


async def test_router_lets_an_early_answer_through_to_a_client_that_is_still_sending() -> None:
    async with await trisock.listen(0, "127.0.0.1") as backend:
        async with running("sni_router", "--default", f"127.0.0.1:{backend.port}") as router:
            async with await trisock.connect("127.0.0.1", router.port) as client:
                await client.send(client_hello("any.example"))
                inner = await backend.accept()
                await inner.send(b"no need to go on")
                await inner.send_eof()
                assert await read_all(client) == b"no need to go on"
                await client.send(b"but I do")
                await client.send_eof()
                assert (await read_all(inner)).endswith(b"but I do")
                await inner.close()


GARBAGE = [
    b"GET / HTTP/1.1\r\nHost: one.example\r\n\r\n",
    b"\x15\x03\x01\x00\x02\x02\x28",
    b"\x16\x02\x00\x00\x05hello",
    b"\x16\x03\x01\x00\x00",
    b"\x16\x03\x01\xff\xff",
    b"\x16\x03\x01\x00\x04\x01\xff\xff\xff" + b"\x16\x03\x01\x10\x00" + b"x" * 4096 * 5,
    b"\x16\x03\x01\x00\x01\x01" * 20_000,
]
CUT_OFF = [
    b"",
    b"\x16",
    b"\x16\x03\x01\x00\x05",
    b"\x16\x03\x01\x00\x05hello",
    client_hello("echo.example")[:-1],
]


@pytest.mark.parametrize("garbage", [*GARBAGE, *CUT_OFF], ids=lambda garbage: repr(garbage[:9]))
async def test_peeking_at_a_client_hello_raises_nothing_but_value_error(garbage: bytes) -> None:
    client, server = await tcp_pair()
    async with closing(client, server):
        await client.send(garbage)
        if garbage in CUT_OFF:
            await client.send_eof()  # the others are refused without waiting for more
        with pytest.raises(ValueError, match=r"client|ClientHello") as caught:
            await sni_router.peek_client_hello(server)
        assert caught.type is ValueError


async def test_peeking_at_a_client_hello_consumes_nothing() -> None:
    client, server = await tcp_pair()
    async with closing(client, server):
        hello = client_hello("echo.example", largest_record=9)
        await client.send(hello, b"and more")
        assert await sni_router.peek_client_hello(server) == handshake_of(hello)
        assert await server.recv_exactly(len(hello) + 8) == hello + b"and more"


async def test_router_drops_garbage_and_lives_on() -> None:
    async with (
        running("echo_server") as backend,
        running("sni_router", "--default", f"127.0.0.1:{backend.port}") as router,
    ):
        for garbage in [*GARBAGE, *CUT_OFF]:
            async with await trisock.connect("127.0.0.1", router.port) as sock:
                await sock.send(garbage)
                await sock.send_eof()
                assert await read_all(sock) == b"", garbage[:20]
        async with await trisock.connect("127.0.0.1", router.port) as sock:
            hello = client_hello(None)
            await sock.send(hello)
            assert await sock.recv_exactly(len(hello)) == hello


async def test_router_tells_a_client_that_it_does_not_know_the_name(ca: str) -> None:
    async with running("sni_router", "--route", "known.example=127.0.0.1:1") as router:
        sock = await trisock.connect("127.0.0.1", router.port)
        with pytest.raises(trisock.TLSError, match="unrecognized name"):
            await sock.starttls("unknown.example")


async def test_router_reports_a_backend_that_cannot_be_reached_and_lives_on() -> None:
    async with await trisock.listen(0, "127.0.0.1") as nobody:
        pass
    async with running("sni_router", "--default", f"127.0.0.1:{nobody.port}") as router:
        for _ in range(2):
            async with await trisock.connect("127.0.0.1", router.port) as sock:
                await sock.send(client_hello("any.example"))
                assert await read_all(sock) == b""
        number = errno.ECONNREFUSED
        complaint = f"cannot connect to 127.0.0.1:{nobody.port}: {os.strerror(number)}"
        router.complaints = f"{OSError(number, complaint)}\n" * 2


@pytest.mark.parametrize(
    "route",
    [
        "one.example",
        "one.example=",
        "one.example=:1",
        "one.example=host:https",
        "one.example=host:0",
    ],
)
async def test_router_refuses_a_route_that_leads_nowhere(route: str) -> None:
    result = await run(*command("sni_router", "--route", route))
    assert result.returncode == 2
    assert b"--route" in result.stderr


# ---- chat_room ----


async def hear(sock: Socket) -> str:
    return (await sock.recv_until(b"\n")).decode().removesuffix("\n")


@asynccontextmanager
async def chatting(room: Running, name: str) -> AsyncIterator[Socket]:
    """Enter the room, up to the note that all get of it."""
    async with await trisock.connect("127.0.0.1", room.port) as sock:
        assert await hear(sock) == "* who are you?"
        await sock.send(f"{name}\r\n".encode())
        assert await hear(sock) == f"* {name} is here"
        yield sock


async def test_chat_room_tells_all_what_one_says_and_who_comes_and_leaves() -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with chatting(room, "Bob") as bob:
            assert await hear(ann) == "* Bob is here"
            await ann.send(b"hello Bob\n")
            for sock in (ann, bob):
                assert await hear(sock) == "Ann: hello Bob"
            await bob.send("\x1b[31mgr\u00fc\u00df dich\x07\n\n".encode())
            for sock in (ann, bob):
                assert await hear(sock) == "Bob: [31mgr\u00fc\u00df dich"
        assert await hear(ann) == "* Bob has left"


async def test_chat_room_lets_all_hear_the_same_order() -> None:
    async with (
        running("chat_room") as room,
        chatting(room, "Ann") as ann,
        chatting(room, "Bob") as bob,
    ):
        assert await hear(ann) == "* Bob is here"
        heard: dict[Socket, list[str]] = {ann: [], bob: []}

        async def listen(sock: Socket) -> None:
            while len(heard[sock]) < 400:
                heard[sock].append(await hear(sock))

        async with trio.open_nursery() as nursery:
            for sock in (ann, bob):
                nursery.start_soon(listen, sock)
                nursery.start_soon(sock.send, b"".join(b"%d\n" % n for n in range(200)))
        assert heard[ann] == heard[bob]
        for name in ("Ann", "Bob"):
            said = [line for line in heard[ann] if line.startswith(name)]
            assert said == [f"{name}: {n}" for n in range(200)]


async def test_chat_room_has_each_name_once() -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with await trisock.connect("127.0.0.1", room.port) as sock:
            assert await hear(sock) == "* who are you?"
            for name in (b"Ann", b"", b"\x1b", b"x" * 21):
                await sock.send(name + b"\n")
                assert await hear(sock) == "* empty, too long, or taken. who are you?"
            await sock.send(b"Ann!\n")
            assert await hear(sock) == "* Ann! is here"
        assert await hear(ann) == "* Ann! is here"
        assert await hear(ann) == "* Ann! has left"
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with chatting(room, "Bob"):
            pass
        assert [await hear(ann) for _ in range(2)] == ["* Bob is here", "* Bob has left"]
        async with chatting(room, "Bob"):  # the name is free again
            pass


@pytest.mark.parametrize("leave", ["in the middle of a line", "by a reset", "by a long line"])
async def test_chat_room_notes_that_one_has_left_in_whatever_way(leave: str) -> None:
    async with running("chat_room") as room, chatting(room, "Ann") as ann:
        async with chatting(room, "Bob") as bob:
            assert await hear(ann) == "* Bob is here"
            if leave == "in the middle of a line":
                await bob.send(b"I wanted to s")
                await bob.send_eof()
            elif leave == "by a reset":
                bob.abort()
            else:
                await bob.send(b"x" * 10_000)
                assert await hear(bob) == "* a line has at most 512 bytes"
            assert await hear(ann) == "* Bob has left"


async def test_chat_room_says_goodbye_to_idle_clients_when_it_stops() -> None:
    async with (
        running("chat_room") as room,
        chatting(room, "Ann") as ann,
        await trisock.connect("127.0.0.1", room.port) as nameless,
    ):
        assert await hear(nameless) == "* who are you?"
        room.ask_to_stop()
        for sock in (ann, nameless):
            assert await read_all(sock) == b"* the room closes\n"
