"""The first message of a TLS client, parsed before OpenSSL sees it (RFC 8446, section 4.1.2).

A server selects its context by this message: by the name that the client requests (SNI, RFC 6066,
section 3), and by whether the client can resume a session with a ticket. This module does no I/O
and decides nothing about the handshake. It leaves a malformed ClientHello to OpenSSL, which sends
the right alert.

The cost of parsing is linear in the number of bytes, whatever the size of the chunks in which they
arrive.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

# OpenSSL's limit for the body of the message, plus the size of its header.
_MAX_MESSAGE = 131396 + 4

# The maximum size with all record headers: a client may put a single byte into each record.
_MAX_WIRE = 256 * 1024

_MAX_FRAGMENT = 16384  # RFC 8446, section 5.1
_HANDSHAKE = 22  # a record type
_CLIENT_HELLO = 1  # a handshake message type

# Extension types.
_SERVER_NAME = 0
_SESSION_TICKET = 35
_SUPPORTED_VERSIONS = 43

_TLS_1_3 = b"\x03\x04"

# Letters, digits and hyphens (RFC 1123, section 2.1), and underscores, which some names contain.
_HOST_NAME = re.compile(rb"(?=.{1,254}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?\Z")


@dataclass(frozen=True)
class ClientHello:
    """The parts of a ClientHello by which a server selects a context.

    Attributes:
      server_name: the name that the client requests, as sent, even if it is not valid. ``None`` if
        the client requests no name.
      supports_tickets: whether the client can store its session in a ticket, so that the server
        need not store it. True for all TLS 1.3 clients, and for older clients that send the
        extension of RFC 5077.
    """

    server_name: bytes | None
    supports_tickets: bool

    @property
    def host_name(self) -> str | None:
        """``server_name`` as text, or ``None`` if it is an IP address or not a valid host name."""
        return None if self.server_name is None else _host_name(self.server_name)


class TooLongError(ValueError):
    """A ClientHello takes more bytes on the wire than a server accepts."""


#: The result if the bytes are not a ClientHello.
NOT_A_CLIENT_HELLO = ClientHello(None, supports_tickets=False)


class ClientHelloReader:
    """Collects the bytes of a TLS client until its ClientHello is complete.

    Invariant: ``_message`` holds the fragments of all complete records before ``_position``.
    """

    def __init__(self) -> None:
        self._wire = bytearray()
        self._position = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> ClientHello | None:
        """Add bytes. Returns the ClientHello when it is complete, and ``None`` until then.

        If the bytes cannot become a ClientHello, returns ``NOT_A_CLIENT_HELLO``. Raises
        ``TooLongError`` if the message is split into so many records that it exceeds 256 KiB.
        """
        self._wire += data
        try:
            while (fragment := self._next_fragment()) is not None:
                self._message += fragment
                hello = self._complete_hello()
                if hello is not None:
                    return hello
        except ValueError:
            return NOT_A_CLIENT_HELLO
        if len(self._wire) > _MAX_WIRE:
            raise TooLongError("the ClientHello takes more than 256 KiB")
        return None

    def wire(self) -> bytes:
        """Return all bytes that were fed so far."""
        return bytes(self._wire)

    def _next_fragment(self) -> bytes | None:
        """Return the content of the next record, or ``None`` until it is complete."""
        header = self._wire[self._position : self._position + 5]
        if header and header[0] != _HANDSHAKE:
            raise ValueError("not a handshake record")
        if len(header) < 5:
            return None
        size = int.from_bytes(header[3:], "big")
        if header[1] != 3 or size > _MAX_FRAGMENT:
            raise ValueError("not a TLS record")
        start = self._position + 5
        if len(self._wire) < start + size:
            return None
        self._position = start + size
        return bytes(self._wire[start : self._position])

    def _complete_hello(self) -> ClientHello | None:
        message = self._message
        if message and message[0] != _CLIENT_HELLO:
            raise ValueError("not a ClientHello")
        if len(message) < 4:
            return None
        end = 4 + int.from_bytes(message[1:4], "big")
        if end > _MAX_MESSAGE:
            raise ValueError("too long for a ClientHello")
        return parse_client_hello(bytes(message[4:end])) if len(message) >= end else None


def parse_client_hello(body: bytes) -> ClientHello:
    """Parse a ClientHello, without its message header. Raises ``ValueError`` if it is malformed."""
    at = 2 + 32  # legacy_version, random
    for width in (1, 2, 1):  # legacy_session_id, cipher_suites, legacy_compression_methods
        start = at + width
        at = start + int.from_bytes(body[at:start], "big")
    if at > len(body):
        raise ValueError("a field is cut short")
    name, supports_tickets = None, False
    if at < len(body):  # a TLS 1.2 client may have no extensions
        extensions = _extensions(body, at)
        if _SERVER_NAME in extensions:
            name = _first_name(extensions[_SERVER_NAME])
        supports_tickets = _SESSION_TICKET in extensions
        if _SUPPORTED_VERSIONS in extensions:
            versions = extensions[_SUPPORTED_VERSIONS]
            start, end = _vector(versions, 0, 1)
            supports_tickets |= _TLS_1_3 in [versions[i : i + 2] for i in range(start, end, 2)]
    return ClientHello(name, supports_tickets)


def _extensions(body: bytes, at: int) -> dict[int, bytes]:
    """Return the data of each extension, by type. The extensions end where ``body`` ends."""
    at, end = _vector(body, at, 2)
    if end != len(body):
        raise ValueError("bytes follow the extensions")
    found: dict[int, bytes] = {}
    while at < end:
        start = at + 4
        if start > end:
            raise ValueError("an extension is cut short")
        kind = (body[at] << 8) + body[at + 1]
        at = start + (body[at + 2] << 8) + body[at + 3]
        if at > end:
            raise ValueError("an extension is cut short")
        if kind in found:
            raise ValueError("an extension occurs twice")
        found[kind] = body[start:at]
    return found


def _first_name(extension: bytes) -> bytes:
    """Return the name in an SNI extension. Like OpenSSL, require exactly one name."""
    at, end = _vector(extension, 0, 2)
    # The only name type is 0, host_name.
    if end != len(extension) or at == end or extension[at] != 0:
        raise ValueError("not a list of host names")
    start, end = _vector(extension, at + 1, 2)
    if end != len(extension) or start == end:
        raise ValueError("not exactly one name")
    return extension[start:end]


def _vector(data: bytes, at: int, width: int) -> tuple[int, int]:
    """Return the start and the end of a vector. The ``width`` bytes before it are its length."""
    start = at + width
    end = start + int.from_bytes(data[at:start], "big")
    if end > len(data):  # this also catches a length that is itself cut short
        raise ValueError("a field is cut short")
    return start, end


def _host_name(name: bytes) -> str | None:
    if not _HOST_NAME.match(name):
        return None
    text = name.decode("ascii")
    # RFC 6066, section 3, does not permit IP addresses. (_HOST_NAME already excludes IPv6.)
    return None if _is_ipv4(text.removesuffix(".")) else text


def _is_ipv4(text: str) -> bool:
    # Most names fail this test, which is cheaper than IPv4Address.
    if not text.replace(".", "").isdecimal():
        return False
    try:
        ipaddress.IPv4Address(text)
    except ValueError:
        return False
    return True
