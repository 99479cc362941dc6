"""Find half-open clients, whose TCP handshake is not finished.

Half-open clients are not in the backlog yet, so ``accept`` does not return them. To find them, we
query the kernel over netlink (sock_diag(7)). On a host with many connections, this is far faster
than reading /proc/net/tcp, because the kernel returns only the sockets that we ask for. But a
hardened service may have no access to netlink: then we read /proc.
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
_INET_DIAG_SOCKID = struct.Struct("!HH44x")  # source port, destination port, the other fields are 0

# We read this many bytes of the answer. Its first message is enough: this message describes a
# matching socket, or says that there is none.
_ANSWER_SIZE = 16384


def may_be_half_open(listening: socket.socket) -> bool:
    """Return whether a client may be in the TCP handshake. Returns True if this is unknown."""
    port: int = listening.getsockname()[1]
    # An IPv6 socket may also have IPv4 clients.
    families = {listening.family, socket.AF_INET}
    with contextlib.suppress(OSError):
        return any(_query(family, port) for family in families)
    return _is_in_proc(port)


def _query(family: int, port: int) -> bool:
    """Ask the kernel over netlink. Raises OSError if netlink is not available."""
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
    """Look for a half-open client in /proc, which lists all sockets of the host."""
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
