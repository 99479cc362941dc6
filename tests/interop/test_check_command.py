"""``trisock check --injection`` with real servers, all of which ignore injected commands."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.real_servers import RealServer
from trisock import starttls
from trisock.__main__ import main
from trisock.testing import Authority

pytestmark = pytest.mark.interop

Check = Callable[..., None]


@pytest.fixture
def check(authority: Authority, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Check:
    """Check some ports of a server. Each must be good."""
    ca = tmp_path / "ca.pem"
    ca.write_bytes(authority.ca)

    def check(server: RealServer, *schemes: str) -> None:
        urls = [f"{scheme}://localhost:{server.ports[scheme]}" for scheme in schemes]
        capsys.readouterr()
        status = main(["check", "--json", "--injection", "--ca", str(ca), *urls])
        results = json.loads(capsys.readouterr().out)
        assert (status, [each["error"] for each in results]) == (0, [None] * len(urls))
        tested = set(starttls.PROTOCOLS) - {"telnet"}
        expected = [False if scheme in tested else None for scheme in schemes]
        assert [each["injection"] for each in results] == expected

    return check


def test_postfix_is_good(check: Check, postfix: RealServer) -> None:
    check(postfix, "smtp", "smtps")


def test_dovecot_is_good(check: Check, dovecot: RealServer) -> None:
    check(dovecot, "imap", "imaps", "pop3", "sieve", "lmtp")


def test_openldap_is_good(check: Check, slapd: RealServer) -> None:
    check(slapd, "ldap")


def test_postgresql_is_good(check: Check, postgresql: RealServer) -> None:
    check(postgresql, "postgres")


def test_proftpd_is_good(check: Check, proftpd: RealServer) -> None:
    check(proftpd, "ftp")


def test_vsftpd_is_good(check: Check, vsftpd: RealServer) -> None:
    check(vsftpd, "ftp")


def test_exim_is_good(check: Check, exim: RealServer) -> None:
    check(exim, "smtp")


def test_cyrus_is_good(check: Check, cyrus: RealServer) -> None:
    check(cyrus, "imap", "pop3", "sieve", "lmtp")


def test_mariadb_is_good(check: Check, mariadb: RealServer) -> None:
    check(mariadb, "mysql")


def test_prosody_is_good(check: Check, prosody: RealServer) -> None:
    check(prosody, "xmpp", "xmpp-server")


def test_inspircd_is_good(check: Check, inspircd: RealServer) -> None:
    check(inspircd, "irc")


def test_inn_is_good(check: Check, nnrpd: RealServer) -> None:
    check(nnrpd, "nntp")


def test_kermit_is_good(check: Check, iksd: RealServer) -> None:
    check(iksd, "telnet")
