"""STARTTLS of ManageSieve."""

from __future__ import annotations

import re

from .conversation import (
    CRLF,
    Names,
    Negotiation,
    Offered,
    Part,
    Send,
    line_with_literals,
    not_offered,
    refused,
    unwelcome,
)

_STARTTLS = re.compile(rb'(?i)("STARTTLS"|\{8\+?\}\r\nSTARTTLS)( |\Z)')
_FINAL = re.compile(rb"(?i)(OK|NO|BYE)([ (]|\Z)")


def sieve_client(names: Names) -> Negotiation:
    """Ask for TLS by STARTTLS (RFC 5804, section 2.2). The greeting lists the capabilities.

    Under TLS, the server sends its capabilities again, without a request. The caller must read
    them.
    """
    ok, capabilities, final = yield from _response()
    greeting = CRLF.join([*capabilities, final])
    if not ok:
        raise unwelcome(greeting)
    if not any(_STARTTLS.match(line) for line in capabilities):
        raise not_offered()
    yield Offered()
    yield Send(b"STARTTLS" + CRLF)
    ok, _, final = yield from _response()
    if not ok:
        raise refused(final, offered=True)
    return greeting


def _response() -> Part[tuple[bool, list[bytes], bytes]]:
    """Return whether the response is OK, its lines before the last one, and its last line."""
    lines: list[bytes] = []
    while True:
        line = yield from line_with_literals()
        if final := _FINAL.match(line):
            return final[1].upper() == b"OK", lines, line
        lines.append(line)
