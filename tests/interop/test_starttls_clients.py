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
from helpers.authority import Authority
from helpers.pairs import all_served
from helpers.starttls_servers import PASSWORD, USER, Site
from helpers.starttls_sites import FILE, MAIL, Server, issue, make_site, serving
from trisock import ClientTLS, ServerTLS, Socket


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
    client(by_ftplib, starttls_ftp.ftp, PYTHON),
    client(by_ftplib_active, starttls_ftp.ftp, PYTHON),
    client(by_ftplib_ipv6, starttls_ftp.ftp, PYTHON),
    client(by_ftplib_ipv6_active, starttls_ftp.ftp, PYTHON),
    client(by_curl_smtp, servers.submission, CURL, "curl"),
    client(by_curl_imap, servers.imap, CURL, "curl"),
    client(by_curl_pop3, servers.pop3, CURL, "curl"),
    client(by_curl_ftp, starttls_ftp.ftp, CURL, "curl"),
    client(by_lftp, starttls_ftp.ftp, LFTP, "lftp"),
    client(by_lftp_active, starttls_ftp.ftp, LFTP, "lftp"),
    client(by_ldapsearch, databases.ldap, LDAP, "ldapsearch"),
    client(by_ldapadd, databases.ldap, LDAP, "ldapadd"),
    client(by_psql, databases.postgres, PSQL, "psql"),
    client(by_psql_with_channel_binding, databases.postgres_with_password, PSQL, "psql"),
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
async def test_a_client_refuses_a_wrong_certificate(
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
async def test_channel_binding_unmasks_a_trusted_one_in_the_middle(
    site: Site, pem: Path, authority: Authority
) -> None:
    """RFC 5929: what TLS alone cannot tell, the password can."""
    other_certificate = issue(authority, "localhost")

    async def in_the_middle(sock: Socket) -> None:
        assert await sock.recv_exactly(8) == databases.SSL_REQUEST
        await sock.send(b"S")
        await sock.starttls(other_certificate)
        async with await trisock.connect("127.0.0.1", real.port) as onward:
            await onward.send(databases.SSL_REQUEST)
            assert await onward.recv_exactly(1) == b"S"
            await onward.starttls(ClientTLS("localhost", ca=authority.pem))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(pass_on, sock, onward)
                await pass_on(onward, sock)
                nursery.cancel_scope.cancel()

    async def pass_on(source: Socket, target: Socket) -> None:
        async for chunk in source:
            await target.send(chunk)

    async with serving(databases.postgres_with_password, site) as real:
        async with serving(lambda _, sock: in_the_middle(sock), site) as bound:
            with pytest.raises(Refused, match="no channel binding, no entry"):
                await by_psql_with_channel_binding(Visit(site, bound.port, pem / "ca.pem"))
        await by_psql_with_channel_binding(Visit(site, real.port, pem / "ca.pem"))


@pytest.mark.needs("curl")
async def test_curl_clears_the_command_channel(site: Site, pem: Path) -> None:
    async with serving(starttls_ftp.ftp, site) as bound:
        # In the passive mode it does not answer close_notify, and cannot be told from an attacker.
        await by_curl_ftp(Visit(site, bound.port, pem / "ca.pem"), "--ftp-ssl-ccc-mode", "active")
    cleared = site.heard.index(("TLSv1.3", b"CCC"))
    assert ("TLSv1.3", f"PASS {PASSWORD}".encode()) in site.heard[:cleared]
    assert site.heard[cleared + 1] == (None, b"PWD")
