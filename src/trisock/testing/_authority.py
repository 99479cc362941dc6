"""Authority: certificates for tests, and the TLS roles that use them."""

from __future__ import annotations

import datetime
import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from .. import Certificate, ClientTLS, ServerTLS, TLSArgument

if TYPE_CHECKING:
    import trustme

# The names of a server on this machine.
_LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")

# RFC 2606, section 2: nobody can have this name.
_WRONG_NAME = "wrong-name.invalid"

_DAY = datetime.timedelta(days=1)

# The certificate of the authority that issued each certificate, in PEM. The test may have dropped
# the Authority itself, as in ``serving(handler, tls=Authority().server_tls())``.
_issuers: dict[Certificate, bytes] = {}


class Authority:
    """A throw-away certificate authority, made with trustme.

    Certificates are cached: the same names give the same ``Certificate``. One authority can serve
    all tests of a program. Clients that trust it reject the certificates of any other authority.

    Attributes:
      ca: the authority's own certificate, in PEM, for ``ClientTLS(ca=)`` and
        ``ServerTLS(client_ca=)``.

    Raises ``ImportError`` if trustme is not installed.
    """

    ca: bytes

    def __init__(self) -> None:
        try:
            import trustme
        except ImportError as exc:
            raise ImportError(
                "trisock.testing makes certificates with trustme: pip install 'trisock[testing]'",
                name="trustme",
            ) from exc
        self._ca = trustme.CA()
        self.ca = self._ca.cert_pem.bytes()
        self._certificates: dict[object, Certificate] = {}

    def certificate(self, *names: str) -> Certificate:
        """Return a server's certificate for these names.

        Args:
          names: host names, wildcards (``*.example.org``) and IP addresses. Without names, the
            certificate is for ``localhost``, ``127.0.0.1`` and ``::1``.
        """
        return self._issue(*(names or _LOCAL_NAMES))

    def expired(self, *names: str) -> Certificate:
        """Return a certificate that expired yesterday. The names are as in ``certificate``."""
        return self._issue(*(names or _LOCAL_NAMES), expired=True)

    def wrong_name(self) -> Certificate:
        """Return a valid certificate for a name that no server has (``wrong-name.invalid``)."""
        return self._issue(_WRONG_NAME)

    def client(self, name: str) -> Certificate:
        """Return a client's certificate, for ``ClientTLS(certificate=)``.

        Args:
          name: a host name or an email address, which becomes the certificate's common name and a
            subject alternative name.
        """
        return self._issue(name, common_name=name)

    def client_tls(self, name: str = "localhost", **options: Any) -> ClientTLS:
        """Return the role of a TLS client that trusts this authority, and no other.

        Args:
          name: the server's name, which its certificate must match.
          options: further arguments of ``ClientTLS``.
        """
        return ClientTLS(name, ca=self.ca, **options)

    def server_tls(self, *names: str, **options: Any) -> ServerTLS:
        """Return the role of a TLS server with ``certificate(*names)``.

        Args:
          names: as in ``certificate``.
          options: further arguments of ``ServerTLS``.
        """
        return ServerTLS(self.certificate(*names), **options)

    def _issue(
        self, *names: str, common_name: str | None = None, expired: bool = False
    ) -> Certificate:
        key = (names, common_name, expired)
        if key not in self._certificates:
            now = datetime.datetime.now(datetime.timezone.utc)
            issued = self._ca.issue_cert(
                *names,
                common_name=common_name,
                not_before=now - 2 * _DAY if expired else None,
                not_after=now - _DAY if expired else None,
            )
            self._certificates[key] = certificate = _certificate(issued)
            _issuers[certificate] = self.ca
        return self._certificates[key]


def _certificate(issued: trustme.LeafCert) -> Certificate:
    chain = b"".join(each.bytes() for each in issued.cert_chain_pems)
    return Certificate(chain, issued.private_key_pem.bytes())


@functools.cache
def shared_authority() -> Authority:
    """Return an authority for TLS connections whose certificates do not matter to the test."""
    return Authority()


def client_tls_of(tls: TLSArgument) -> ClientTLS | None:
    """Return a client's role for a server, or None if no ``Authority`` issued its certificate."""
    try:
        role = tls if isinstance(tls, ServerTLS) else ServerTLS(cast("Any", tls))
    except TypeError:  # an ssl.SSLContext
        return None
    first = cast("Sequence[Certificate]", role.certificates)[0]
    if first not in _issuers:
        return None
    # ``names`` has no IP addresses. Without a name, the client verifies the address of the server.
    name = first.names[0].replace("*", "any") if first.names else None
    return ClientTLS(name, ca=_issuers[first])
