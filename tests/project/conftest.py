"""Fixtures for the tests of the examples."""

from __future__ import annotations

import pathlib
from collections.abc import Iterator

import pytest

from helpers.shared_examples import SharedServer, shared
from trisock.testing import Authority


@pytest.fixture
def other_ca(tmp_path: pathlib.Path, other_authority: Authority) -> str:
    """The path of a CA certificate. The servers' certificates are from other CAs."""
    path = tmp_path / "other-ca.pem"
    path.write_bytes(other_authority.ca)
    return str(path)


@pytest.fixture
def ca(tmp_path: pathlib.Path) -> str:
    """The path to which an example writes its CA certificate."""
    return str(tmp_path / "ca.pem")


@pytest.fixture(scope="module")
def https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    with shared("https_server", str(tmp_path_factory.mktemp("https") / "ca.pem")) as server:
        yield server


@pytest.fixture(scope="module")
def http_and_https(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    ca = str(tmp_path_factory.mktemp("http_and_https") / "ca.pem")
    with shared("http_and_https", ca) as server:
        yield server


@pytest.fixture(scope="module")
def smtp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SharedServer]:
    with shared("smtp_server", str(tmp_path_factory.mktemp("smtp") / "ca.pem")) as server:
        yield server
