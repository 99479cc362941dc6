"""The requests that a negotiation makes to its driver. This module does no I/O.

A negotiation is a generator. It yields one request at a time, and the driver answers with the bytes
that were received, or with ``b""``. The generator returns the greeting once the other side has
agreed to TLS, and raises ``Refusal`` if TLS must not begin.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Generator
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from .._errors import StartTLSFailure

CRLF = b"\r\n"

#: A server that reads this many commands without STARTTLS ends the connection.
MAX_COMMANDS = 20

# The end of a line that announces a literal (RFC 9051, section 4.3; RFC 5804, section 1.2). A
# 64-bit number has at most 20 digits.
_LITERAL = re.compile(rb"\{(\d{1,20})\+?\}\Z")


@dataclass(frozen=True)
class Send:
    """Send these bytes."""

    data: bytes


@dataclass(frozen=True)
class Line:
    """Receive a line. The driver's answer is the line without its LF or CRLF."""


@dataclass(frozen=True)
class Exactly:
    """Receive exactly this many bytes."""

    size: int


@dataclass(frozen=True)
class Until:
    """Receive everything up to and including this delimiter."""

    delimiter: bytes


@dataclass(frozen=True)
class CheckQuiet:
    """Raise ``Refusal`` if anything from the peer is unread."""


@dataclass(frozen=True)
class Farewell:
    """Set what to send to the peer if a stop or the time limit ends the session."""

    data: bytes


@dataclass(frozen=True)
class Offered:
    """Record that the server offers TLS, for the ``StartTLSError`` of a later failure."""


Request: TypeAlias = Send | Line | Exactly | Until | CheckQuiet | Farewell | Offered

ResultT = TypeVar("ResultT")

#: A part of a negotiation, with any result.
Part: TypeAlias = Generator[Request, bytes, ResultT]

#: A whole negotiation, which returns the greeting.
Negotiation: TypeAlias = Part[bytes]


@dataclass(frozen=True)
class Names:
    """The names that a negotiation may need.

    Attributes:
      own: the name that this side gives itself: an address literal (client) or a host name
        (server).
      server: the name that the server's certificate must have, or ``None`` if it may have any.
    """

    own: bytes
    server: str | None = None


class Refusal(Exception):
    """TLS must not begin.

    Attributes:
      why: the reason, for the error's text.
      kind: the attribute ``kind`` of the ``StartTLSError``.
      offered: whether STARTTLS was offered, or ``None`` if this is unknown.
      reply: the peer's reply, or ``None``. The error's text shows a part of it.
    """

    def __init__(
        self,
        why: str,
        *,
        kind: StartTLSFailure = "violation",
        offered: bool | None = None,
        reply: bytes | None = None,
    ) -> None:
        super().__init__(why)
        self.why = why
        self.kind: StartTLSFailure = kind
        self.offered = offered
        self.reply = reply


def line_with_literals() -> Part[bytes]:
    """Receive a line of IMAP or ManageSieve, which continues after each literal in it."""
    line = yield Line()
    parts = [line]
    # Search only the received lines, because the content of a literal cannot announce a literal.
    while literal := _LITERAL.search(line):
        content = yield Exactly(int(literal[1]))
        line = yield Line()
        parts += [CRLF, content, line]
    return b"".join(parts)


def address_literal(host: str) -> bytes:
    """Write an IP address as SMTP does: ``[192.0.2.1]`` (RFC 5321, section 4.1.3).

    Raises ``ValueError`` if the host is not an IP address.
    """
    ip = ipaddress.ip_address(host.partition("%")[0])
    tag = "IPv6:" if ip.version == 6 else ""
    return f"[{tag}{ip}]".encode()


def unexpected(reply: bytes, *, offered: bool | None = None) -> Refusal:
    """Return the refusal for a reply that the protocol does not allow here."""
    return Refusal("the server sent something unexpected", offered=offered, reply=reply)


def refused(reply: bytes, *, offered: bool | None = None) -> Refusal:
    """Return the refusal for a server that rejects our request."""
    return Refusal("the server refused STARTTLS", kind="refused", offered=offered, reply=reply)


def not_offered(reply: bytes | None = None) -> Refusal:
    """Return the refusal for a server that does not offer STARTTLS."""
    why = "the server does not offer STARTTLS"
    return Refusal(why, kind="not offered", offered=False, reply=reply)


def unwelcome(greeting: bytes) -> Refusal:
    """Return the refusal for a server that greets us with an error."""
    return Refusal("the server's greeting is not a welcome", kind="refused", reply=greeting)


def ended(reply: bytes) -> Refusal:
    """Return the refusal for a server that ends the session."""
    return Refusal("the server ended the session", kind="closed", reply=reply)


def client_quit() -> Refusal:
    """Return the refusal for a client that ends the session."""
    return Refusal("the client quit without asking for TLS", kind="refused")


def too_many_commands() -> Refusal:
    """Return the refusal for a client that continues without TLS."""
    why = f"the client sent {MAX_COMMANDS} commands without asking for TLS"
    return Refusal(why, kind="refused")
