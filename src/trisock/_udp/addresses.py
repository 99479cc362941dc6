"""Convert the addresses of a UDP socket between the forms of the kernel and of users."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from typing import Any, TypeAlias, cast

from .._address import Address, check_port, to_ascii_host, zone_name
from .._arguments import quoted
from .packet_info import MAPPED_PREFIX, needs_zone

SockAddr: TypeAlias = "tuple[str, int] | tuple[str, int, int, int]"

# Interface numbers are C ints. A larger number would not fit into a structure, or would wrap around
# in ``sendto`` and select another interface.
_MAX_INTERFACE = (1 << 31) - 1

#: The advice for the error EAFNOSUPPORT.
ONLY_IPV4 = "this socket has only IPv4"

# Address(host, port) costs three times as much.
_new_address = cast("Callable[[type[Address], object], Address]", tuple.__new__)


def address_from(sockaddr: Any) -> Address:
    """Convert a sockaddr of ``recvmsg`` to an Address. IPv4-mapped addresses become IPv4."""
    if len(sockaddr) == 2:
        return _new_address(Address, sockaddr)
    host, port, _, scope_id = sockaddr
    if host.startswith("::ffff:") and "." in host:  # inet_ntop writes it in this form
        return _new_address(Address, (host[7:], port))
    if scope_id:
        host = f"{host}%{zone_name(scope_id)}"
    return _new_address(Address, (host, port))


def check_address(name: str, address: object) -> tuple[str, int]:
    """Return an address argument as ``(host, port)``. Raises ``TypeError`` or ``ValueError``."""
    if not isinstance(address, tuple) or len(address) != 2:
        raise TypeError(f"{name} must be (host, port), not {quoted(address)}")
    host, port = address
    if type(host) is str and type(port) is int and 0 <= port <= 65535:  # hot path
        return host, port
    if not isinstance(host, str):
        raise TypeError(f"a host must be a str, not {quoted(host)}")
    check_port(port, host)
    return host, port


def pack_host(host: str) -> tuple[bytes, int] | None:
    """Return the packed address of a host and its interface (or 0), or ``None`` for a name.

    Raises ``OSError`` (``ENODEV``) if there is no such interface.
    """
    try:
        return socket.inet_pton(socket.AF_INET, host), 0
    except (OSError, ValueError):  # ValueError: a null character
        pass
    bare, percent, zone = host.partition("%")
    try:
        packed = socket.inet_pton(socket.AF_INET6, bare)
    except (OSError, ValueError):
        return None
    if not percent:
        return packed, 0
    to_ascii_host(host)  # raises ValueError if the zone is invalid
    return packed, interface_index(zone)


def interface_index(interface: str | int) -> int:
    """Return the number of an interface. Raises ``OSError`` (``ENODEV``) if it does not exist."""
    if isinstance(interface, str) and not (interface.isascii() and interface.isdigit()):
        try:
            return socket.if_nametoindex(interface)
        except OSError:
            raise OSError(errno.ENODEV, os.strerror(errno.ENODEV)) from None
    index = int(interface)
    if index > _MAX_INTERFACE:
        raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
    return index


def sockaddr_for(family: int, host: str, port: int) -> SockAddr | None:
    """Return the sockaddr for ``sendto`` on a socket of this family, or ``None`` for a name.

    Raises ``OSError`` if the socket cannot reach addresses of this kind (``EAFNOSUPPORT``), or if
    there is no such interface (``ENODEV``).
    """
    if family == socket.AF_INET:
        try:
            socket.inet_pton(socket.AF_INET, host)
        except (OSError, ValueError):
            pass
        else:
            return host, port
    found = pack_host(host)
    if found is None:
        return None
    packed, interface = found
    if len(packed) == 4:
        return f"::ffff:{host}", port, 0, 0
    if family == socket.AF_INET:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    return host.partition("%")[0], port, 0, interface


def advice_for_broadcast(exc: OSError) -> str:
    """Return advice for the error of a connect or send to a broadcast address, or ``""``."""
    if exc.errno == errno.EACCES:
        return "if this is a broadcast address, enable broadcast on the socket"
    return ""


def pack_for(family: int, host: str) -> tuple[bytes, int] | None:
    """Return the packed address of a host for a socket of this family, and its interface (or 0).

    Returns ``None`` for a name. Raises ``OSError`` as ``sockaddr_for`` does.
    """
    found = pack_host(host)
    if found is None:
        return None
    packed, interface = found
    if len(packed) == 4:
        return (packed if family == socket.AF_INET else MAPPED_PREFIX + packed), 0
    if family == socket.AF_INET:
        raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    return packed, interface if needs_zone(packed) else 0
