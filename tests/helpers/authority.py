"""Certificates that ``trisock.testing.Authority`` does not issue."""

from __future__ import annotations

import functools
from typing import Any

import trustme

from trisock import Certificate
from trisock.testing import Authority


def issue(authority: Authority, *names: str, **options: Any) -> Certificate:
    """Return a new certificate. The options are those of trustme's ``issue_cert``."""
    leaf = authority._ca.issue_cert(*names, **options)
    chain = b"".join(blob.bytes() for blob in leaf.cert_chain_pems)
    return Certificate(chain, leaf.private_key_pem.bytes())


@functools.cache
def rsa_certificate(authority: Authority, *names: str) -> Certificate:
    """Return a certificate with an RSA key. It is cached, because generating the key is slow."""
    return issue(authority, *names, key_type=trustme.KeyType.RSA)
