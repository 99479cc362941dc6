"""A fixture: a certificate that does not fit in one TLS record."""

from __future__ import annotations

import pytest

from trisock import Certificate
from trisock.testing import Authority


@pytest.fixture(scope="session")
def wide_certificate(authority: Authority) -> Certificate:
    """A large client certificate. A session ticket that contains it spans several records."""
    names = [f"{number}.{'x' * 60}.example.org" for number in range(300)]
    return authority.certificate(*names)
