"""Errors about unknown certificates: ``trisock connect`` makes no second connection to see one."""

from __future__ import annotations

import datetime

import pytest

from trisock._command.certificate import CertificateFacts
from trisock._command.explain import explain_verification

NOW = datetime.datetime(2026, 11, 27, tzinfo=datetime.timezone.utc)


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (10, "a certificate has expired: renew the server's, or replace the one in its chain"),
        (20, "the certificate has an issuer that is not trusted here: make the server send "),
        (62, "the certificate is not for mail.example.org: "),
        (9, "OpenSSL's text"),
    ],
)
def test_the_text_needs_no_certificate(code: int, text: str) -> None:
    facts = CertificateFacts()
    shown = explain_verification(code, "OpenSSL's text", facts, "mail.example.org", NOW)
    assert shown.startswith(text)
