"""Real clients that upgrade to TLS, with small servers (``starttls_servers.py``)."""

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
import re
import smtplib
import ssl
import sys
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import trio

import trisock
from helpers import starttls_databases as databases
from helpers import starttls_ftp
from helpers import starttls_servers as servers
from helpers.pairs import all_served
from helpers.starttls_servers import PASSWORD, USER, Site
from helpers.starttls_sites import FILE, MAIL, Server, make_site, serving, site_certificate
from helpers.tls_clients import usually_the_newest
from trisock import ServerTLS, Socket
from trisock.testing import Authority


class ProgramError(Exception):
    """A program failed. The error's text is what the program printed."""


@dataclass
class Visit:
    """What a client needs to know: the port, the authority to trust, and the TLS version."""

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
        """Run a program and return its output."""
        done = await trio.run_process(
            list(map(str, command)),
            stdin=stdin,
            capture_stdout=True,
            capture_stderr=True,
            check=False,
            env={**os.environ, "HOME": str(self.ca.parent), **{k: str(v) for k, v in env.items()}},
        )
        if done.returncode:
            raise ProgramError((done.stdout + done.stderr).decode(errors="replace"))
        return done.stdout


def by_smtplib(visit: Visit, kind: type[smtplib.SMTP] = smtplib.SMTP) -> None:
    # Without local_hostname, smtplib looks up a name in the DNS.
    with kind("localhost", visit.port, local_hostname="client", timeout=30) as client:
        client.starttls(context=visit.context())
        if kind is smtplib.SMTP:
            client.login(USER, PASSWORD)
        client.sendmail("me@example.org", ["you@example.org"], MAIL)
    assert visit.site.mail.pop() == MAIL


def by_imaplib(visit: Visit) -> None:
    client = imaplib.IMAP4("localhost", visit.port, timeout=30)
    client.starttls(visit.context())  # on failure, starttls() closes the connection
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
    message = visit.ca.parent / "message"  # a file, because curl must know the size
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


async def by_lftp(visit: Visit, *, passive: bool = True) -> None:
    (visit.ca.parent / "upload").write_bytes(FILE)
    script = [
        "set cmd:fail-exit true; set net:max-retries 1; set net:timeout 30",
        f"set ssl:ca-file {visit.ca}; set ssl:priority {visit.gnutls_priority}",
        "set ftp:ssl-force true; set ftp:ssl-protect-data true",
        f"set ftp:passive-mode {str(passive).lower()}",
        f"open -u {USER},{PASSWORD} -p {visit.port} localhost",
        f"put -O / {visit.ca.parent}/upload; get /upload -o {visit.ca.parent}/download",
    ]
    await visit.run("lftp", "-c", "; ".join(script))
    for path in (visit.site.directory / "upload", visit.ca.parent / "download"):
        assert path.read_bytes() == FILE
        path.unlink()


async def ldap_client(visit: Visit, program: str, *options: str, stdin: bytes = b"") -> bytes:
    # Pass an address, because these programs would replace "localhost" with the host's name.
    return await visit.run(
        *(program, "-ZZ", "-x", "-D", f"cn={USER}", "-w", PASSWORD),
        *("-H", f"ldap://127.0.0.1:{visit.port}", *options),
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
    assert any(text in command for _, command in visit.site.commands)


async def by_psql(visit: Visit, *, channel_binding: str = "prefer") -> None:
    text = "x" * 1_000_000
    server = f"host=localhost port={visit.port} user={USER} dbname=test"
    trust = f"sslmode=verify-full sslrootcert={visit.ca}"
    versions = f"ssl_max_protocol_version={visit.version}"
    got = await visit.run(
        *("psql", "--no-psqlrc", "--no-align", "--tuples-only", "--file", "-"),
        f"{server} {trust} {versions} channel_binding={channel_binding}",
        stdin=f"select '{text}';".encode(),
        PGPASSWORD=PASSWORD,
    )
    assert got.decode() == f"{text}\n"


def client(name: str, talk: Any, server: Server, error: str, *programs: str, **options: Any) -> Any:
    """Return a test's parameters. ``error`` is the client's error for an invalid certificate."""
    talk = functools.partial(talk, **options)
    if not inspect.iscoroutinefunction(talk):
        talk = functools.partial(trio.to_thread.run_sync, talk)
    marks = [pytest.mark.needs(*programs)] if programs else []
    return pytest.param(talk, server, error, id=name, marks=marks)


PYTHON = "certificate verify failed"
CURL = "SSL certificate problem|no alternative certificate subject name matches"
LFTP = "Certificate verification: "
LDAP = "ldap_start_tls: Connect error"  # the clients print no details
PSQL = "certificate verify failed|does not match host name"

submission, ftp, ldap = servers.submission, starttls_ftp.ftp, databases.ldap
postgres, postgres_with_password = databases.postgres, databases.postgres_with_password

CLIENTS = [
    client("smtplib", by_smtplib, submission, PYTHON),
    client("smtplib-lmtp", by_smtplib, servers.lmtp, PYTHON, kind=smtplib.LMTP),
    client("imaplib", by_imaplib, servers.imap, PYTHON),
    client("poplib", by_poplib, servers.pop3, PYTHON),
    client("ftplib", by_ftplib, ftp, PYTHON),
    client("ftplib-active", by_ftplib, ftp, PYTHON, passive=False),
    client("ftplib-ipv6", by_ftplib, ftp, PYTHON, host="::1"),
    client("ftplib-ipv6-active", by_ftplib, ftp, PYTHON, host="::1", passive=False),
    client("curl-smtp", by_curl_smtp, submission, CURL, "curl"),
    client("curl-imap", by_curl_imap, servers.imap, CURL, "curl"),
    client("curl-pop3", by_curl_pop3, servers.pop3, CURL, "curl"),
    client("curl-ftp", by_curl_ftp, ftp, CURL, "curl"),
    client("lftp", by_lftp, ftp, LFTP, "lftp"),
    client("lftp-active", by_lftp, ftp, LFTP, "lftp", passive=False),
    client("ldapsearch", by_ldapsearch, ldap, LDAP, "ldapsearch"),
    client("ldapadd", by_ldapadd, ldap, LDAP, "ldapadd"),
    client("psql", by_psql, postgres, PSQL, "psql"),
    client(
        *("psql-with-channel-binding", by_psql, postgres_with_password, PSQL, "psql"),
        channel_binding="require",
    ),
]
if sys.version_info < (3, 13):
    CLIENTS.append(client("nntplib", by_nntplib, servers.nntp, PYTHON))

# The alerts from clients that reject a certificate. GnuTLS sends no alert. Clients that check the
# name after the handshake send no alert for a wrong name.
ALERTS = {
    (PYTHON, "authority"): "unknown ca",
    (PYTHON, "name"): "bad certificate",
    (CURL, "authority"): "unknown ca",
    (PSQL, "authority"): "unknown ca",
}


@pytest.mark.parametrize(("talk", "server", "error"), CLIENTS)
@usually_the_newest
@pytest.mark.filterwarnings("ignore:'nntplib' is deprecated:DeprecationWarning")
async def test_a_client_upgrades_only_with_a_valid_certificate(
    talk: Callable[[Visit], Awaitable[None]],
    server: Server,
    error: str,
    version: str,
    site: Site,
    pem: Path,
    authority: Authority,
    other_authority: Authority,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Each client transfers about 1 MB with TLS, and sends no password without TLS."""
    caplog.set_level(logging.INFO, "trisock.server")
    valid = site.tls
    invalid = {
        "authority": site_certificate(other_authority),
        "name": site_certificate(authority, "example.net"),
    }
    async with serving(server, site) as bound:
        visit = Visit(site, bound.port, pem / "ca.pem", version)
        for number, (fault, certificate) in enumerate(invalid.items(), 1):
            caplog.clear()
            site.tls = ServerTLS(certificate)
            with pytest.raises((ProgramError, ssl.SSLCertVerificationError), match=error):
                await talk(visit)
            await all_served(bound, number)
            if alert := ALERTS.get((error, fault)):
                (message,) = caplog.messages
                assert re.fullmatch(
                    r"closed the connection with \S+: TLS handshake failed: "
                    rf"the peer refused, with the alert '{alert}'( \(.*\))?",
                    message,
                )
        assert not any(PASSWORD.encode() in command for _, command in site.commands)
        peer_errors = bound.stats().peer_errors
        site.tls = valid
        await talk(visit)
    assert bound.stats().peer_errors == peer_errors
    assert {tls for tls, _ in site.commands} - {None} == {version}
    assert not any(tls is None and PASSWORD.encode() in command for tls, command in site.commands)


@pytest.mark.interop
@pytest.mark.needs("curl", "lftp", "ldapsearch", "ldapadd", "psql")
@pytest.mark.filterwarnings("ignore:'nntplib' is deprecated:DeprecationWarning")
async def test_all_clients_upgrade_concurrently(
    times: int, authority: Authority, tmp_path: Path
) -> None:
    async def serve(parameters: Any, directory: Path) -> None:
        talk, server, _ = parameters.values
        site = make_site(authority, directory)
        async with serving(server, site) as bound:
            await talk(Visit(site, bound.port, directory / "ca.pem"))
        assert bound.stats().peer_errors == 0

    for round_number in range(2 * times):
        with trio.fail_after(50):
            async with trio.open_nursery() as nursery:
                for number, parameters in enumerate(CLIENTS):
                    nursery.start_soon(serve, parameters, tmp_path / f"{round_number}-{number}")


@pytest.mark.needs("psql")
async def test_channel_binding_exposes_a_trusted_man_in_the_middle(
    site: Site, pem: Path, authority: Authority
) -> None:
    """The attacker's certificate is valid too.

    Only channel binding (RFC 5929) shows that it is not the server's certificate.
    """
    other_certificate = site_certificate(authority, "localhost")

    async def man_in_the_middle(_: Site, sock: Socket) -> None:
        assert await sock.recv_exactly(8) == databases.SSL_REQUEST
        await sock.send(b"S")
        await sock.starttls(other_certificate)
        async with await trisock.connect(
            "127.0.0.1", real.port, tls=authority.client_tls("localhost"), starttls="postgres"
        ) as onward:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(forward, sock, onward)
                await forward(onward, sock)
                nursery.cancel_scope.cancel()

    async def forward(source: Socket, target: Socket) -> None:
        async for chunk in source:
            await target.send(chunk)

    async with serving(databases.postgres_with_password, site) as real:
        async with serving(man_in_the_middle, site) as bound:
            with pytest.raises(ProgramError, match="channel binding required"):
                await by_psql(Visit(site, bound.port, pem / "ca.pem"), channel_binding="require")
        await by_psql(Visit(site, real.port, pem / "ca.pem"), channel_binding="require")


@pytest.mark.needs("curl")
async def test_curl_returns_the_control_channel_to_plain_text(site: Site, pem: Path) -> None:
    async with serving(starttls_ftp.ftp, site) as bound:
        # In passive CCC mode, curl does not answer the server's close_notify. The server would
        # therefore see a truncated connection.
        await by_curl_ftp(Visit(site, bound.port, pem / "ca.pem"), "--ftp-ssl-ccc-mode", "active")
    cleared = site.commands.index(("TLSv1.3", b"CCC"))
    assert ("TLSv1.3", f"PASS {PASSWORD}".encode()) in site.commands[:cleared]
    assert site.commands[cleared + 1] == (None, b"PWD")


# ---- clients that verify no name, or do not ask for TLS ----

SMALL_MAIL = b"Subject: small\r\n\r\nhello\r\n"


async def swaks(visit: Visit, *options: str | Path) -> bytes:
    return await visit.run(
        *("swaks", "--server", f"localhost:{visit.port}", "--helo", "client"),
        *("--from", "me@example.org", "--to", "you@example.org", "--data", "-", *options),
        stdin=SMALL_MAIL,
    )


@pytest.mark.interop
@pytest.mark.needs("swaks")
@usually_the_newest
@pytest.mark.parametrize(
    ("server", "options"),
    [
        (submission, ["--auth", "PLAIN", "--auth-user", USER, "--auth-password", PASSWORD]),
        (servers.lmtp, ["--protocol", "LMTP"]),
    ],
    ids=["smtp", "lmtp"],
)
async def test_swaks_upgrades_only_with_a_trusted_certificate(
    server: Server,
    options: list[str],
    version: str,
    site: Site,
    pem: Path,
    other_authority: Authority,
) -> None:
    """swaks verifies no name."""
    options = [*options, "--tls-protocol", version.lower().replace(".", "_")]
    verify = ("--tls", "--tls-verify", "--tls-ca-path", pem / "ca.pem")
    async with serving(server, site) as bound:
        visit = Visit(site, bound.port, pem / "ca.pem", version)
        valid = site.tls
        site.tls = ServerTLS(site_certificate(other_authority))
        with pytest.raises(ProgramError, match="certificate verify failed"):
            await swaks(visit, *verify, *options)
        assert not site.commands
        site.tls = valid
        await swaks(visit, *verify, *options)
    (mail,) = site.mail
    assert mail.startswith(SMALL_MAIL)
    assert {tls for tls, _ in site.commands} == {version}


async def curl_in_plain_text(visit: Visit, url: str) -> bytes:
    return await visit.run(
        *("curl", "--silent", "--show-error", "--noproxy", "*"),
        *("--user", f"{USER}:{PASSWORD}", url.replace("PORT", str(visit.port))),
    )


async def psql_in_plain_text(visit: Visit) -> bytes:
    where = f"host=localhost port={visit.port} user={USER} dbname=test sslmode=disable"
    return await visit.run("psql", "--no-psqlrc", "-c", "select 1", where, PGPASSWORD=PASSWORD)


@pytest.mark.parametrize(
    ("talk", "server", "error"),
    [
        pytest.param(
            *(swaks, submission, "<.* 530 "),
            id="swaks",
            marks=[pytest.mark.interop, pytest.mark.needs("swaks")],
        ),
        pytest.param(
            functools.partial(curl_in_plain_text, url="imap://localhost:PORT/INBOX"),
            *(servers.imap, "Login denied"),
            id="curl-imap",
            marks=pytest.mark.needs("curl"),
        ),
        pytest.param(
            functools.partial(curl_in_plain_text, url="pop3://localhost:PORT/1"),
            *(servers.pop3, "Login denied"),
            id="curl-pop3",
            marks=pytest.mark.needs("curl"),
        ),
        pytest.param(
            *(psql_in_plain_text, postgres, "SSL|TLS"),
            id="psql",
            marks=pytest.mark.needs("psql"),
        ),
    ],
)
async def test_a_client_without_tls_is_refused(
    talk: Callable[[Visit], Awaitable[bytes]], server: Server, error: str, site: Site, pem: Path
) -> None:
    """``accept`` ends the session, and the server gets no command."""
    async with serving(server, site) as bound:
        with pytest.raises(ProgramError, match=error):
            await talk(Visit(site, bound.port, pem / "ca.pem"))
        await all_served(bound, 1)
        assert bound.stats().peer_errors == 1
    assert not site.commands
    assert not site.mail
