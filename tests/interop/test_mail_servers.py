"""A trisock client of Postfix and Dovecot (real_mail_servers.py starts them)."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing
from cryptography import x509

import trisock
from helpers.authority import Authority, certificate
from helpers.mail_client import (
    a_mail,
    ask,
    deliver,
    expect,
    imap,
    imap_login,
    imap_ok,
    imap_starttls,
    lmtp_hello,
    lmtp_starttls,
    pop3,
    pop3_lines,
    pop3_starttls,
    smtp_hello,
    smtp_starttls,
    the_mail_that_arrives,
)
from helpers.real_servers import PASSWORD, RealServer
from helpers.tls_clients import CRLF, RefusedError, both_versions, cancelled_often, for_version
from trisock import ClientTLS, Socket

pytestmark = pytest.mark.interop

# ---- Postfix ----


@pytest.mark.needs("postfix")
@both_versions
async def test_postfix_takes_a_large_mail(
    version: str, postfix: RealServer, authority: Authority
) -> None:
    mail = a_mail()
    async with await trisock.listen_unix(postfix.directory / "arrived", mode=0o666) as arrived:
        async with await trisock.connect("127.0.0.1", postfix.ports["smtp"]) as sock:
            await smtp_starttls(sock)
            await sock.starttls(for_version(version, authority))
            await smtp_hello(sock)
            await deliver(sock, mail, b"bob@example.org")
        arrived_mail = await the_mail_that_arrives(arrived)
    assert b"using %s with cipher" % version.encode() in arrived_mail
    assert b"Client did not present a certificate" in arrived_mail
    assert arrived_mail.endswith(CRLF + mail)


@pytest.mark.needs("postfix")
@both_versions
async def test_postfix_relays_for_a_client_with_a_certificate_only(
    version: str, postfix: RealServer, authority: Authority
) -> None:
    """The client's certificate is sent and verified, and Postfix says in the mail whose it was."""
    leaf = authority.ca.issue_cert("client.example.org", common_name="certified")
    with_certificate = for_version(version, authority)
    certificate(leaf).load_into(with_certificate)
    mail = b"Subject: small\r\n\r\nhello\r\n"

    async def send(tls: ssl.SSLContext) -> None:
        async with await trisock.connect("127.0.0.1", postfix.ports["smtp"]) as sock:
            await smtp_starttls(sock)
            await sock.starttls(tls)
            await smtp_hello(sock)
            await deliver(sock, mail, b"bob@elsewhere.example")

    async with await trisock.listen_unix(postfix.directory / "arrived", mode=0o666) as arrived:
        with pytest.raises(RefusedError, match="Access denied"):
            await send(for_version(version, authority))
        await send(with_certificate)
        arrived_mail = await the_mail_that_arrives(arrived)
    assert b'(Client CN "certified", Issuer' in arrived_mail
    assert b"(verified OK)" in arrived_mail


@pytest.mark.needs("postfix")
async def test_postfix_with_tls_from_the_start(postfix: RealServer, authority: Authority) -> None:
    async with await trisock.connect(
        "127.0.0.1", postfix.ports["smtps"], tls=ClientTLS(ca=authority.pem)
    ) as sock:
        await expect(sock, 220)
        await smtp_hello(sock)
        await ask(sock, b"QUIT", 221)
        assert await sock.recv() == b""  # Postfix has said close_notify


# ---- Dovecot ----


@contextlib.asynccontextmanager
async def imap_client(
    dovecot: RealServer, authority: Authority, user: bytes
) -> AsyncIterator[Socket]:
    """Connect, turn to TLS and log in, to an empty mailbox."""
    async with await trisock.connect(
        "127.0.0.1", dovecot.ports["imap"], local_address="127.0.0.2"
    ) as sock:
        await imap_starttls(sock)
        await sock.starttls(ClientTLS(ca=authority.pem))
        await imap(sock, b"LOGIN %s %s" % (user, PASSWORD.encode()))
        await imap(sock, b"SELECT INBOX")
        yield sock


async def imap_append(sock: Socket, mail: bytes) -> None:
    await sock.send(b"a APPEND INBOX {%d}\r\n" % len(mail))
    assert (await sock.recv_until(CRLF)).startswith(b"+ ")
    await sock.send(mail, CRLF)
    await imap_ok(sock)


async def imap_fetch(sock: Socket, what: bytes) -> bytes:
    """Return what there is of the last mail."""
    await sock.send(b"a FETCH * %s\r\n" % what)
    while not (line := await sock.recv_until(CRLF)).endswith(b"}\r\n"):
        assert line.startswith(b"* ")
    data = await sock.recv_exactly(int(line[line.rindex(b"{") + 1 : -3]))
    assert (await sock.recv_until(CRLF)).endswith(b")\r\n")
    await imap_ok(sock)
    return data


@pytest.mark.needs("dovecot")
async def test_dovecot_takes_no_password_in_the_clear(dovecot: RealServer) -> None:
    """The log-ins in the other tests are proof that Dovecot sees TLS, then."""
    for port, greeting, login, answer in [
        ("imap", b"* OK ", b"a LOGIN alice secret\r\n", b"a NO [PRIVACYREQUIRED]"),
        ("pop3", b"+OK ", b"USER alice\r\n", b"-ERR [AUTH]"),
    ]:
        async with await trisock.connect(
            "127.0.0.1", dovecot.ports[port], local_address="127.0.0.2"
        ) as sock:
            assert (await sock.recv_until(CRLF)).startswith(greeting)
            await sock.send(login)
            while (line := await sock.recv_until(CRLF)).startswith(b"* "):
                pass
            assert line.startswith(answer)


@pytest.mark.needs("dovecot")
@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5])
async def test_a_large_mail_by_imap_and_back(
    checkpoints: int, dovecot: RealServer, authority: Authority
) -> None:
    """The second time the reading of it is cancelled again and again."""
    mail = a_mail()
    async with imap_client(dovecot, authority, b"large%d" % checkpoints) as sock:
        await imap_append(sock, mail)
        assert await imap_fetch(sock, b"BODY[]") == mail
        await sock.send(b"a FETCH * BODY[]\r\n")
        line = await cancelled_often(lambda: sock.recv_until(CRLF), checkpoints)
        assert line == b"* 1 FETCH (BODY[] {%d}\r\n" % len(mail)
        assert await cancelled_often(lambda: sock.recv_exactly(len(mail)), checkpoints) == mail
        assert await sock.recv_until(CRLF) == b")\r\n"
        await imap_ok(sock)


@pytest.mark.needs("dovecot")
async def test_imap_idle_that_is_cancelled(dovecot: RealServer, authority: Authority) -> None:
    """RFC 2177: the server talks when it has something to say; who gives up waiting loses nothing.

    The mail comes while nobody reads, and is announced all the same.
    """
    async with (
        imap_client(dovecot, authority, b"idle") as idle,
        imap_client(dovecot, authority, b"idle") as other,
    ):
        await idle.send(b"a IDLE\r\n")
        assert (await idle.recv_until(CRLF)).startswith(b"+ ")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(idle.recv_until, CRLF)
            await trio.testing.wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        await imap_append(other, b"Subject: news\r\n\r\n")
        while b"EXISTS" not in (line := await idle.recv_until(CRLF)):
            assert line.startswith(b"* ")
        assert line == b"* 1 EXISTS\r\n"
        await idle.send(b"DONE\r\n")
        await imap_ok(idle)
        await imap(idle, b"NOOP")


@pytest.mark.needs("dovecot")
async def test_dovecot_chooses_the_certificate_by_sni(
    dovecot: RealServer, authority: Authority
) -> None:
    """Both names are verified, so each certificate is the right one; they are two."""
    seen = []
    for name in ("imap.example.org", "localhost"):
        async with await trisock.connect("127.0.0.1", dovecot.ports["imap"]) as sock:
            await imap_starttls(sock)
            info = await sock.starttls(ClientTLS(name, ca=authority.pem))
            assert info.peer_certificate is not None
            seen.append(x509.load_der_x509_certificate(info.peer_certificate).serial_number)
            await imap_login(sock)
    assert len(set(seen)) == 2


@pytest.mark.needs("dovecot")
async def test_imaps(dovecot: RealServer, authority: Authority) -> None:
    tls = ClientTLS("imap.example.org", ca=authority.pem)
    async with await trisock.connect("127.0.0.1", dovecot.ports["imaps"], tls=tls) as sock:
        assert (await sock.recv_until(CRLF)).startswith(b"* OK ")
        await imap_login(sock)
        assert (await imap(sock, b"LOGOUT"))[0].startswith(b"* BYE")
        assert await sock.recv() == b""  # Dovecot has said close_notify


@pytest.mark.needs("dovecot")
async def test_lmtp_over_a_unix_socket_with_starttls_and_pop3(
    dovecot: RealServer, authority: Authority
) -> None:
    """A mail goes in by one protocol, and comes out by another."""
    mail = a_mail()
    async with await trisock.connect_unix(dovecot.directory / "lmtp") as sock:
        await lmtp_starttls(sock)
        await sock.starttls(ClientTLS("localhost", ca=authority.pem))
        await lmtp_hello(sock)
        await deliver(sock, mail, b"carol@example.org")
    async with await trisock.connect("127.0.0.1", dovecot.ports["pop3"]) as sock:
        await pop3_starttls(sock)
        await sock.starttls(ClientTLS(ca=authority.pem))
        await pop3(sock, b"USER carol")
        await pop3(sock, b"PASS " + PASSWORD.encode())
        await pop3(sock, b"RETR 1")
        received = CRLF.join([*await pop3_lines(sock), b""])
        await pop3(sock, b"QUIT")
    assert received.startswith(b"Return-Path: <a@b.example>\r\nDelivered-To: carol")
    assert b"with LMTPS" in received
    assert received[received.index(b"Subject:") :] == mail
