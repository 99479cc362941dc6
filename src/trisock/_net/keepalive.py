"""TCP keepalive: the kernel detects a peer that has vanished.

Without keepalive, a vanished peer would hold a server's slot forever, because a silent connection
carries no packets. The times are the same as in Go's ``net``.
"""

from __future__ import annotations

import contextlib
import socket

from .syscalls import INTERNET_FAMILIES

# The kernel sends the first probe after IDLE_SECONDS without data, and further probes every
# INTERVAL_SECONDS. After PROBES unanswered probes (150 seconds in total), the connection fails with
# ETIMEDOUT.
IDLE_SECONDS = 15
INTERVAL_SECONDS = 15
PROBES = 9


def enable_keepalive(sock: socket.socket) -> None:
    """Turn TCP keepalive on, and set its times.

    On a listening socket this also sets the options of each connection that is established later:
    accept(2) returns sockets that have inherited them, at no cost. A connection that is already in
    the backlog keeps the options that it has.

    A Unix socket is not changed. A socket whose keepalive is already on is not changed either,
    because its owner has chosen the times. If the platform lacks an option, the platform's default
    applies.
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
