"""Half-open clients: those whose TCP handshake with a listening socket is not finished.

They are not in the backlog yet, and ``accept`` does not see them. The kernel lists them. A query by
netlink (sock_diag(7)) reads only what we ask for, and so takes far less time than /proc/net/tcp on
a host with many connections. But a hardened service may be denied netlink.
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from pathlib import Path

# From linux/netlink.h, linux/sock_diag.h and netinet/tcp.h.
_NETLINK_SOCK_DIAG = 4
_SOCK_DIAG_BY_FAMILY = 20
_NLMSG_ERROR = 2
_NLM_F_REQUEST_AND_DUMP = 0x301
_TCP_SYN_RECV = 3

_NLMSGHDR = struct.Struct("=IHHII")  # length, type, flags, sequence number, port id
_INET_DIAG_REQ = struct.Struct("=BBBxI")  # family, protocol, extensions, states
_INET_DIAG_SOCKID = struct.Struct("!HH44x")  # source port, destination port, the rest is 0

# The answer begins with the first matching socket, or is one message that says there is none.
_ANSWER_SIZE = 16384


def may_be_half_open(listening: socket.socket) -> bool:
    """Return whether a client may be in the TCP handshake. True if the system does not tell."""
    port: int = listening.getsockname()[1]
    # A socket for IPv6 may have clients with IPv4.
    families = {listening.family, socket.AF_INET}
    with contextlib.suppress(OSError):
        return any(_query(family, port) for family in families)
    return _is_in_proc(port)


def _query(family: int, port: int) -> bool:
    """Ask by netlink. Raises OSError if the system does not answer."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        raise OSError(errno.EOPNOTSUPP, "only Linux has netlink")
    body = _INET_DIAG_REQ.pack(family, socket.IPPROTO_TCP, 0, 1 << _TCP_SYN_RECV)
    body += _INET_DIAG_SOCKID.pack(port, 0)
    header = _NLMSGHDR.pack(
        _NLMSGHDR.size + len(body), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST_AND_DUMP, 0, 0
    )
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    with socket.socket(socket.AF_NETLINK, kind, _NETLINK_SOCK_DIAG) as netlink:
        netlink.send(header + body)
        answer = netlink.recv(_ANSWER_SIZE)
    message_type: int = _NLMSGHDR.unpack_from(answer)[1]
    if message_type == _NLMSG_ERROR:
        raise OSError(errno.EOPNOTSUPP, "the kernel has no sock_diag for TCP")
    return message_type == _SOCK_DIAG_BY_FAMILY


def _is_in_proc(port: int) -> bool:
    """Look into /proc, which lists all sockets of the host."""
    local_end, state = f":{port:04X}", f"{_TCP_SYN_RECV:02X}"
    try:
        for table in ("/proc/net/tcp", "/proc/net/tcp6"):
            with Path(table).open() as lines:
                for fields in map(str.split, lines):
                    if fields[1].endswith(local_end) and fields[3] == state:
                        return True
    except OSError:
        return True
    return False
