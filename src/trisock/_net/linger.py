"""The lingering close: read until later input can no longer destroy data that we sent."""

from __future__ import annotations

import contextlib
import socket

import trio

from .syscalls import FINAL_SEND_FLAGS, RECEIVE_SIZE, BorrowedSocket, unacknowledged_bytes

# A close reads the peer's data until one of these limits is reached: the limit in seconds if the
# peer is silent or slow, or the limit in bytes if the peer is fast. With 1 MiB instead of 64 MiB, a
# peer that was uploading 4 MiB lost the last part of our response.
LINGER_SECONDS = 2.0
LINGER_BYTES = 64 * 1024 * 1024

# The kernel does not notify us when the peer has acknowledged all data, so a close polls. The
# first interval (seconds) is about one loopback round trip. The interval then doubles, up to the
# time by which a peer may delay an ACK (RFC 9293: < 0.5 s, Linux: 40 ms).
_MIN_POLL_INTERVAL = 0.0005
_MAX_POLL_INTERVAL = 0.04


async def linger(
    sock: trio.socket.SocketType,
    raw: socket.socket | BorrowedSocket,
    final_bytes: bytes,
    *,
    fin_sent: bool,
) -> bool:
    """Send ``final_bytes`` and FIN, then read until closing is safe or a limit is reached.

    Closing is safe after the peer's FIN. Closing is also safe if the peer has acknowledged all data
    and our FIN, and has sent nothing during the close. (A peer that has sent something is likely to
    send more, and input after the close causes a reset, which must not overtake our FIN.)

    Returns: whether the peer's FIN has been read, so that nothing is unread.

    Raises OSError if the connection breaks. The caller must then close it immediately.
    """
    if fin_sent:
        final_bytes = b""  # nothing can follow FIN
    drained = 0
    interval = _MIN_POLL_INTERVAL
    deadline = trio.current_time() + LINGER_SECONDS
    while trio.current_time() < deadline:
        descriptor = sock.fileno()
        if final_bytes:
            with contextlib.suppress(BlockingIOError):
                final_bytes = final_bytes[raw.send(final_bytes, FINAL_SEND_FLAGS) :]
        if not final_bytes and not fin_sent:
            sock.shutdown(socket.SHUT_WR)
            fin_sent = True
        try:
            data: bytes | None = raw.recv(RECEIVE_SIZE)
        except BlockingIOError:
            data = None
        if data == b"" and not final_bytes:
            return True  # the peer has sent FIN: no later input can cause RST
        is_quiet = data is None and not (final_bytes or drained)
        if is_quiet and unacknowledged_bytes(sock) == 0:
            return False
        if data:
            drained += len(data)
            if drained > LINGER_BYTES:
                return False
            await trio.lowlevel.checkpoint()
            continue
        poll_at = deadline
        if final_bytes or not drained:
            # Trio cannot wait for input, room in the send queue and ACKs at the same time, so poll.
            poll_at = min(trio.current_time() + interval, deadline)
            interval = min(2 * interval, _MAX_POLL_INTERVAL)
        with trio.move_on_at(poll_at):
            if data is None:
                await trio.lowlevel.wait_readable(descriptor)
            else:  # the peer has sent FIN: wait_readable would return at once
                await trio.sleep_forever()
    return False


async def wait_until_acknowledged(sock: trio.socket.SocketType) -> None:
    """Wait at most ``LINGER_SECONDS`` until the peer's kernel has acknowledged all sent data."""
    interval = _MIN_POLL_INTERVAL
    deadline = trio.current_time() + LINGER_SECONDS
    while trio.current_time() < deadline:
        if sock.fileno() < 0 or not unacknowledged_bytes(sock):  # -1: closed by another task
            return
        await trio.sleep(interval)
        interval = min(2 * interval, _MAX_POLL_INTERVAL)
