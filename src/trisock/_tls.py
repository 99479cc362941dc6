"""What TLS is to be: certificates, the two roles, and what was agreed on.

No conversation happens here (``_tls_connection`` holds those). Everything that can be wrong
in a certificate, a key or an option is found here, before a byte is sent.

Contexts are built once for equal values and shared: loading the system's trust store alone
takes tens of milliseconds. They are never changed after they were built.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import os
import ssl
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar, cast

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed448, ed25519, rsa
from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes, PublicKeyTypes

from . import _pem
from ._address import Address, quoted, to_tls_name
from ._client_hello import ClientHello
from ._text import printable

T = TypeVar("T")

# ---- certificates ----


class Certificate:
    """A certificate chain with its private key, checked to belong together.

    Args:
      chain: the certificates in PEM, the server's (or client's) own first.
      private_key: its private key in PEM: RSA, ECDSA, Ed25519 or Ed448, also encrypted.
      password: what the key is encrypted with.

    Raises:
      ValueError: it is no PEM, a certificate or the key cannot be read, the key does not fit
        the first certificate, or the key is encrypted and the password is missing or wrong
        (there is never a prompt). The text says which argument is wrong and quotes nothing.
      TypeError: an argument is neither ``str`` nor ``bytes``.
      OSError: OpenSSL, which reads files only, cannot be given one.

    What lies outside the PEM blocks does not matter. Each certificate is sent once, in the order
    given. Certificates are immutable, equal by value, and never show their key: copies are the
    certificate itself, and pickling is a ``TypeError``. The names a server's certificate is
    chosen by are its DNS names, or the common name where it has none (RFC 6125, section 6.4.4).
    """

    __slots__ = ("_chain", "_password", "_private_key", "key_kind", "names")

    #: The names that the certificate is for, in lower case; wildcards as ``*.example.org``.
    names: tuple[str, ...]
    #: What kind of key it has, such as ``"RSA"``: a client chooses among them.
    key_kind: str
    _chain: bytes
    _private_key: bytes
    _password: bytes | None

    # Invariant: OpenSSL has taken _chain with _private_key, both in PEM that _pem has written.

    def __init__(
        self, chain: str | bytes, private_key: str | bytes, password: str | bytes | None = None
    ) -> None:
        chain_pem = _pem_argument(chain, "chain")
        key_pem = _pem_argument(private_key, "private_key")
        _set(self, "_password", None if password is None else _password_argument(password))
        ders = _told_as("chain is not a PEM certificate", lambda: _pem.certificates(chain_pem))
        _set(self, "_chain", _pem.written_certificates(ders))
        leaf = _told_as(
            "chain is not a certificate", lambda: x509.load_der_x509_certificate(ders[0])
        )
        _set(self, "names", _told_as("chain: the names cannot be read", lambda: _names(leaf)))
        public_key = _told_as(
            "chain: the public key cannot be read", lambda: _public_bytes(leaf.public_key())
        )
        key_pem = _told_as(
            "private_key is not a PEM private key", lambda: _pem.private_key(key_pem)
        )
        _set(self, "_private_key", key_pem)
        key = _load_key(self._private_key, self._password)
        if public_key != _told_as(
            "private_key cannot be used", lambda: _public_bytes(key.public_key())
        ):
            raise ValueError(
                "private_key does not fit the first certificate of the chain, "
                f"which is for {_listed(self.names) or 'no name'}"
            )
        if not isinstance(key, _TLS_KEYS):
            raise ValueError("private_key is of a kind that TLS does not have")
        kind = type(key).__name__.removeprefix("_").removesuffix("PrivateKey")
        if kind == "RSA" and public_key not in leaf.tbs_certificate_bytes:
            # The certificate names another algorithm than the one that cryptography, for which
            # both kinds are RSA, writes for the key.
            kind = "RSA-PSS"
        _set(self, "key_kind", kind)
        # Small keys are for the context to refuse: it may be one of the user's that takes them.
        trial = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        trial.set_ciphers("DEFAULT:@SECLEVEL=0")
        self.load_into(trial)

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
        chain_pem = _content(chain, "chain")
        if private_key is None:
            return cls(chain_pem, chain_pem, password)
        return cls(chain_pem, _content(private_key, "private_key"), password)

    def load_into(self, context: ssl.SSLContext) -> None:
        """Use this certificate in a context. ``TypeError`` if it is no ``ssl.SSLContext``."""
        if not isinstance(context, ssl.SSLContext):
            raise TypeError(f"a certificate is loaded into an ssl.SSLContext, not {_kind(context)}")

        def the_password() -> bytes:
            # Without a function OpenSSL would ask on the terminal, and the event loop wait.
            return self._password or b""

        with _private_file(self._chain) as chain, _private_file(self._private_key) as key:
            try:
                context.load_cert_chain(chain, key, password=the_password)
            except ssl.SSLError as exc:
                raise ValueError(
                    "chain or private_key: OpenSSL does not take the certificate for "
                    f"{_listed(self.names) or 'no name'}: {exc}"
                ) from exc

    def __repr__(self) -> str:
        return f"<trisock.Certificate {_listed(self.names) or 'without a name'} ({self.key_kind})>"

    def _value(self) -> tuple[bytes, bytes, bytes | None]:
        return (self._chain, self._private_key, self._password)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Certificate) and self._value() == other._value()

    def __hash__(self) -> int:
        return hash(self._value())

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError("a trisock.Certificate cannot be changed")

    def __delattr__(self, name: str) -> None:
        raise AttributeError("a trisock.Certificate cannot be changed")

    def __copy__(self) -> Certificate:
        return self

    def __deepcopy__(self, memo: object) -> Certificate:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            "a trisock.Certificate cannot be pickled, nor can what holds one: the pickle would "
            "show its private key. Read the files where it is needed (Certificate.from_files)."
        )


_TLS_KEYS = (
    rsa.RSAPrivateKey,
    ec.EllipticCurvePrivateKey,
    ed25519.Ed25519PrivateKey,
    ed448.Ed448PrivateKey,
)

CertificateLike = Certificate | Mapping[str, str | bytes]


def to_certificate(value: object) -> Certificate:
    """Return a Certificate from one, or from a mapping that has its fields."""
    if isinstance(value, Certificate):
        return value
    if isinstance(value, Mapping):
        unknown = set(value) - {"chain", "private_key", "password"}
        missing = {"chain", "private_key"} - set(value)
        if unknown or missing:
            # The names of unknown fields are not shown: one may be a key.
            raise ValueError(
                "a certificate has the fields chain and private_key (and password): "
                f"{_listed(sorted(missing)) or 'none'} missing, {len(unknown)} unknown"
            )
        password = value.get("password")
        return _certificate(
            _encoded(value["chain"], "chain"),
            _encoded(value["private_key"], "private_key"),
            None if password is None else _password_argument(password),
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
        return value.encode(errors="replace")  # what is not UTF-8 is not in a PEM block
    if isinstance(value, (bytes, bytearray, memoryview)):
        return bytes(value)
    raise TypeError(f"{what} is str or bytes, not {_kind(value)}")


def _password_argument(value: object) -> bytes:
    if not isinstance(value, str):
        return _encoded(value, "password")
    with contextlib.suppress(UnicodeEncodeError):  # which quotes the whole password
        return value.encode(errors="surrogateescape")  # as it was, if it comes from the system
    raise ValueError("password has characters that cannot be encoded")


def _pem_argument(value: object, what: str) -> bytes:
    data = _encoded(value, what)
    if b"-----BEGIN " not in data:
        raise ValueError(f"{what} is not PEM: it has no '-----BEGIN' line")
    return data


def _content(path: str | os.PathLike[str], what: str) -> bytes:
    """Return what is in a file. The error shows a path, and nothing that may be a key."""
    name = os.fsdecode(path)
    if not name.isprintable() or "-----BEGIN" in name:
        raise ValueError(f"{what} is a path, and what was given is none; PEM goes to Certificate()")
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as exc:
        if exc.errno != errno.ENAMETOOLONG:
            raise
        raise OSError(exc.errno, f"{what}: {exc.strerror} ({len(name)} characters)") from None


def _told_as(problem: str, function: Callable[[], T]) -> T:
    """Call what reads a certificate or a key; whatever it raises becomes one ``ValueError``.

    ``cryptography`` raises errors of many kinds, and warnings under ``-W error``.
    """
    try:
        return function()
    except Exception as exc:
        raise ValueError(f"{problem}: {_told(exc)}") from None


def _load_key(pem: bytes, password: bytes | None) -> PrivateKeyTypes:
    try:
        return serialization.load_pem_private_key(pem, password)
    except TypeError:  # a password is missing, or there is one that is not needed
        if password is None:
            raise ValueError("private_key is encrypted, and no password was given") from None
        return _load_key(pem, None)  # not needed is fine, as it is for OpenSSL
    except Exception as exc:  # also warnings, under -W error
        hint = "" if password is None else ", or the password is wrong"
        raise ValueError(f"private_key is not a PEM private key{hint}: {_told(exc)}") from None


def _told(exc: Exception) -> str:
    # Without what it quotes. A line that has lost its dashes makes of the whole key the name of a
    # PEM block, and of that a part of the text: MismatchedTags("PRIVATE KEY\nMIIE...", ...).
    return printable(str(exc).partition('("')[0]) or type(exc).__name__


def _listed(names: Iterable[str]) -> str:
    return ", ".join(map(printable, names))


def _public_bytes(key: PublicKeyTypes) -> bytes:
    return key.public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )


def _names(leaf: x509.Certificate) -> tuple[str, ...]:
    found: list[str] = []
    with contextlib.suppress(x509.ExtensionNotFound):
        extension = leaf.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        found = extension.value.get_values_for_type(x509.DNSName)
    if not found:
        common = leaf.subject.get_attributes_for_oid(x509.NameOID.COMMON_NAME)
        found = [str(attribute.value) for attribute in common]
    return tuple(name.lower().removesuffix(".") for name in found)


@contextlib.contextmanager
def _private_file(content: bytes) -> Iterator[str]:
    """Give the content a path for as long as OpenSSL, which reads files only, needs it.

    The file is in memory and has no name in any directory, if the system can do that (Linux,
    with ``/proc``). Otherwise it is a temporary one that only this user can read, from its
    first moment on.
    """
    descriptor = _memory_file()
    if descriptor is not None:
        path, named = f"/proc/self/fd/{descriptor}", False
    else:
        try:
            descriptor, path = tempfile.mkstemp(prefix="trisock-")
        except OSError as exc:
            raise OSError(
                exc.errno,
                "OpenSSL reads certificates from files only, and none can be made for it: no "
                f"memory file (it needs memfd_create and /proc), and no temporary one: {exc}",
            ) from exc
        named = True
    try:
        with open(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield path
    finally:
        if named:
            os.unlink(path)


def _memory_file() -> int | None:
    """Return a descriptor that can be opened by its name in ``/proc``; ``None`` without one."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        return None
    try:
        descriptor = os.memfd_create("trisock", os.MFD_CLOEXEC)
    except (AttributeError, OSError):  # an old C library; seccomp
        return None
    try:
        os.close(os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC))
    except OSError:  # chroot
        os.close(descriptor)
        return None
    return descriptor


# ---- the two roles ----

#: What decides, besides the system, whom it trusts.
Trust = tuple[str | None, str | None]


@dataclass(frozen=True)
class ClientTLS:
    """The TLS client's role, verified: what ``starttls`` and ``connect(tls=)`` take.

    Args:
      server_hostname: the name (or IP address) that the server's certificate must be
        for; ``None`` for the host given to ``connect``.
      ca: the certificates to trust, in PEM, in place of the system's. An intermediate or
        the server's own certificate may be among them, and trust ends there.
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
    # No annotation: it is not a field, so that it is not compared, copied, pickled or shown.
    _built = cast("tuple[Trust | None, ssl.SSLContext] | None", None)

    def __post_init__(self) -> None:
        if self.server_hostname is not None:
            to_tls_name(self.server_hostname)
        _set(self, "alpn_protocols", _alpn(self.alpn_protocols))
        if self.ca is not None:
            _set(self, "ca", _authorities(self.ca, "ca"))
        if self.certificate is not None:
            _set(self, "certificate", to_certificate(self.certificate))
        check_flag("verify", self.verify)
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

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _restore(self, state)
        self.__post_init__()


@dataclass(frozen=True)
class ServerTLS:
    """The TLS server's role: what ``starttls`` and ``bind(tls=)`` take.

    Args:
      certificates: one or more. The one for the name that the client asks for (SNI) is
        used; there may be one of each key kind for a name (of two of one kind the first is
        used, and one that names the host before a wildcard). A name that is not found, and
        a client that names none, gets the first.
      alpn_protocols: the protocols that are spoken, the preferred first (RFC 7301).
      require_alpn: whether a client that shares none of them is turned away.
      client_ca: the certificates (PEM) that client certificates are verified with; with
        it clients are asked for theirs, and a wrong one is turned away. An intermediate
        or a client's own certificate may be among them, and trust ends there.
      require_client_certificate: whether a client without one is turned away too.

    The rules are the same whichever certificate is chosen. Clients of TLS 1.2 that take no
    tickets can resume a session as long as it is among the last few: at most 16 of those
    that have ended are remembered.

    Raises ``ValueError`` or ``TypeError`` for what cannot be used. Immutable.
    """

    certificates: CertificateLike | Sequence[CertificateLike]
    alpn_protocols: Sequence[str] = field(default=(), kw_only=True)
    require_alpn: bool = field(default=False, kw_only=True)
    client_ca: str | bytes | None = field(default=None, kw_only=True, repr=False)
    require_client_certificate: bool = field(default=False, kw_only=True)
    _built = cast("ServerContexts", None)  # not a field, as in ClientTLS

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
        check_flag("require_alpn", self.require_alpn)
        check_flag("require_client_certificate", self.require_client_certificate)
        if self.require_alpn and not self.alpn_protocols:
            raise ValueError("require_alpn needs alpn_protocols")
        if self.client_ca is not None:
            _set(self, "client_ca", _authorities(self.client_ca, "client_ca"))
        elif self.require_client_certificate:
            # The system's trust store would let in whoever any public authority knows.
            raise ValueError("require_client_certificate needs client_ca")
        contexts = _server_contexts(
            cast("tuple[Certificate, ...]", self.certificates),
            tuple(self.alpn_protocols),
            cast("bytes | None", self.client_ca),
            self.require_client_certificate,
        )
        _set(self, "_built", contexts)

    def _context(self) -> ssl.SSLContext:
        return self._built.default

    def __getstate__(self) -> dict[str, Any]:
        return _fields_of(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        _restore(self, state)
        self.__post_init__()


TLSArgument = str | ClientTLS | ServerTLS | ssl.SSLContext | Certificate | Sequence[CertificateLike]


@dataclass(frozen=True)
class TLSRole:
    """What a handshake needs to know."""

    context: ssl.SSLContext
    server_side: bool
    #: The name to verify, as it goes over the wire; None for servers.
    server_hostname: str | None
    require_alpn: bool = False
    #: Where a server's context comes from, once the ClientHello is known; None for one of the
    #: user's.
    contexts: ServerContexts | None = None

    def named(self, peer: Address) -> str:
        """Return how an error calls the peer at an address."""
        name = self.server_hostname
        return str(peer) if name is None else f"{quoted(name)} ({peer})"


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
        role = TLSRole(tls._context(), True, None, tls.require_alpn, tls._built)
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


def _fields_of(role: ClientTLS | ServerTLS) -> dict[str, Any]:
    return {each.name: getattr(role, each.name) for each in dataclasses.fields(role)}


def _restore(role: ClientTLS | ServerTLS, state: dict[str, Any]) -> None:
    for name, value in state.items():
        _set(role, name, value)


def _authorities(value: object, what: str) -> bytes:
    """Return the certificates to trust, as PEM that we have written."""
    data = _pem_argument(value, what)
    return _pem.written_certificates(
        _told_as(
            f"{what} holds no PEM certificate that OpenSSL can use",
            lambda: _pem.certificates(data),
        )
    )


def check_flag(name: str, value: object) -> None:
    """Raise ``TypeError`` unless the value is a bool."""
    # An option that a program left unset (None) must not switch a check off.
    if not isinstance(value, bool):
        raise TypeError(f"{name} is True or False, not {_kind(value)}")


def _alpn(protocols: object) -> tuple[str, ...]:
    if isinstance(protocols, (str, bytes)) or not isinstance(protocols, Sequence):
        raise TypeError(f"alpn_protocols is a sequence of str, not {_kind(protocols)}")
    for protocol in protocols:
        if not isinstance(protocol, str):
            raise TypeError(f"an ALPN protocol is a str, not {_kind(protocol)}")
        if not (protocol.isascii() and protocol.isprintable() and 1 <= len(protocol) <= 255):
            raise ValueError(
                "an ALPN protocol is 1 to 255 printable ASCII characters, and one of "
                f"alpn_protocols is not: it has {len(protocol)} characters"
            )
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
        context = _verifying_context(ssl.Purpose.SERVER_AUTH, ca, "ca")
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    _set_common(context, alpn_protocols)
    if certificate is not None:
        certificate.load_into(context)
    return context


class ServerContexts:
    """The contexts of a server, by the name that a client asks for.

    They differ in their certificates only: whose client certificates are trusted, ALPN, versions
    and ciphers are the same in all.

    ``ssl`` cannot switch off OpenSSL's cache of sessions, where a client of TLS 1.2 that takes no
    tickets stays for two hours, with its whole certificate chain. So clients that do not show
    that they take tickets get contexts of their own. One serves ``_MOST_REMEMBERED`` connections
    that chose the same certificates, and then another is built, so a client that changes the name
    that it asks for does not make us build more of them. With the last connection of a context its
    sessions are gone.

    Invariant: ``_remembering`` holds the context for such clients of each choice of certificates
    that was asked for, and how many more connections may use it.
    """

    def __init__(
        self,
        certificates: tuple[Certificate, ...],
        alpn_protocols: tuple[str, ...],
        client_ca: bytes | None,
        require_client_certificate: bool,
    ) -> None:
        self._alpn_protocols = alpn_protocols
        self._client_ca = client_ca
        self._require_client_certificate = require_client_certificate
        self._choices: dict[str, tuple[Certificate, ...]] = {}
        for name in {name: None for certificate in certificates for name in certificate.names}:
            exact = [each for each in certificates if name in each.names]
            wild = [each for each in certificates if _wildcard(name) in each.names]
            self._choices[name] = _one_of_each_kind([*exact, *wild])
        names = set(certificates[0].names)
        self._default = _one_of_each_kind(c for c in certificates if set(c.names) == names)
        self._contexts = {
            chosen: self._build(chosen) for chosen in {*self._choices.values(), self._default}
        }
        self._remembering: dict[tuple[Certificate, ...], tuple[ssl.SSLContext, int]] = {}

    @property
    def default(self) -> ssl.SSLContext:
        """The context for clients that ask for no name, or for none that is here."""
        return self._contexts[self._default]

    def choose(self, hello: ClientHello) -> ssl.SSLContext:
        """Return the context for a client."""
        chosen = self._default
        if hello.host_name is not None:
            name = hello.host_name.lower().removesuffix(".")
            found = self._choices.get(name) or self._choices.get(_wildcard(name))
            chosen = found or chosen
        if hello.takes_tickets:
            return self._contexts[chosen]
        context, uses_left = self._remembering.get(chosen, (None, 0))
        if context is None or not uses_left:
            try:
                context, uses_left = self._build(chosen), _MOST_REMEMBERED
            except OSError:  # out of descriptors: no reason to refuse a client
                return self._contexts[chosen]
        self._remembering[chosen] = context, uses_left - 1
        return context

    def _build(self, chosen: tuple[Certificate, ...]) -> ssl.SSLContext:
        context = _verifying_context(ssl.Purpose.CLIENT_AUTH, self._client_ca, "client_ca")
        _set_common(context, self._alpn_protocols)
        # Forward secrecy and AEAD, which is what RFC 9325, section 4.2, recommends for TLS 1.2.
        context.set_ciphers("ECDHE+AESGCM:ECDHE+CHACHA20")
        context.options |= ssl.OP_NO_RENEGOTIATION  # RFC 7457, sections 2.6 and 2.10
        if self._client_ca is not None:
            context.verify_mode = (
                ssl.CERT_REQUIRED if self._require_client_certificate else ssl.CERT_OPTIONAL
            )
        for certificate in chosen:
            certificate.load_into(context)
        return context


#: How many ended connections the cache of a server's sessions holds, for each choice of
#: certificates. An attacker can make each of them 0.7 MB large, so this is 11 MB.
_MOST_REMEMBERED = 16

#: Built once for equal roles.
_server_contexts = functools.lru_cache(maxsize=32)(ServerContexts)


def _wildcard(name: str) -> str:
    return "*." + name.partition(".")[2]


def _one_of_each_kind(certificates: Iterable[Certificate]) -> tuple[Certificate, ...]:
    """Return the first certificate of each key kind: a context has one place for each."""
    kinds: dict[str, Certificate] = {}
    for certificate in certificates:
        kinds.setdefault(certificate.key_kind, certificate)
    return tuple(kinds.values())


def _verifying_context(
    purpose: ssl.Purpose, authorities: bytes | None, what: str
) -> ssl.SSLContext:
    """Return a context of the interpreter's, which trusts these certificates (PEM) if given.

    Whom they make it trust must not change with the version of Python: from 3.13 on it takes a
    partial chain, and refuses certificates that break small rules of RFC 5280.
    """
    if authorities is None:
        return ssl.create_default_context(purpose)
    try:
        context = ssl.create_default_context(purpose, cadata=authorities.decode())
    except ssl.SSLError as exc:
        raise ValueError(f"{what} holds no PEM certificate that OpenSSL can use: {exc}") from None
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def _set_common(context: ssl.SSLContext, alpn_protocols: tuple[str, ...]) -> None:
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996 ended the older ones
    if alpn_protocols:
        context.set_alpn_protocols(alpn_protocols)


# ---- what was agreed on ----


def has_expired(certificate: bytes) -> bool:
    """Return whether the time of a certificate (DER) is over; ``ValueError`` if it has none."""
    end = _told_as(
        "the certificate cannot be read",
        lambda: x509.load_der_x509_certificate(certificate).not_valid_after_utc,
    )
    return end.timestamp() < time.time()


@dataclass(frozen=True)
class TLSInfo:
    """What both sides agreed on, and who the peer has shown to be.

    Attributes:
      version: such as ``"TLSv1.3"``.
      cipher: the cipher suite by its OpenSSL name, such as ``"TLS_AES_256_GCM_SHA384"``.
      alpn_protocol: the protocol chosen by ALPN, or ``None``.
      server_hostname: as a client the name that was asked for, and verified unless
        verification is off. As a server the one that the
        client asked for (SNI), as it was on the wire (A-labels; upper case stays); ``None``
        if it asked for none, or for what is no host name.
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
            return _end_point(self._server_certificate)
        raise ValueError(f"no channel binding of the type {quoted(type)}")


def _end_point(server_certificate: bytes) -> bytes:
    def digest() -> bytes | None:
        certificate = x509.load_der_x509_certificate(server_certificate)
        algorithm = certificate.signature_hash_algorithm
        if algorithm is None:  # Ed25519, Ed448
            return None
        if algorithm.name in ("md5", "sha1"):
            algorithm = hashes.SHA256()
        return certificate.fingerprint(algorithm)

    refused = "tls-server-end-point is not defined for this certificate's signature"
    found = _told_as(refused, digest)
    if found is None:
        raise ValueError(refused)
    return found
