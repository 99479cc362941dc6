"""The ``ssl.SSLContext`` objects of clients and servers.

Equal settings share one context, because loading the system's trust store alone takes tens of
milliseconds. A context never changes after it was built.
"""

from __future__ import annotations

import functools
import itertools
import os
import ssl
import threading
from collections.abc import Iterable

from .certificate import Certificate

# The maximum number of ended sessions in a server's cache, for each selection of certificates. An
# attacker can make each session 0.7 MB large, so 16 sessions may take 11 MB.
_MAX_STORED_SESSIONS = 16

# Forward secrecy and AEAD, as RFC 9325, section 4.2, recommends for TLS 1.2.
_ECDHE = "ECDHE+AESGCM:ECDHE+CHACHA20"

# The environment variables that select the system's trust store.
SystemTrust = tuple[str | None, str | None]


def system_trust() -> SystemTrust:
    """Return the environment variables that select the system's trust store."""
    return (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=32)
def client_context(
    ca: bytes | None,
    alpn_protocols: tuple[str, ...],
    certificate: Certificate | None,
    verify: bool,
    require_ecdhe: bool,
    trust: SystemTrust | None,  # used only in the cache key
) -> ssl.SSLContext:
    if verify:
        context = _verifying_context(ssl.Purpose.SERVER_AUTH, ca, "ca")
    else:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    # By default, OpenSSL compares the common name if the subjectAltName has no DNS names. RFC 9525,
    # section 2, forbids this: any text may be a common name, and authorities do not check that the
    # common name is a host name.
    context.hostname_checks_common_name = False
    _set_common(context, alpn_protocols)
    if require_ecdhe:
        context.set_ciphers(_ECDHE)
    if certificate is not None:
        certificate.load_into(context)
    return context


class ServerContexts:
    """Selects a server's context by the name that the client requests.

    The contexts differ only in their certificates. All have the same ALPN protocols, versions,
    ciphers and authorities for client certificates.

    ``ssl`` cannot disable OpenSSL's session cache. If a TLS 1.2 client does not support tickets,
    the cache keeps the session for two hours, with the client's whole certificate chain. So clients
    without ticket support get separate contexts, called stateful: one for each selection of
    certificates. After ``_MAX_STORED_SESSIONS`` connections, a new context replaces the old one.
    Connections are counted per selection, so a client that keeps changing the requested name cannot
    force extra rebuilds. The sessions of a replaced context are freed when its last connection
    ends.

    Invariant: for each selection of certificates that needed a stateful context so far,
    ``_stateful`` holds this context and the number of connections that may still use it.
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
        self._by_name: dict[str, tuple[Certificate, ...]] = {}
        for name in {name: None for certificate in certificates for name in certificate.names}:
            exact = [each for each in certificates if name in each.names]
            wild = [each for each in certificates if _wildcard(name) in each.names]
            self._by_name[name] = _first_of_each_kind([*exact, *wild])
        names = set(certificates[0].names)
        self._default = _first_of_each_kind(c for c in certificates if set(c.names) == names)
        self._contexts = {
            selected: self._build(selected) for selected in {*self._by_name.values(), self._default}
        }
        self._stateful: dict[tuple[Certificate, ...], tuple[ssl.SSLContext, int]] = {}

    @property
    def default(self) -> ssl.SSLContext:
        """The context for clients that request no name, or an unknown one."""
        return self._contexts[self._default]

    def choose(self, host_name: str | None, *, supports_tickets: bool) -> ssl.SSLContext:
        """Return the context to use for a client, depending on its ClientHello."""
        selected = self._default
        if host_name is not None:
            name = host_name.lower().removesuffix(".")
            found = self._by_name.get(name) or self._by_name.get(_wildcard(name))
            selected = found or selected
        if supports_tickets:
            return self._contexts[selected]
        context, uses_left = self._stateful.get(selected, (None, 0))
        if context is None or not uses_left:
            try:
                context, uses_left = self._build(selected), _MAX_STORED_SESSIONS
            except OSError:  # such as EMFILE, which is no reason to refuse a client
                return self._contexts[selected]
        self._stateful[selected] = context, uses_left - 1
        return context

    def _build(self, selected: tuple[Certificate, ...]) -> ssl.SSLContext:
        context = _verifying_context(ssl.Purpose.CLIENT_AUTH, self._client_ca, "client_ca")
        _set_common(context, self._alpn_protocols)
        context.set_ciphers(_ECDHE)
        context.options |= ssl.OP_NO_RENEGOTIATION  # RFC 7457, sections 2.6 and 2.10
        if self._client_ca is not None:
            context.verify_mode = (
                ssl.CERT_REQUIRED if self._require_client_certificate else ssl.CERT_OPTIONAL
            )
        for certificate in selected:
            certificate.load_into(context)
        return context


class CurrentContexts:
    """The contexts that a ``ServerTLS`` uses now. ``ServerTLS.reload`` replaces them.

    Connections keep this object, so each handshake uses the newest contexts.

    Two threads may reload at the same time. Each takes a number before it reads the files. Contexts
    with a lower number than the current ones are not used, because their files were read earlier.

    Attributes:
      read: the certificates and authorities of the current contexts.
      contexts: the current contexts.
    """

    def __init__(self, read: object, contexts: ServerContexts) -> None:
        self.read = read
        self.contexts = contexts
        self._number = 0
        self._numbers = itertools.count(1)
        self._lock = threading.Lock()

    def next_number(self) -> int:
        """Return a number for a reload that begins."""
        return next(self._numbers)

    def replace(self, number: int, read: object, contexts: ServerContexts) -> bool:
        """Use new contexts, unless a later reload was faster. Return whether they are used."""
        with self._lock:
            if number < self._number:
                return False
            self._number, self.read, self.contexts = number, read, contexts
            return True

    @property
    def default(self) -> ssl.SSLContext:
        """The context for clients that request no name, or an unknown one."""
        return self.contexts.default

    def choose(self, host_name: str | None, *, supports_tickets: bool) -> ssl.SSLContext:
        """Return the context to use for a client, depending on its ClientHello."""
        return self.contexts.choose(host_name, supports_tickets=supports_tickets)


# Equal roles share one ServerContexts.
server_contexts = functools.lru_cache(maxsize=32)(ServerContexts)


def _wildcard(name: str) -> str:
    return "*." + name.partition(".")[2]


def _first_of_each_kind(certificates: Iterable[Certificate]) -> tuple[Certificate, ...]:
    """Return the first certificate of each key type. A context holds only one of each type."""
    kinds: dict[str, Certificate] = {}
    for certificate in certificates:
        kinds.setdefault(certificate.key_kind, certificate)
    return tuple(kinds.values())


def _verifying_context(
    purpose: ssl.Purpose, authorities: bytes | None, what: str
) -> ssl.SSLContext:
    """Return Python's default context. If ``authorities`` (PEM) are given, it trusts only them.

    With ``authorities``, the context accepts partial chains, and certificates that break minor
    rules of RFC 5280, on every Python version. (By default, Python 3.13 and later refuse such
    certificates, and earlier versions refuse partial chains.)
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
    context.minimum_version = ssl.TLSVersion.TLSv1_2  # RFC 8996 deprecates older versions
    if alpn_protocols:
        context.set_alpn_protocols(alpn_protocols)
