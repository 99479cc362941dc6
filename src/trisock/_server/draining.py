"""Draining a listening socket: serve the clients that wait, and let no others in.

A client that waits in the backlog has already connected. Closing the socket would reset it. So we
first close the door to new clients, then accept those who wait, and only then close the socket.
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

# The maximum time to wait for clients that were still connecting when the door was closed.
HALF_OPEN_SECONDS = 1

# How often to look for such clients.
_POLL_SECONDS = 0.02

# A filter that drops each packet with the SYN flag, in classic BPF (linux/filter.h). A client whose
# SYN is dropped tries again a second later.
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
    """Close the door to new clients, and accept those who came before.

    When this returns, closing the socket resets nobody. Where the system allows us no filter, there
    is a gap of microseconds: a client that connects between the last look and the close is reset.

    Args:
      listening: a listening socket that no other process holds.
      accept_one: accepts one client. Returns False if none waits.

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
            if overdue and not filtered:  # new clients still come in, so stop counting them
                for _ in range(_backlog(listening)):
                    await accept_one()
                return
            if not await accept_one() and is_unix:
                return
        elif overdue or is_unix or not may_be_half_open(listening):
            if not is_pending(0):  # a client may have finished its handshake since the last look
                return
        else:
            with trio.move_on_after(_POLL_SECONDS):
                await trio.lowlevel.wait_readable(listening)


def _close_door(listening: socket.socket, *, is_unix: bool) -> bool:
    """Let no new clients in. Return whether this is certain.

    On a Unix socket, new clients get ECONNREFUSED. On a TCP socket, their SYN is dropped: by a
    filter if the system allows one, and otherwise because the backlog is full.
    """
    if is_unix:
        with contextlib.suppress(OSError):  # ENOTCONN on macOS
            listening.shutdown(socket.SHUT_RD)
        return True
    if sys.platform == "linux":  # pragma: no branch (tests run on Linux)
        program = ctypes.create_string_buffer(_DROP_SYN)
        length = len(_DROP_SYN) // struct.calcsize("HBBI")
        argument = struct.pack("HP", length, ctypes.addressof(program))
        with contextlib.suppress(OSError):  # some systems want CAP_NET_ADMIN
            listening.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, argument)
            return True
    listening.listen(0)
    return False


def _backlog(listening: socket.socket) -> int:
    """Return how many clients wait to be accepted."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        return 0
    info = listening.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _TCPI_UNACKED.size)
    waiting: int = _TCPI_UNACKED.unpack(info)[0]
    return waiting
