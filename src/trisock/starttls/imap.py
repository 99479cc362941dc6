"""STARTTLS of IMAP."""

from __future__ import annotations

import re

from .conversation import (
    CRLF,
    Exactly,
    Line,
    Names,
    Negotiation,
    Part,
    Refusal,
    Send,
    not_offered,
    refused,
    unexpected,
    unwelcome,
)

# The end of a line that announces a literal (RFC 9051, section 4.3).
_LITERAL = re.compile(rb"\{(\d{1,9})\}$")


def imap_client(names: Names) -> Negotiation:
    """Ask for TLS by CAPABILITY and STARTTLS (RFC 9051, section 6.2.1)."""
    greeting = yield from _response()
    kind = greeting[:10].upper()
    if kind.startswith(b"* PREAUTH "):
        # STARTTLS is impossible once the client is authenticated (RFC 9051, section 7.1.4).
        raise Refusal("the server has authenticated us already", offered=False, reply=greeting)
    if not kind.startswith(b"* OK "):
        raise unwelcome(greeting)
    yield Send(b"a1 CAPABILITY" + CRLF)
    final, untagged = yield from _responses(b"a1")
    if not final.upper().startswith(b"A1 OK "):
        raise not_offered(final)
    words = [line.upper().split(b" ") for line in untagged]
    if not any(each[:2] == [b"*", b"CAPABILITY"] and b"STARTTLS" in each for each in words):
        raise not_offered()
    yield Send(b"a2 STARTTLS" + CRLF)
    # Untagged responses are legal here. They are not protected, so nobody may believe them.
    final, _ = yield from _responses(b"a2")
    if not final.upper().startswith(b"A2 OK "):
        raise refused(final, offered=True)
    return greeting


def _responses(tag: bytes) -> Part[tuple[bytes, list[bytes]]]:
    """Return the tagged response and the untagged responses before it (RFC 9051, section 7)."""
    untagged: list[bytes] = []
    while True:
        response = yield from _response()
        if response.startswith(tag + b" "):
            return response, untagged
        if not response.startswith(b"* "):
            raise unexpected(response)
        if response[:5].upper() == b"* BYE":
            raise Refusal("the server ended the session", reply=response)
        untagged.append(response)


def _response() -> Part[bytes]:
    """Return a response: a line, which goes on after each literal in it."""
    response = yield Line()
    while literal := _LITERAL.search(response):
        content = yield Exactly(int(literal[1]))
        response += CRLF + content + (yield Line())
    return response
