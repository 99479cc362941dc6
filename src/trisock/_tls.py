"""What TLS is to be: certificates, the two roles, and what was agreed on.

No conversation happens here (``_tls_connection`` holds those). Everything that can be wrong
in a certificate, a key or an option is found here, before a byte is sent.

Contexts are built once for equal values and shared: loading the system's trust store alone
takes tens of milliseconds. They are never changed after they were built.
"""

from __future__ import annotations

import contextlib
import functools
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import cast

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from ._address import to_tls_name

# ---- certificates ----


class Certificate:
    """A certificate chain with its private key, checked to belong together.

    Args:
      chain: the certificates in PEM, the server's (or client's) own first.
      private_key: its private key in PEM: RSA, ECDSA, Ed25519 or Ed448, also encrypted.
      password: what the key is encrypted with.

    Raises:
      ValueError: it is no PEM, the key does not fit the first certificate, or the key is
        encrypted and the password is missing or wrong (there is never a prompt).
      TypeError: an argument is neither ``str`` nor ``bytes``.

    Certificates are immutable, equal by value, and never show their key. The names a
    server's certificate is chosen by are its DNS names (RFC 6125), or the common name
    where it has none.
    """

    __slots__ = ("_chain", "_password", "_private_key", "key_kind", "names")

    #: The names that the certificate is for, in lower case; wildcards as ``*.example.org``.
    names: tuple[str, ...]
    #: What kind of key it has, such as ``"RSA"``: a client chooses among them.
    key_kind: str

    def __init__(
        self, chain: str | bytes, private_key: str | bytes, password: str | bytes | None = None
    ) -> None:
        self._chain = _pem(chain, "chain")
        self._private_key = _pem(private_key, "private_key")
        self._password = None if password is None else _encoded(password, "password")
        leaf = _load_chain(self._chain)[0]
        self.names = _names(leaf)
        key = _load_key(self._private_key, self._password)
        if _public_bytes(key.public_key()) != _public_bytes(leaf.public_key()):
            raise ValueError(
                "private_key does not fit the first certificate of the chain, "
                f"which is for {', '.join(self.names) or 'no name'}"
            )
        self.key_kind = type(key).__name__.removeprefix("_").removesuffix("PrivateKey")

    @classmethod
    def from_files(
        cls,
        chain: str | os.PathLike[str],
        private_key: str | os.PathLike[str] | None = None,
        password: str | bytes | None = None,
    ) -> Certificate:
        """Read a certificate from PEM files (one file, if the key is in it as well).

        Raises ``OSError`` for a file that cannot be read, and what the class itself raises.
        """
        with open(chain, "rb") as file:
            chain_pem = file.read()
        if private_key is None:
            return cls(chain_pem, chain_pem, password)
        with open(private_key, "rb") as file:
            return cls(chain_pem, file.read(), password)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Use this certificate in a context."""

        def the_password() -> bytes:
            # Without a function OpenSSL would ask on the terminal, and the event loop wait.
            return self._password or b""

        with _private_file(self._chain + b"\n" + self._private_key) as path:
            try:
                context.load_cert_chain(path, password=the_password)
            except ssl.SSLError as exc:
                raise ValueError(
                    f"OpenSSL does not take the certificate {self.names}: {exc}"
                ) from exc

    def __repr__(self) -> str:
        return (
            f"<trisock.Certificate {', '.join(self.names) or 'without a name'} ({self.key_kind})>"
        )

    def _value(self) -> tuple[bytes, bytes, bytes | None]:
        return (self._chain, self._private_key, self._password)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Certificate) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())


CertificateLike = Certificate | Mapping[str, str | bytes]


def to_certificate(value: object) -> Certificate:
    """Return a Certificate from one, or from a mapping that has its fields."""
    if isinstance(value, Certificate):
        return value
    if isinstance(value, Mapping):
        unknown = set(value) - {"chain", "private_key", "password"}
        missing = {"chain", "private_key"} - set(value)
        if unknown or missing:
            raise ValueError(
                "a certificate has the fields chain and private_key (and password), "
                f"not {sorted(map(str, value))}"
            )
        password = value.get("password")
        return _certificate(
            _encoded(value["chain"], "chain"),
            _encoded(value["private_key"], "private_key"),
            None if password is None else _encoded(password, "password"),
        )
    raise TypeError(f"a certificate is a trisock.Certificate or a mapping, not {_kind(value)}")


@functools.lru_cache(maxsize=32)
def _certificate(chain: bytes, private_key: bytes, password: bytes | None) -> Certificate:
    # Checking an RSA key takes milliseconds: not once per connection.
    return Certificate(chain, private_key, password)


def _kind(value: object) -> str:
    # The type only: the value may be a key that was put into the wrong place.
    return f"a {type(value).__name__}"


def _encoded(value: object, what: str) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"{what} is str or bytes, not {_kind(value)}")


def _pem(value: object, what: str) -> bytes:
    data = _encoded(value, what)
    if b"-----BEGIN " not in data:
        raise ValueError(f"{what} is not PEM: it has no '-----BEGIN' line")
    return data


def _load_chain(pem: bytes) -> list[x509.Certificate]:
    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, UnsupportedAlgorithm) as exc:
        raise ValueError(f"chain is not a PEM certificate: {_told(exc)}") from None


def _load_key(pem: bytes, password: bytes | None) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password)
    except TypeError:  # a password is missing, or there is one that is not needed
        if password is None:
            raise ValueError("private_key is encrypted, and no password was given") from None
        return _load_key(pem, None)  # not needed is fine, as it is for OpenSSL
    except (ValueError, UnsupportedAlgorithm) as exc:
        hint = "" if password is None else ", or the password is wrong"
        raise ValueError(f"private_key is not a PEM private key{hint}: {_told(exc)}") from None


def _told(exc: Exception) -> str:
    # Without what it quotes. A line that has lost its dashes makes of the whole key the name of a
    # PEM block, and of that a part of the text: MismatchedTags("PRIVATE KEY\nMIIE...", ...).
    return str(exc).partition('("')[0]


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    try:
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except x509.ExtensionNotFound:
        common = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        found = [str(attribute.value) for attribute in common]
    else:
        found = extension.value.get_values_for_type(x509.DNSName)
    return tuple(name.lower().removesuffix(".") for name in found)


@contextlib.contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """Give the content a path for as long as OpenSSL, which reads files only, needs it.

    On Linux the file is in memory and has no name in any directory. Elsewhere it is a
    temporary one that only this user can read, from its first moment on.
    """
    if sys.platform == "linux" and hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("trisock", os.MFD_CLOEXEC)
        path, named = f"/proc/self/fd/{descriptor}", False
    else:
        descriptor, path = tempfile.mkstemp(prefix="trisock-")
        named = True
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield path
    finally:
        if named:
            os.unlink(path)


# ---- the two roles ----

#: What decides, besides the system, whom it trusts.
Trust = tuple[str | None, str | None]


@dataclass(frozen=True)
class ClientTLS:
    """The TLS client's role, verified: what ``starttls`` and ``connect(tls=)`` take.

    Args:
      server_hostname: the name (or IP address) that the server's certificate must be
        for; ``None`` for the host given to ``connect``.
      ca: the certificates to trust, in PEM, in place of the system's.
      alpn_protocols: the protocols to offer, the preferred first (RFC 7301).
      certificate: what to show to a server that asks for a client certificate.
      verify: ``False`` takes any certificate from anybody. It protects from nobody who
        can stand in between.

    Raises ``ValueError`` or ``TypeError`` for what cannot be used. Immutable.
    """

    server_hostname: str | None = None
    ca: str | bytes | None = field(default=None, kw_only=True, repr=False)
    alpn_protocols: Sequence[str] = field(default=(), kw_only=True)
    certificate: CertificateLike | None = field(default=None, kw_only=True)
    verify: bool = field(default=True, kw_only=True)
    _built: tuple[Trust | None, ssl.SSLContext] | None = field(
        default=None, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.server_hostname is not None:
            to_tls_name(self.server_hostname)
        _set(self, "alpn_protocols", _alpn(self.alpn_protocols))
        if self.ca is not None:
            _set(self, "ca", _pem(self.ca, "ca"))
        if self.certificate is not None:
            _set(self, "certificate", to_certificate(self.certificate))
        self._context()

    def _context(self) -> ssl.SSLContext:
        """Return the context: always the same, but for a change of what the system trusts."""
        trust = _system_trust() if self.ca is None and self.verify else None
        if self._built is None or self._built[0] != trust:
            context = _client_context(
                cast("bytes | None", self.ca),
                tuple(self.alpn_protocols),
                cast("Certificate | None", self.certificate),
                self.verify,
                trust,
            )
            _set(self, "_built", (trust, context))
        assert self._built is not None
        return self._built[1]


@dataclass(frozen=True)
class ServerTLS:
    """The TLS server's role: what ``starttls`` and ``bind(tls=)`` take.

    Args:
      certificates: one or more. The one for the name that the client asks for (SNI) is
        used; there may be one of each key kind for a name. A name that is not found,
        and a client that names none, gets the first.
      alpn_protocols: the protocols that are spoken, the preferred first (RFC 7301).
      require_alpn: whether a client that shares none of them is turned away.
      client_ca: the certificates (PEM) that client certificates are verified with; with
        it clients are asked for theirs, and a wrong one is turned away.
      require_client_certificate: whether a client without one is turned away too.

    The rules are the same whichever certificate is chosen.

    Raises ``ValueError`` or ``TypeError`` for what cannot be used. Immutable.
    """

    certificates: CertificateLike | Sequence[CertificateLike]
    alpn_protocols: Sequence[str] = field(default=(), kw_only=True)
    require_alpn: bool = field(default=False, kw_only=True)
    client_ca: str | bytes | None = field(default=None, kw_only=True, repr=False)
    require_client_certificate: bool = field(default=False, kw_only=True)
    _built: ssl.SSLContext = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = self.certificates
        if isinstance(given, (str, bytes)):
            raise TypeError(f"certificates are given as trisock.Certificate, not as {_kind(given)}")
        if isinstance(given, (Certificate, Mapping)):
            given = [given]
        _set(self, "certificates", tuple(to_certificate(each) for each in given))
        if not self.certificates:
            raise ValueError("a TLS server needs at least one certificate")
        _set(self, "alpn_protocols", _alpn(self.alpn_protocols))
        if self.require_alpn and not self.alpn_protocols:
            raise ValueError("require_alpn needs alpn_protocols")
        if self.client_ca is not None:
            _set(self, "client_ca", _pem(self.client_ca, "client_ca"))
        elif self.require_client_certificate:
            # The system's trust store would let in whoever any public authority knows.
            raise ValueError("require_client_certificate needs client_ca")
        context = _server_context(
            cast("tuple[Certificate, ...]", self.certificates),
            tuple(self.alpn_protocols),
            cast("bytes | None", self.client_ca),
            self.require_client_certificate,
        )
        _set(self, "_built", context)

    def _context(self) -> ssl.SSLContext:
        return self._built


TLSArgument = str | ClientTLS | ServerTLS | ssl.SSLContext | Certificate | Sequence[CertificateLike]


@dataclass(frozen=True)
class TLSRole:
    """What a handshake needs to know."""

    context: ssl.SSLContext
    server_side: bool
    #: The name to verify, as it goes over the wire; None for servers.
    server_hostname: str | None
    require_alpn: bool = False


def to_role(tls: object) -> object:
    """Turn a bare name or bare certificates into a role; leave anything else."""
    if isinstance(tls, str):
        return ClientTLS(tls)
    if isinstance(tls, (Certificate, Mapping)) or (
        isinstance(tls, Sequence) and not isinstance(tls, (bytes, bytearray, memoryview))
    ):
        return ServerTLS(tls)
    return tls


def resolve(
    tls: object, *, server_hostname: str | None, connected_host: str | None, side: str
) -> TLSRole:
    """Turn what the user gave for ``tls`` into a role, or raise TypeError or ValueError.

    The name checked is, in this order, ``server_hostname``, the one in ``tls``, ``connected_host``.
    """
    if server_hostname is not None and not isinstance(server_hostname, str):
        raise TypeError(f"server_hostname is a str, not {_kind(server_hostname)}")
    tls = to_role(tls)
    if isinstance(tls, ServerTLS):
        role = TLSRole(tls._context(), True, None, tls.require_alpn)
    elif isinstance(tls, ClientTLS):
        name = _first(server_hostname, tls.server_hostname, connected_host)
        role = TLSRole(tls._context(), False, name)
        if name is None and tls.verify:
            raise ValueError("a verified TLS client needs to know the server's name")
    elif isinstance(tls, ssl.SSLContext):
        server_side = tls.protocol == ssl.PROTOCOL_TLS_SERVER or (
            tls.protocol != ssl.PROTOCOL_TLS_CLIENT and side == "server"
        )
        name = None if server_side else _first(server_hostname, connected_host)
        role = TLSRole(tls, server_side, name)
        if name is None and tls.check_hostname and not server_side:
            raise ValueError("the context checks host names: server_hostname is needed")
    else:
        raise TypeError(
            "tls is a server name, ClientTLS, certificates, ServerTLS or an ssl.SSLContext, "
            f"not {_kind(tls)}"
        )
    if role.server_side and server_hostname is not None:
        raise ValueError("server_hostname is for the TLS client's role")
    if role.server_hostname is None:
        return role
    return TLSRole(role.context, False, to_tls_name(role.server_hostname))


def _first(*names: str | None) -> str | None:
    return next((name for name in names if name is not None), None)


def _set(instance: object, name: str, value: object) -> None:
    object.__setattr__(instance, name, value)  # how a frozen dataclass normalises its own fields


def _alpn(protocols: object) -> tuple[str, ...]:
    if isinstance(protocols, (str, bytes)) or not isinstance(protocols, Sequence):
        raise TypeError(f"alpn_protocols is a sequence of str, not {_kind(protocols)}")
    for protocol in protocols:
        if not isinstance(protocol, str):
            raise TypeError(f"an ALPN protocol is a str, not {protocol!r}")
        if not protocol.isascii() or not 1 <= len(protocol) <= 255:
            raise ValueError(f"an ALPN protocol is 1 to 255 ASCII characters, not {protocol!r}")
    return tuple(protocols)


# ---- contexts ----


def _system_trust() -> Trust:
    """Return what decides, besides the system, whom it trusts."""
    return (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=32)
def _client_context(
    ca: bytes | None,
    alpn_protocols: tuple[str, ...],
    certificate: Certificate | None,
    verify: bool,
    trust: Trust | None,  # only a part of the cache's key
) -> ssl.SSLContext:
    if verify:
        with _named("ca"):
            context = ssl.create_default_context(
                ssl.Purpose.SERVER_AUTH, cadata=None if ca is None else ca.decode()
            )
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    _set_common(context, alpn_protocols)
    if certificate is not None:
        certificate.load_into(context)
    return context


@functools.lru_cache(maxsize=32)
def _server_context(
    certificates: tuple[Certificate, ...],
    alpn_protocols: tuple[str, ...],
    client_ca: bytes | None,
    require_client_certificate: bool,
) -> ssl.SSLContext:
    """Build the context of a server; its SNI callback changes to the others.

    The contexts differ in their certificates only: what OpenSSL takes from the first one
    even after a change (whether a client certificate is required, the versions) and what
    it takes from the new one (ALPN, whose client certificates are trusted) is the same in all.
    """

    def build(chosen: tuple[Certificate, ...]) -> ssl.SSLContext:
        with _named("client_ca"):
            context = ssl.create_default_context(
                ssl.Purpose.CLIENT_AUTH, cadata=None if client_ca is None else client_ca.decode()
            )
        _set_common(context, alpn_protocols)
        # Forward secrecy and AEAD, which is what RFC 9325, section 4.2, recommends for TLS 1.2.
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.options |= ssl.OP_NO_RENEGOTIATION  # RFC 7457, sections 2.6 and 2.10
        if client_ca is not None:
            context.verify_mode = (
                ssl.CERT_REQUIRED if require_client_certificate else ssl.CERT_OPTIONAL
            )
        for certificate in chosen:
            certificate.load_into(context)
        return context

    contexts: dict[tuple[Certificate, ...], ssl.SSLContext] = {}
    by_name: dict[str, ssl.SSLContext] = {}
    for name in {name: None for certificate in certificates for name in certificate.names}:
        chosen = _one_of_each_kind(c for c in certificates if name in c.names)
        if chosen not in contexts:
            contexts[chosen] = build(chosen)
        by_name[name] = contexts[chosen]
    first = certificates[0]
    default_choice = _one_of_each_kind(c for c in certificates if set(c.names) == set(first.names))
    if default_choice not in contexts:
        contexts[default_choice] = build(default_choice)
    default = contexts[default_choice]

    def choose(ssl_object: ssl.SSLObject, name: str | None, _: ssl.SSLContext) -> None:
        if name is None:
            return
        name = name.lower().removesuffix(".")
        assert isinstance(ssl_object, SNIRecorder)
        ssl_object.requested_name = name
        wildcard = "*." + name.partition(".")[2]
        found = by_name.get(name) or by_name.get(wildcard)
        if found is not None:
            ssl_object.context = found

    default.sslobject_class = SNIRecorder
    default.sni_callback = choose
    return default


class SNIRecorder(ssl.SSLObject):
    """An SSLObject that remembers the name that the client asked for."""

    requested_name: str | None = None


def _one_of_each_kind(certificates: Iterator[Certificate]) -> tuple[Certificate, ...]:
    """Return the first certificate of each key kind: a context has one place for each."""
    kinds: dict[str, Certificate] = {}
    for certificate in certificates:
        kinds.setdefault(certificate.key_kind, certificate)
    return tuple(kinds.values())


def _set_common(context: ssl.SSLContext, alpn_protocols: tuple[str, ...]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996 ended the older ones
    if alpn_protocols:
        context.set_alpn_protocols(alpn_protocols)


@contextlib.contextmanager
def _named(what: str) -> Iterator[None]:
    """Turn OpenSSL's complaint about the certificates to trust into one that says which."""
    try:
        yield
    except (ssl.SSLError, UnicodeDecodeError, ValueError) as exc:
        # The cause is left out: UnicodeDecodeError's repr has all the data, which may be a key.
        raise ValueError(f"{what} holds no PEM certificate that OpenSSL can use: {exc}") from None


# ---- what was agreed on ----


def has_expired(certificate: bytes) -> bool:
    """Return whether the time of a certificate (DER) is over."""
    end = x509.load_der_x509_certificate(certificate).not_valid_after_utc
    return end.timestamp() < time.time()


@dataclass(frozen=True)
class TLSInfo:
    """What both sides agreed on, and who the peer has shown to be.

    Attributes:
      version: such as ``"TLSv1.3"``.
      cipher: the cipher suite by its OpenSSL name, such as ``"TLS_AES_256_GCM_SHA384"``.
      alpn_protocol: the protocol chosen by ALPN, or ``None``.
      server_hostname: as a client the name that was verified, as a server the one that
        the client asked for (SNI); as it went over the wire (A-labels), or ``None``.
      peer_certificate: the peer's certificate in DER, or ``None`` if it showed none.
      session_reused: whether an earlier session was resumed.
    """

    version: str
    cipher: str
    alpn_protocol: str | None
    server_hostname: str | None
    peer_certificate: bytes | None = field(repr=False)
    session_reused: bool
    _tls_unique: bytes | None = field(repr=False)
    _server_certificate: bytes | None = field(repr=False)

    def channel_binding(self, type: str = "tls-unique") -> bytes:
        """Return the data that binds an authentication to this connection (RFC 5056).

        Args:
          type: ``"tls-unique"`` (RFC 5929, section 3; not defined for TLS 1.3) or
            ``"tls-server-end-point"`` (section 4; clients only, a server's ``ssl`` module does
            not say which of its certificates was used).

        Raises ``ValueError`` where there is no such binding for this connection.
        """
        if type == "tls-unique":
            if self._tls_unique is None:
                raise ValueError(
                    f"tls-unique is not defined for {self.version} (RFC 8446, appendix C.5)"
                )
            return self._tls_unique
        if type == "tls-server-end-point":
            if self._server_certificate is None:
                raise ValueError("tls-server-end-point: the server's certificate is not known here")
            certificate = x509.load_der_x509_certificate(self._server_certificate)
            algorithm = certificate.signature_hash_algorithm
            if algorithm is None:  # Ed25519, Ed448
                raise ValueError(
                    "tls-server-end-point is not defined for this certificate's signature"
                )
            if algorithm.name in ("md5", "sha1"):
                algorithm = hashes.SHA256()
            return certificate.fingerprint(algorithm)
        raise ValueError(f"no channel binding of the type {type!r}")
