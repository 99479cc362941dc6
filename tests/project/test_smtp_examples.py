"""The example smtp_server. Its clients are smtplib, openssl, curl, and trisock sockets."""

from __future__ import annotations

import smtplib
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

import trisock
from helpers.example_clients import codes, reply, trusting
from helpers.examples import Running, running
from helpers.pairs import read_all
from helpers.programs import curl, run
from helpers.shared_examples import SharedServer
from trisock import Socket

MAIL = b"Subject: dots\r\n\r\n.\r\n..\r\n.hidden\r\nend\r\n"


def client_context(ca: str) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=ca)


@contextmanager
def smtp_client(port: int) -> Iterator[smtplib.SMTP]:
    # Without local_hostname, smtplib looks up a name in the DNS.
    with smtplib.SMTP("127.0.0.1", port, local_hostname="client", timeout=30) as client:
        yield client


async def in_thread(function: Callable[[], None]) -> None:
    await trio.to_thread.run_sync(function)


async def test_smtp_server_accepts_mail_from_smtplib_over_tls(ca: str) -> None:
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


async def test_smtp_server_resets_the_session_at_starttls(smtp: SharedServer) -> None:
    def upgrade() -> None:
        with smtp_client(smtp.port) as client:
            client.ehlo()
            assert client.mail("me@example.org")[0] == 250
            assert client.rcpt("you@example.org")[0] == 250
            client.starttls(context=client_context(smtp.ca))
            assert client.docmd("DATA")[0] == 503
            assert client.docmd("MAIL FROM:<me@example.org>")[0] == 503  # no EHLO yet
            assert client.docmd("STARTTLS")[0] == 503
            client.ehlo()
            assert client.docmd("MAIL FROM:<me@example.org>")[0] == 250

    await in_thread(upgrade)


async def test_smtplib_with_another_ca_refuses_smtp_server(
    smtp: SharedServer, other_ca: str
) -> None:
    def upgrade() -> None:
        with smtp_client(smtp.port) as client:
            client.starttls(context=client_context(other_ca))

    with pytest.raises(ssl.SSLCertVerificationError):
        await in_thread(upgrade)


@pytest.mark.needs("openssl")
async def test_smtp_server_speaks_starttls_with_openssl(smtp: SharedServer) -> None:
    result = await run(
        "openssl", "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{smtp.port}",
        "-CAfile", smtp.ca, "-verify_return_error", "-verify_ip", "127.0.0.1",
        "-ign_eof", "-nocommands",
        stdin=b"EHLO client\r\nQUIT\r\n",
    )  # fmt: skip
    assert result.returncode == 0
    assert b"Verify return code: 0 (ok)" in result.stdout
    assert b"250-PIPELINING\r\n" in result.stdout
    assert b"STARTTLS" not in result.stdout
    assert b"221 goodbye\r\n" in result.stdout


@pytest.mark.needs("openssl")
async def test_openssl_with_another_ca_refuses_smtp_server(
    smtp: SharedServer, other_ca: str
) -> None:
    result = await run(
        "openssl", "s_client", "-starttls", "smtp", "-connect", f"127.0.0.1:{smtp.port}",
        "-CAfile", other_ca, "-verify_return_error", stdin=b"QUIT\r\n",
    )  # fmt: skip
    assert result.returncode == 1
    assert b"221" not in result.stdout


@pytest.mark.needs("curl")
async def test_smtp_server_accepts_mail_from_curl(ca: str) -> None:
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


async def smtp_connect(server: Running | SharedServer) -> Socket:
    """Connect to a server, and read its greeting."""
    sock = await trisock.connect("127.0.0.1", server.port)
    assert (await reply(sock)).startswith("220 ")
    return sock


async def test_commands_injected_after_starttls_are_never_executed(smtp: SharedServer) -> None:
    async with await smtp_connect(smtp) as sock:
        assert await codes(sock, b"EHLO client\r\n") == [250]
        await sock.send(
            b"STARTTLS\r\nEHLO evil\r\nMAIL FROM:<evil@example.org>\r\nRCPT TO:<you>\r\n"
        )
        assert (await reply(sock)).startswith("220 ")
        with pytest.raises(trisock.TLSError):
            await sock.starttls(trusting(smtp.ca))
    # If a client continues in plain text, the server sends a TLS alert or nothing.
    async with await smtp_connect(smtp) as sock:
        await sock.send(b"STARTTLS\r\nNOOP\r\nQUIT\r\n")
        assert (await reply(sock)).startswith("220 ")
        rest = await read_all(sock)
        assert rest == b"" or rest.startswith(b"\x15\x03")
    # The server still serves the next client.
    async with await smtp_connect(smtp) as sock:
        assert await codes(sock, b"STARTTLS\r\n") == [220]
        await sock.starttls(trusting(smtp.ca))
        assert await codes(sock, b"QUIT\r\n") == [221]


async def test_smtp_server_refuses_starttls_with_a_parameter(smtp: SharedServer) -> None:
    async with await smtp_connect(smtp) as sock:
        assert await codes(sock, b"EHLO client\r\nSTARTTLS now\r\nNOOP\r\n") == [250, 501, 250]


async def test_smtp_server_checks_commands_and_their_order(smtp: SharedServer) -> None:
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
    async with await smtp_connect(smtp) as sock:
        for line, code in dialogue:
            assert await codes(sock, line) == [code], line
        assert await sock.recv() == b""
    async with await smtp_connect(smtp) as sock:  # all commands in one segment
        lines, expected = zip(*dialogue, strict=True)
        assert await codes(sock, b"".join(lines)) == list(expected)


async def test_smtp_server_refuses_a_too_long_line_and_continues(smtp: SharedServer) -> None:
    async with await smtp_connect(smtp) as sock:
        for size in (511, 65534, 65535, 65536, 1_000_000):
            assert await codes(sock, b"NOOP " + b"x" * (size - 5) + b"\r\nNOOP\r\n") == [
                500,
                250,
            ]
        assert await codes(sock, b"NOOP " + b"x" * 505 + b"\r\n") == [250]


async def test_smtp_server_refuses_a_too_large_message_and_continues() -> None:
    envelope = b"EHLO client\r\nMAIL FROM:<me@example.org>\r\nRCPT TO:<you@example.org>\r\nDATA\r\n"
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            for text, code in ((b"x" * 5_000_000, 552), (b".." * 3, 250), (b"\r\n" * 9, 250)):
                assert await codes(sock, envelope) == [250, 250, 250, 354]
                await sock.send(text, b"\r\n.\r\n")
                assert int((await reply(sock))[:3]) == code
        for size in (7, 20):
            assert (await server.line()).endswith(f": {size} bytes, unencrypted")


async def test_only_a_dot_between_two_crlf_ends_a_message() -> None:
    text = b"a\n.\nb\r\n.\nc\n.\r\nd\r.\re\r\n"
    async with running("smtp_server") as server:
        async with await smtp_connect(server) as sock:
            await sock.send(b"HELO x\r\nMAIL FROM:<a>\r\nRCPT TO:<b>\r\nDATA\r\n" + text + b".\r\n")
            assert [int((await reply(sock))[:3]) for _ in range(5)] == [250, 250, 250, 354, 250]
            # The server removes the dot at the start of a line. (A client should have doubled it.)
            size = len(text) - 1
            assert await server.line() == f"mail from <a> to <b>: {size} bytes, unencrypted"
            await sock.send(b"DATA\r\n")
            assert (await reply(sock)).startswith("503 ")
            await sock.send(b"MAIL FROM:<a>\r\nRCPT TO:<b>\r\nDATA\r\n.\r\n")
            assert [int((await reply(sock))[:3]) for _ in range(4)] == [250, 250, 354, 250]
            assert await server.line() == "mail from <a> to <b>: 0 bytes, unencrypted"


async def test_smtp_server_survives_clients_that_vanish(smtp: SharedServer) -> None:
    beginnings = [b"", b"EHL", b"STARTTLS\r\n", b"STARTTLS\r\n\x16\x03\x01", b"x" * 1000]
    for sent in beginnings:
        async with await smtp_connect(smtp) as sock:
            await sock.send(sent)
        sock = await smtp_connect(smtp)
        await sock.send(sent)
        sock.abort()
    async with await smtp_connect(smtp) as sock:
        assert await codes(sock, b"QUIT\r\n") == [221]
