"""The argument ``where`` of ``listen``, ``bind`` and ``udpserver``: a port, or address and port."""

from __future__ import annotations

import ipaddress
import re

from .blocking import describe


def parse_where(where: int | str) -> tuple[int, str | None]:
    """Return the port, and the local address to listen on. ``None`` means all addresses.

    In a string, the last colon separates the port. As in Pluto, ``":80"`` and ``"[::]:80"`` mean
    all addresses, ``"0.0.0.0:80"`` means all IPv4 addresses, and an IPv6 address needs no brackets.

    Raises ``TypeError`` for other types, and ``ValueError`` for other strings. (Pluto listens on
    all addresses if it does not understand the address.)
    """
    if not isinstance(where, str):
        if not isinstance(where, int) or isinstance(where, bool):
            raise TypeError(f"where to listen must be an int or a str, not {describe(where)}")
        return where, None
    host, colon, port = where.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    try:
        if not colon or re.fullmatch("[0-9]{1,5}", port) is None:
            raise ValueError
        is_any = not host or ipaddress.ip_address(host) == ipaddress.IPv6Address("::")
    except ValueError:
        message = "where to listen must be a port, or an IP address and a port: '1.2.3.4:567'"
        raise ValueError(message) from None
    return int(port), None if is_any else host
