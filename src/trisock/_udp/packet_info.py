"""Packet info: the local address of a datagram, reported by the kernel or chosen by us.

``recvmsg`` and ``sendmsg`` pass it as ancillary data (RFC 3542, section 6; ip(7), IP_PKTINFO). This
module builds and parses the ancillary data, and does no I/O.

An AF_INET6 socket that also supports IPv4 uses the IPv6 structure for both families, with
IPv4-mapped addresses.
"""

from __future__ import annotations

import socket
import struct
import sys
from collections.abc import Iterable

from .._address import zone_name

# Some of these constants are in ``socket`` only since Python 3.12 or 3.14, or only on one system. 0
# means that this system gives us no packet info. (Windows has no recvmsg.)
if sys.platform == "linux":
    IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO = 8, 49, 50
elif sys.platform == "darwin":  # pragma: no cover (tests run on Linux)
    IP_PKTINFO, IPV6_RECVPKTINFO, IPV6_PKTINFO = 26, 61, 46
else:  # pragma: no cover (tests run on Linux)
    IP_PKTINFO = IPV6_RECVPKTINFO = IPV6_PKTINFO = 0

# struct in_pktinfo: the interface, the local address (the source of a sent datagram), and the
# destination in the header of a received datagram.
_IN_PKTINFO = struct.Struct("@I4s4s")

# struct in6_pktinfo: the address and the interface.
_IN6_PKTINFO = struct.Struct("@16sI")

MAPPED_PREFIX = bytes(10) + b"\xff\xff"

AncillaryItem = tuple[int, int, bytes]


def needs_zone(packed: bytes) -> bool:
    """Return whether an IPv6 address is meaningful on only one interface (RFC 4007, section 6).

    These are the link-local addresses, and the groups whose scope is an interface or a link.
    """
    if packed[0] == 0xFF:
        return packed[1] & 0x0F in (1, 2)
    return packed[0] == 0xFE and packed[1] & 0xC0 == 0x80


def destination_host(items: Iterable[AncillaryItem]) -> str | None:
    """Return the host that a datagram was sent to, or ``None`` if the ancillary data lacks it."""
    for level, kind, data in items:
        if level == socket.IPPROTO_IPV6 and kind == IPV6_PKTINFO:
            if len(data) >= _IN6_PKTINFO.size:
                return _ipv6_host(*_IN6_PKTINFO.unpack_from(data))
        elif level == socket.IPPROTO_IP and kind == IP_PKTINFO and len(data) >= _IN_PKTINFO.size:
            return socket.inet_ntop(socket.AF_INET, _IN_PKTINFO.unpack_from(data)[2])
    return None


def _ipv6_host(packed: bytes, interface: int) -> str:
    if packed.startswith(MAPPED_PREFIX):
        return socket.inet_ntop(socket.AF_INET, packed[12:])
    host = socket.inet_ntop(socket.AF_INET6, packed)
    return f"{host}%{zone_name(interface)}" if interface and needs_zone(packed) else host


def source_item(family: int, packed: bytes, interface: int = 0) -> AncillaryItem:
    """Return the ancillary data that makes the kernel send from an address.

    Args:
      family: the family of the socket.
      packed: the address in network byte order, with 4 or 16 bytes as the family requires.
      interface: the number of the interface, if the address needs one. 0: any interface that has
        the address.
    """
    if family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, IPV6_PKTINFO, _IN6_PKTINFO.pack(packed, interface)
    return socket.IPPROTO_IP, IP_PKTINFO, _IN_PKTINFO.pack(0, packed, bytes(4))
