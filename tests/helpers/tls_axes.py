"""The TLS settings that tests combine, each with its expected result."""

from __future__ import annotations

import dataclasses
import functools
import ssl
from collections.abc import Callable
from typing import NamedTuple

from helpers.certificates import EXPIRED, SERVERS_ONLY, CertificateAuthority
from trisock import Certificate, ClientTLS, TLSError

VERSIONS = ("TLSv1.2", "TLSv1.3")


@dataclasses.dataclass(frozen=True)
class Fault:
    """The error of the side that detects a fault, and the alert (if any) that this side sends."""

    words: str
    alert: str | None
    reason: str | None = "CERTIFICATE_VERIFY_FAILED"
    verify_code: int | None = None
    alert_of_1_2: str | None = None  # set if the alert differs in TLS 1.2

    def check(self, finder: object, other: object, version: str) -> None:
        assert isinstance(finder, TLSError)
        assert self.words in str(finder)
        assert finder.reason == self.reason
        assert finder.verify_code == self.verify_code
        assert isinstance(other, TLSError)
        alert = (version == "TLSv1.2" and self.alert_of_1_2) or self.alert
        if alert is None:  # OpenSSL sends no alert
            assert "without close_notify" in str(other)
            assert other.reason is None
        else:
            assert f"refused, with the alert '{alert}'" in str(other)
            assert other.reason is not None
            assert other.reason.endswith(f"ALERT_{alert.upper().replace(' ', '_')}")


WRONG_NAME = Fault("Hostname mismatch", "bad certificate", verify_code=62)
WRONG_ADDRESS = Fault("IP address mismatch", "bad certificate", verify_code=64)
WRONG_CA = Fault("unable to get local issuer certificate", "unknown ca", verify_code=20)
TOO_LATE = Fault("certificate has expired", "certificate expired", verify_code=10)
TOO_EARLY = Fault("certificate is not yet valid", "bad certificate", verify_code=9)
WRONG_PURPOSE = Fault("purpose", "unsupported certificate", verify_code=26)
NO_CERTIFICATE = Fault(
    "the peer sent no certificate, but one is required",
    "certificate required",
    reason="PEER_DID_NOT_RETURN_A_CERTIFICATE",
    alert_of_1_2="handshake failure",
)
NO_ALPN = Fault("shares no ALPN protocol, but one is required", None, reason=None)


class Name(NamedTuple):
    certified: str
    asked: str
    on_the_wire: str | None  # the name in SNI, or None for an address
    fault: Fault | None = None


# test_tls_matrix.py combines NAMES and CLIENT_CERTIFICATES with all other settings. It combines
# MORE_NAMES and MORE_CLIENT_CERTIFICATES only with the default values of the other settings.
NAMES = {
    "exact": Name("example.org", "example.org", "example.org"),
    "wildcard": Name("*.example.org", "www.example.org", "www.example.org"),
    "address": Name("127.0.0.1", "127.0.0.1", None),
    "international": Name("xn--bcher-kva.example", "bücher.example", "xn--bcher-kva.example"),
    "mismatch": Name("example.org", "example.net", "example.net", WRONG_NAME),
    "another address": Name("127.0.0.1", "127.0.0.2", None, WRONG_ADDRESS),
}
MORE_NAMES = {
    "uppercase": Name("example.org", "Example.ORG", "Example.ORG"),
    "trailing dot": Name("example.org", "example.org.", "example.org"),
    "IPv6 address": Name("::1", "::1", None),
    "the wildcard's own domain": Name("*.example.org", "example.org", "", WRONG_NAME),
    "two labels below the wildcard": Name("*.example.org", "a.b.example.org", "", WRONG_NAME),
    "partial wildcard": Name("w*.example.org", "www.example.org", "", WRONG_NAME),
    "another international": Name("xn--bcher-kva.example", "bucher.example", "", WRONG_NAME),
    "a name that looks like the address": Name(
        "127-0-0-1.example", "127.0.0.1", None, WRONG_ADDRESS
    ),
}


class ClientCertificate(NamedTuple):
    asked: str
    shown: str | None
    fault: Fault | None = None


CLIENT_CERTIFICATES = {
    "none": ClientCertificate("no", None),
    "optional, none": ClientCertificate("optional", None),
    "optional, right": ClientCertificate("optional", "right"),
    "optional, wrong CA": ClientCertificate("optional", "wrong CA", WRONG_CA),
    "required, right": ClientCertificate("required", "right"),
    "required, none": ClientCertificate("required", None, NO_CERTIFICATE),
    "required, wrong CA": ClientCertificate("required", "wrong CA", WRONG_CA),
    "required, expired": ClientCertificate("required", "expired", TOO_LATE),
}
MORE_CLIENT_CERTIFICATES = {
    "not asked for": ClientCertificate("no", "right"),
    "by an intermediate": ClientCertificate("required", "intermediate"),
    "without its intermediate": ClientCertificate("required", "no intermediate", WRONG_CA),
    "a server's": ClientCertificate("required", "a server's", WRONG_PURPOSE),
    "optional, expired": ClientCertificate("optional", "expired", TOO_LATE),
}


class ALPN(NamedTuple):
    offered: tuple[str, ...]
    spoken: tuple[str, ...]
    chosen: str | None = None
    required: bool = False
    fault: Fault | None = None


ALPNS = {
    "none": ALPN((), ()),
    "match": ALPN(("imap", "h2"), ("h2", "imap"), "h2", required=True),
    "no match": ALPN(("imap",), ("h2",)),
    "no match, required": ALPN(("imap",), ("h2",), None, required=True, fault=NO_ALPN),
}


class Authorities:
    """The right authority and a wrong one. Each certificate is issued once and cached."""

    def __init__(self) -> None:
        self.right = CertificateAuthority("right")
        self.wrong = CertificateAuthority("wrong")
        self.intermediate = CertificateAuthority("intermediate", issuer=self.right)
        self._issued: dict[object, Certificate] = {}

    def server(self, name: str, kind: str) -> Certificate:
        return self._once((name, kind), lambda: self.right.issue(name, kind=kind))

    def client(self, what: str | None, kind: str) -> Certificate | None:
        makers: dict[str, Callable[..., Certificate]] = {
            "right": self.right.issue,
            "wrong CA": self.wrong.issue,
            "expired": functools.partial(self.right.issue, dates=EXPIRED),
            "intermediate": self.intermediate.issue,
            "no intermediate": functools.partial(self.intermediate.issue, with_chain=False),
            "a server's": functools.partial(self.right.issue, purpose=SERVERS_ONLY),
        }
        if what is None:
            return None
        return self._once(("client", what, kind), lambda: makers[what]("client", kind=kind))

    def _once(self, key: object, make: Callable[[], Certificate]) -> Certificate:
        if key not in self._issued:
            self._issued[key] = make()
        return self._issued[key]


def client_of(
    version: str,
    ca: bytes,
    *,
    alpn: tuple[str, ...] = (),
    certificate: Certificate | None = None,
) -> ClientTLS | ssl.SSLContext:
    """Return ClientTLS, or an SSLContext for TLS 1.2 (ClientTLS has no version option)."""
    if version == "TLSv1.3":
        return ClientTLS(ca=ca, alpn_protocols=alpn, certificate=certificate)
    context = ssl.create_default_context(cadata=ca.decode())
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    if alpn:
        context.set_alpn_protocols(alpn)
    if certificate is not None:
        certificate.load_into(context)
    return context
