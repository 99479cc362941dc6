"""The first message of a TLS client, read before OpenSSL sees it (RFC 8446, section 4.1.2).

A server chooses its context by what the client says first: the name that it asks for (SNI, RFC
6066, section 3), and whether it can resume a session by a ticket. No I/O happens here, and nothing
is decided about the handshake. What is not a well-formed ClientHello is left for OpenSSL, which
sends the right alert.

The cost is linear in the bytes that were fed, however they are split.
"""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

# OpenSSL takes 131396 bytes at most.
_MAX_MESSAGE = 128 * 1024

# With the headers of its records: a client may put one byte into each.
_MAX_WIRE = 2 * _MAX_MESSAGE

_MAX_FRAGMENT = 16384  # RFC 8446, section 5.1
_HANDSHAKE = 22  # the type of a record
_CLIENT_HELLO = 1  # the type of a message in it

# Types of extensions.
_SERVER_NAME = 0
_SESSION_TICKET = 35
_SUPPORTED_VERSIONS = 43

_TLS_1_3 = b"\x03\x04"

# Letters, digits and hyphens (RFC 1123, section 2.1), and the underscore, which is in use.
_HOST_NAME = re.compile(rb"(?=.{1,254}\Z)[A-Za-z0-9_-]{1,63}(?:\.[A-Za-z0-9_-]{1,63})*\.?\Z")


@dataclass(frozen=True)
class ClientHello:
    """What a server wants to know of a ClientHello before it chooses a context.

    Attributes:
      server_name: what the client asks for, as sent, whether it is a name or not.
      takes_tickets: whether the client keeps its session in a ticket, so that the server
        need not remember it: TLS 1.3, or the extension of RFC 5077.
    """

    server_name: bytes | None
    takes_tickets: bool

    @property
    def host_name(self) -> str | None:
        """``server_name`` as text; ``None`` if no host can have it, or it is an IP address."""
        return None if self.server_name is None else _host_name(self.server_name)


#: All that is known of what is not a ClientHello.
NOT_A_CLIENT_HELLO = ClientHello(None, takes_tickets=False)


class ClientHelloReader:
    """Collects the bytes of a TLS client until its ClientHello is whole.

    Invariant: ``_message`` holds the fragments of all whole records before ``_position``.
    """

    def __init__(self) -> None:
        self._wire = bytearray()
        self._position = 0
        self._message = bytearray()

    def feed(self, data: bytes) -> ClientHello | None:
        """Take more bytes; return the hello once it is whole, or cannot become one."""
        self._wire += data
        try:
            while (fragment := self._next_fragment()) is not None:
                self._message += fragment
                hello = self._whole_hello()
                if hello is not None:
                    return hello
        except ValueError:
            return NOT_A_CLIENT_HELLO
        return NOT_A_CLIENT_HELLO if len(self._wire) > _MAX_WIRE else None

    def wire(self) -> bytes:
        """Return all bytes that were fed."""
        return bytes(self._wire)

    def _next_fragment(self) -> bytes | None:
        """Return what the next record holds; ``None`` until it is whole."""
        header = self._wire[self._position : self._position + 5]
        if header and header[0] != _HANDSHAKE:
            raise ValueError("not a record of a handshake")
        if len(header) < 5:
            return None
        size = int.from_bytes(header[3:], "big")
        if header[1] != 3 or size > _MAX_FRAGMENT:
            raise ValueError("not a record of TLS")
        start = self._position + 5
        if len(self._wire) < start + size:
            return None
        self._position = start + size
        return bytes(self._wire[start : self._position])

    def _whole_hello(self) -> ClientHello | None:
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
    """Read a ClientHello, without the header of its message; ``ValueError`` if it is none."""
    fields = _Fields(body)
    fields.take(2 + 32)  # legacy_version, random
    fields.vector(1)  # legacy_session_id
    fields.vector(2)  # cipher_suites
    fields.vector(1)  # legacy_compression_methods
    extensions: dict[int, bytes] = {}
    if fields:  # a client of TLS 1.2 need not have any
        listed = _Fields(fields.vector(2))
        while listed:
            kind = int.from_bytes(listed.take(2), "big")
            if kind in extensions:
                raise ValueError("an extension comes twice")
            extensions[kind] = listed.vector(2)
    if fields:
        raise ValueError("bytes follow the extensions")
    name = None
    if _SERVER_NAME in extensions:
        name = _first_name(extensions[_SERVER_NAME])
    takes_tickets = _SESSION_TICKET in extensions
    if _SUPPORTED_VERSIONS in extensions:
        versions = _Fields(extensions[_SUPPORTED_VERSIONS]).vector(1)
        takes_tickets |= any(versions[at : at + 2] == _TLS_1_3 for at in range(0, len(versions), 2))
    return ClientHello(name, takes_tickets)


def _first_name(extension: bytes) -> bytes:
    """Return the name in an extension of SNI. There is one, and OpenSSL takes no other either."""
    whole = _Fields(extension)
    names = _Fields(whole.vector(2))
    if whole or names.take(1) != b"\0":  # the type of a name: there is no other than host_name
        raise ValueError("not a list of host names")
    name = names.vector(2)
    if names or not name:
        raise ValueError("not one name")
    return name


def _host_name(name: bytes) -> str | None:
    if not _HOST_NAME.match(name):
        return None
    text = name.decode("ascii")
    try:
        ipaddress.ip_address(text.removesuffix("."))
    except ValueError:
        return text
    return None  # RFC 6066, section 3: literal addresses are not permitted


class _Fields:
    """Reads fields one after the other; ``ValueError`` where one is cut short."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def __bool__(self) -> bool:
        return self._position < len(self._data)

    def take(self, size: int) -> bytes:
        end = self._position + size
        if end > len(self._data):
            raise ValueError("a field is cut short")
        taken = self._data[self._position : end]
        self._position = end
        return taken

    def vector(self, length_size: int) -> bytes:
        """Return what comes after its own length."""
        return self.take(int.from_bytes(self.take(length_size), "big"))
