"""The system calls of a UDP socket, with their differences between platforms."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import sys
from collections.abc import Callable
from typing import TypeAlias

from .._net.syscalls import SEND_FLAGS
from .addresses import SockAddr
from .packet_info import IP_PKTINFO, IPV6_RECVPKTINFO, AncillaryItem

# The maximum size of a datagram, in bytes: the length fields of IPv4 and UDP have 16 bits. (We
# ignore IPv6 jumbograms, which UDP over the Internet does not use.)
MAX_DATAGRAM = 65535

# Bytes for the packet info, and for ancillary data that the program enables by socket options.
ANCILLARY_SIZE = 256

# The result of ``recvmsg``: data, ancillary data, flags, and the sender's sockaddr.
Received: TypeAlias = "tuple[bytes, list[AncillaryItem], int, SockAddr]"

# struct sk_meminfo has nine numbers (include/uapi/linux/sock_diag.h). The last one is the number of
# datagrams that the kernel has dropped. SO_RXQ_OVFL reports the same counter, but costs time in
# each receive, and reports it only with the next datagram.
_SO_MEMINFO = 55
_MEMINFO = struct.Struct("@9I")

if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
    MSG_TRUNC = 0x100

    # WSAECONNRESET and WSAENETRESET: ICMP has answered an earlier send, because the port is closed
    # or the time to live has expired (Microsoft's documentation of recvfrom).
    _ICMP_ERRNOS = (errno.ECONNRESET, errno.ENETRESET)

    def _any_receiver(sock: socket.socket, has_peer: bool) -> Callable[[int, int], Received]:
        def receive(max_bytes: int, ancillary_size: int) -> Received:
            while True:
                try:
                    # With a smaller buffer, this call would fail and lose a longer datagram.
                    data, sockaddr = sock.recvfrom(MAX_DATAGRAM)
                    break
                except OSError as exc:
                    # Ignore the error: other systems report it only if the socket has one peer.
                    if has_peer or exc.errno not in _ICMP_ERRNOS:
                        raise
            return data[:max_bytes], [], MSG_TRUNC if len(data) > max_bytes else 0, sockaddr

        return receive

    def send_from(
        sock: socket.socket,
        data: bytes | memoryview,
        source: AncillaryItem,
        sockaddr: SockAddr | None,
    ) -> None:
        # Set no errno: its text would replace this text in the error of ``UDPSocket.send``.
        raise OSError("this system cannot choose the source of a datagram")

else:
    MSG_TRUNC = socket.MSG_TRUNC

    def _any_receiver(sock: socket.socket, has_peer: bool) -> Callable[[int, int], Received]:
        return sock.recvmsg

    def send_from(
        sock: socket.socket,
        data: bytes | memoryview,
        source: AncillaryItem,
        sockaddr: SockAddr | None,
    ) -> None:
        """Send a datagram from a source address, to the peer if ``sockaddr`` is ``None``."""
        sock.sendmsg([data], [source], SEND_FLAGS, sockaddr)


def receiver(sock: socket.socket, has_peer: bool) -> Callable[[int, int], Received]:
    """Return a function that works like ``sock.recvmsg``.

    If the socket has one peer, datagrams from other senders are dropped. The kernel drops them too,
    but only once the socket is connected. Earlier datagrams to the socket's port stay in the
    kernel's buffer, whose size limits their number.
    """
    receive = _any_receiver(sock, has_peer)
    if not has_peer:
        return receive
    peer = sock.getpeername()[:2]

    def receive_from_peer(max_bytes: int, ancillary_size: int) -> Received:
        while True:
            received = receive(max_bytes, ancillary_size)
            if received[3][:2] == peer:
                return received

    return receive_from_peer


def send_to(
    sock: socket.socket,
    data: bytes | memoryview,
    source: AncillaryItem | None,
    sockaddr: SockAddr | None,
) -> None:
    """Send a datagram. If ``sockaddr`` is ``None``, send it to the socket's one peer.

    If ``source`` is ``None``, the system chooses the source. Raises ``BlockingIOError`` if there is
    no room in the kernel's buffer.
    """
    if source is not None:
        send_from(sock, data, source, sockaddr)
    elif sockaddr is None:
        sock.send(data, SEND_FLAGS)
    else:
        sock.sendto(data, SEND_FLAGS, sockaddr)


def request_packet_info(sock: socket.socket) -> None:
    """Make ``recvmsg`` return the destination of each datagram, if the system supports this."""
    level, option = socket.IPPROTO_IP, IP_PKTINFO
    if sock.family == socket.AF_INET6:
        level, option = socket.IPPROTO_IPV6, IPV6_RECVPKTINFO
    if option:  # pragma: no branch (Windows)
        sock.setsockopt(level, option, 1)


def dropped_datagrams(sock: socket.socket) -> int | None:
    """Return how many datagrams the kernel has dropped at this socket, or ``None`` if unknown."""
    if sys.platform == "linux":  # pragma: no branch (tests run on Linux)
        with contextlib.suppress(OSError):  # supported since Linux 4.12
            answer = sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
            if len(answer) == _MEMINFO.size:  # pragma: no branch
                count: int = _MEMINFO.unpack(answer)[8]
                return count
    return None
