"""Fixtures for the interop tests: real servers, a site for small servers, and TLS files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

from helpers import (
    real_chat_servers,
    real_databases,
    real_ftp_servers,
    real_mail_servers,
    real_news_servers,
    real_other_mail_servers,
)
from helpers.program_versions import package_of
from helpers.real_servers import PROGRAMS, RealServer
from helpers.starttls_servers import Site
from helpers.starttls_sites import make_site
from helpers.tls_axes import Authorities
from helpers.tls_programs import GO_NAME_ERROR, PEERS, Files, Peer, our_peer
from trisock import ServerTLS
from trisock.testing import Authority


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """For each server fixture that a test uses, mark the test as needing the server's program."""
    for item in items:
        for fixture in PROGRAMS.keys() & getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.needs(PROGRAMS[fixture]))


# The programs that the tests of this run need.
needed: set[str] = set()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Remember the programs that a test needs."""
    for mark in item.iter_markers("needs"):
        needed.update(mark.args)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the version of each program, for a report. Workers of pytest-xdist print nothing."""
    if needed:
        terminalreporter.section("versions of the programs")
        for line in sorted({package_of(program) for program in needed}):
            terminalreporter.write_line(line)


def fixture_of(
    start: Callable[..., AbstractContextManager[RealServer]], *, root: bool, **options: bool
) -> object:
    """Return a fixture that runs a server until the end of the session."""

    @pytest.fixture(scope="session")
    def server(authority: Authority) -> Iterator[RealServer]:
        if root and os.geteuid() != 0:
            pytest.skip("only root can start this server")
        with start(authority, **options) as running:
            yield running

    return server


postfix = fixture_of(real_mail_servers.postfix, root=True)
dovecot = fixture_of(real_mail_servers.dovecot, root=True)
slapd = fixture_of(real_databases.slapd, root=False)
slapd_without_tls = fixture_of(real_databases.slapd, root=False, tls=False)
postgresql = fixture_of(real_databases.postgresql, root=False)
postgresql_without_tls = fixture_of(real_databases.postgresql, root=False, tls=False)
proftpd = fixture_of(real_ftp_servers.proftpd, root=True)
vsftpd = fixture_of(real_ftp_servers.vsftpd, root=True)
exim = fixture_of(real_other_mail_servers.exim, root=True)
exim_without_tls = fixture_of(real_other_mail_servers.exim, root=True, tls=False)
cyrus = fixture_of(real_other_mail_servers.cyrus, root=True)
cyrus_without_tls = fixture_of(real_other_mail_servers.cyrus, root=True, tls=False)
mariadb = fixture_of(real_databases.mariadb, root=False)
mariadb_without_tls = fixture_of(real_databases.mariadb, root=False, tls=False)
prosody = fixture_of(real_chat_servers.prosody, root=True)
prosody_without_tls = fixture_of(real_chat_servers.prosody, root=True, tls=False)
inspircd = fixture_of(real_chat_servers.inspircd, root=True)
inspircd_without_tls = fixture_of(real_chat_servers.inspircd, root=True, tls=False)
nnrpd = fixture_of(real_news_servers.nnrpd, root=True)
nnrpd_without_tls = fixture_of(real_news_servers.nnrpd, root=True, tls=False)
iksd = fixture_of(real_news_servers.iksd, root=True)
iksd_without_tls = fixture_of(real_news_servers.iksd, root=True, tls=False)


@pytest.fixture
def site(authority: Authority, tmp_path: Path) -> Site:
    return make_site(authority, tmp_path)


@pytest.fixture(scope="session")
def authorities() -> Authorities:
    return Authorities()


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


@pytest.fixture
def ca(authorities: Authorities, files: Files) -> Path:
    """The file with the trusted CA certificate."""
    return files.ca(authorities.right.pem)


@pytest.fixture
def server_files(authorities: Authorities, files: Files) -> tuple[Path, Path]:
    """The files with the certificate chain and the key of example.org."""
    return files.certificate("server", authorities.server("example.org", "P-256"))


@pytest.fixture
def example_org(authorities: Authorities) -> ServerTLS:
    return ServerTLS(authorities.server("example.org", "P-256"))


@pytest.fixture(scope="session")
def go_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("go") / "peer"
    subprocess.run(["go", "build", "-o", path, PEERS / "peer.go"], check=True, timeout=300)
    return path


@pytest.fixture
def peer(request: pytest.FixtureRequest) -> Peer:
    """A TLS program. The Go program is built on its first use."""
    if request.param.name == "go":
        return our_peer("go", request.getfixturevalue("go_program"), name_error=GO_NAME_ERROR)
    given: Peer = request.param
    return given
