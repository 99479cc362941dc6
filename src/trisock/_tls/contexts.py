"""The ``ssl.SSLContext`` objects of clients and servers.

Contexts are built once for equal values and shared: loading the system's trust store alone
takes tens of milliseconds. They are never changed after they were built.
"""

from __future__ import annotations

import functools
import os
import ssl
from collections.abc import Iterable

from .certificate import Certificate
from .client_hello import ClientHello

#: What decides, besides the system, whom it trusts.
SystemTrust = tuple[str | None, str | None]


def system_trust() -> SystemTrust:
    """Return what decides, besides the system, whom it trusts."""
    return (os.environ.get("SSL_CERT_FILE"), os.environ.get("SSL_CERT_DIR"))


@functools.lru_cache(maxsize=32)
def client_context(
    ca: bytes | None,
    alpn_protocols: tuple[str, ...],
    certificate: Certificate | None,
    verify: bool,
    trust: SystemTrust | None,  # only a part of the cache's key
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
server_contexts = functools.lru_cache(maxsize=32)(ServerContexts)


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
