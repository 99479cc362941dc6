"""What a certificate says, as text that is safe to show (no I/O)."""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from cryptography import x509
from cryptography.x509.oid import NameOID

from .._text import printable

T = TypeVar("T")

# Show at most this many characters of a name. A host name has at most 253 (RFC 1035, section
# 2.3.4).
_MAX_TEXT = 255


@dataclass(frozen=True)
class CertificateFacts:
    """What a certificate says. Fields that cannot be read are empty or ``None``.

    Attributes:
      names: the DNS names and IP addresses of the subjectAltName. Clients compare nothing else (RFC
        9525, section 2).
      issuer: the issuer's common name, or else its whole name.
      not_before, not_after: the dates, in UTC.
    """

    names: tuple[str, ...] = ()
    issuer: str | None = None
    not_before: datetime.datetime | None = None
    not_after: datetime.datetime | None = None

    def days_left(self, now: datetime.datetime) -> int | None:
        """Return how many whole days are left. The number is negative after the expiry."""
        return None if self.not_after is None else (self.not_after - now).days


def read_certificate(der: bytes | None) -> CertificateFacts:
    """Read a peer's certificate."""
    if der is None:
        return CertificateFacts()
    leaf = _attempt(lambda: x509.load_der_x509_certificate(der))
    if leaf is None:
        return CertificateFacts()
    return CertificateFacts(
        tuple(map(_shown, _attempt(lambda: _names(leaf)) or ())),
        _attempt(lambda: _shown(_issuer(leaf))),
        _attempt(lambda: leaf.not_valid_before_utc),
        _attempt(lambda: leaf.not_valid_after_utc),
    )


def _shown(text: str) -> str:
    return printable(text if len(text) <= _MAX_TEXT else text[:_MAX_TEXT] + "...")


def _attempt(function: Callable[[], T]) -> T | None:
    # ``cryptography`` raises errors (and warnings) of many types for malformed certificates.
    with contextlib.suppress(Exception):
        return function()
    return None


def _names(leaf: x509.Certificate) -> list[str]:
    # A client compares these names, unchanged. ``Certificate.names`` is for SNI: it contains no
    # addresses, and may contain a common name instead.
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names: list[str] = extension.value.get_values_for_type(x509.DNSName)
        return [*names, *map(str, extension.value.get_values_for_type(x509.IPAddress))]
    return []


def _issuer(leaf: x509.Certificate) -> str:
    common = leaf.issuer.get_attributes_for_oid(NameOID.COMMON_NAME)
    return ", ".join(str(each.value) for each in common) or leaf.issuer.rfc4514_string()
