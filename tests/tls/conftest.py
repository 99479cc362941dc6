"""A fixture: a certificate that does not fit in one TLS record."""

from __future__ import annotations

import pytest
import trustme

from helpers.authority import Authority, certificate
from trisock import Certificate


@pytest.fixture(scope="session")
def wide_certificate(authority: Authority) -> Certificate:
    """A large client certificate. A session ticket that contains it spans several records."""
    names = [f"{number}.{'x' * 60}.example.org" for number in range(300)]
    return certificate(authority.ca.issue_cert(*names, key_type=trustme.KeyType.ECDSA))
