"""Fixtures for the tests of trisock.testing."""

from __future__ import annotations

import pytest

from trisock.testing import Authority


@pytest.fixture(scope="session")
def authority() -> Authority:  # type: ignore[override]
    return Authority()
