"""STARTTLS of NNTP."""

from __future__ import annotations

from .conversation import CRLF, Line, Names, Negotiation, Send, refused, unwelcome


def nntp_client(names: Names) -> Negotiation:
    """Ask for TLS by STARTTLS (RFC 4642, section 2.2)."""
    greeting = yield Line()
    if greeting.split(b" ")[0] not in (b"200", b"201"):  # RFC 3977, section 5.1
        raise unwelcome(greeting)
    yield Send(b"STARTTLS" + CRLF)
    reply = yield Line()
    if reply.split(b" ")[0] != b"382":
        raise refused(reply)
    return greeting
