"""STARTTLS of FTP."""

from __future__ import annotations

from .conversation import (
    CRLF,
    Line,
    Names,
    Negotiation,
    Part,
    Send,
    refused,
    unexpected,
    unwelcome,
)


def ftp_client(names: Names) -> Negotiation:
    """Ask for TLS by AUTH TLS (RFC 4217, section 4).

    This protects the control connection. PBSZ and PROT protect the data connections.
    """
    code, greeting = yield from _reply()
    while code == b"120":  # "service ready in some minutes": 220 follows (RFC 959, section 5.4)
        code, greeting = yield from _reply()
    if code != b"220":
        raise unwelcome(greeting)
    yield Send(b"AUTH TLS" + CRLF)
    code, reply = yield from _reply()
    if code != b"234":
        raise refused(reply)
    return greeting


def _reply() -> Part[tuple[bytes, bytes]]:
    """Return the code and the lines of a reply (RFC 959, section 4.2).

    Unlike in SMTP, the lines between the first and the last may begin with anything.
    """
    first = line = yield Line()
    code = first[:3]
    if not code.isdigit() or first[3:4] not in (b" ", b"-", b""):
        raise unexpected(first)
    lines = [first]
    while first[3:4] == b"-" and not (line[:3] == code and line[3:4] == b" "):
        line = yield Line()
        lines.append(line)
    return code, CRLF.join(lines)
