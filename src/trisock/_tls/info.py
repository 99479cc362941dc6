"""TLSInfo: the negotiated parameters, and the peer's certificate."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from .._arguments import quoted
from .certificate import as_value_error


def has_expired(certificate: bytes) -> bool:
    """Return whether a certificate (DER) has expired. Raises ``ValueError`` if it is unreadable."""
    from . import x509

    end = as_value_error(
        "the certificate cannot be read",
        lambda: x509.load_certificate(certificate).not_valid_after_utc,
    )
    return end.timestamp() < time.time()


@dataclass(frozen=True)
class TLSInfo:
    """The negotiated parameters, and the peer's certificate.

    Attributes:
      version: the TLS version, such as ``"TLSv1.3"``.
      cipher: the cipher suite by its OpenSSL name, such as ``"TLS_AES_256_GCM_SHA384"``.
      alpn_protocol: the protocol selected by ALPN, or ``None``.
      server_hostname: for a client, the name that it requested. The server's certificate matches
        this name, unless verification is off. For a server, the name that the client requested
        (SNI), as sent (A-labels, upper case preserved), or ``None`` if the client requested no name
        or an invalid one.
      peer_certificate: the peer's certificate in DER, or ``None`` if the peer sent none.
      session_reused: whether an earlier session was resumed.
    """

    version: str
    cipher: str
    alpn_protocol: str | None
    server_hostname: str | None
    peer_certificate: bytes | None = field(repr=False)
    session_reused: bool
    # new_tls_info sets these. They are not part of the public constructor.
    _tls_unique: bytes | None = field(default=None, init=False, repr=False)
    _server_certificate: bytes | None = field(default=None, init=False, repr=False)

    def channel_binding(self, type: str = "tls-unique") -> bytes:
        """Return the data that binds an authentication to this connection (RFC 5056).

        Args:
          type: ``"tls-unique"`` (RFC 5929, section 3; not defined for TLS 1.3) or
            ``"tls-server-end-point"`` (section 4; clients only, because the ``ssl`` module does not
            tell a server which of its certificates was used).

        Raises ``ValueError`` if this connection has no such binding.
        """
        if type == "tls-unique":
            if self._tls_unique is None:
                raise ValueError(
                    f"tls-unique is not defined for {self.version} (RFC 8446, appendix C.5)"
                )
            return self._tls_unique
        if type == "tls-server-end-point":
            if self._server_certificate is None:
                raise ValueError(
                    "tls-server-end-point needs the server's certificate, "
                    "which this side does not know"
                )
            return _server_end_point(self._server_certificate)
        raise ValueError(f"no channel binding of the type {quoted(type)}")


def new_tls_info(
    info: TLSInfo, *, tls_unique: bytes | None, server_certificate: bytes | None
) -> TLSInfo:
    """Add the data for channel bindings to the info, and return the info."""
    object.__setattr__(info, "_tls_unique", tls_unique)
    object.__setattr__(info, "_server_certificate", server_certificate)
    return info


def _server_end_point(server_certificate: bytes) -> bytes:
    from . import x509

    refused = "tls-server-end-point is not defined for this certificate's signature"
    found = as_value_error(refused, lambda: x509.end_point(server_certificate))
    if found is None:
        raise ValueError(refused)
    return found
