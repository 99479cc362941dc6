"""Binary socket addresses (``struct sockaddr_in``, ``sockaddr_in6``), in the two common layouts.

On BSD and macOS, the first byte is the length and the second byte is the family. On Linux and
Windows, the first two bytes are the family, in host byte order. The port follows (2 bytes, network
order). Next, an IPv4 sockaddr has the address itself (4 bytes) and zeros (8), and an IPv6 sockaddr
has the flow label (4), the address itself (16) and the scope (4, host order). Each system has its
own number for the IPv6 family.
"""

from __future__ import annotations

import ipaddress
import socket
import sys
from typing import TypedDict

from .._address import Address, UnixAddress, zone_name

_SIZE_IPV4 = 16
_SIZE_IPV6 = 28
_HAS_LENGTH = sys.platform == "darwin" or "bsd" in sys.platform

# The number of the IPv6 family in each layout. The layout of this system has this system's number.
# The other layout has the number of its best known system (Darwin or Linux).
_AF_INET6_WITH_LENGTH = socket.AF_INET6 if _HAS_LENGTH else 30  # Darwin's
_AF_INET6_WITHOUT_LENGTH = 10 if _HAS_LENGTH else socket.AF_INET6  # Linux's


class ParsedAddress(TypedDict):
    """The result of ``hs.socket.parseAddress``. ``addressFamily`` is the number in the sockaddr."""

    host: str
    port: int
    addressFamily: int


def parse_sockaddr(data: bytes) -> ParsedAddress | None:
    """Parse an IPv4 or IPv6 address. Return ``None`` for other data."""
    size = len(data)
    if size not in (_SIZE_IPV4, _SIZE_IPV6):
        return None
    if data[0] == size:
        family, family_of_ipv6 = data[1], _AF_INET6_WITH_LENGTH
    else:
        family = int.from_bytes(data[:2], sys.byteorder)
        family_of_ipv6 = _AF_INET6_WITHOUT_LENGTH
    port = int.from_bytes(data[2:4], "big")
    if size == _SIZE_IPV4 and family == socket.AF_INET:
        host = socket.inet_ntop(socket.AF_INET, data[4:8])
    elif size == _SIZE_IPV6 and family == family_of_ipv6:
        host = socket.inet_ntop(socket.AF_INET6, data[8:24])
        scope = int.from_bytes(data[24:28], sys.byteorder)
        if scope:
            host = f"{host}%{zone_name(scope)}"
    else:
        return None
    return {"host": host, "port": port, "addressFamily": family}


def pack_sockaddr(address: Address) -> bytes:
    """Return an IPv4 or IPv6 address in this system's layout, or ``b""`` for other addresses."""
    if isinstance(address, UnixAddress):  # a Unix path may look like an IP address
        return b""
    host, _, zone = address.host.partition("%")
    try:
        ip = ipaddress.ip_address(host)
    except ValueError:
        return b""
    port = address.port.to_bytes(2, "big")
    if ip.version == 4:
        return _head(_SIZE_IPV4, socket.AF_INET) + port + ip.packed + bytes(8)
    return (
        _head(_SIZE_IPV6, socket.AF_INET6)
        + port
        + bytes(4)
        + ip.packed
        + _scope(zone).to_bytes(4, sys.byteorder)
    )


def _scope(zone: str) -> int:
    if not zone or zone.isdecimal():
        return int(zone or 0)
    try:
        return socket.if_nametoindex(zone)
    except OSError:  # raised if the interface no longer exists
        return 0


def _head(size: int, family: int) -> bytes:
    return bytes([size, family]) if _HAS_LENGTH else family.to_bytes(2, sys.byteorder)
