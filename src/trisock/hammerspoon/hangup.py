"""Waits until a peer is gone, whatever is unread: a read would meet the end only behind that."""

from __future__ import annotations

import select
import sys

import trio

# How often to look where no event tells (seconds).
_LOOK_AGAIN = 1.0


async def wait_for_hangup(descriptor: int) -> None:
    """Wait until the peer has ended its side of a connection (FIN), or has reset it.

    Reads nothing. Where the system cannot tell with data unread, it waits for good.
    """
    if sys.platform == "linux":
        # Trio waits for EPOLLIN, which unread data sets. So an epoll that waits for nothing but the
        # hangup, and Trio waits for that epoll.
        try:
            hangups = select.epoll(1)
        except OSError:  # no descriptor is left
            pass
        else:
            with hangups:
                hangups.register(descriptor, select.EPOLLRDHUP)  # and a reset, always
                await trio.lowlevel.wait_readable(hangups.fileno())
            return
    while not _has_hung_up(descriptor):  # noqa: ASYNC110 (there is no event)
        await trio.sleep(_LOOK_AGAIN)


def _has_hung_up(descriptor: int) -> bool:
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        return False
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))
