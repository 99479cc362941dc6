"""The two TLS roles, ``ClientTLS`` and ``ServerTLS``, and the conversion of arguments to roles.

Every mistake in an option is found here, before a byte is sent.
"""

from __future__ import annotations

import dataclasses
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from .._address import Address, to_tls_name
from .._arguments import check_bool, quoted, type_name
from .._errors import TLSError
from .._text import set_message
from . import pem
from .certificate import (
    Certificate,
    CertificateLike,
    as_value_error,
    pem_argument,
    read_file,
    set_field,
    to_certificate,
)
from .contexts import (
    CurrentContexts,
    ServerContexts,
    SystemTrust,
    client_context,
    server_contexts,
    system_trust,
)


@dataclass(frozen=True)
class ClientTLS:
    """The TLS client's role, for ``starttls`` and ``connect(tls=)``. It verifies the server.

    Args:
      server_hostname: the name (or IP address) that the server's certificate must have in its
        subjectAltName. A common name does not count (RFC 9525, section 2). The default is the host
        given to ``connect``.
      ca: the certificates to trust, instead of the system's trust store: in PEM, or the
        ``pathlib.Path`` of a file. They may be roots, intermediates or the server's own
        certificate, because verification stops at a trusted certificate.
      alpn_protocols: the protocols to offer, in order of preference (RFC 7301).
      certificate: the client certificate to send if the server requests one.
      verify: ``False`` accepts any certificate from anybody. The connection is then not protected
        from an attacker in the middle.
      require_ecdhe: whether to offer, for TLS 1.2, only the cipher suites that ``ServerTLS``
        accepts: ECDHE, which has forward secrecy, with AES-GCM or ChaCha20-Poly1305 (RFC 9325,
        section 4.2). TLS 1.3 is not affected.

    Raises ``ValueError`` or ``TypeError`` if an argument is invalid, and ``OSError`` if the file
    cannot be read. Immutable.
    """

    server_hostname: str | None = None
    ca: str | bytes | Path | None = field(default=None, kw_only=True, repr=False)
    alpn_protocols: Sequence[str] = field(default=(), kw_only=True)
    certificate: CertificateLike | None = field(default=None, kw_only=True)
    verify: bool = field(default=True, kw_only=True)
    require_ecdhe: bool = field(default=False, kw_only=True)
    # Without an annotation this is not a field, so it is not compared, copied, pickled or shown.
    _built = cast("tuple[SystemTrust | None, ssl.SSLContext] | None", None)

    def __post_init__(self) -> None:
        if self.server_hostname is not None:
            to_tls_name(self.server_hostname)
        set_field(self, "alpn_protocols", _alpn(self.alpn_protocols))
        if self.ca is not None:
            set_field(self, "ca", _authorities(self.ca, "ca"))
        if self.certificate is not None:
            set_field(self, "certificate", to_certificate(self.certificate))
        check_bool("verify", self.verify)
        check_bool("require_ecdhe", self.require_ecdhe)
        from . import x509  # noqa: F401 (it takes 35 ms to import, which no handshake should wait for)

        self._context()

    def _context(self) -> ssl.SSLContext:
        """Return the context. It is rebuilt only if the environment selects another trust store."""
        trust = system_trust() if self.ca is None and self.verify else None
        if self._built is None or self._built[0] != trust:
            context = client_context(
                cast("bytes | None", self.ca),
                tuple(self.alpn_protocols),
                cast("Certificate | None", self.certificate),
                self.verify,
                self.require_ecdhe,
                trust,
            )
            set_field(self, "_built", (trust, context))
        assert self._built is not None
        return self._built[1]

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _restore(self, state)
        self.__post_init__()


@dataclass(frozen=True)
class ServerTLS:
    """The TLS server's role, for ``starttls`` and ``bind(tls=)``.

    Args:
      certificates: one or more certificates. The name that the client requests (SNI) selects one. A
        name may have one certificate of each key type. If several certificates of one key type
        match, an exact name wins over a wildcard. Among equal matches, the first certificate wins.
        A client that requests no name, or an unknown name, gets the first certificate.
      alpn_protocols: the supported protocols, in order of preference (RFC 7301).
      require_alpn: whether to reject a client that supports none of ``alpn_protocols``.
      client_ca: the certificates to trust when client certificates are verified: in PEM, or the
        ``pathlib.Path`` of a file. They may be roots, intermediates or clients' own certificates,
        because verification stops at a trusted certificate. If ``client_ca`` is given, the server
        requests a certificate from each client, and rejects an invalid one.
      require_client_certificate: whether to also reject a client that sends no certificate.

    The other arguments apply to all certificates. A TLS 1.2 client without ticket support can
    resume only a recent session, because the server stores at most 16 ended sessions.

    Raises ``ValueError`` or ``TypeError`` if an argument is invalid, and ``OSError`` if the file
    cannot be read. Immutable, except that ``reload`` reads the files again. A copy is the same
    object.
    """

    certificates: CertificateLike | Sequence[CertificateLike]
    alpn_protocols: Sequence[str] = field(default=(), kw_only=True)
    require_alpn: bool = field(default=False, kw_only=True)
    client_ca: str | bytes | Path | None = field(default=None, kw_only=True, repr=False)
    require_client_certificate: bool = field(default=False, kw_only=True)
    # Not fields, as in ClientTLS. The path is absolute, so that it survives a ``chdir``.
    _client_ca_path = cast("Path | None", None)
    _built = cast("CurrentContexts", None)

    def __post_init__(self) -> None:
        given = self.certificates
        if isinstance(given, (str, bytes)):
            raise TypeError(
                f"certificates must be trisock.Certificate objects, not {type_name(given)}"
            )
        if isinstance(given, (Certificate, Mapping)):
            given = [given]
        set_field(self, "certificates", tuple(to_certificate(each) for each in given))
        if not self.certificates:
            raise ValueError("a TLS server needs at least one certificate")
        set_field(self, "alpn_protocols", _alpn(self.alpn_protocols))
        check_bool("require_alpn", self.require_alpn)
        check_bool("require_client_certificate", self.require_client_certificate)
        if self.require_alpn and not self.alpn_protocols:
            raise ValueError("require_alpn needs alpn_protocols")
        client_ca = None
        if self.client_ca is not None:
            client_ca = _authorities(self.client_ca, "client_ca")
            if isinstance(self.client_ca, Path):
                set_field(self, "_client_ca_path", self.client_ca.absolute())
            else:
                set_field(self, "client_ca", client_ca)
        elif self.require_client_certificate:
            # With the system's trust store, any certificate from a public authority would be
            # accepted.
            raise ValueError("require_client_certificate needs client_ca")
        read = cast("tuple[Certificate, ...]", self.certificates), client_ca
        set_field(self, "_built", CurrentContexts(read, self._contexts_of(*read)))

    def reload(self) -> bool:
        """Read the files again: those of ``Certificate.from_files``, and ``client_ca``'s ``Path``.

        Later handshakes use the new content of the files, both in ``bind(tls=)`` and in each
        ``starttls`` with this object. Handshakes in progress and open connections are not
        disturbed. TLS sessions from before the reload cannot be resumed, so a client that the new
        ``client_ca`` rejects cannot connect by resuming one. The fields, equality and hash still
        depend only on the arguments.

        Call this only when the files are completely written: a chain that lacks its last
        certificates may look complete. The call reads files and may take milliseconds. It may be
        made in any thread. If calls overlap, the result of the call that began last is used.

        Returns: whether anything has changed.

        Raises ``ValueError`` if a file is broken, half written, or does not fit the others, and
        ``OSError`` if a file cannot be read. The old certificates then stay in use.
        """
        current = self._built
        number = current.next_number()
        before = cast("tuple[tuple[Certificate, ...], bytes | None]", current.read)
        certificates, client_ca = before
        if self._client_ca_path is not None:
            client_ca = _authorities(self._client_ca_path, "client_ca")
        read = tuple(each.reread() for each in certificates), client_ca
        is_used = current.replace(number, read, self._contexts_of(*read))
        return is_used and read != before

    def _contexts_of(
        self, certificates: tuple[Certificate, ...], client_ca: bytes | None
    ) -> ServerContexts:
        return server_contexts(
            certificates, tuple(self.alpn_protocols), client_ca, self.require_client_certificate
        )

    def _context(self) -> ssl.SSLContext:
        return self._built.default

    def __copy__(self) -> ServerTLS:
        return self

    def __deepcopy__(self, memo: object) -> ServerTLS:
        return self

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)


TLSArgument = str | ClientTLS | ServerTLS | ssl.SSLContext | Certificate | Sequence[CertificateLike]


@dataclass(frozen=True)
class TLSRole:
    """The settings of a handshake."""

    context: ssl.SSLContext
    server_side: bool
    #: The name to verify, as sent on the wire. None for servers.
    server_hostname: str | None
    require_alpn: bool = False
    #: The contexts from which the ClientHello selects. None for a client or a user's context.
    sni_contexts: CurrentContexts | None = None
    #: The ``ServerTLS`` that was passed, or that was made from certificates, for ``reload``.
    server_tls: ServerTLS | None = None

    def failure(self, phase: str, peer: Address, why: str) -> TLSError:
        """Return an error whose message names the phase that failed, and the peer."""
        name, address = "", f" with {peer}"
        if self.server_hostname is not None:
            name, address = f" with {quoted(self.server_hostname)}", f" ({peer})"
        return set_message(
            TLSError(""),
            f"{phase}{name}{address} failed: {why}",
            without_peer=f"{phase}{name} failed: {why}",
        )


def parse_role(tls: object) -> object:
    """Turn a bare name or bare certificates into a role. Return anything else unchanged."""
    if isinstance(tls, str):
        return ClientTLS(tls)
    if isinstance(tls, (Certificate, Mapping)) or (
        isinstance(tls, Sequence) and not isinstance(tls, (bytes, bytearray, memoryview))
    ):
        return ServerTLS(tls)
    return tls


def resolve_role(
    tls: object, *, server_hostname: str | None, connected_host: str | None, side: str
) -> TLSRole:
    """Turn the user's ``tls`` argument into a role, or raise TypeError or ValueError.

    The name to verify is the first of these that is not ``None``: ``server_hostname``, the name in
    ``tls``, ``connected_host``.
    """
    if server_hostname is not None and not isinstance(server_hostname, str):
        raise TypeError(f"server_hostname must be a str, not {type_name(server_hostname)}")
    tls = parse_role(tls)
    if isinstance(tls, ServerTLS):
        role = TLSRole(tls._context(), True, None, tls.require_alpn, tls._built, tls)
    elif isinstance(tls, ClientTLS):
        name = _first_given(server_hostname, tls.server_hostname, connected_host)
        role = TLSRole(tls._context(), False, name)
        if name is None and tls.verify:
            raise ValueError("a TLS client needs the server's name to verify the server")
    elif isinstance(tls, ssl.SSLContext):
        server_side = tls.protocol == ssl.PROTOCOL_TLS_SERVER or (
            tls.protocol != ssl.PROTOCOL_TLS_CLIENT and side == "server"
        )
        name = None if server_side else _first_given(server_hostname, connected_host)
        role = TLSRole(tls, server_side, name)
        if name is None and tls.check_hostname and not server_side:
            raise ValueError("the context checks host names: server_hostname is needed")
    else:
        raise TypeError(
            "tls must be a server name, ClientTLS, certificates, ServerTLS or an ssl.SSLContext, "
            f"not {type_name(tls)}"
        )
    if role.server_side and server_hostname is not None:
        raise ValueError("a TLS server takes no server_hostname")
    if role.server_hostname is None:
        return role
    return TLSRole(role.context, False, to_tls_name(role.server_hostname))


def _first_given(*names: str | None) -> str | None:
    return next((name for name in names if name is not None), None)


def _fields_of(role: ClientTLS | ServerTLS) -> dict[str, Any]:
    return {each.name: getattr(role, each.name) for each in dataclasses.fields(role)}


def _restore(role: ClientTLS | ServerTLS, state: dict[str, Any]) -> None:
    for name, value in state.items():
        set_field(role, name, value)


def _authorities(value: object, what: str) -> bytes:
    """Return the certificates to trust, as PEM written by the module ``pem``."""
    if not isinstance(value, Path):
        return _parse_authorities(value, what)
    content = read_file(value, what)
    try:
        return _parse_authorities(content, what)
    except ValueError as exc:
        raise ValueError(f"{exc} (in {value})") from None


def _parse_authorities(value: object, what: str) -> bytes:
    data = pem_argument(value, what)
    return pem.encode_certificates(
        as_value_error(
            f"{what} holds no PEM certificate that OpenSSL can use",
            lambda: pem.certificates(data),
        )
    )


def _alpn(protocols: object) -> tuple[str, ...]:
    if isinstance(protocols, (str, bytes)) or not isinstance(protocols, Sequence):
        raise TypeError(f"alpn_protocols must be a sequence of str, not {type_name(protocols)}")
    for protocol in protocols:
        if not isinstance(protocol, str):
            raise TypeError(f"an ALPN protocol must be a str, not {type_name(protocol)}")
        if not (protocol.isascii() and protocol.isprintable() and 1 <= len(protocol) <= 255):
            raise ValueError(
                f"alpn_protocols contains an invalid protocol, of {len(protocol)} characters: only "
                "1 to 255 printable ASCII characters are allowed"
            )
    return tuple(protocols)
