"""The fixtures of the tests of the examples."""

from __future__ import annotations

import pathlib

import pytest

from helpers.authority import Authority


@pytest.fixture
def other_ca(tmp_path: pathlib.Path, other_authority: Authority) -> str:
    """The path of a CA that has issued nothing that is in use here."""
    path = tmp_path / "other-ca.pem"
    path.write_bytes(other_authority.pem)
    return str(path)


@pytest.fixture
def ca(tmp_path: pathlib.Path) -> str:
    """The path to which an example writes its CA."""
    return str(tmp_path / "ca.pem")
