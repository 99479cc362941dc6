"""The close that loses nothing: reading on until the peer has taken all that was sent."""

from __future__ import annotations

import contextlib
import socket

import trio

from .syscalls import SEND_FLAGS, Descriptor, unacknowledged_bytes

# How long, and for how many bytes, a close goes on reading from a peer that still sends.
# Both bounds are needed: the first against a peer that is silent or slow, the second against
# one that is fast. 1 MiB in place of 64 cost an answer its tail when the peer was uploading 4 MiB.
LINGER_SECONDS = 2.0
LINGER_BYTES = 64 * 1024 * 1024

# How long a close waits between two looks at the send queue, for which there is no event:
# at first a loopback round trip, then doubling to what a delayed ACK takes (RFC 9293: < 0.5 s,
# Linux: 40 ms).
_FIRST_POLL = 0.0005
_LAST_POLL = 0.04

# What one read takes at most (Trio's own choice).
_RECEIVE_SIZE = 65536


async def linger(
    sock: trio.socket.SocketType,
    raw: socket.socket | Descriptor,
    final_bytes: bytes,
    *,
    fin_sent: bool,
) -> None:
    """Send ``final_bytes`` and FIN, then read until the peer has taken all, or a bound is met.

    Raises OSError if the connection breaks meanwhile: then it is over, and so is the close.
    """
    drained = 0
    pause = _FIRST_POLL
    deadline = trio.current_time() + LINGER_SECONDS
    while trio.current_time() < deadline:
        descriptor = sock.fileno()
        if final_bytes and not fin_sent:
            with contextlib.suppress(BlockingIOError):
                final_bytes = final_bytes[raw.send(final_bytes, SEND_FLAGS) :]
        try:
            data: bytes | None = raw.recv(_RECEIVE_SIZE)
        except BlockingIOError:
            data = None
        if data == b"" and not final_bytes:
            return  # the peer has ended its side: nothing can come that would make a RST
        if not final_bytes and not drained and data is None and unacknowledged_bytes(sock) == 0:
            return
        if not final_bytes and not fin_sent:
            sock.shutdown(socket.SHUT_WR)
            fin_sent = True
        if data:
            drained += len(data)
            if drained > LINGER_BYTES:
                return
            await trio.lowlevel.checkpoint()
            continue
        look_again = deadline
        if final_bytes or not drained:
            # Room in the send queue, or the acknowledgement: no event tells of both.
            look_again = min(trio.current_time() + pause, deadline)
            pause = min(2 * pause, _LAST_POLL)
        with trio.move_on_at(look_again):
            if data is None:
                await trio.lowlevel.wait_readable(descriptor)
            else:
                await trio.sleep_forever()
