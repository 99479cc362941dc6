"""Addresses: what the kernel calls them, what users see, what TLS needs."""

from __future__ import annotations

import ipaddress
import os
import socket
from collections.abc import Sequence
from typing import NamedTuple

import idna

_MAX_NAME = 253  # characters of a DNS name without its final dot (RFC 1035, section 2.3.4)


class Address(NamedTuple):
    """One end of a connection.

    Attributes:
      host: an IPv4 or IPv6 address in text; an IPv4-mapped IPv6 address is
          shown as IPv4, an IPv6 zone stays (``fe80::1%eth0``), so that it can be
          given to ``connect`` again. For Unix sockets the path (``""`` for the
          unnamed end of a connection).
      port: the port, 0 for Unix sockets.
    """

    host: str
    port: int

    def __str__(self) -> str:
        if self.port == 0 and not _is_ip(self.host):
            return self.host or "an unnamed Unix socket"
        return format_host_port(self.host, self.port)


def format_host_port(host: str, port: int) -> str:
    """``host:port``, with brackets around an IPv6 address (RFC 3986, section 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_from_sockaddr(family: int, sockaddr: object) -> Address:
    """Turn what ``getpeername``, ``getsockname`` or ``accept`` gave into an Address."""
    if isinstance(sockaddr, (str, bytes)):  # AF_UNIX; bytes is Linux's abstract namespace
        return Address(os.fsdecode(sockaddr), 0)
    if not isinstance(sockaddr, tuple) or len(sockaddr) < 2:
        raise ValueError(f"not an address of a stream socket: {sockaddr!r}")
    host, port = sockaddr[0], sockaddr[1]
    if family == socket.AF_INET6:
        scope_id = sockaddr[3] if len(sockaddr) > 3 else 0
        return Address(_ipv6_text(host, scope_id), port)
    return Address(host, port)


def _ipv6_text(host: str, scope_id: int) -> str:
    bare = host.partition("%")[0]
    mapped = ipaddress.IPv6Address(bare).ipv4_mapped
    if mapped is not None:
        return str(mapped)
    return f"{bare}%{zone_name(scope_id)}" if scope_id else bare


def zone_name(scope_id: int) -> str:
    """Return the name of an IPv6 zone, or its number in text where there is none."""
    try:
        return socket.if_indextoname(scope_id)
    except OSError:  # the interface has gone away since
        return str(scope_id)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def to_ascii_host(host: str) -> str:
    """Turn a host into the one ASCII form that is resolved, sent as SNI and verified.

    An IP address stays as it is. A name with other than ASCII characters is
    mapped by UTS 46 and each label turned into its A-label (RFC 5890). ASCII
    names pass unchanged, also those that IDNA would refuse but that exist
    (``my_service``).

    Raises ``TypeError`` where it is no ``str``, ``ValueError`` where it can be no host name.
    """
    if not isinstance(host, str):
        raise TypeError(f"a host is a str, not {host!r}")
    if _is_ip(host):
        return host
    name = host
    if not host.isascii():
        try:
            mapped = idna.uts46_remap(host, std3_rules=False, transitional=False)
            name = ".".join(
                label if label.isascii() else idna.alabel(label).decode("ascii")
                for label in mapped.split(".")
            )
        except idna.IDNAError as exc:
            raise ValueError(f"{host!r} is not a host name: {exc}") from None
    bare = name.removesuffix(".")
    if (
        len(bare) > _MAX_NAME
        or any(not 0 < len(label) <= 63 for label in bare.split("."))
        or any(char <= " " or char == "\x7f" for char in bare)
    ):
        raise ValueError(f"{host!r} is not a host name")
    return name


def to_tls_name(host: str) -> str:
    """Turn a host into the name that a certificate is checked against.

    The ASCII form of it, without the final dot (RFC 6066, section 3: "without a
    trailing dot") and without an IPv6 zone, which has a meaning on this machine only.
    """
    ascii_host = to_ascii_host(host)
    if _is_ip(ascii_host):
        return ascii_host.partition("%")[0]
    return ascii_host.removesuffix(".")


def check_port(port: object, host: str | None) -> int:
    """Return the port if it can be one; ``TypeError`` or ``ValueError`` that names the address."""
    where = "" if host is None else f" (host {host!r})"
    if not isinstance(port, int) or isinstance(port, bool):
        raise TypeError(f"a port is an int, not {port!r}{where}")
    if not 0 <= port <= 65535:
        raise ValueError(f"a port is in 0-65535, not {port}{where}")
    return port


def oserror(cause: OSError, message: str) -> OSError:
    """Make an ``OSError`` of the same errno (and so the same subclass) that says more."""
    if isinstance(cause, socket.gaierror):
        return socket.gaierror(cause.errno, f"{message}: {cause.strerror}")
    if cause.errno is None:
        return OSError(f"{message}: {cause}")
    return OSError(cause.errno, f"{message}: {os.strerror(cause.errno)}")


def same_errno(errors: Sequence[BaseException]) -> int | None:
    """Return the errno that all of the errors have, or ``None``."""
    errnos = {exc.errno if isinstance(exc, OSError) else None for exc in errors}
    return errnos.pop() if len(errnos) == 1 else None
