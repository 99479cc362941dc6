"""A trisock client and the servers that people use it with (``real_servers.py`` starts them).

Each protocol has its own way to TLS, and here is a client of each, as a user would write it. None
of them goes on in the clear when it does not get TLS.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import hmac
import os
import secrets
import signal
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import pytest
import trio
import trio.testing
from cryptography import x509

import real_servers
import trisock
from helpers.authority import Authority, certificate
from helpers.pairs import read_all
from real_servers import PASSWORD, RealServer
from trisock import ClientTLS, Socket, TLSError

pytestmark = pytest.mark.interop

CRLF = b"\r\n"


class RefusedError(Exception):
    """The server does not do what was asked of it."""


# ---- the servers, each started once ----


def fixture_of(
    start: Callable[..., AbstractContextManager[RealServer]], *, root: bool, **options: bool
) -> object:
    """Return a fixture that runs a server from the first test that needs it to the last of all."""

    @pytest.fixture(scope="module")
    def server(authority: Authority) -> Iterator[RealServer]:
        if root and os.geteuid() != 0:
            pytest.skip("this server insists on being started by root")
        with start(authority, **options) as running:
            yield running

    return server


postfix = fixture_of(real_servers.postfix, root=True)
dovecot = fixture_of(real_servers.dovecot, root=True)
slapd = fixture_of(real_servers.slapd, root=False)
slapd_without_tls = fixture_of(real_servers.slapd, root=False, tls=False)
postgresql = fixture_of(real_servers.postgresql, root=False)
postgresql_without_tls = fixture_of(real_servers.postgresql, root=False, tls=False)
proftpd = fixture_of(real_servers.proftpd, root=True)
vsftpd = fixture_of(real_servers.vsftpd, root=True)


class ResumingContext(ssl.SSLContext):
    """A client's context whose connections go on with the TLS session of the first.

    FTP servers want it: they know by it that a data connection is from whom they talk to.
    """

    _first: ssl.SSLObject | None = None

    def wrap_bio(self, *args: object, **options: object) -> ssl.SSLObject:
        ssl_object = super().wrap_bio(*args, **options)
        if self._first is None:
            self._first = ssl_object
        else:
            ssl_object.session = self._first.session
        return ssl_object


def for_version(
    version: str, authority: Authority, kind: type[ssl.SSLContext] = ssl.SSLContext
) -> ssl.SSLContext:
    """Return a client's context that speaks one version of TLS only."""
    context = kind(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=authority.pem.decode())
    context.minimum_version = context.maximum_version = {
        "TLSv1.2": ssl.TLSVersion.TLSv1_2,
        "TLSv1.3": ssl.TLSVersion.TLSv1_3,
    }[version]
    return context


both_versions = pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])


async def cancelled_often(read: Callable[[], Awaitable[bytes]], checkpoints: int) -> bytes:
    """Return what a read returns that is cancelled, and tried again, every so many checkpoints."""
    results: list[bytes] = []

    async def once() -> None:
        results.append(await read())

    while not results:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(once)
            for _ in range(checkpoints):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()
    (result,) = results
    return result


# ---- SMTP, LMTP and FTP: commands, and replies with a code ----


async def reply(sock: Socket) -> tuple[int, bytes]:
    line = text = await sock.recv_until(CRLF)
    code = line[:3]
    if line[3:4] == b"-":
        while not line.startswith(code + b" "):
            line = await sock.recv_until(CRLF)
            text += line
    return int(code), text


async def expect(sock: Socket, code: int) -> bytes:
    got, text = await reply(sock)
    if got != code:
        raise RefusedError(text)
    return text


async def ask(sock: Socket, command: bytes, code: int) -> bytes:
    await sock.send(command, CRLF)
    return await expect(sock, code)


async def smtp_starttls(sock: Socket, hello: bytes = b"EHLO client.example.org") -> None:
    await expect(sock, 220)
    if b"STARTTLS\r\n" not in await ask(sock, hello, 250):
        raise RefusedError("no STARTTLS")
    await ask(sock, b"STARTTLS", 220)


async def smtp_hello(sock: Socket) -> None:
    assert b"STARTTLS" not in await ask(sock, b"EHLO client.example.org", 250)


async def lmtp_starttls(sock: Socket) -> None:
    await smtp_starttls(sock, b"LHLO client.example.org")


async def lmtp_hello(sock: Socket) -> None:
    assert b"STARTTLS" not in await ask(sock, b"LHLO client.example.org", 250)


def a_mail() -> bytes:
    """Return a mail of about 1 MB, with all that dots at the start of a line can do."""
    lines = [base64.b64encode(secrets.token_bytes(57)) for _ in range(13_000)]
    lines[5000:5000] = [b".", b"..", b"", b".a", b"..a"]
    return CRLF.join([b"Subject: large", b"", *lines, b""])


def stuffed(mail: bytes) -> bytes:
    """Return a mail as it goes over the wire (RFC 5321, section 4.5.2)."""
    return (CRLF + mail).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n"


async def deliver(sock: Socket, mail: bytes, recipient: bytes) -> None:
    """Deliver a mail, with the commands that may be pipelined sent at once (RFC 2920)."""
    await sock.send(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<%s>\r\nDATA\r\n" % recipient)
    replies = [await reply(sock) for _ in range(3)]
    if [code for code, _ in replies] != [250, 250, 354]:
        raise RefusedError(replies)
    await sock.send(stuffed(mail))
    await expect(sock, 250)
    await ask(sock, b"QUIT", 221)


async def the_mail_that_arrives(listener: trisock.Listener) -> bytes:
    """Be the LMTP server for one mail."""
    async with await listener.accept() as sock:
        await sock.send(b"220 ready\r\n")
        while not (command := await sock.recv_until(CRLF)).startswith(b"DATA"):
            assert command[:4] in (b"LHLO", b"MAIL", b"RCPT")
            await sock.send(b"250 ok\r\n")
        await sock.send(b"354 go ahead\r\n")
        mail = await sock.recv_until(b"\r\n.\r\n", max_bytes=10_000_000)
        await sock.send(b"250 ok\r\n")
        assert await sock.recv_until(CRLF) == b"QUIT\r\n"
        await sock.send(b"221 bye\r\n")
    return (CRLF + mail[:-3]).replace(b"\r\n..", b"\r\n.")[2:]


# ---- IMAP and POP3 ----


async def imap(sock: Socket, command: bytes) -> list[bytes]:
    """Say a command and return the server's lines before the one that says OK."""
    await sock.send(b"a ", command, CRLF)
    return await imap_ok(sock)


async def imap_ok(sock: Socket) -> list[bytes]:
    lines = []
    async for line in sock.lines(delimiter=CRLF):
        if line.startswith(b"a "):
            if not line.startswith(b"a OK "):
                raise RefusedError(line)
            return lines
        lines.append(line)
    raise RefusedError("the server has gone")


async def imap_starttls(sock: Socket) -> None:
    greeting = await sock.recv_until(CRLF)
    assert greeting.startswith(b"* OK ")
    (capabilities,) = await imap(sock, b"CAPABILITY")
    if b"STARTTLS" not in capabilities.split():
        raise RefusedError("no STARTTLS")
    await imap(sock, b"STARTTLS")


async def imap_login(sock: Socket) -> None:
    await imap(sock, b"LOGIN alice " + PASSWORD.encode())


async def pop3_ok(sock: Socket) -> bytes:
    line = await sock.recv_until(CRLF)
    if not line.startswith(b"+OK"):
        raise RefusedError(line)
    return line


async def pop3(sock: Socket, command: bytes) -> bytes:
    await sock.send(command, CRLF)
    return await pop3_ok(sock)


async def pop3_lines(sock: Socket) -> list[bytes]:
    lines = []
    async for line in sock.lines(delimiter=CRLF):
        if line == b".":
            break
        lines.append(line.removeprefix(b"."))
    return lines


async def pop3_starttls(sock: Socket) -> None:
    await pop3_ok(sock)
    await pop3(sock, b"CAPA")
    if b"STLS" not in await pop3_lines(sock):
        raise RefusedError("no STLS")
    await pop3(sock, b"STLS")


async def pop3_login(sock: Socket) -> None:
    await pop3(sock, b"USER alice")
    await pop3(sock, b"PASS " + PASSWORD.encode())


# ---- LDAP ----


def ber(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content)
    if size < 128:
        return bytes([tag, size]) + content
    octets = size.to_bytes(4, "big")
    return bytes([tag, 0x80 | len(octets)]) + octets + content


def ber_elements(data: bytes) -> Iterator[tuple[int, bytes]]:
    while data:
        tag, size, start = data[0], data[1], 2
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(data[2:start], "big")
        yield tag, data[start : start + size]
        data = data[start + size :]


def octet_string(value: bytes) -> bytes:
    return ber(0x04, value)


SEQUENCE, INTEGER, ENUMERATED = 0x30, 0x02, 0x0A
SUCCESS, CONFIDENTIALITY_REQUIRED = 0, 13
ADMIN = b"cn=admin,o=example"


async def ldap_send(sock: Socket, operation: bytes) -> None:
    await sock.send(ber(SEQUENCE, ber(INTEGER, b"\x01"), operation))


async def ldap_receive(sock: Socket) -> tuple[int, bytes]:
    """Return the next response: its tag and its content."""
    tag, size = await sock.recv_exactly(2)
    assert tag == SEQUENCE
    if size & 0x80:
        size = int.from_bytes(await sock.recv_exactly(size & 0x7F), "big")
    _, response = ber_elements(await sock.recv_exactly(size))
    return response


async def ldap(sock: Socket, operation: bytes) -> tuple[int, bytes]:
    """Ask for an operation that has one response and return its result code and the response."""
    await ldap_send(sock, operation)
    _, content = await ldap_receive(sock)
    (_, code), *_ = ber_elements(content)
    return code[0], content


def extended(oid: bytes) -> bytes:
    return ber(0x77, ber(0x80, oid))


def bind(name: bytes, password: bytes) -> bytes:
    return ber(0x60, ber(INTEGER, b"\x03"), octet_string(name), ber(0x80, password))


SASL_EXTERNAL = ber(
    0x60,
    ber(INTEGER, b"\x03"),
    octet_string(b""),
    ber(0xA3, octet_string(b"EXTERNAL"), octet_string(b"")),
)


async def ldap_starttls(sock: Socket) -> None:
    code, _ = await ldap(sock, extended(b"1.3.6.1.4.1.1466.20037"))
    if code != SUCCESS:
        raise RefusedError(code)


async def ldap_login(sock: Socket) -> None:
    code, _ = await ldap(sock, bind(ADMIN, PASSWORD.encode()))
    assert code == SUCCESS


async def ldap_whoami(sock: Socket) -> bytes:
    code, content = await ldap(sock, extended(b"1.3.6.1.4.1.4203.1.11.3"))
    assert code == SUCCESS
    return dict(ber_elements(content))[0x8B]


# ---- PostgreSQL ----


def message(kind: bytes, *contents: bytes) -> bytes:
    content = b"".join(contents)
    return kind + (len(content) + 4).to_bytes(4, "big") + content


async def pg_starttls(sock: Socket) -> None:
    await sock.send(message(b"", (80877103).to_bytes(4, "big")))  # SSLRequest
    if await sock.recv_exactly(1) != b"S":
        raise RefusedError("no TLS")


async def pg_receive(sock: Socket) -> tuple[bytes, bytes]:
    """Return the next message that is not just for information."""
    while True:
        head = await sock.recv_exactly(5)
        content = await sock.recv_exactly(int.from_bytes(head[1:], "big") - 4)
        kind = head[:1]
        if kind == b"E":
            raise RefusedError(content)
        if kind not in b"SNK":
            return kind, content


async def pg_expect(sock: Socket, kind: bytes, start: bytes = b"") -> bytes:
    got, content = await pg_receive(sock)
    assert (got, content[: len(start)]) == (kind, start)
    return content[len(start) :]


async def pg_startup(sock: Socket, user: bytes) -> None:
    version = (3 << 16).to_bytes(4, "big")
    await sock.send(
        message(b"", version, b"user\0", user, b"\0", b"database\0", b"postgres\0", b"\0")
    )


OK, SASL, SASL_CONTINUE, SASL_FINAL = (number.to_bytes(4, "big") for number in (0, 10, 11, 12))


async def pg_login(sock: Socket, binding: bytes | None = None) -> None:
    """Authenticate with SCRAM-SHA-256-PLUS (RFC 5802): both sides prove that they know the
    password, on this very connection.
    """
    if binding is None:
        assert sock.tls is not None
        binding = sock.tls.channel_binding("tls-server-end-point")
    await pg_startup(sock, b"postgres")
    mechanism = b"SCRAM-SHA-256-PLUS"
    assert mechanism in (await pg_expect(sock, b"R", SASL)).split(b"\0")
    gs2_header = b"p=tls-server-end-point,,"
    client_first = b"n=,r=" + base64.b64encode(secrets.token_bytes(18))
    first = gs2_header + client_first
    await sock.send(message(b"p", mechanism, b"\0", len(first).to_bytes(4, "big"), first))
    server_first = await pg_expect(sock, b"R", SASL_CONTINUE)
    given = dict(part.split(b"=", 1) for part in server_first.split(b","))
    assert given[b"r"].startswith(client_first[5:])
    salted = hashlib.pbkdf2_hmac(
        "sha256", PASSWORD.encode(), base64.b64decode(given[b"s"]), int(given[b"i"])
    )
    client_key = hmac.digest(salted, b"Client Key", "sha256")
    final = b"c=%s,r=%s" % (base64.b64encode(gs2_header + binding), given[b"r"])
    signed = b",".join([client_first, server_first, final])
    signature = hmac.digest(hashlib.sha256(client_key).digest(), signed, "sha256")
    proof = bytes(a ^ b for a, b in zip(client_key, signature, strict=True))
    await sock.send(message(b"p", final, b",p=", base64.b64encode(proof)))
    verifier = hmac.digest(hmac.digest(salted, b"Server Key", "sha256"), signed, "sha256")
    assert await pg_expect(sock, b"R", SASL_FINAL) == b"v=" + base64.b64encode(verifier)
    await pg_expect(sock, b"R", OK)
    await pg_expect(sock, b"Z", b"I")


async def pg_query(sock: Socket, query: str) -> list[bytes]:
    """Return the first column of what a query returns."""
    await sock.send(message(b"Q", query.encode(), b"\0"))
    rows = []
    while True:
        kind, content = await pg_receive(sock)
        if kind == b"Z":
            return rows
        if kind == b"D":
            rows.append(content[6 : 6 + int.from_bytes(content[2:6], "big")])


# ---- FTP ----


async def ftp_starttls(sock: Socket) -> None:
    await expect(sock, 220)
    await ask(sock, b"AUTH TLS", 234)


async def ftp_login(sock: Socket, user: bytes = b"alice") -> None:
    await ask(sock, b"USER " + user, 331)
    await ask(sock, b"PASS " + PASSWORD.encode(), 230)
    await ask(sock, b"PBSZ 0", 200)
    await ask(sock, b"PROT P", 200)
    await ask(sock, b"TYPE I", 200)


async def vsftp_login(sock: Socket) -> None:
    await ftp_login(sock, b"anonymous")


@contextlib.asynccontextmanager
async def ftp_transfer(
    sock: Socket, tls: ClientTLS | ssl.SSLContext, command: bytes
) -> AsyncIterator[Socket]:
    """Open a command's data connection; at its end the server must say that all is well."""
    answer = await ask(sock, b"EPSV", 229)  # RFC 2428
    async with await trisock.connect("127.0.0.1", int(answer.split(b"|")[3])) as channel:
        await ask(sock, command, 150)
        await channel.starttls(tls, server_hostname="localhost")
        yield channel
    await expect(sock, 226)


# ---- what holds for all of them ----


@dataclass(frozen=True)
class Service:
    """One place where a server speaks a protocol that turns to TLS.

    Attributes:
      server: the fixture that starts the server.
      port: which of its ports.
      starttls: says all that comes before TLS, or raises RefusedError.
      login: says something that the server takes under TLS.
      needs: the program.
      local_address: where the client comes from.
    """

    server: str
    port: str
    starttls: Callable[[Socket], Awaitable[None]]
    login: Callable[[Socket], Awaitable[None]]
    needs: str
    local_address: str = "127.0.0.2"  # Dovecot takes who comes from its own address for safe


def services(**named: Service) -> list[object]:
    return [
        pytest.param(service, id=name, marks=pytest.mark.needs(service.needs))
        for name, service in named.items()
    ]


ALL = services(
    smtp=Service("postfix", "smtp", smtp_starttls, smtp_hello, "postfix"),
    imap=Service("dovecot", "imap", imap_starttls, imap_login, "dovecot"),
    pop3=Service("dovecot", "pop3", pop3_starttls, pop3_login, "dovecot"),
    lmtp=Service("dovecot", "lmtp", lmtp_starttls, lmtp_hello, "dovecot"),
    ldap=Service("slapd", "ldap", ldap_starttls, ldap_login, "slapd"),
    postgresql=Service("postgresql", "postgres", pg_starttls, pg_login, "pg_ctlcluster"),
    ftp=Service("proftpd", "ftp", ftp_starttls, ftp_login, "proftpd"),
    vsftp=Service("vsftpd", "ftp", ftp_starttls, vsftp_login, "vsftpd"),
)

# 127.0.0.3 is whom Dovecot is told to offer no TLS.
WITHOUT_TLS = services(
    smtp=Service("postfix", "plain", smtp_starttls, smtp_hello, "postfix"),
    imap=Service("dovecot", "imap", imap_starttls, imap_login, "dovecot", "127.0.0.3"),
    pop3=Service("dovecot", "pop3", pop3_starttls, pop3_login, "dovecot", "127.0.0.3"),
    ldap=Service("slapd_without_tls", "ldap", ldap_starttls, ldap_login, "slapd"),
    postgresql=Service(
        "postgresql_without_tls", "postgres", pg_starttls, pg_login, "pg_ctlcluster"
    ),
    ftp=Service("proftpd", "plain", ftp_starttls, ftp_login, "proftpd"),
)


@pytest.fixture(scope="module")
def place(request: pytest.FixtureRequest) -> tuple[Service, int]:
    """A service, and the port where it is."""
    server: RealServer = request.getfixturevalue(request.param.server)
    return request.param, server.ports[request.param.port]


all_services = pytest.mark.parametrize("place", ALL, indirect=True)


async def connected(place: tuple[Service, int]) -> Socket:
    service, port = place
    return await trisock.connect("127.0.0.1", port, local_address=service.local_address)


@all_services
@both_versions
async def test_tls_in_mid_conversation(
    place: tuple[Service, int], version: str, authority: Authority
) -> None:
    service, _ = place
    async with await connected(place) as sock:
        await service.starttls(sock)
        info = await sock.starttls(for_version(version, authority), server_hostname="localhost")
        assert (info.version, info.server_hostname) == (version, "localhost")
        await service.login(sock)


@all_services
async def test_tls_by_the_address_that_was_connected_to(
    place: tuple[Service, int], authority: Authority
) -> None:
    service, _ = place
    async with await connected(place) as sock:
        await service.starttls(sock)
        info = await sock.starttls(ClientTLS(ca=authority.pem))
        assert info.server_hostname == "127.0.0.1"
        await service.login(sock)


@all_services
async def test_a_server_of_another_authority_or_name_gets_nothing(
    place: tuple[Service, int], authority: Authority, other_authority: Authority
) -> None:
    service, _ = place
    for tls, words in [
        (ClientTLS(ca=other_authority.pem), "local issuer|self-signed certificate in"),
        (ClientTLS("example.net", ca=authority.pem), "Hostname mismatch"),
    ]:
        async with await connected(place) as sock:
            await service.starttls(sock)
            with pytest.raises(TLSError, match=words):
                await sock.starttls(tls)
            assert not sock.isopen()
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(PASSWORD.encode())


@pytest.mark.parametrize("place", WITHOUT_TLS, indirect=True)
async def test_a_server_that_has_no_tls(place: tuple[Service, int]) -> None:
    service, _ = place
    async with await connected(place) as sock:
        with pytest.raises(RefusedError):
            await service.starttls(sock)
        assert not sock.istls()


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


# ---- OpenLDAP ----


@contextlib.asynccontextmanager
async def ldap_client(slapd: RealServer, tls: ClientTLS | ssl.SSLContext) -> AsyncIterator[Socket]:
    async with await trisock.connect("127.0.0.1", slapd.ports["ldap"]) as sock:
        await ldap_starttls(sock)
        await sock.starttls(tls)
        yield sock


@pytest.mark.needs("slapd")
async def test_slapd_takes_no_password_in_the_clear(
    slapd: RealServer, authority: Authority
) -> None:
    async with await trisock.connect("127.0.0.1", slapd.ports["ldap"]) as sock:
        code, _ = await ldap(sock, bind(ADMIN, PASSWORD.encode()))
        assert code == CONFIDENTIALITY_REQUIRED
        await ldap_starttls(sock)
        await sock.starttls(ClientTLS(ca=authority.pem))
        await ldap_login(sock)
        assert await ldap_whoami(sock) == b"dn:" + ADMIN


@pytest.mark.needs("slapd")
async def test_slapd_keeps_a_large_value(slapd: RealServer, authority: Authority) -> None:
    def attribute(name: bytes, value: bytes) -> bytes:
        return ber(SEQUENCE, octet_string(name), ber(0x31, octet_string(value)))

    large = secrets.token_hex(500_000).encode()
    async with ldap_client(slapd, ClientTLS(ca=authority.pem)) as sock:
        await ldap_login(sock)
        attributes = ber(
            SEQUENCE,
            attribute(b"objectClass", b"organization"),
            attribute(b"o", b"example"),
            attribute(b"description", large),
        )
        add = ber(0x68, octet_string(b"o=example"), attributes)
        code, answer = await ldap(sock, add)
        assert code == SUCCESS, answer
        zero = ber(INTEGER, b"\0")
        whole = [ber(ENUMERATED, b"\0"), ber(ENUMERATED, b"\0"), zero, zero, ber(0x01, b"\0")]
        await ldap_send(
            sock,
            ber(
                0x63,
                octet_string(b"o=example"),
                *whole,
                ber(0x87, b"objectClass"),
                ber(SEQUENCE, octet_string(b"description")),
            ),
        )
        tag, entry = await ldap_receive(sock)
        assert tag == 0x64
        (_, name), (_, attributes) = ber_elements(entry)
        ((_, only),) = ber_elements(attributes)
        (_, kind), (_, values) = ber_elements(only)
        assert (name, kind) == (b"o=example", b"description")
        assert list(ber_elements(values)) == [(0x04, large)]
        tag, done = await ldap_receive(sock)
        assert (tag, next(ber_elements(done))) == (0x65, (ENUMERATED, b"\0"))
        await ldap_send(sock, ber(0x42))  # unbind
        assert await sock.recv() == b""


@pytest.mark.needs("slapd")
async def test_slapd_knows_a_client_by_its_certificate(
    slapd: RealServer, authority: Authority
) -> None:
    leaf = authority.ca.issue_cert("client.example.org", common_name="certified")
    tls = ClientTLS(ca=authority.pem, certificate=certificate(leaf))
    async with ldap_client(slapd, tls) as sock:
        code, _ = await ldap(sock, SASL_EXTERNAL)
        assert code == SUCCESS
        assert (await ldap_whoami(sock)).startswith(b"dn:cn=certified,")


@pytest.mark.needs("slapd")
@both_versions
async def test_slapd_answers_the_end_of_tls_and_goes(
    version: str, slapd: RealServer, authority: Authority
) -> None:
    """RFC 4511, section 4.14.3.2, lets a server go on in the clear, or close; slapd closes."""
    async with ldap_client(slapd, for_version(version, authority)) as sock:
        await ldap_login(sock)
        await sock.stoptls()
        assert not sock.istls()
        assert await sock.recv() == b""


# ---- PostgreSQL ----


@contextlib.asynccontextmanager
async def pg_client(
    postgresql: RealServer, tls: ClientTLS | ssl.SSLContext
) -> AsyncIterator[Socket]:
    async with await trisock.connect("127.0.0.1", postgresql.ports["postgres"]) as sock:
        await pg_starttls(sock)
        await sock.starttls(tls)
        yield sock


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_postgresql_sees_tls(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        await pg_login(sock)
        query = "SELECT version FROM pg_stat_ssl WHERE pid = pg_backend_pid()"
        assert await pg_query(sock, query) == [version.encode()]


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_postgresql_refuses_the_binding_to_another_connection(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """So that the log-ins of the other tests say something about the binding."""
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        with pytest.raises(RefusedError, match="SCRAM channel binding check failed"):
            await pg_login(sock, binding=bytes(32))


@pytest.mark.needs("pg_ctlcluster")
async def test_postgresql_lets_nobody_in_without_tls_but_over_the_unix_socket(
    postgresql: RealServer,
) -> None:
    port = postgresql.ports["postgres"]
    async with await trisock.connect("127.0.0.1", port) as sock:
        await pg_startup(sock, b"postgres")
        with pytest.raises(RefusedError, match="no encryption"):
            await pg_receive(sock)
    path = postgresql.directory / f".s.PGSQL.{port}"
    async with await trisock.connect_unix(path) as sock:
        with pytest.raises(RefusedError, match="no TLS"):
            await pg_starttls(sock)
        await pg_startup(sock, b"postgres")
        await pg_expect(sock, b"R", OK)
        await pg_expect(sock, b"Z", b"I")
        assert await pg_query(sock, "SELECT 6 * 7") == [b"42"]


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_postgresql_knows_a_client_by_its_certificate(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """``clientcert=verify-full``: the certificate's common name is the user's."""
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        await pg_startup(sock, b"certified")
        with pytest.raises(RefusedError, match="requires a valid client certificate"):
            await pg_receive(sock)
    for name in ("other", "certified"):
        context = for_version(version, authority)
        leaf = authority.ca.issue_cert("client.example.org", common_name=name)
        certificate(leaf).load_into(context)
        async with pg_client(postgresql, context) as sock:
            await pg_startup(sock, b"certified")
            if name == "other":
                with pytest.raises(RefusedError, match="authentication failed"):
                    await pg_receive(sock)
            else:
                await pg_expect(sock, b"R", OK)
                await pg_expect(sock, b"Z", b"I")


ROWS = 2000


@pytest.mark.needs("pg_ctlcluster")
@pytest.mark.parametrize("checkpoints", [None, 1, 2, 5])
async def test_a_large_result_whose_reading_is_cancelled(
    checkpoints: int | None, postgresql: RealServer, authority: Authority
) -> None:
    """6 MB, in messages that begin and end anywhere in records."""
    query = f"SELECT repeat(md5(i::text), 100) FROM generate_series(1, {ROWS}) i"
    expected = [hashlib.md5(b"%d" % i).hexdigest().encode() * 100 for i in range(1, ROWS + 1)]
    async with pg_client(postgresql, ClientTLS(ca=authority.pem)) as sock:
        await pg_login(sock)
        if checkpoints is None:
            assert await pg_query(sock, query) == expected
            return
        await sock.send(message(b"Q", query.encode(), b"\0"))
        await pg_expect(sock, b"T")
        for row in expected:
            wanted = message(b"D", b"\0\1", len(row).to_bytes(4, "big"), row)
            read = functools.partial(sock.recv_exactly, len(wanted))
            assert await cancelled_often(read, checkpoints) == wanted
        await pg_expect(sock, b"C", b"SELECT %d" % ROWS)
        await pg_expect(sock, b"Z", b"I")


@pytest.mark.needs("pg_ctlcluster")
@both_versions
async def test_copying_a_table_into_postgresql(
    version: str, postgresql: RealServer, authority: Authority
) -> None:
    """5 MB, as many small buffers of one send."""
    lines = [b"%d\t%s\n" % (i, secrets.token_hex(250).encode()) for i in range(10_000)]
    digest = hashlib.md5(b"".join(line.split()[1] for line in lines)).hexdigest()
    async with pg_client(postgresql, for_version(version, authority)) as sock:
        await pg_login(sock)
        await pg_query(sock, "CREATE TEMPORARY TABLE copied (number int, line text)")
        await sock.send(message(b"Q", b"COPY copied FROM STDIN\0"))
        await pg_expect(sock, b"G")
        await sock.send(*(message(b"d", line) for line in lines), message(b"c"))
        await pg_expect(sock, b"C", b"COPY 10000")
        await pg_expect(sock, b"Z", b"I")
        query = "SELECT md5(string_agg(line, '' ORDER BY number)) FROM copied"
        assert await pg_query(sock, query) == [digest.encode()]
        await sock.send(message(b"X"))
        assert await sock.recv() == b""


# ---- FTP ----


@contextlib.asynccontextmanager
async def ftp_client(
    server: RealServer, port: str, tls: ClientTLS | ssl.SSLContext, user: bytes = b"alice"
) -> AsyncIterator[Socket]:
    async with await trisock.connect("127.0.0.1", server.ports[port]) as sock:
        await ftp_starttls(sock)
        await sock.starttls(tls, server_hostname="localhost")
        await ftp_login(sock, user)
        yield sock


@pytest.mark.needs("proftpd")
async def test_proftpd_takes_no_password_in_the_clear(proftpd: RealServer) -> None:
    async with await trisock.connect("127.0.0.1", proftpd.ports["ftp"]) as sock:
        await expect(sock, 220)
        await ask(sock, b"USER alice", 550)


@pytest.mark.needs("proftpd")
@both_versions
async def test_files_to_proftpd_and_back(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    """The end of a file is the end of TLS, so a file may be empty as well."""
    tls = for_version(version, authority)
    async with ftp_client(proftpd, "ftp", tls) as sock:
        for data in (secrets.token_bytes(5_000_000), b""):
            async with ftp_transfer(sock, tls, b"STOR a-file") as channel:
                await channel.send(data)
            assert (proftpd.directory / "home/a-file").read_bytes() == data
            async with ftp_transfer(sock, tls, b"RETR a-file") as channel:
                assert await read_all(channel) == data
            async with ftp_transfer(sock, tls, b"LIST") as channel:
                assert b" %d " % len(data) in await read_all(channel)
        await ask(sock, b"QUIT", 221)
        assert await sock.recv() == b""


async def check_session_reuse(
    server: RealServer, port: str, user: bytes, name: bytes, version: str, authority: Authority
) -> None:
    data = secrets.token_bytes(5_000_000)
    tls = for_version(version, authority, ResumingContext)
    async with ftp_client(server, port, tls, user) as sock:
        async with ftp_transfer(sock, tls, b"STOR " + name) as channel:
            assert channel.tls is not None
            assert channel.tls.session_reused
            await channel.send(data)
        async with ftp_transfer(sock, tls, b"RETR " + name) as channel:
            assert await read_all(channel) == data
    tls = for_version(version, authority)
    async with ftp_client(server, port, tls, user) as sock:
        with pytest.raises((trio.BrokenResourceError, RefusedError)):
            async with ftp_transfer(sock, tls, b"STOR " + name) as channel:
                await channel.send(data)


@pytest.mark.needs("proftpd")
@both_versions
async def test_proftpd_that_insists_on_the_session_of_the_control_connection(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    await check_session_reuse(proftpd, "reuse", b"alice", b"reused", version, authority)


@pytest.mark.needs("vsftpd")
@both_versions
async def test_vsftpd_that_insists_on_the_session_of_the_control_connection(
    version: str, vsftpd: RealServer, authority: Authority
) -> None:
    """And on ``close_notify``: vsftpd refuses an upload that ends without."""
    name = b"upload/" + version.encode()
    await check_session_reuse(vsftpd, "ftp", b"anonymous", name, version, authority)


@pytest.mark.needs("vsftpd")
@both_versions
async def test_what_vsftpd_says_in_the_clear_under_tls_is_no_reply(
    version: str, vsftpd: RealServer, authority: Authority
) -> None:
    """It does when it fails: ``500 OOPS: cannot change directory`` comes without encryption."""
    home = vsftpd.directory / "home"
    tls = for_version(version, authority)
    home.rename(vsftpd.directory / "away")
    try:
        with pytest.raises(TLSError, match="the peer does not speak TLS"):
            async with ftp_client(vsftpd, "ftp", tls, b"anonymous"):
                pass
    finally:
        (vsftpd.directory / "away").rename(home)


@pytest.mark.needs("proftpd")
@both_versions
async def test_a_data_connection_that_the_server_opens(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    """RFC 4217, section 7: who has accepted the connection is the client of TLS."""
    data = secrets.token_bytes(5_000_000)
    (proftpd.directory / "home/active").write_bytes(data)
    tls = for_version(version, authority)
    async with (
        ftp_client(proftpd, "ftp", tls) as sock,
        await trisock.listen(0, "127.0.0.1") as listener,
    ):
        await ask(sock, b"EPRT |1|127.0.0.1|%d|" % listener.port, 200)
        await ask(sock, b"RETR active", 150)
        async with await listener.accept() as channel:
            assert channel.getside() == "server"
            with pytest.raises(ValueError, match="server_hostname is needed"):
                await channel.starttls(tls)
            info = await channel.starttls(tls, server_hostname="localhost")
            assert info.server_hostname == "localhost"
            assert await read_all(channel) == data
        await expect(sock, 226)


@pytest.mark.needs("proftpd")
@both_versions
async def test_back_to_the_clear_with_ccc(
    version: str, proftpd: RealServer, authority: Authority
) -> None:
    """RFC 4217, section 6: commands go on in the clear, data does not."""
    tls = for_version(version, authority)
    data = secrets.token_bytes(100_000)
    async with ftp_client(proftpd, "ftp", tls) as sock:
        await ask(sock, b"CCC", 200)
        await sock.stoptls()
        assert not sock.istls()
        async with ftp_transfer(sock, tls, b"STOR cleared") as channel:
            await channel.send(data)
        await ask(sock, b"QUIT", 221)
        assert await sock.recv() == b""
    assert (proftpd.directory / "home/cleared").read_bytes() == data


@pytest.fixture
def endless_file(proftpd: RealServer) -> Iterator[bytes]:
    """More than all buffers on the way can hold."""
    path = proftpd.directory / "home/endless"
    with path.open("wb") as file:
        file.truncate(100_000_000)
    yield b"RETR endless"
    path.unlink()


@pytest.mark.needs("proftpd")
@both_versions
async def test_a_transfer_that_the_client_aborts(
    version: str, proftpd: RealServer, endless_file: bytes, authority: Authority
) -> None:
    tls = for_version(version, authority)
    async with ftp_client(proftpd, "ftp", tls) as sock:
        with pytest.raises(RefusedError, match="b'426 "):
            async with ftp_transfer(sock, tls, endless_file) as channel:
                await channel.recv_exactly(1_000_000)
                channel.abort()
        await ask(sock, b"NOOP", 200)


@pytest.mark.needs("proftpd")
@both_versions
async def test_a_file_whose_end_does_not_come_is_not_taken_for_a_whole_one(
    version: str, proftpd: RealServer, endless_file: bytes, authority: Authority
) -> None:
    """A server that dies ends its connections as if all was said, but for the ``close_notify``."""
    tls = for_version(version, authority)
    async with ftp_client(proftpd, "ftp", tls, b"bob") as sock:
        with pytest.raises(TLSError, match="without close_notify: data may be missing"):
            async with ftp_transfer(sock, tls, endless_file) as channel:
                await channel.recv_exactly(1_000_000)
                os.kill(proftpd.child_called("bob"), signal.SIGKILL)
                await read_all(channel)
        with pytest.raises(TLSError, match="without close_notify"):
            await sock.recv()
