"""TCP keepalive: the kernel detects a peer that has vanished.

Without keepalive, such a peer would hold a server's slot forever, because a silent
connection carries no packets. The times are the same as in Go's ``net``.
"""

from __future__ import annotations

import contextlib
import socket

from .syscalls import INTERNET_FAMILIES

# The first probe is sent after this many seconds without data, and the next ones at this interval.
# After this many unanswered probes, the connection fails with ETIMEDOUT: 150 seconds in all.
IDLE_SECONDS = 15
INTERVAL_SECONDS = 15
PROBES = 9


def enable_keepalive(sock: socket.socket) -> None:
    """Turn TCP keepalive on, and set its times.

    On a listening socket this also sets the options of each connection that is established later:
    accept(2) returns sockets that have inherited them, at no cost. A connection that is already in
    the backlog does not get them.

    A Unix socket is left alone. So is a socket whose keepalive is already on, because its owner has
    chosen its times. A platform that lacks some of the options uses its default for these.
    """
    if sock.family not in INTERNET_FAMILIES:
        return
    with contextlib.suppress(OSError):  # the connection is already dead: the next read reports it
        if sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE):
            return
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    # macOS calls the idle time TCP_KEEPALIVE.
    idle = getattr(socket, "TCP_KEEPIDLE", getattr(socket, "TCP_KEEPALIVE", None))
    interval = getattr(socket, "TCP_KEEPINTVL", None)
    probes = getattr(socket, "TCP_KEEPCNT", None)
    for option, value in ((idle, IDLE_SECONDS), (interval, INTERVAL_SECONDS), (probes, PROBES)):
        if option is not None:
            with contextlib.suppress(OSError):  # Python knows the option, but the kernel does not
                sock.setsockopt(socket.IPPROTO_TCP, option, value)
