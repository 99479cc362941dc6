"""Our client upgrades to TLS with real servers (``real_servers.py``), in each protocol.

If a server refuses TLS, the client does not continue in plain text.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest
import trio
import trio.testing

import trisock
from helpers.ftp_client import ftp_login, ftp_starttls, vsftp_login
from helpers.ldap_client import ldap_login, ldap_starttls
from helpers.mail_client import (
    imap_login,
    imap_starttls,
    lmtp_hello,
    lmtp_starttls,
    pop3_login,
    pop3_starttls,
    smtp_hello,
    smtp_starttls,
)
from helpers.postgres_client import pg_login, pg_starttls
from helpers.real_servers import PASSWORD, RealServer
from helpers.tls_clients import RefusedError, both_versions, for_version
from trisock import ClientTLS, Socket, TLSError
from trisock.testing import Authority

pytestmark = pytest.mark.interop


@dataclass(frozen=True)
class Service:
    """A server's port for a protocol that upgrades to TLS.

    Attributes:
      server: the fixture that starts the server.
      port: the port's name.
      starttls: a function that requests TLS, and raises RefusedError if the server refuses.
      login: a function that logs in, or sends another command that needs TLS.
      needs: the program that must be installed.
      local_address: the client's address.
    """

    server: str
    port: str
    starttls: Callable[[Socket], Awaitable[None]]
    login: Callable[[Socket], Awaitable[None]]
    needs: str
    # From its own address, 127.0.0.1, Dovecot would accept a log-in without TLS.
    local_address: str = "127.0.0.2"


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

# Dovecot does not offer TLS to 127.0.0.3.
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
def endpoint(request: pytest.FixtureRequest) -> tuple[Service, int]:
    """A service and its port."""
    server: RealServer = request.getfixturevalue(request.param.server)
    return request.param, server.ports[request.param.port]


async def connected(endpoint: tuple[Service, int]) -> Socket:
    service, port = endpoint
    return await trisock.connect("127.0.0.1", port, local_address=service.local_address)


@pytest.mark.parametrize("endpoint", ALL, indirect=True)
@both_versions
async def test_a_client_logs_in_after_an_upgrade(
    endpoint: tuple[Service, int], version: str, authority: Authority
) -> None:
    """If no name is given, the certificate must be valid for the server's address."""
    service, _ = endpoint
    for given, verified in [("localhost", "localhost"), (None, "127.0.0.1")]:
        async with await connected(endpoint) as sock:
            await service.starttls(sock)
            tls = for_version(version, authority)
            info = await sock.starttls(tls, server_hostname=given)
            assert (info.version, info.server_hostname) == (version, verified)
            await service.login(sock)


@pytest.mark.parametrize("endpoint", ALL, indirect=True)
async def test_a_server_with_an_invalid_certificate_gets_no_password(
    endpoint: tuple[Service, int], authority: Authority, other_authority: Authority
) -> None:
    service, _ = endpoint
    for tls, words in [
        (ClientTLS(ca=other_authority.ca), "local issuer|self-signed certificate in"),
        (authority.client_tls("example.net"), "Hostname mismatch"),
    ]:
        async with await connected(endpoint) as sock:
            await service.starttls(sock)
            with pytest.raises(TLSError, match=words):
                await sock.starttls(tls)
            assert not sock.isopen()
            with pytest.raises(trio.ClosedResourceError):
                await sock.send(PASSWORD.encode())


@pytest.mark.parametrize("endpoint", WITHOUT_TLS, indirect=True)
async def test_a_server_without_tls_gets_no_password(endpoint: tuple[Service, int]) -> None:
    service, _ = endpoint
    async with await connected(endpoint) as sock:
        with pytest.raises(RefusedError):
            await service.starttls(sock)
        assert not sock.istls()
