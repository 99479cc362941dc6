"""open_udp and connect_udp: open a UDP socket."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import trio

from .._address import advice_for_bind, check_port, format_host_port, to_ascii_host, with_message
from .._arguments import check_bool, quoted
from .addresses import advice_for_broadcast
from .endpoint import is_wildcard
from .groups import only_joined_groups
from .socket import UDPSocket
from .syscalls import request_packet_info

# What ``getaddrinfo`` returns.
_Found: TypeAlias = "Sequence[tuple[int, int, int, str, tuple[Any, ...]]]"

# The errnos for an address that this machine does not have: the family is missing or disabled, or
# the address belongs to another machine. After these errors, we try the next address.
_MISSING = {errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL}


@dataclass(frozen=True)
class _Options:
    """The options of a socket that is about to be bound."""

    reuse_port: bool
    reuse_address: bool
    broadcast: bool

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_bool(name, value)
        if self.reuse_port and not hasattr(socket, "SO_REUSEPORT"):
            raise OSError(errno.EOPNOTSUPP, "there is no SO_REUSEPORT on this platform")

    def set_on(self, sock: socket.socket) -> None:
        if self.reuse_address:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        elif sys.platform == "win32":  # pragma: no cover (tests run on Linux)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
        if self.reuse_port and sys.platform != "win32":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        if self.broadcast:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)


async def open_udp(
    port: int = 0,
    *,
    host: str | None = None,
    reuse_port: bool = False,
    reuse_address: bool = False,
    broadcast: bool = False,
) -> UDPSocket:
    """Open a UDP socket that can receive from anyone and send to anyone.

    ::

        async with await trisock.open_udp(7777) as udp:
            async for datagram in udp:
                with contextlib.suppress(OSError):  # anyone can forge the address
                    await udp.send(datagram.data, datagram.address, source=datagram.destination)

    Args:
      port: 0 to 65535; 0 lets the system choose a free port (see ``UDPSocket.getlocal``).
      host: the local address or name. ``None`` means all addresses of this machine, IPv4 and IPv6,
        on one socket. If ``host`` is a name, the socket is bound to the name's first address that
        belongs to this machine. ``"::"`` is IPv6 only, and ``"0.0.0.0"`` is IPv4 only.
      reuse_port: share the port with other sockets of the same user; the kernel distributes the
        senders among them (``SO_REUSEPORT``).
      reuse_address: share the port with other sockets (``SO_REUSEADDR``). Each socket gets the
        datagrams of its groups and the broadcasts. Programs for mDNS or SSDP need this option. But
        any other program that sets it may receive the unicast datagrams for this socket.
      broadcast: allow sending to broadcast addresses (``SO_BROADCAST``).

    Returns: a ``UDPSocket``.

    Raises:
      OSError: the system refuses this address (``EADDRINUSE``, ``EACCES``, ...). The message
        contains the address.
      TypeError, ValueError: an argument is invalid.

    A cancelled call leaves nothing open.
    """
    name = _check(port, host)
    options = _Options(reuse_port, reuse_address, broadcast)
    if name is None:
        await trio.lowlevel.checkpoint()
        return _open(_all_addresses(), port, host, options)
    try:
        found = await trio.socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)
    except OSError as exc:
        raise with_message(exc, f"cannot open UDP on {format_host_port(str(host), port)}") from exc
    return _open(found, port, host, options)


def open_udp_nowait(
    port: int = 0,
    *,
    host: str | None = None,
    reuse_port: bool = False,
    reuse_address: bool = False,
    broadcast: bool = False,
) -> UDPSocket:
    """Do the same as ``open_udp``, but synchronously. This also works outside Trio.

    Use it to bind a privileged port before the program drops its privileges.

    Args:
      port, reuse_port, reuse_address, broadcast: as in ``open_udp``.
      host: the local address, or ``None``. A name raises ``ValueError``, because a lookup could
        block.

    Returns: a ``UDPSocket``.

    Raises: the same errors as ``open_udp``.
    """
    name = _check(port, host)
    options = _Options(reuse_port, reuse_address, broadcast)
    if name is None:
        return _open(_all_addresses(), port, host, options)
    return _open(_without_look_up("open_udp_nowait", host, name, port), port, host, options)


async def connect_udp(host: str, port: int) -> UDPSocket:
    """Open a UDP socket that has one peer.

    The socket sends to this peer (``await udp.send(data)``), and receives only from this peer. If
    an ICMP error arrives, for example because nothing listens on the port, the next call of
    ``send`` or ``recv`` raises it as an ``OSError``. ``connect_udp`` sends nothing, so its success
    does not mean that the peer exists.

    Args:
      host: a name, which may be internationalized, or an address. If a name has several addresses,
        the first address with a route is used.
      port: 1 to 65535.

    Returns: a ``UDPSocket``.

    Raises:
      OSError: there is no route to the host (``ENETUNREACH``, ...). The message contains the
        address. ``socket.gaierror``: the host is unknown.
      TypeError, ValueError: an argument is invalid.

    A cancelled call leaves nothing open.
    """
    name = _check_peer(host, port)
    where = format_host_port(host, port)
    try:
        found = await trio.socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM)
    except OSError as exc:
        raise with_message(exc, f"cannot connect to {where}") from exc
    failure: OSError | None = None
    for family, _, _, _, sockaddr in found:
        try:
            return _connect(family, sockaddr)
        except OSError as exc:
            failure = failure or exc
    assert failure is not None
    try:
        message, advice = f"cannot connect to {where}", advice_for_broadcast(failure)
        raise with_message(failure, message, advice) from failure
    finally:
        del failure  # the traceback refers to this frame


def connect_udp_nowait(host: str, port: int, *, broadcast: bool = False) -> UDPSocket:
    """Do the same as ``connect_udp``, but synchronously. It may be called outside Trio.

    Args:
      host: an address. A name raises ``ValueError``, because a lookup could block.
      port: 1 to 65535.
      broadcast: allow a broadcast address as the peer (``SO_BROADCAST``).

    Returns and raises the same as ``connect_udp``.
    """
    name = _check_peer(host, port)
    family, _, _, _, sockaddr = _without_look_up("connect_udp_nowait", host, name, port)[0]
    try:
        return _connect(family, sockaddr, broadcast)
    except OSError as exc:
        message = f"cannot connect to {format_host_port(host, port)}"
        raise with_message(exc, message, advice_for_broadcast(exc)) from exc


def _check(port: int, host: str | None) -> bytes | None:
    """Check the arguments, and return the host in the form that the resolver needs."""
    check_port(port, host)
    if host is not None and not isinstance(host, str):
        raise TypeError(f"a host must be a str or None, not {quoted(host)}")
    return None if host is None else to_ascii_host(host).encode()


def _check_peer(host: str, port: int) -> bytes:
    """Check the arguments, and return the host in the form that the resolver needs."""
    name = to_ascii_host(host).encode()
    check_port(port, host)
    if port == 0:
        raise ValueError(f"a peer's port must be in 1-65535, not 0 (host {quoted(host)})")
    return name


def _without_look_up(caller: str, host: str | None, name: bytes, port: int) -> _Found:
    """Return what ``getaddrinfo`` returns for an address. Raises ``ValueError`` for a name.

    ``name`` is the host in the form that the resolver needs.
    """
    try:
        return socket.getaddrinfo(name, port, type=socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        raise ValueError(f"{caller} needs an address, not a name: {quoted(host)}") from None


def _all_addresses() -> _Found:
    """Return the bind targets for all addresses: IPv6 with IPv4, then only IPv4 if that fails."""
    kind = socket.SOCK_DGRAM
    any_ipv6 = (socket.AF_INET6, kind, 0, "", ("::", 0, 0, 0))
    any_ipv4 = (socket.AF_INET, kind, 0, "", ("0.0.0.0", 0))  # noqa: S104
    return [any_ipv6, any_ipv4] if socket.has_ipv6 else [any_ipv4]


def _open(found: _Found, port: int, host: str | None, options: _Options) -> UDPSocket:
    """Bind to the first of the addresses that belongs to this machine."""
    failure: OSError | None = None
    try:
        for family, _, _, _, sockaddr in found:
            try:
                return _bind(family, (sockaddr[0], port, *sockaddr[2:]), host is None, options)
            except OSError as exc:
                failure = exc
                if exc.errno not in _MISSING:
                    break
        assert failure is not None
        where = format_host_port("*" if host is None else host, port)
        advice = advice_for_bind(failure, port)
        raise with_message(failure, f"cannot open UDP on {where}", advice) from failure
    finally:
        del failure  # the traceback refers to this frame


def _bind(family: int, sockaddr: tuple[Any, ...], both: bool, options: _Options) -> UDPSocket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        options.set_on(sock)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0 if both else 1)
        # Do this before the bind: even the first datagram must have packet info, and must not come
        # from a group that only other sockets have joined.
        only_joined_groups(sock)
        if is_wildcard(sockaddr[0]):
            request_packet_info(sock)
        sock.bind(sockaddr)
        return UDPSocket(sock)
    except BaseException:
        sock.close()
        raise


def _connect(family: int, sockaddr: tuple[Any, ...], broadcast: bool = False) -> UDPSocket:
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        if broadcast:  # a connect to a broadcast address needs this
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        sock.connect(sockaddr)
        if sock.getsockname() == sock.getpeername():
            # The system has chosen the peer's port as our own, because the port was free. Try again
            # while this socket occupies the port.
            with sock:
                return _connect(family, sockaddr, broadcast)
        return UDPSocket(sock)
    except BaseException:
        sock.close()
        raise
