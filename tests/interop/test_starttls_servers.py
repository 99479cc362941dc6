"""Our client upgrades to TLS with real servers (``real_servers.py``), in each protocol.

If a server refuses TLS, the client does not continue in plain text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

import pytest
import trio
import trio.testing

import trisock
from helpers.chat_client import (
    irc_login,
    nntp_hello,
    telnet_prompt,
    xmpp_client_hello,
    xmpp_server_hello,
)
from helpers.ftp_client import ftp_login, vsftp_login
from helpers.ldap_client import ldap_login
from helpers.mail_client import (
    imap_hello,
    imap_login,
    lmtp_hello,
    pop3_hello,
    pop3_login,
    sieve_hello,
    sieve_login,
    smtp_hello,
)
from helpers.mysql_client import mysql_login
from helpers.postgres_client import pg_login
from helpers.real_servers import PASSWORD, PROGRAMS, RealServer
from helpers.tls_clients import both_versions, for_version
from trisock import ClientTLS, Socket, StartTLSError, TLSError
from trisock.testing import Authority

pytestmark = pytest.mark.interop

# From its own address, 127.0.0.1, Dovecot would accept a log-in without TLS.
CLIENT_ADDRESS = "127.0.0.2"


@dataclass(frozen=True)
class Service:
    """A server's port for a protocol that upgrades to TLS.

    Attributes:
      protocol: the name of the protocol.
      server: the fixture that starts the server.
      session: a function that logs in, or sends another command that needs TLS.
      greeting: a part of the server's greeting.
      port: the port's name, if it differs from ``protocol``.
    """

    protocol: str
    server: str
    session: Callable[[Socket], Awaitable[None]]
    greeting: bytes = b""
    port: str | None = None


SERVICES = {
    "smtp": Service("smtp", "postfix", smtp_hello, b"220 mail.example.org ESMTP Postfix"),
    "smtp-exim": Service("smtp", "exim", smtp_hello, b"220 mail.example.org ESMTP Exim"),
    "lmtp": Service("lmtp", "dovecot", lmtp_hello, b"220 "),
    "lmtp-cyrus": Service("lmtp", "cyrus", lmtp_hello, b"220 mail.example.org Cyrus LMTP"),
    "imap": Service("imap", "dovecot", imap_login, b"* OK [CAPABILITY "),
    "imap-cyrus": Service("imap", "cyrus", imap_hello, b"mail.example.org Cyrus IMAP"),
    "pop3": Service("pop3", "dovecot", pop3_login, b"+OK Dovecot"),
    "pop3-cyrus": Service("pop3", "cyrus", pop3_hello, b"+OK mail.example.org Cyrus POP3"),
    "sieve": Service("sieve", "dovecot", sieve_login, b'"IMPLEMENTATION" "Dovecot'),
    "sieve-cyrus": Service("sieve", "cyrus", sieve_hello, b'"IMPLEMENTATION" "Cyrus'),
    "ftp": Service("ftp", "proftpd", ftp_login, b"220 ProFTPD"),
    "ftp-vsftpd": Service("ftp", "vsftpd", vsftp_login, b"220 (vsFTPd"),
    "nntp": Service("nntp", "nnrpd", nntp_hello, b"201 localhost InterNetNews"),
    "ldap": Service("ldap", "slapd", ldap_login),
    "postgres": Service("postgres", "postgresql", pg_login),
    "mysql": Service("mysql", "mariadb", mysql_login, b"-MariaDB-"),
    "xmpp": Service("xmpp", "prosody", xmpp_client_hello),
    "xmpp-server": Service("xmpp-server", "prosody", xmpp_server_hello),
    "irc": Service("irc", "inspircd", irc_login),
    "telnet": Service("telnet", "iksd", telnet_prompt),
}


@dataclass(frozen=True)
class WithoutTLS:
    """A server's port without TLS.

    Attributes:
      protocol: the name of the protocol.
      server: the fixture that starts the server.
      offered: the expected ``StartTLSError.offered``.
      port: the port's name, if it differs from ``protocol``.
      local_address: the client's address.
      timeout: how long to wait for an answer, in seconds.
    """

    protocol: str
    server: str
    offered: bool | None
    port: str | None = None
    local_address: str = CLIENT_ADDRESS
    timeout: float = 60


# Dovecot does not offer TLS to this address.
NO_TLS_ADDRESS = "127.0.0.3"

WITHOUT_TLS = {
    "smtp": WithoutTLS("smtp", "postfix", False, port="plain"),
    "smtp-exim": WithoutTLS("smtp", "exim_without_tls", False),
    "lmtp-cyrus": WithoutTLS("lmtp", "cyrus_without_tls", False),
    "imap": WithoutTLS("imap", "dovecot", False, local_address=NO_TLS_ADDRESS),
    "imap-cyrus": WithoutTLS("imap", "cyrus_without_tls", False),
    "pop3": WithoutTLS("pop3", "dovecot", None, local_address=NO_TLS_ADDRESS),
    "pop3-cyrus": WithoutTLS("pop3", "cyrus_without_tls", None),
    "sieve": WithoutTLS("sieve", "dovecot", True, local_address=NO_TLS_ADDRESS),
    "sieve-cyrus": WithoutTLS("sieve", "cyrus_without_tls", False),
    "ftp": WithoutTLS("ftp", "proftpd", None, port="plain"),
    "nntp": WithoutTLS("nntp", "nnrpd_without_tls", None),
    "ldap": WithoutTLS("ldap", "slapd_without_tls", False),
    "postgres": WithoutTLS("postgres", "postgresql_without_tls", False),
    "mysql": WithoutTLS("mysql", "mariadb_without_tls", False),
    "xmpp": WithoutTLS("xmpp", "prosody_without_tls", False),
    "xmpp-server": WithoutTLS("xmpp-server", "prosody_without_tls", False),
    # Before a client registers, InspIRCd does not answer a command that it does not know.
    "irc": WithoutTLS("irc", "inspircd_without_tls", None, timeout=0.5),
    "telnet": WithoutTLS("telnet", "iksd_without_tls", None),
}


def parametrized(name: str, cases: Mapping[str, Service | WithoutTLS]) -> pytest.MarkDecorator:
    """Run a test with each case and its server, which starts before the test."""
    parameters = []
    for key, case in cases.items():
        program = PROGRAMS[case.server.removesuffix("_without_tls")]
        parameters.append(pytest.param(case, id=key, marks=pytest.mark.needs(program)))
    return pytest.mark.parametrize(name, parameters, indirect=True)


@pytest.fixture(scope="module")
def service(request: pytest.FixtureRequest) -> tuple[Service, int]:
    """A service and its port."""
    case: Service = request.param
    server: RealServer = request.getfixturevalue(case.server)
    return case, server.ports[case.port or case.protocol]


@pytest.fixture(scope="module")
def without_tls(request: pytest.FixtureRequest) -> tuple[WithoutTLS, int]:
    """A server without TLS and its port."""
    case: WithoutTLS = request.param
    server: RealServer = request.getfixturevalue(case.server)
    return case, server.ports[case.port or case.protocol]


@parametrized("service", SERVICES)
@both_versions
async def test_a_session_works_after_connect_with_starttls(
    service: tuple[Service, int], version: str, authority: Authority
) -> None:
    """The certificate must have the name of the host."""
    case, port = service
    async with await trisock.connect(
        "localhost",
        port,
        local_address=CLIENT_ADDRESS,
        tls=for_version(version, authority),
        starttls=case.protocol,
    ) as sock:
        assert sock.tls is not None
        assert (sock.tls.version, sock.tls.server_hostname) == (version, "localhost")
        await case.session(sock)


@parametrized("service", SERVICES)
async def test_upgrade_returns_the_greeting(
    service: tuple[Service, int], authority: Authority
) -> None:
    """``upgrade`` verifies a name that differs from the host in ``connect``."""
    case, port = service
    async with await trisock.connect("127.0.0.1", port, local_address=CLIENT_ADDRESS) as sock:
        tls = authority.client_tls("localhost")
        greeting = await trisock.starttls.upgrade(sock, case.protocol, tls)
        assert case.greeting in greeting
        assert bool(greeting) is bool(case.greeting)
        await case.session(sock)


@parametrized("service", SERVICES)
async def test_an_invalid_certificate_gets_no_password(
    service: tuple[Service, int], authority: Authority, other_authority: Authority
) -> None:
    """Prosody is responsible for example.net too, but has no certificate for it."""
    case, port = service
    for tls, words in [
        (other_authority.client_tls("localhost"), "local issuer|self-signed certificate in"),
        (authority.client_tls("example.net"), "Hostname mismatch"),
    ]:
        async with await trisock.connect("127.0.0.1", port, local_address=CLIENT_ADDRESS) as sock:
            with pytest.raises(TLSError, match=words) as raised:
                await trisock.starttls.upgrade(sock, case.protocol, tls)
            assert not isinstance(raised.value, StartTLSError)
            assert not sock.isopen()
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(PASSWORD.encode())


@parametrized("without_tls", WITHOUT_TLS)
async def test_a_server_without_tls_gets_no_password(
    without_tls: tuple[WithoutTLS, int], authority: Authority
) -> None:
    case, port = without_tls
    async with await trisock.connect("127.0.0.1", port, local_address=case.local_address) as sock:
        with pytest.raises(StartTLSError) as raised:
            await trisock.starttls.upgrade(
                sock, case.protocol, authority.client_tls(), timeout=case.timeout
            )
        assert raised.value.protocol == case.protocol
        assert raised.value.offered is case.offered
        assert not sock.isopen()


async def test_connect_closes_the_connection_if_tls_is_refused(
    postfix: RealServer, authority: Authority
) -> None:
    with pytest.raises(StartTLSError, match=r"STARTTLS \(smtp\)"):
        await trisock.connect(
            "127.0.0.1",
            postfix.ports["plain"],
            tls=ClientTLS(ca=authority.ca),
            starttls="smtp",
        )
