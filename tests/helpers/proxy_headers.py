"""PROXY headers, built by hand from the specification, and the PyPI package that also reads them.

The specification is https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt
"""

from __future__ import annotations

import socket
import struct

from crc32c import crc32c
from proxyprotocol.v1 import ProxyProtocolV1
from proxyprotocol.v2 import ProxyProtocolV2

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"
LOCAL, PROXY = 0x20, 0x21
TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM = 0x11, 0x12, 0x21, 0x22, 0x31, 0x32

# 192.0.2.1:50000 has connected to 198.51.100.2:443.
IPV4 = bytes([192, 0, 2, 1, 198, 51, 100, 2]) + struct.pack("!HH", 50000, 443)
IPV6 = (
    socket.inet_pton(socket.AF_INET6, "2001:db8::1")
    + socket.inet_pton(socket.AF_INET6, "2001:db8::2")
    + struct.pack("!HH", 50000, 443)
)
UNIX = b"/run/client".ljust(108, b"\0") + b"/run/server".ljust(108, b"\0")
ENDS = {
    TCP4: IPV4,
    UDP4: IPV4,
    TCP6: IPV6,
    UDP6: IPV6,
    UNIX_STREAM: UNIX,
    UNIX_DATAGRAM: UNIX,
    0: b"",
}

LINE4 = b"PROXY TCP4 192.0.2.1 198.51.100.2 50000 443\r\n"
LINE6 = b"PROXY TCP6 2001:db8::1 2001:db8::2 50000 443\r\n"


def tlv(kind: int, value: bytes) -> bytes:
    return struct.pack("!BH", kind, len(value)) + value


def binary(
    tlvs: bytes = b"", *, command: int = PROXY, family: int = TCP4, ends: bytes | None = None
) -> bytes:
    """Return a header of version 2."""
    rest = (ENDS[family] if ends is None else ends) + tlvs
    return SIGNATURE + struct.pack("!BBH", command, family, len(rest)) + rest


def with_crc(header: bytes) -> bytes:
    """Return a header of version 2 with a checksum at its end."""
    size = struct.unpack_from("!H", header, 14)[0] + 7
    header = header[:14] + struct.pack("!H", size) + header[16:] + tlv(3, bytes(4))
    return header[:-4] + struct.pack("!I", crc32c(header))


SSL = tlv(
    0x20,
    struct.pack("!BI", 1 | 2, 0)
    + tlv(0x21, b"TLSv1.3")
    + tlv(0x22, "J\u00fcrgen".encode())
    + tlv(0x23, b"TLS_AES_256_GCM_SHA384")
    + tlv(0x24, b"ecdsa-with-SHA256")
    + tlv(0x25, b"EC256"),
)

# A valid header of each kind.
VALID = [
    LINE4,
    LINE6,
    b"PROXY TCP6 ::ffff:192.0.2.1 ::ffff:198.51.100.2 0 65535\r\n",
    b"PROXY TCP6 " + b" ".join([b"FFFF:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n",
    b"PROXY UNKNOWN\r\n",
    b"PROXY UNKNOWN " + b" ".join([b"ffff:" * 7 + b"ffff"] * 2) + b" 65535 65535\r\n",
    binary(),
    binary(family=TCP6),
    binary(family=UDP4),
    binary(family=UDP6),
    binary(family=UNIX_STREAM),
    binary(family=UNIX_DATAGRAM),
    binary(family=0),
    binary(command=LOCAL, family=0),
    binary(command=LOCAL),
    binary(command=LOCAL, family=0x11, ends=b""),
    with_crc(binary(command=LOCAL, family=0)),
    with_crc(binary()),
    with_crc(binary(family=TCP6)),
    with_crc(binary(tlv(1, b"h2") + tlv(2, b"example.org") + tlv(5, b"id") + tlv(0x30, b"ns"))),
    binary(tlv(4, b"") + tlv(0xE0, b"own") + tlv(0xE0, b"again") + tlv(0x77, b"\xff")),
    with_crc(binary(SSL + tlv(4, bytes(9)), family=TCP6)),
    binary(tlv(0xE1, bytes(4096 - 16 - 12 - 3))),
]


def refused_by_package(data: bytes) -> bool | None:
    """Return whether the package refuses the header, or ``None`` if it needs more bytes."""
    try:
        if data.startswith(b"PROXY "):
            line, newline, _ = data.partition(b"\n")
            if not newline:
                return None
            ProxyProtocolV1().unpack_line(line + newline)
        elif data.startswith(SIGNATURE[:8]):
            if len(data) < 16:
                return None
            header = ProxyProtocolV2().unpack_header(data[:16])
            if len(data) < 16 + header.data_len:
                return None
            rest = data[16 : 16 + header.data_len]
            ProxyProtocolV2().unpack_data(header, data[:16], rest)
        else:
            return True
    except Exception:  # it has no common class for its errors
        return True
    return False


def fields_of(data: bytes) -> tuple[int, int]:
    """Return two bytes of a version 2 header: command, family and protocol. Otherwise zeros."""
    if data.startswith(SIGNATURE) and len(data) >= 16:
        return data[12], data[13]
    return 0, 0


def places_of(data: bytes, at: int) -> list[tuple[int, int]] | None:
    """Return the type and the offset of the value of each TLV, starting at ``at``.

    Return ``None`` if the data is not a sequence of TLVs.
    """
    end = 16 + struct.unpack_from("!H", data, 14)[0]
    found = []
    while at < end:
        if at + 3 > end:
            return None
        kind, size = struct.unpack_from("!BH", data, at)
        found.append((kind, at + 3))
        at += 3 + size
    return found if at == end else None


def package_errs(data: bytes) -> bool:
    """Return whether the package may refuse this header although it is valid.

    - The package sorts the TLVs by type before it computes the checksum. Section 2.2.3 requires a
      checksum of the bytes as received.
    - The package does not ignore the data after the first 16 bytes of a LOCAL header: it looks for
      a checksum even in addresses and in bytes that are not TLVs.
    - The package supports only ASCII paths.
    """
    command, family = fields_of(data)
    if command not in (LOCAL, PROXY):
        return False
    places = places_of(data, 16 + len(ENDS.get(family, b"")))
    if command == LOCAL and (family != 0 or places is None):
        return True
    if family >> 4 == 3:
        return True
    checksums = [place for kind, place in places or [] if kind == 3]
    if len(checksums) != 1:
        return False
    (at,) = checksums
    header = data[: 16 + struct.unpack_from("!H", data, 14)[0]]
    zeroed = header[:at] + bytes(4) + header[at + 4 :]
    return bool(crc32c(zeroed) == int.from_bytes(header[at : at + 4], "big"))


def haproxy_errs(data: bytes) -> bool:
    """Return whether HAProxy 2.6 may refuse this header although it is valid.

    - HAProxy does not ignore the text after UNKNOWN.
    - A receiver that does not support UDP, Unix sockets or unspecified families must use the
      connection's own addresses (section 2.2). HAProxy looks for TLVs in the wrong place, and
      refuses the header.
    """
    command, family = fields_of(data)
    unsupported = command == PROXY and family in (0, UDP4, UDP6, UNIX_STREAM, UNIX_DATAGRAM)
    return unsupported or data.startswith(b"PROXY UNKNOWN ")


def haproxy_is_lax(data: bytes) -> bool:
    """Return whether HAProxy 2.6 may accept this header although it is malformed.

    - It accepts IPv4 addresses such as ``1.2``, and ports over 65535.
    - It does not verify the checksum of a LOCAL header, nor the encoding of text in TLVs.
    - It accepts headers of more than 4,096 bytes, if its buffer has room for them.
    """
    command, _ = fields_of(data)
    return (
        data.startswith((b"PROXY TCP4 ", b"PROXY TCP6 "))
        or command == LOCAL
        or any(bytes([kind, 0]) in data for kind in (2, 0x20, 0x30))
        or len(data) > 4096
    )
