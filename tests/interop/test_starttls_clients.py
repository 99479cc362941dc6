"""STARTTLS as real clients do it, against small servers (``starttls_servers.py``)."""

from __future__ import annotations

import contextlib
import ftplib
import functools
import imaplib
import inspect
import io
import logging
import os
import poplib
import random
import re
import smtplib
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio
import trustme

import starttls_servers as servers
import trisock
from helpers.authority import Authority, certificate
from helpers.pairs import all_served
from helpers.programs import running
from starttls_servers import PASSWORD, USER, Proxied, Site, ber, ldap_message
from trisock import Certificate, ClientTLS, ServerTLS, Socket, TLSError

Server = Callable[[Site, Socket], Awaitable[None]]

# A megabyte each way: many records, and more than all buffers on the way hold.
MAIL = b"Subject: big\r\n\r\n.\r\n..\r\n" + b"".join(b"%062d\r\n" % n for n in range(16_384))
FILE = random.Random(1).randbytes(1_048_576 + 3)


@pytest.fixture
def site(authority: Authority, tmp_path: Path) -> Site:
    return make_site(authority, tmp_path)


def make_site(authority: Authority, directory: Path) -> Site:
    (directory / "files").mkdir(parents=True)
    (directory / "ca.pem").write_bytes(authority.pem)
    return Site(issue(authority, "localhost", "127.0.0.1", "::1"), directory / "files")


def issue(authority: Authority, *names: str) -> Certificate:
    # OpenLDAP takes no certificate without a common name.
    return certificate(
        authority.ca.issue_cert(*names, common_name=names[0], key_type=trustme.KeyType.ECDSA)
    )


@contextlib.asynccontextmanager
async def serving(server: Server, site: Site) -> AsyncIterator[trisock.Server]:
    """Serve for as long as the context lasts, and then until everybody has been served."""
    async with trio.open_nursery() as nursery:
        bound = await trisock.bind(nursery, 0, functools.partial(server, site))
        yield bound
        bound.stop()
        await bound.wait_closed()
        assert bound.stats().handler_errors == 0


# ---- the clients ----


class Refused(Exception):
    """A program would not go on with this server; what it said."""


@dataclass
class Visit:
    """Where a client goes, whom it trusts, and which TLS it is to speak."""

    site: Site
    port: int
    ca: Path
    version: str = "TLSv1.3"

    def context(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self.ca)
        version = ssl.TLSVersion[self.version.replace(".", "_")]
        context.minimum_version = context.maximum_version = version
        return context

    @property
    def gnutls_priority(self) -> str:
        return f"NORMAL:-VERS-ALL:+VERS-{self.version.replace('v', '')}"

    async def run(self, *command: str | Path, stdin: bytes = b"", **env: object) -> bytes:
        """Run a program and return what it printed."""
        done = await trio.run_process(
            list(map(str, command)),
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, "HOME": str(self.ca.parent), **{k: str(v) for k, v in env.items()}},
        )
        if done.returncode:
            raise Refused(done.stderr.decode())
        return done.stdout


def by_smtplib(visit: Visit) -> None:
    # A name of its own, or smtplib would ask the network for one.
    with smtplib.SMTP("localhost", visit.port, local_hostname="client", timeout=30) as client:
        client.starttls(context=visit.context())
        client.login(USER, PASSWORD)
        client.sendmail("me@example.org", ["you@example.org"], MAIL)
    assert visit.site.mail.pop() == MAIL


def by_smtplib_lmtp(visit: Visit) -> None:
    with smtplib.LMTP("localhost", visit.port, local_hostname="client", timeout=30) as client:
        client.starttls(context=visit.context())
        client.sendmail("me@example.org", ["you@example.org"], MAIL)
    assert visit.site.mail.pop() == MAIL


def by_imaplib(visit: Visit) -> None:
    client = imaplib.IMAP4("localhost", visit.port, timeout=30)
    client.starttls(visit.context())  # if that fails, it has closed the connection
    with client:
        client.login(USER, PASSWORD)
        client.append("INBOX", "", "", MAIL)
        assert client.select() == ("OK", [b"1"])
        ((_, text), _) = client.fetch("1", "(BODY[])")[1]
        assert text == MAIL
    assert visit.site.mail.pop() == MAIL


def by_poplib(visit: Visit) -> None:
    visit.site.mail[:] = [MAIL]
    client = poplib.POP3("localhost", visit.port, timeout=30)
    client.stls(visit.context())
    with contextlib.closing(client):
        client.user(USER)
        client.pass_(PASSWORD)
        assert client.stat() == (1, len(MAIL))
        assert b"".join(line + b"\r\n" for line in client.retr(1)[1]) == MAIL
        client.quit()


def by_nntplib(visit: Visit) -> None:
    import nntplib

    client = nntplib.NNTP("localhost", visit.port, timeout=30)
    client.starttls(visit.context())
    with client:
        client.post(io.BytesIO(MAIL))
        assert b"".join(line + b"\r\n" for line in client.article(1)[1].lines) == MAIL
    assert visit.site.mail.pop() == MAIL


def by_ftplib(visit: Visit, *, host: str = "localhost", passive: bool = True) -> None:
    with ftplib.FTP_TLS(context=visit.context(), timeout=30) as client:
        client.connect(host, visit.port)
        client.set_pasv(passive)
        client.login(USER, PASSWORD)
        for protect in (client.prot_p, client.prot_c):
            protect()
            client.storbinary("STOR file", io.BytesIO(FILE))
            assert (visit.site.directory / "file").read_bytes() == FILE
            got: list[bytes] = []
            client.retrbinary("RETR file", got.append)
            assert b"".join(got) == FILE
            assert client.nlst() == ["file"]
        client.ccc()
        assert client.pwd() == "/"
        client.quit()


def by_ftplib_active(visit: Visit) -> None:
    by_ftplib(visit, passive=False)


def by_ftplib_ipv6(visit: Visit) -> None:
    by_ftplib(visit, host="::1")


def by_ftplib_ipv6_active(visit: Visit) -> None:
    by_ftplib(visit, host="::1", passive=False)


async def curl(visit: Visit, path: str, *options: str | Path, stdin: bytes = b"") -> bytes:
    scheme, slashes, rest = path.partition("://localhost")
    return await visit.run(
        *("curl", "--silent", "--show-error", "--noproxy", "*", "--ssl-reqd"),
        *("--cacert", visit.ca, "--user", f"{USER}:{PASSWORD}"),
        *(["--tlsv1.3"] if visit.version == "TLSv1.3" else ["--tls-max", "1.2"]),
        *options,
        f"{scheme}{slashes}:{visit.port}{rest}",
        stdin=stdin,
    )


async def by_curl_smtp(visit: Visit) -> None:
    addresses = ["--mail-from", "me@example.org", "--mail-rcpt", "you@example.org"]
    await curl(visit, "smtp://localhost/client", *addresses, "--upload-file", "-", stdin=MAIL)
    assert visit.site.mail.pop() == MAIL


async def by_curl_imap(visit: Visit) -> None:
    message = visit.ca.parent / "message"  # curl must know how long it is
    message.write_bytes(MAIL)
    await curl(visit, "imap://localhost/INBOX", "--upload-file", message)
    assert await curl(visit, "imap://localhost/INBOX;UID=1") == MAIL
    assert visit.site.mail.pop() == MAIL


async def by_curl_pop3(visit: Visit) -> None:
    visit.site.mail[:] = [MAIL]
    assert await curl(visit, "pop3://localhost/1") == MAIL


async def by_curl_ftp(visit: Visit, *options: str) -> None:
    await curl(visit, "ftp://localhost/file", *options, "--upload-file", "-", stdin=FILE)
    assert (visit.site.directory / "file").read_bytes() == FILE
    assert await curl(visit, "ftp://localhost/file", *options) == FILE


async def by_lftp(visit: Visit, *settings: str) -> None:
    (visit.ca.parent / "upload").write_bytes(FILE)
    script = [
        "set cmd:fail-exit true; set net:max-retries 1; set net:timeout 30",
        f"set ssl:ca-file {visit.ca}; set ssl:priority {visit.gnutls_priority}",
        "set ftp:ssl-force true; set ftp:ssl-protect-data true",
        *settings,
        f"open -u {USER},{PASSWORD} -p {visit.port} localhost",
        f"put -O / {visit.ca.parent}/upload; get /upload -o {visit.ca.parent}/download",
    ]
    await visit.run("lftp", "-c", "; ".join(script))
    for path in (visit.site.directory / "upload", visit.ca.parent / "download"):
        assert path.read_bytes() == FILE
        path.unlink()


async def by_lftp_active(visit: Visit) -> None:
    await by_lftp(visit, "set ftp:passive-mode false")


async def ldap_client(visit: Visit, program: str, *options: str, stdin: bytes = b"") -> bytes:
    return await visit.run(
        *(program, "-ZZ", "-x", "-D", f"cn={USER}", "-w", PASSWORD),
        *("-H", f"ldap://127.0.0.1:{visit.port}"),  # it takes "localhost" for the machine's name
        *options,
        stdin=stdin,
        LDAPTLS_CACERT=visit.ca,
        LDAPTLS_CIPHER_SUITE=visit.gnutls_priority,
    )


async def by_ldapsearch(visit: Visit) -> None:
    visit.site.mail[:] = [b"x" * 1_000_000]
    got = await ldap_client(visit, "ldapsearch", "-LLL", "-o", "ldif-wrap=no", "-b", "dc=example")
    assert got.split() == [b"dn:", b"dc=example", b"description:", visit.site.mail[0]]


async def by_ldapadd(visit: Visit) -> None:
    text = b"y" * 1_000_000
    await ldap_client(visit, "ldapadd", stdin=b"dn: dc=example\ndescription: " + text)
    assert any(text in command for _, command in visit.site.heard)


async def by_psql(visit: Visit, *options: str) -> None:
    text = "x" * 1_000_000
    server = f"host=localhost port={visit.port} user={USER} dbname=test"
    trust = f"sslmode=verify-full sslrootcert={visit.ca}"
    got = await visit.run(
        *("psql", "--no-psqlrc", "--no-align", "--tuples-only", "--file", "-"),
        " ".join([server, trust, f"ssl_max_protocol_version={visit.version}", *options]),
        stdin=f"select '{text}';".encode(),
        PGPASSWORD=PASSWORD,
    )
    assert got.decode() == f"{text}\n"


async def by_psql_with_channel_binding(visit: Visit) -> None:
    await by_psql(visit, "channel_binding=require")


def client(talk: Any, server: Server, refusal: str, *programs: str) -> Any:
    """Name a client, its server, and what it says when it does not trust that."""
    name = talk.__name__.removeprefix("by_").replace("_", "-")
    if not inspect.iscoroutinefunction(talk):
        talk = functools.partial(trio.to_thread.run_sync, talk)
    marks = [pytest.mark.needs(*programs)] if programs else []
    return pytest.param(talk, server, refusal, id=name, marks=marks)


PYTHON = "certificate verify failed"
CURL = "SSL certificate problem|no alternative certificate subject name matches"
LFTP = "Certificate verification: "
LDAP = "ldap_start_tls: Connect error"  # it says no more
PSQL = "certificate verify failed|does not match host name"

CLIENTS = [
    client(by_smtplib, servers.submission, PYTHON),
    client(by_smtplib_lmtp, servers.smtp, PYTHON),
    client(by_imaplib, servers.imap, PYTHON),
    client(by_poplib, servers.pop3, PYTHON),
    client(by_ftplib, servers.ftp, PYTHON),
    client(by_ftplib_active, servers.ftp, PYTHON),
    client(by_ftplib_ipv6, servers.ftp, PYTHON),
    client(by_ftplib_ipv6_active, servers.ftp, PYTHON),
    client(by_curl_smtp, servers.submission, CURL, "curl"),
    client(by_curl_imap, servers.imap, CURL, "curl"),
    client(by_curl_pop3, servers.pop3, CURL, "curl"),
    client(by_curl_ftp, servers.ftp, CURL, "curl"),
    client(by_lftp, servers.ftp, LFTP, "lftp"),
    client(by_lftp_active, servers.ftp, LFTP, "lftp"),
    client(by_ldapsearch, servers.ldap, LDAP, "ldapsearch"),
    client(by_ldapadd, servers.ldap, LDAP, "ldapadd"),
    client(by_psql, servers.postgres, PSQL, "psql"),
    client(by_psql_with_channel_binding, servers.postgres_with_password, PSQL, "psql"),
]
if sys.version_info < (3, 13):
    CLIENTS.append(client(by_nntplib, servers.nntp, PYTHON))

# What clients say to the server that they refuse. Those that are not here say nothing: those that
# check the name after the handshake, and GnuTLS.
ALERTS = {
    (PYTHON, "authority"): "unknown ca",
    (PYTHON, "name"): "bad certificate",
    (CURL, "authority"): "unknown ca",
    (PSQL, "authority"): "unknown ca",
}

each_client = pytest.mark.parametrize(("talk", "server", "refusal"), CLIENTS)
Talk = Callable[[Visit], Awaitable[None]]


@each_client
@pytest.mark.parametrize("version", ["TLSv1.2", "TLSv1.3"])
@pytest.mark.filterwarnings("ignore:'nntplib' is deprecated:DeprecationWarning")
async def test_a_client_turns_to_tls_and_does_its_work(
    talk: Talk, server: Server, refusal: str, version: str, site: Site, pem: Path
) -> None:
    async with serving(server, site) as bound:
        await talk(Visit(site, bound.port, pem / "ca.pem", version))
    assert bound.stats().peer_errors == 0
    assert {how for how, _ in site.heard} - {None} == {version}
    assert not any(how is None and PASSWORD.encode() in command for how, command in site.heard)


@each_client
@pytest.mark.parametrize("wrong", ["authority", "name"])
@pytest.mark.filterwarnings("ignore:'nntplib' is deprecated:DeprecationWarning")
async def test_a_client_refuses_a_wrong_certificate_and_the_server_goes_on(
    talk: Talk,
    server: Server,
    refusal: str,
    wrong: str,
    site: Site,
    pem: Path,
    authority: Authority,
    other_authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.INFO, "trisock.server")
    right = site.tls
    if wrong == "name":
        site.tls = ServerTLS(issue(authority, "example.net"))
    else:
        site.tls = ServerTLS(issue(other_authority, "localhost", "127.0.0.1", "::1"))
    async with serving(server, site) as bound:
        with pytest.raises((Refused, ssl.SSLCertVerificationError), match=refusal):
            await talk(Visit(site, bound.port, pem / "ca.pem"))
        await all_served(bound, 1)
        assert not any(PASSWORD.encode() in command for _, command in site.heard)
        if alert := ALERTS.get((refusal, wrong)):
            (message,) = caplog.messages
            assert re.fullmatch(
                r"closed the connection with (\S+): TLS handshake with \1 failed: "
                rf"the peer refused, with the alert '{alert}'",
                message,
            )
        site.tls = right
        await talk(Visit(site, bound.port, pem / "ca.pem"))


@pytest.mark.interop
@pytest.mark.needs("curl", "lftp", "ldapsearch", "ldapadd", "psql")
@pytest.mark.filterwarnings("ignore:'nntplib' is deprecated:DeprecationWarning")
async def test_all_clients_at_once(times: int, authority: Authority, tmp_path: Path) -> None:
    async def serve(parameters: Any, directory: Path) -> None:
        talk, server, _ = parameters.values
        site = make_site(authority, directory)
        async with serving(server, site) as bound:
            await talk(Visit(site, bound.port, directory / "ca.pem"))
        assert bound.stats().peer_errors == 0

    for turn in range(2 * times):
        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                for number, parameters in enumerate(CLIENTS):
                    nursery.start_soon(serve, parameters, tmp_path / f"{turn}-{number}")


@pytest.mark.needs("psql")
async def test_channel_binding_unmasks_one_in_the_middle_whom_the_client_trusts(
    site: Site, pem: Path, authority: Authority
) -> None:
    """RFC 5929: what TLS alone cannot tell, the password can."""
    other_certificate = issue(authority, "localhost")

    async def in_the_middle(sock: Socket) -> None:
        assert await sock.recv_exactly(8) == servers.SSL_REQUEST
        await sock.send(b"S")
        await sock.starttls(other_certificate)
        async with await trisock.connect("127.0.0.1", real.port) as onward:
            await onward.send(servers.SSL_REQUEST)
            assert await onward.recv_exactly(1) == b"S"
            await onward.starttls(ClientTLS("localhost", ca=authority.pem))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, sock, onward)
                await pass_on(onward, sock)
                nursery.cancel_scope.cancel()

    async def pass_on(source: Socket, target: Socket) -> None:
        async for chunk in source:
            await target.send(chunk)

    async with serving(servers.postgres_with_password, site) as real:
        async with serving(lambda _, sock: in_the_middle(sock), site) as bound:
            with pytest.raises(Refused, match="no channel binding, no entry"):
                await by_psql_with_channel_binding(Visit(site, bound.port, pem / "ca.pem"))
        await by_psql_with_channel_binding(Visit(site, real.port, pem / "ca.pem"))


# ---- every protocol, word by word ----


@dataclass(frozen=True)
class Dialogue:
    """How a client asks for TLS, and takes its leave once it has that.

    Attributes:
      before: what the client says before, and the end of each answer.
      ask, agreed: what asks for TLS, and the answer to it.
      leave, answer: the last thing that is said, and the answer to it.
    """

    server: Server
    before: tuple[tuple[bytes, bytes], ...]
    ask: bytes
    agreed: bytes
    leave: bytes
    answer: bytes

    async def ask_for_tls(self, sock: Socket, slipped_in: bytes = b"") -> None:
        for said, answer in self.before:
            await sock.send(said)
            await sock.recv_until(answer)
        await sock.send(self.ask + slipped_in)
        assert await sock.recv_exactly(len(self.agreed)) == self.agreed

    async def offer_tls(self, sock: Socket, slipped_in: bytes) -> None:
        for said, answer in self.before:
            assert await sock.recv_exactly(len(said)) == said
            await sock.send(answer)
        assert await sock.recv_exactly(len(self.ask)) == self.ask
        await sock.send(self.agreed + slipped_in)


STARTTLS = b"STARTTLS\r\n"
QUIT = b"QUIT\r\n"
OPEN_STREAM = b"<stream:stream to='localhost'>"
XMPP = Dialogue(
    servers.xmpp,
    ((OPEN_STREAM, b"</stream:features>"),),
    b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
    OPEN_STREAM + b"</stream:stream>",
    b"</stream:features></stream:stream>",
)
SMTP = Dialogue(
    servers.smtp,
    ((b"", b"220 localhost ready\r\n"), (b"EHLO client\r\n", b"250 STARTTLS\r\n")),
    *(STARTTLS, b"220 go ahead\r\n", QUIT, b"221 goodbye\r\n"),
)
# By the names that openssl gives them.
DIALOGUES = {
    "smtp": SMTP,
    "lmtp": SMTP,
    "pop3": Dialogue(
        servers.pop3,
        ((b"", b"+OK ready\r\n"),),
        *(b"STLS\r\n", b"+OK go ahead\r\n", QUIT, b"+OK goodbye\r\n"),
    ),
    "imap": Dialogue(
        servers.imap,
        ((b"", b"ready\r\n"), (b". CAPABILITY\r\n", b". OK done\r\n")),
        *(b". STARTTLS\r\n", b". OK go ahead\r\n"),
        *(b". LOGOUT\r\n", b"* BYE goodbye\r\n. OK done\r\n"),
    ),
    "ftp": Dialogue(
        servers.ftp,
        ((b"", b"220 ready\r\n"),),
        *(b"AUTH TLS\r\n", b"234 go ahead\r\n", QUIT, b"221 goodbye\r\n"),
    ),
    "nntp": Dialogue(
        servers.nntp,
        ((b"", b"200 ready\r\n"), (b"CAPABILITIES\r\n", b"\r\n.\r\n")),
        *(STARTTLS, b"382 go ahead\r\n", QUIT, b"205 goodbye\r\n"),
    ),
    "sieve": Dialogue(
        servers.sieve,
        ((b"", b'OK "ready"\r\n'),),
        *(STARTTLS, b'OK "go ahead"\r\n', b"LOGOUT\r\n", b'OK "goodbye"\r\n'),
    ),
    "irc": Dialogue(
        servers.irc,
        (),
        *(STARTTLS, b":localhost 670 * :go ahead\r\n", QUIT, b"ERROR :goodbye\r\n"),
    ),
    "telnet": Dialogue(
        servers.telnet,
        ((b"", servers.DO_START_TLS),),
        *(servers.WILL_START_TLS + servers.TLS_FOLLOWS, servers.TLS_FOLLOWS),
        *(b"hello\r\n", b"you said hello\r\n"),
    ),
    "xmpp": XMPP,
    "xmpp-server": XMPP,
    "ldap": Dialogue(
        servers.ldap,
        (),
        ldap_message(b"\1", 0x77, ber(0x80, servers.START_TLS)),
        ldap_message(b"\1", 0x78, *servers.SUCCESS),
        ldap_message(b"\2", 0x63) + ldap_message(b"\3", 0x42),
        ldap_message(b"\2", 0x65, *servers.SUCCESS),
    ),
    "postgres": Dialogue(
        servers.postgres,
        (),
        *(servers.SSL_REQUEST, b"S"),
        b"\0\0\0\x0e\0\3\0\0user\0\0" + servers.pg(b"X"),
        servers.pg(b"Z", b"I"),
    ),
    "mysql": Dialogue(
        servers.mysql,
        ((b"", servers.MYSQL_GREETING),),
        servers.mysql_packet(1, b"\0\x8a" + bytes(30)),
        b"",
        servers.mysql_packet(2, b"let me in") + servers.mysql_packet(0, b"\1"),
        servers.mysql_packet(3, b"\0\0\0\2\0\0\0"),
    ),
}


@pytest.mark.needs("openssl")
async def test_there_is_a_server_for_each_protocol_that_openssl_knows() -> None:
    done = await trio.run_process(
        ["openssl", "s_client", "-starttls", "?"], capture_stderr=True, check=False
    )
    known = done.stderr.decode().partition("must be one of:")[2].split()
    assert "smtp" in known
    assert set(known) <= set(DIALOGUES)


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("version", ["-tls1_2", "-tls1_3"])
@pytest.mark.parametrize("protocol", DIALOGUES)
async def test_openssl_turns_to_tls_in_every_protocol(
    protocol: str, version: str, site: Site, pem: Path
) -> None:
    dialogue = DIALOGUES[protocol]
    async with serving(dialogue.server, site) as bound:
        done = await trio.run_process(
            [
                *("openssl", "s_client", "-starttls", protocol, version),
                *("-connect", f"127.0.0.1:{bound.port}", "-verify_hostname", "localhost"),
                *("-CAfile", str(pem / "ca.pem"), "-verify_return_error"),
                *("-ign_eof", "-nocommands"),
            ],
            stdin=dialogue.leave,
            capture_stdout=True,
            capture_stderr=True,
        )
    assert b"Verify return code: 0 (ok)" in done.stdout
    assert dialogue.answer in done.stdout
    assert site.heard[-1][0] == {"-tls1_2": "TLSv1.2", "-tls1_3": "TLSv1.3"}[version]
    assert bound.stats().peer_errors == 0


@pytest.mark.needs("gnutls-cli")
@pytest.mark.parametrize(
    "protocol", ["smtp", "lmtp", "imap", "pop3", "nntp", "sieve", "ftp", "xmpp", "ldap", "postgres"]
)
async def test_gnutls_turns_to_tls_in_every_protocol_that_it_knows(
    protocol: str, site: Site, pem: Path
) -> None:
    dialogue = DIALOGUES[protocol]
    async with serving(dialogue.server, site) as bound:
        done = await trio.run_process(
            [
                *("gnutls-cli", f"--starttls-proto={protocol}", f"--x509cafile={pem}/ca.pem"),
                *("-p", str(bound.port), "localhost"),
            ],
            stdin=dialogue.leave,
            capture_stdout=True,
            capture_stderr=True,
        )
    assert b"- Status: The certificate is trusted." in done.stdout
    assert dialogue.answer in done.stdout
    assert site.heard[-1][0] == "TLSv1.3"
    assert bound.stats().peer_errors == 0


each_protocol = pytest.mark.parametrize("protocol", DIALOGUES)


@each_protocol
async def test_commands_slipped_in_behind_the_one_that_asks_for_tls_are_not_obeyed(
    protocol: str, site: Site, authority: Authority, caplog: pytest.LogCaptureFixture
) -> None:
    """CVE-2011-0411, CVE-2021-23214, and "NO STARTTLS" (2021)."""
    caplog.set_level(logging.INFO, "trisock.server")
    dialogue = DIALOGUES[protocol]
    tls = ClientTLS("localhost", ca=authority.pem)
    async with serving(dialogue.server, site) as bound:
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            where = sock.getlocal()
            await dialogue.ask_for_tls(sock, dialogue.leave)
            heard = site.heard.copy()
            with pytest.raises(TLSError):
                await sock.starttls(tls)
        await all_served(bound, 1)
        assert site.heard == heard
        (message,) = caplog.messages
        assert message.startswith(
            f"closed the connection with {where}: TLS handshake with {where} failed: "
        )
        async with await trisock.connect("127.0.0.1", bound.port) as sock:
            await dialogue.ask_for_tls(sock)
            await sock.starttls(tls)
            await sock.send(dialogue.leave)
            await sock.recv_until(dialogue.answer)
        assert bound.stats().peer_errors == 1


@each_protocol
async def test_answers_slipped_in_behind_the_one_that_agrees_to_tls_are_not_believed(
    protocol: str, site: Site, authority: Authority
) -> None:
    """CVE-2021-23222, and "NO STARTTLS" (2021)."""
    dialogue = DIALOGUES[protocol]

    async def serve(site: Site, sock: Socket) -> None:
        await dialogue.offer_tls(sock, slipped_in)
        await sock.starttls(site.tls)
        await sock.recv_exactly(len(dialogue.leave))
        await sock.send(dialogue.answer)

    async with serving(serve, site) as bound:
        for slipped_in in (dialogue.answer, b""):
            async with await trisock.connect("127.0.0.1", bound.port) as sock:
                await dialogue.ask_for_tls(sock)
                if slipped_in:
                    with pytest.raises(TLSError):
                        await sock.starttls(ClientTLS("localhost", ca=authority.pem))
                    assert not sock.isopen()
                else:
                    await sock.starttls(ClientTLS("localhost", ca=authority.pem))
                    await sock.send(dialogue.leave)
                    assert await sock.recv_exactly(len(dialogue.answer)) == dialogue.answer
            await all_served(bound, 1)


# ---- FTP ----


@pytest.mark.needs("curl")
async def test_curl_clears_the_command_channel(site: Site, pem: Path) -> None:
    async with serving(servers.ftp, site) as bound:
        # In the passive mode it does not answer close_notify, and cannot be told from an attacker.
        await by_curl_ftp(Visit(site, bound.port, pem / "ca.pem"), "--ftp-ssl-ccc-mode", "active")
    cleared = site.heard.index(("TLSv1.3", b"CCC"))
    assert ("TLSv1.3", f"PASS {PASSWORD}".encode()) in site.heard[:cleared]
    assert site.heard[cleared + 1] == (None, b"PWD")


async def test_an_upload_that_is_cut_off_leaves_no_file(site: Site, authority: Authority) -> None:
    tls = ClientTLS("localhost", ca=authority.pem)
    async with serving(servers.ftp, site) as bound:
        async with await trisock.connect("127.0.0.1", bound.port) as control:
            await DIALOGUES["ftp"].ask_for_tls(control)
            await control.starttls(tls)
            for whole in (False, True):
                await control.send(b"PBSZ 0\r\nPROT P\r\nEPSV\r\nSTOR file\r\n")
                answers = [await control.recv_until(b"\r\n") for _ in range(4)]
                assert [answer[:3] for answer in answers] == [b"200", b"200", b"229", b"150"]
                port = int(answers[2].split(b"|")[3])
                async with await trisock.connect("127.0.0.1", port) as data:
                    await data.starttls(tls)
                    await data.send(b"the first half")
                    if not whole:
                        data.stream.socket.shutdown(socket.SHUT_WR)
                        with pytest.raises(TLSError):  # the server gives it up as well
                            await data.recv()
                answer = await control.recv_until(b"\r\n")
                assert answer.startswith(b"226 " if whole else b"426 TLS with ")
                assert (site.directory / "file").exists() is whole


# ---- HAProxy ----

HAPROXY = """
defaults
    mode tcp
    timeout connect 60s
    timeout client 60s
    timeout server 60s
listen proxy
    bind fd@{fd} {bind}
    option tcp-check
    tcp-check send hello\\n
    tcp-check expect string hello
    server only 127.0.0.1:{port} {server}
"""


@contextlib.asynccontextmanager
async def haproxy(
    where: str | Path, port: int, directory: Path, *, server: str, bind: str = ""
) -> AsyncIterator[int]:
    """Run HAProxy in front of a port; what it listens on is open from the start.

    Gives the port, if it listens at an address and not at a path.
    """
    if isinstance(where, Path):
        family: int = socket.AF_UNIX
    else:
        family = socket.AF_INET6 if ":" in where else socket.AF_INET
    with socket.socket(family) as listening:
        listening.bind(str(where) if isinstance(where, Path) else (where, 0))
        listening.listen()
        fd = listening.fileno()
        config = directory / "haproxy.cfg"
        config.write_text(HAPROXY.format(fd=fd, port=port, server=server, bind=bind))
        async with running(
            *("haproxy", "-db", "-f", config), pass_fds=[fd], stderr=subprocess.DEVNULL
        ):
            yield 0 if isinstance(where, Path) else listening.getsockname()[1]


class BehindProxy:
    """Answers each line with whose connection it is; notes what the PROXY headers say."""

    def __init__(self, *, read_ahead: bool = False) -> None:
        self.read_ahead = read_ahead
        self.headers: list[Proxied] = []
        self.checked = trio.Event()  # by the proxy itself

    async def __call__(self, site: Site, sock: Socket) -> None:
        if self.read_ahead:  # until a part of the ClientHello is there, however it comes
            start = b""
            while b"\x16\x03" not in start:
                start += await sock.recv()
            sock.unrecv(start)
        header = await servers.receive_proxy_header(sock)
        self.headers.append(header)
        first = await sock.recv(1)
        sock.unrecv(first)
        if first == b"\x16":  # a ClientHello
            await sock.starttls(site.tls)
        async for line in sock.lines(max_bytes=len(FILE) + 1):
            await sock.send(str(header.client).encode(), b" ", line, b"\n")
            if header.client is None:
                self.checked.set()


@pytest.mark.needs("haproxy")
@pytest.mark.parametrize("how", ["clear", "TLS", "TLS, read ahead"])
@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy_each_client_is_known_by_its_own_address(
    server: str, host: str, how: str, site: Site, pem: Path, authority: Authority
) -> None:
    behind = BehindProxy(read_ahead=how == "TLS, read ahead")
    tls = None if how == "clear" else ClientTLS("localhost", ca=authority.pem)
    line = FILE.replace(b"\n", b"")
    served = 0

    async def visit(port: int) -> None:
        nonlocal served
        async with await trisock.connect(host, port, tls=tls) as sock:
            await sock.send(line, b"\n")
            answer = await sock.recv_until(b"\n", max_bytes=len(FILE) + 100)
            assert answer == str(sock.getlocal()).encode() + b" " + line + b"\n"
        served += 1

    async with serving(behind, site) as bound:
        async with haproxy(host, bound.port, pem, server=server) as port:
            async with trio.open_nursery() as nursery:
                for _ in range(5):
                    nursery.start_soon(visit, port)
            await all_served(bound, 5)
    assert served == len(behind.headers) == 5
    assert bound.stats().peer_errors == 0


@pytest.mark.needs("haproxy")
@pytest.mark.parametrize("tls", [False, True])
async def test_haproxys_own_checks_are_nobodys_connections(
    tls: bool, site: Site, pem: Path
) -> None:
    behind = BehindProxy()
    check = "send-proxy-v2 check inter 100ms"  # version 1 has no word for them
    if tls:
        check += f" check-ssl check-sni localhost verify required ca-file {pem}/ca.pem"
    async with serving(behind, site) as bound:
        async with haproxy("127.0.0.1", bound.port, pem, server=check):
            await behind.checked.wait()
    assert {header.client for header in behind.headers} == {None}


@pytest.mark.needs("haproxy")
@pytest.mark.parametrize("server", ["send-proxy", "send-proxy-v2"])
async def test_behind_haproxy_a_client_without_an_address_has_none(
    server: str, site: Site, pem: Path, authority: Authority
) -> None:
    path = pem / "socket"
    behind = BehindProxy()
    async with (
        serving(behind, site) as bound,
        haproxy(path, bound.port, pem, server=server),
        await trisock.connect_unix(path, tls=ClientTLS("localhost", ca=authority.pem)) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == b"None hello\n"


@pytest.mark.needs("haproxy")
async def test_haproxy_tells_what_tls_it_took_off(
    site: Site, pem: Path, authority: Authority
) -> None:
    combined = pem / "combined.pem"
    combined.touch(mode=0o600)
    combined.write_bytes((pem / "chain.pem").read_bytes() + (pem / "key.pem").read_bytes())
    behind = BehindProxy()
    async with (
        serving(behind, site) as bound,
        haproxy(
            *("127.0.0.1", bound.port, pem),
            bind=f"ssl crt {combined}",
            server="send-proxy-v2 proxy-v2-options ssl,authority,crc32c",
        ) as port,
        await trisock.connect(
            "127.0.0.1", port, tls=ClientTLS("localhost", ca=authority.pem)
        ) as sock,
    ):
        await sock.send(b"hello\n")
        assert await sock.recv_until(b"\n") == f"{sock.getlocal()} hello\n".encode()
    (header,) = behind.headers
    assert header.fields[0x02] == b"localhost"
    assert header.fields[0x20][0] & 1  # by TLS
    assert servers.split_tlv(header.fields[0x20][5:])[0x21] == b"TLSv1.3"
