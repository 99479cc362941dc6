"""Wait for a peer's hangup, even while data is unread. (A read would return the data first.)"""

from __future__ import annotations

import select
import sys

import trio

# On platforms without an event for a hangup, poll at this interval (seconds).
_POLL_SECONDS = 1.0


async def wait_for_hangup(descriptor: int) -> None:
    """Wait until the peer has ended its side of a connection (FIN), or has reset it.

    This reads no data. If the platform cannot report a hangup while data is unread, this waits
    forever.
    """
    if sys.platform == "linux":
        # Trio waits for EPOLLIN, which is also set while data is unread. So a second epoll waits
        # for the hangup alone, and Trio waits for that epoll.
        try:
            hangups = select.epoll(1)
        except OSError:  # such as EMFILE
            pass
        else:
            with hangups:
                hangups.register(descriptor, select.EPOLLRDHUP)  # epoll always reports resets
                await trio.lowlevel.wait_readable(hangups.fileno())
            return
    while not _has_hung_up(descriptor):  # noqa: ASYNC110 (there is no event)
        await trio.sleep(_POLL_SECONDS)


def _has_hung_up(descriptor: int) -> bool:
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        return False
    poll = select.poll()
    poll.register(descriptor, getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))
