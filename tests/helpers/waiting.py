"""Whether a datagram waits in the kernel."""

from __future__ import annotations

from trisock import UDPSocket
from trisock._net.syscalls import poll_readable


def is_waiting(udp: UDPSocket) -> bool:
    """Return whether a datagram can be received. On loopback, a send delivers it at once."""
    return poll_readable(udp.fileno()) != 0
