"""The SSLRequest of MySQL and MariaDB."""

from __future__ import annotations

import struct

from .conversation import (
    Exactly,
    Names,
    Negotiation,
    Offered,
    Part,
    Refusal,
    Send,
    not_offered,
    unexpected,
)

_SSL, _PROTOCOL_41 = 0x0800, 0x0200

# The client's capabilities: LONG_PASSWORD, LONG_FLAG, PROTOCOL_41, SSL, TRANSACTIONS,
# SECURE_CONNECTION, PLUGIN_AUTH. MySQL uses the flags of the SSLRequest, and ignores those of the
# HandshakeResponse. So we set only the flags that every client needs.
_FLAGS = 0x0001 | 0x0004 | _PROTOCOL_41 | _SSL | 0x2000 | 0x8000 | 0x80000

_MAX_PACKET = 0xFFFFFF
_UTF8MB4 = 45


def mysql_client(names: Names) -> Negotiation:
    """Ask for TLS by an SSLRequest (MySQL's documentation, "Protocol::SSLRequest").

    The greeting is the server's first packet with its header. The caller then sends a
    HandshakeResponse41 with the sequence number 2.
    """
    header, packet = yield from _packet()
    if packet[:1] == b"\xff":
        raise Refusal("the server refused the connection", kind="refused", reply=packet[3:])
    # Version 10, the server's version as text, then a NUL, a thread number (4 bytes), a salt (8), a
    # filler (1), and the lower 16 flags. If the packet continues: charset (1), status (2), upper
    # flags.
    start = packet.find(b"\0") + 14
    if header[3] != 0 or packet[:1] != b"\x0a" or start == 13 or len(packet) < start + 2:
        raise unexpected(packet)
    upper = packet[start + 5 : start + 7]
    flags = int.from_bytes(packet[start : start + 2] + upper, "little")
    if not flags & _SSL or not flags & _PROTOCOL_41:
        raise not_offered()
    yield Offered()
    request = struct.pack("<IIB23x", _FLAGS & flags, _MAX_PACKET, _UTF8MB4)
    yield Send(struct.pack("<I", 1 << 24 | len(request)) + request)
    return header + packet


def _packet() -> Part[tuple[bytes, bytes]]:
    """Return the header (a length, and a sequence number of one byte) and the content."""
    header = yield Exactly(4)
    content = yield Exactly(int.from_bytes(header[:3], "little"))
    return header, content
