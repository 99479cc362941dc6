"""Multicast groups: join and leave them, and ignore groups that only other sockets joined."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import sys

from .._address import with_message
from .._arguments import quoted
from .._text import printable
from .addresses import ONLY_IPV4, interface_index, pack_host

# By default, a Linux socket receives from all groups that any socket of this machine has joined.
# These options turn that off (ip(7); include/uapi/linux/in6.h). Python has no names for them.
_IP_MULTICAST_ALL = 49
_IPV6_MULTICAST_ALL = 29

# On Windows, the number of an interface is encoded as an address in 0.0.0.0/8 (struct ip_mreq). On
# other systems, the number has a field of its own, after an address (struct ip_mreqn).
_IP_MREQ = struct.Struct("!4sI") if sys.platform == "win32" else struct.Struct("@4s4xi")

# struct ipv6_mreq (RFC 3493, section 5.2).
_IPV6_MREQ = struct.Struct("@16sI")


def only_joined_groups(sock: socket.socket) -> None:
    """Make a socket receive only from groups that it joins itself."""
    if sys.platform == "linux":  # pragma: no branch (tests run on Linux)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_IP, _IP_MULTICAST_ALL, 0)
        if sock.family == socket.AF_INET6:
            with contextlib.suppress(OSError):  # supported since Linux 4.20
                sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_MULTICAST_ALL, 0)


def join(sock: socket.socket, group: str, interface: str | int | None) -> None:
    """Join a group. The arguments and errors are those of ``UDPSocket.join_group``."""
    _change(sock, group, interface, "join", socket.IP_ADD_MEMBERSHIP, socket.IPV6_JOIN_GROUP)


def leave(sock: socket.socket, group: str, interface: str | int | None) -> None:
    """Leave a group. The arguments and errors are those of ``UDPSocket.leave_group``."""
    _change(sock, group, interface, "leave", socket.IP_DROP_MEMBERSHIP, socket.IPV6_LEAVE_GROUP)


def _change(
    sock: socket.socket,
    group: str,
    interface: str | int | None,
    verb: str,
    ipv4_option: int,
    ipv6_option: int,
) -> None:
    """Change the membership of a socket in a group.

    On Linux, the options of IPv4 also work on an AF_INET6 socket that supports both families.
    """
    _check(group, interface)
    where = "" if interface is None else f" on the interface {printable(str(interface))}"
    try:
        found = pack_host(group)
        if found is None or not _is_multicast(found[0]):
            raise ValueError(f"{quoted(group)} is not the address of a multicast group")
        packed, zone = found
        index = zone if interface is None else interface_index(interface)
        if len(packed) == 4:
            sock.setsockopt(socket.IPPROTO_IP, ipv4_option, _IP_MREQ.pack(packed, index))
        elif sock.family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, ipv6_option, _IPV6_MREQ.pack(packed, index))
        else:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
    except OSError as exc:
        advice = ""
        if exc.errno == errno.EAFNOSUPPORT:
            advice = ONLY_IPV4
        elif exc.errno == errno.ENODEV and interface is None and "%" not in group:
            advice = "pass the interface"
        raise with_message(exc, f"cannot {verb} {group}{where}", advice) from exc


def _check(group: object, interface: object) -> None:
    if not isinstance(group, str):
        raise TypeError(f"a group must be a str, not {quoted(group)}")
    if interface is None:
        return
    if isinstance(interface, bool) or not isinstance(interface, (str, int)):
        raise TypeError(f"interface must be a name, a number or None, not {quoted(interface)}")
    if isinstance(interface, int):
        is_possible = 0 < interface < 1 << 31
    else:
        is_possible = interface != "" and "\0" not in interface
    if not is_possible:
        raise ValueError(f"there is no such interface: {quoted(interface)}")


def _is_multicast(packed: bytes) -> bool:
    return packed[0] == 0xFF if len(packed) == 16 else 224 <= packed[0] < 240
