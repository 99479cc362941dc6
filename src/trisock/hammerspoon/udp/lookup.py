"""The addresses of a host."""

from __future__ import annotations

import ipaddress
import socket

import trio

from ..._address import address_from_sockaddr, format_host_port, to_ascii_host, with_message


def known_hosts(host: str) -> list[str] | None:
    """Return the addresses of a host that needs no lookup: an address or ``localhost``.

    Returns ``None`` for other hosts. As in hs.socket.udp, the IPv4 address of ``localhost`` comes
    first. Source: RFC 6761, section 6.3 (``localhost`` needs no lookup).
    """
    if host.lower() == "localhost":
        return ["127.0.0.1", "::1"]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return None
    return [host]


async def look_up(host: str, port: int) -> list[str]:
    """Return the addresses of a host, in the order of the system. The port is for error messages.

    Raises ``OSError`` if the lookup fails, and ``ValueError`` if the name is invalid.
    """
    name = to_ascii_host(host)
    try:
        found = await trio.socket.getaddrinfo(name.encode(), port, type=socket.SOCK_DGRAM)
    except OSError as exc:
        raise with_message(exc, f"cannot look up {format_host_port(host, port)}") from exc
    return [address_from_sockaddr(family, sockaddr).host for family, _, _, _, sockaddr in found]
