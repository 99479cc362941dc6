"""Find out which certificate a client receives for a requested name."""

from __future__ import annotations

import ssl
from typing import Any

import trio
from cryptography import x509

from helpers.pairs import closing
from trisock import TLSInfo
from trisock.testing import Authority, socket_pair


async def client_info(server_tls: Any, name: str | None, context: ssl.SSLContext) -> TLSInfo:
    """Return the TLSInfo of a client that sends this name as SNI."""
    a, b = await socket_pair()
    async with closing(a, b), trio.open_nursery() as nursery:
        nursery.start_soon(b.starttls, server_tls)
        return await a.starttls(context, server_hostname=name)


def names_of(info: TLSInfo) -> list[str]:
    assert info.peer_certificate is not None
    certificate = x509.load_der_x509_certificate(info.peer_certificate)
    extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    return extension.value.get_values_for_type(x509.DNSName)


def trusting(authority: Authority) -> ssl.SSLContext:
    context = ssl.create_default_context(cadata=authority.ca.decode())
    context.check_hostname = False  # the tests check the name themselves
    return context
