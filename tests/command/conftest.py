"""Fixtures for the tests of the command."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers.certificates import CertificateAuthority
from helpers.command import Command, Done, Servers
from helpers.local_servers import LocalServer, offering, quiet, server_tls, serving
from trisock.__main__ import main


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """Run the command in this process."""

    def run(*arguments: object) -> Done:
        capsys.readouterr()
        status = main(list(map(str, arguments)))
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def command_ca() -> CertificateAuthority:
    return CertificateAuthority("Example CA")


@pytest.fixture(scope="session")
def ca_file(command_ca: CertificateAuthority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("command") / "ca.pem"
    path.write_bytes(command_ca.pem)
    return path


@pytest.fixture
def servers(command_ca: CertificateAuthority, ca_file: Path) -> Iterator[Servers]:
    good = server_tls(command_ca)
    soon = server_tls(command_ca, left=5)
    wrong = server_tls(command_ca, "other.example")
    with serving(
        LocalServer(quiet, good), offering("imap", soon), LocalServer(quiet, wrong)
    ) as ports:
        yield Servers(
            ca_file,
            f"tls://localhost:{ports[0]}",
            f"imap://localhost:{ports[1]}",
            f"tls://localhost:{ports[2]}",
        )
