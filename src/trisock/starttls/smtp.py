"""STARTTLS of SMTP and LMTP."""

from __future__ import annotations

from .conversation import (
    CRLF,
    Line,
    Names,
    Negotiation,
    Part,
    Send,
    not_offered,
    refused,
    unexpected,
    unwelcome,
)


def smtp_client(names: Names) -> Negotiation:
    """Ask for TLS by EHLO and STARTTLS (RFC 3207, section 4)."""
    return _client(names, b"EHLO")


def lmtp_client(names: Names) -> Negotiation:
    """Ask for TLS by LHLO and STARTTLS (RFC 2033, section 4.1, and RFC 3207)."""
    return _client(names, b"LHLO")


def _client(names: Names, hello: bytes) -> Negotiation:
    code, greeting = yield from _reply()
    if code != b"220":
        raise unwelcome(CRLF.join(greeting))
    yield Send(hello + b" " + names.own + CRLF)
    code, lines = yield from _reply()
    if code != b"250":
        raise not_offered(CRLF.join(lines))
    # The first line holds the server's name, and each other line a keyword (RFC 5321, 4.1.1.1).
    if not any(line[4:].strip().upper() == b"STARTTLS" for line in lines[1:]):
        raise not_offered()
    yield Send(b"STARTTLS" + CRLF)
    code, lines = yield from _reply()
    if code != b"220":
        raise refused(CRLF.join(lines), offered=True)
    return CRLF.join(greeting)


def _reply() -> Part[tuple[bytes, list[bytes]]]:
    """Return the code and the lines of a reply (RFC 5321, section 4.2.1)."""
    lines: list[bytes] = []
    while True:
        line = yield Line()
        code, separator = line[:3], line[3:4]
        if not code.isdigit() or separator not in (b" ", b"-", b""):
            raise unexpected(line)
        if lines and code != lines[0][:3]:
            raise unexpected(line)  # each line of a reply has the same code
        lines.append(line)
        if separator != b"-":
            return code, lines
