"""Binary socket addresses (``struct sockaddr_in``, ``sockaddr_in6``), in the layouts that are seen.

BSD's (and macOS's) begins with a byte for the length and one for the family; Linux's and Windows'
with two for the family, in the machine's byte order. After those: the port (2 bytes, network
order), then for IPv4 the address (4) and zeros (8), for IPv6 the flow label (4), the address (16)
and the scope (4, machine's order). The number of IPv6's family is each system's own.
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

# The families of IPv6 in the two layouts: this system's own in its own layout, and the best known
# other system's in the other.
_AF_INET6_WITH_LENGTH = socket.AF_INET6 if _HAS_LENGTH else 30  # Darwin's
_AF_INET6_WITHOUT_LENGTH = 10 if _HAS_LENGTH else socket.AF_INET6  # Linux's


class ParsedAddress(TypedDict):
    """What ``hs.socket.parseAddress`` returns; the family is the number that is in the sockaddr."""

    host: str
    port: int
    addressFamily: int


def parse_sockaddr(data: bytes) -> ParsedAddress | None:
    """Read an address of IPv4 or IPv6; ``None`` for anything else."""
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
    """Return an address in this system's layout; ``b""`` if it is not one of IPv4 or IPv6."""
    if isinstance(address, UnixAddress):  # its path may look like an IP address
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
    except OSError:  # the interface has gone away since
        return 0


def _head(size: int, family: int) -> bytes:
    return bytes([size, family]) if _HAS_LENGTH else family.to_bytes(2, sys.byteorder)
