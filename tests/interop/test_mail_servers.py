"""Our mail clients with two real servers, Postfix and Dovecot (see real_mail_servers.py)."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator

import pytest
import trio
import trio.testing

import trisock
from helpers.authority import issue
from helpers.mail_client import (
    a_mail,
    ask,
    deliver,
    expect,
    imap,
    imap_login,
    imap_ok,
    lmtp_hello,
    pop3,
    pop3_lines,
    receive_mail,
    smtp_hello,
)
from helpers.real_servers import PASSWORD, RealServer
from helpers.tls_clients import CRLF, RefusedError, both_versions, cancelled_often, for_version
from trisock import ClientTLS, Socket
from trisock.testing import Authority

pytestmark = pytest.mark.interop

# ---- Postfix ----


async def arrivals(postfix: RealServer) -> trisock.Listener:
    """Listen on the Unix path to which Postfix delivers mail."""
    return await trisock.listen_unix(postfix.directory / "arrived", mode=0o666)


async def send_mail(
    postfix: RealServer, tls: ssl.SSLContext, mail: bytes, recipient: bytes
) -> None:
    async with await trisock.connect(
        "127.0.0.1", postfix.ports["smtp"], tls=tls, starttls="smtp"
    ) as sock:
        await smtp_hello(sock)
        await deliver(sock, mail, recipient)


@both_versions
async def test_postfix_delivers_a_large_message(
    version: str, postfix: RealServer, authority: Authority
) -> None:
    mail = a_mail()
    async with await arrivals(postfix) as listener:
        await send_mail(postfix, for_version(version, authority), mail, b"bob@example.org")
        arrived = await receive_mail(listener)
    assert b"using %s with cipher" % version.encode() in arrived
    assert b"Client did not present a certificate" in arrived
    assert arrived.endswith(CRLF + mail)


@both_versions
async def test_postfix_relays_only_for_clients_with_a_certificate(
    version: str, postfix: RealServer, authority: Authority
) -> None:
    """Postfix names the certificate's owner in the message."""
    with_certificate = for_version(version, authority)
    certified = issue(authority, "client.example.org", common_name="certified")
    certified.load_into(with_certificate)
    mail, recipient = b"Subject: small\r\n\r\nhello\r\n", b"bob@elsewhere.example"
    async with await arrivals(postfix) as listener:
        with pytest.raises(RefusedError, match="Access denied"):
            await send_mail(postfix, for_version(version, authority), mail, recipient)
        await send_mail(postfix, with_certificate, mail, recipient)
        arrived = await receive_mail(listener)
    assert b'(Client CN "certified", Issuer' in arrived
    assert b"(verified OK)" in arrived


async def test_postfix_supports_implicit_tls(postfix: RealServer, authority: Authority) -> None:
    async with await trisock.connect(
        "127.0.0.1", postfix.ports["smtps"], tls=ClientTLS(ca=authority.ca)
    ) as sock:
        await expect(sock, 220)
        await smtp_hello(sock)
        await ask(sock, b"QUIT", 221)
        assert await sock.recv() == b""  # Postfix sent close_notify


# ---- Dovecot ----


@contextlib.asynccontextmanager
async def imap_client(
    dovecot: RealServer, authority: Authority, user: bytes
) -> AsyncIterator[Socket]:
    """Connect, upgrade to TLS and log in to an empty mailbox."""
    tls = ClientTLS(ca=authority.ca)
    async with await trisock.connect(
        "127.0.0.1", dovecot.ports["imap"], local_address="127.0.0.2", tls=tls, starttls="imap"
    ) as sock:
        await imap(sock, b"LOGIN %s %s" % (user, PASSWORD.encode()))
        await imap(sock, b"SELECT INBOX")
        yield sock


async def imap_append(sock: Socket, mail: bytes) -> None:
    await sock.send(b"a APPEND INBOX {%d}\r\n" % len(mail))
    assert (await sock.recv_until(CRLF)).startswith(b"+ ")
    await sock.send(mail, CRLF)
    await imap_ok(sock)


async def imap_fetch(sock: Socket, what: bytes) -> bytes:
    """Return an item of the last message."""
    await sock.send(b"a FETCH * %s\r\n" % what)
    while not (line := await sock.recv_until(CRLF)).endswith(b"}\r\n"):
        assert line.startswith(b"* ")
    data = await sock.recv_exactly(int(line[line.rindex(b"{") + 1 : -3]))
    assert (await sock.recv_until(CRLF)).endswith(b")\r\n")
    await imap_ok(sock)
    return data


async def test_dovecot_refuses_a_password_in_plain_text(dovecot: RealServer) -> None:
    """Dovecot therefore accepts a log-in from 127.0.0.2 only with TLS."""
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


@pytest.mark.parametrize("checkpoints", [1, 2, 3, 5])
async def test_cancelled_reads_of_a_large_message_lose_nothing(
    checkpoints: int, dovecot: RealServer, authority: Authority
) -> None:
    """Fetch the message twice. Cancel only the reads of the second fetch."""
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


async def test_a_cancelled_imap_idle_loses_no_notification(
    dovecot: RealServer, authority: Authority
) -> None:
    """In IDLE (RFC 2177), a message arrives after the cancellation, while no task reads."""
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


async def test_dovecot_selects_the_certificate_by_sni(
    dovecot: RealServer, authority: Authority
) -> None:
    seen = set()
    for name in ("imap.example.org", "localhost"):
        async with await trisock.connect(
            "127.0.0.1", dovecot.ports["imap"], tls=authority.client_tls(name), starttls="imap"
        ) as sock:
            assert sock.tls is not None
            assert sock.tls.peer_certificate is not None
            seen.add(sock.tls.peer_certificate)
            await imap_login(sock)
    assert len(seen) == 2


async def test_dovecot_supports_implicit_tls(dovecot: RealServer, authority: Authority) -> None:
    tls = authority.client_tls("imap.example.org")
    async with await trisock.connect("127.0.0.1", dovecot.ports["imaps"], tls=tls) as sock:
        assert (await sock.recv_until(CRLF)).startswith(b"* OK ")
        await imap_login(sock)
        assert (await imap(sock, b"LOGOUT"))[0].startswith(b"* BYE")
        assert await sock.recv() == b""  # Dovecot sent close_notify


async def test_a_message_sent_over_lmtp_arrives_over_pop3(
    dovecot: RealServer, authority: Authority
) -> None:
    """The LMTP connection uses STARTTLS on a Unix socket."""
    mail = a_mail()
    async with await trisock.connect_unix(dovecot.directory / "lmtp") as sock:
        await trisock.starttls.upgrade(sock, "lmtp", authority.client_tls("localhost"))
        await lmtp_hello(sock)
        await deliver(sock, mail, b"carol@example.org")
    async with await trisock.connect(
        "127.0.0.1", dovecot.ports["pop3"], tls=ClientTLS(ca=authority.ca), starttls="pop3"
    ) as sock:
        await pop3(sock, b"USER carol")
        await pop3(sock, b"PASS " + PASSWORD.encode())
        await pop3(sock, b"RETR 1")
        received = CRLF.join([*await pop3_lines(sock), b""])
        await pop3(sock, b"QUIT")
    assert received.startswith(b"Return-Path: <a@b.example>\r\nDelivered-To: carol")
    assert b"with LMTPS" in received
    assert received[received.index(b"Subject:") :] == mail
