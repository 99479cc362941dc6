"""Drain a listening socket: accept the clients in the backlog, and let no new clients in.

A client in the backlog has already connected, and closing the listening socket would reset this
client. So we first block new clients, then accept the backlog, and only then close the socket.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

import trio

from .._net.syscalls import readable_poller
from .half_open import may_be_half_open

# The maximum time to wait for clients that were in the TCP handshake when new ones were blocked.
HALF_OPEN_SECONDS = 1

# The interval between two checks for such clients.
_POLL_SECONDS = 0.02

# A filter in classic BPF (linux/filter.h), which drops each packet with the SYN flag. A client
# sends a dropped SYN again one second later.
_SO_ATTACH_FILTER = 26
_DROP_SYN = b"".join(
    struct.pack("HBBI", *instruction)
    for instruction in (
        (0x30, 0, 0, 13),  # load the byte of the TCP header that holds the flags
        (0x45, 0, 1, 0x02),  # if SYN is not set, skip the next instruction
        (0x06, 0, 0, 0),  # drop the packet
        (0x06, 0, 0, 0xFFFFFFFF),  # keep the packet
    )
)

# In struct tcp_info of a listening socket, tcpi_unacked is the length of the backlog.
_TCPI_UNACKED = struct.Struct("=24xI")


async def drain(listening: socket.socket, accept_one: Callable[[], Awaitable[bool]]) -> None:
    """Block new clients, and accept the clients that came before.

    After this returns, the caller can close the socket without resetting a client. If the system
    does not allow the packet filter, there is a gap of microseconds: a client that connects between
    the last check and the close is reset.

    Args:
      listening: a listening socket that no other process holds.
      accept_one: accepts one client. Returns False if the backlog is empty.

    If the socket is closed meanwhile, this returns.
    """
    is_unix = listening.family not in (socket.AF_INET, socket.AF_INET6)
    filtered = _close_door(listening, is_unix=is_unix)
    is_pending = readable_poller(listening.fileno())
    give_up_at = trio.current_time() + HALF_OPEN_SECONDS
    while True:
        await trio.lowlevel.checkpoint()
        if listening.fileno() < 0:
            return
        overdue = trio.current_time() >= give_up_at
        if is_pending(0):
            if overdue and not filtered:  # clients still come in: accept those who wait now
                for _ in range(_backlog(listening)):
                    await accept_one()
                return
            if not await accept_one() and is_unix:
                return
        elif overdue or is_unix or not may_be_half_open(listening):
            if not is_pending(0):  # a client may have finished its handshake since the last check
                return
        else:
            with trio.move_on_after(_POLL_SECONDS):
                await trio.lowlevel.wait_readable(listening)


def _close_door(listening: socket.socket, *, is_unix: bool) -> bool:
    """Block new clients. Return True if it is certain that no new client gets in.

    On a Unix socket, new clients get ECONNREFUSED. On a TCP socket, the SYN of a new client is
    dropped: by a filter if the system allows one, and otherwise because the backlog is full.
    """
    if is_unix:
        with contextlib.suppress(OSError):  # ENOTCONN on macOS
            listening.shutdown(socket.SHUT_RD)
        return True
    if sys.platform == "linux":  # pragma: no branch (tests run on Linux)
        program = ctypes.create_string_buffer(_DROP_SYN)
        length = len(_DROP_SYN) // struct.calcsize("HBBI")
        argument = struct.pack("HP", length, ctypes.addressof(program))
        with contextlib.suppress(OSError):  # some systems require CAP_NET_ADMIN
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)
            return True
    listening.listen(0)
    return False


def _backlog(listening: socket.socket) -> int:
    """Return the number of clients in the backlog."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        return 0
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.size)
    waiting: int = _TCPI_UNACKED.unpack(info)[0]
    return waiting
