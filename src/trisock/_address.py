"""Convert addresses and host names to the forms that the kernel, users, DNS and TLS expect."""

from __future__ import annotations

import errno
import ipaddress
import os
import re
import socket
from collections.abc import Sequence
from typing import NamedTuple

import idna

from ._arguments import MAX_QUOTED_LABEL, quoted
from ._text import printable

_FIRST_UNPRIVILEGED_PORT = 1024

_MAX_NAME = 253  # characters of a DNS name without its final dot (RFC 1035, section 2.3.4)

# ASCII names that a resolver can look up or a certificate can contain. Ports, brackets, URLs, user
# names and wildcards are not part of a host name.
_ASCII_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")

# An interface name has at most 15 characters and no colon, slash or white space (Linux: IFNAMSIZ
# and dev_valid_name). The pattern also matches the number of an interface.
_ZONE = re.compile(r"[A-Za-z0-9!#$&()*+,.;<=>?@^_`{|}~-]{1,15}")

# Paths that need no quotes, because they cannot be mistaken for anything else.
_PLAIN_PATH = re.compile(r"/[A-Za-z0-9._/@+~-]*")


class Address(NamedTuple):
    """The address of one end of a connection.

    Attributes:
      host: an IPv4 or IPv6 address as text. An IPv4-mapped IPv6 address is shown as IPv4. An IPv6
        zone is kept (``fe80::1%eth0``), because ``connect`` needs it. For a Unix socket, ``host``
        is the socket's path, or ``""`` if the socket is unnamed.
      port: the port, or 0 for a Unix socket.

    A Unix peer chooses its own path, which may look like an IP address. The port of a TCP
    connection is never 0, so ``address.port == 0`` identifies a Unix socket.

    ``str(address)`` is one line that is safe to log. Unprintable characters are escaped, and an
    unusual path is quoted (``unix:'127.0.0.1:80'``), so that no path looks like a host and a port.
    ``host`` itself is not escaped.
    """

    host: str
    port: int

    def __str__(self) -> str:
        if is_unix_address(self):
            return format_unix_path(self.host)
        return format_host_port(self.host, self.port)


class UnixAddress(Address):
    """The address of a Unix socket.

    This class distinguishes a Unix address from a TCP address, because a Unix path may look like an
    IP address.
    """

    __slots__ = ()

    def __str__(self) -> str:
        return format_unix_path(self.host)


def is_unix_address(address: Address) -> bool:
    """Return whether this is the address of a Unix socket."""
    return isinstance(address, UnixAddress) or (address.port == 0 and not _is_ip(address.host))


def format_unix_path(path: str | bytes) -> str:
    """Format a path for a log or an error, so that the path cannot be mistaken for ``host:port``.

    A path is returned unchanged if it starts with a slash and has only ordinary characters.
    """
    path = os.fsdecode(path)
    if not path:
        return "an unnamed Unix socket"
    return path if _PLAIN_PATH.fullmatch(path) else f"unix:{path!r}"


def format_host_port(host: str, port: int) -> str:
    """Format ``host:port``, with brackets around an IPv6 address (RFC 3986, section 3.2.2)."""
    if (
        len(host) > MAX_QUOTED_LABEL
        and not _is_ip(host)
        and max(map(len, host.split("."))) > MAX_QUOTED_LABEL
    ):
        return f"<a host name of {len(host)} characters>:{port}"
    host = printable(host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def address_from_sockaddr(family: int, sockaddr: object) -> Address:
    """Convert a sockaddr from ``getpeername``, ``getsockname`` or ``accept`` to an Address."""
    if isinstance(sockaddr, (str, bytes)):  # AF_UNIX (bytes: an abstract name, on Linux)
        return UnixAddress(os.fsdecode(sockaddr), 0)
    if not isinstance(sockaddr, tuple) or len(sockaddr) < 2:
        raise ValueError(f"not an address of a stream socket: {quoted(sockaddr)}")
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
    """Return the interface name for an IPv6 scope id.

    Returns the id as text if there is no such interface, or if the name has unusual characters.
    """
    try:
        name = socket.if_indextoname(scope_id)
    except OSError:  # the interface no longer exists
        return str(scope_id)
    return name if _ZONE.fullmatch(name) else str(scope_id)


def _is_ip(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def to_ascii_host(host: str) -> str:
    """Convert a host to the ASCII form that DNS and TLS use.

    An IP address is returned unchanged. A name with non-ASCII characters is mapped by UTS 46, and
    each label is converted to its A-label (RFC 5890). ASCII names are returned unchanged, even
    names such as ``my_service``, which IDNA rejects but people use.

    Raises ``TypeError`` if the host is not a ``str``, and ``ValueError`` if the name is invalid.
    """
    if not isinstance(host, str):
        raise TypeError(f"a host must be a str, not {quoted(host)}")
    if _is_ip(host):
        _check_zone(host)
        return host
    name = host
    # Do not map a name that is too long. The mapped name would also be too long, unless the mapping
    # removed many characters. (The mapping removes only a few kinds of characters, such as the soft
    # hyphen.)
    if not host.isascii() and len(host) <= _MAX_NAME + 1:
        try:
            mapped = idna.uts46_remap(host, std3_rules=False, transitional=False)
            name = ".".join(
                label if label.isascii() else idna.alabel(label).decode("ascii")
                for label in mapped.split(".")
            )
        except UnicodeError:  # idna.IDNAError. Its message quotes the host, which may be a secret.
            raise ValueError(f"{quoted(host)} is not a host name") from None
    bare = name.removesuffix(".")
    if (
        _ASCII_NAME.fullmatch(name) is None
        or len(bare) > _MAX_NAME
        or any(len(label) > 63 for label in bare.split("."))
    ):
        raise ValueError(f"{quoted(host)} is not a host name{_hint(host)}")
    return name


def _check_zone(host: str) -> None:
    _, percent, zone = host.partition("%")
    if percent and not _ZONE.fullmatch(zone):
        raise ValueError(f"{quoted(host)} is not a host name: the zone after the % is invalid")


def _hint(host: str) -> str:
    """Return advice for a common mistake, or ``""``."""
    if "://" in host or "/" in host:
        return ": give the host alone, without the other parts of a URL"
    if "@" in host:
        return ": give the host alone, without a user name"
    if "*" in host:
        return ": wildcards are only for certificates"
    if host.startswith("[") and host.endswith("]"):
        return ": give an IPv6 address without brackets"
    if ":" in host:
        return ": give the host alone, without a port"
    return ""


def to_tls_name(host: str) -> str:
    """Convert a host to the name that the certificate must match.

    The name is the host's ASCII form without a trailing dot (RFC 6066, section 3) and without an
    IPv6 zone, which is meaningful only on this machine.

    Raises the errors of ``to_ascii_host``. Also raises ``ValueError`` for an abbreviated IPv4
    address (``127.1``): resolvers accept such an address, but no certificate can match it.
    """
    ascii_host = to_ascii_host(host)
    if _is_ip(ascii_host):
        return ascii_host.partition("%")[0]
    if re.fullmatch(r"[0-9]+(\.[0-9]+)+\.?", ascii_host):
        raise ValueError(f"{quoted(host)} is not a host name, and not a complete IPv4 address")
    return ascii_host.removesuffix(".")


def check_port(port: object, host: str | None) -> None:
    """Raise ``TypeError`` or ``ValueError`` unless the port is valid.

    The error message includes ``host``, unless ``host`` is ``None``.
    """
    where = "" if host is None else f" (host {quoted(host)})"
    if not isinstance(port, int) or isinstance(port, bool):
        raise TypeError(f"a port must be an int, not {quoted(port)}{where}")
    if not 0 <= port <= 65535:
        raise ValueError(f"a port must be in 0-65535, not {quoted(port)}{where}")


def with_message(cause: OSError, message: str, advice: str = "") -> OSError:
    """Return an ``OSError`` with a new message, and with the errno and the class of ``cause``.

    ``advice``: what to do, or a fact that the system's error text omits.
    """
    if isinstance(cause, socket.gaierror):
        return socket.gaierror(cause.errno, f"{message}: {cause.strerror}")
    if cause.errno is None:
        return OSError(f"{message}: {cause}")
    more = f" ({advice})" if advice else ""
    return OSError(cause.errno, f"{message}: {os.strerror(cause.errno)}{more}")


def advice_for_bind(exc: OSError, port: int) -> str:
    """Return advice that the system's text for a failed bind(2) lacks, or ``""``."""
    if exc.errno == errno.EADDRNOTAVAIL:
        return "it is not an address of this machine"
    if exc.errno == errno.EACCES and 0 < port < _FIRST_UNPRIVILEGED_PORT:
        return f"a port below {_FIRST_UNPRIVILEGED_PORT} needs privileges"
    return ""


def same_errno(errors: Sequence[BaseException]) -> int | None:
    """Return the errno that all of the errors share, or ``None`` if they differ."""
    errnos = {exc.errno if isinstance(exc, OSError) else None for exc in errors}
    return errnos.pop() if len(errnos) == 1 else None
