"""The SSLRequest of PostgreSQL."""

from __future__ import annotations

from .conversation import Exactly, Names, Negotiation, Refusal, Send, not_offered, unexpected

# A message without a type: its length (8), then a code in place of the protocol's version.
_SSL_REQUEST = bytes.fromhex("00000008 04d2162f")


def postgres_client(names: Names) -> Negotiation:
    """Ask for TLS by SSLRequest (PostgreSQL's documentation, "SSL Session Encryption").

    The greeting is empty, because the server does not speak first.
    """
    yield Send(_SSL_REQUEST)
    reply = yield Exactly(1)
    if reply == b"N":
        raise not_offered(reply)
    if reply == b"E":
        # Nobody has authenticated the text of this ErrorResponse (CVE-2024-10977): do not read it.
        raise Refusal("the server answered with an error", reply=reply)
    if reply != b"S":
        raise unexpected(reply)
    return b""
