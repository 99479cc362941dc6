"""ServedUDP: lets a service stop a UDP socket like a Server."""

from __future__ import annotations

import math

import trio

from .. import _fork
from .._arguments import seconds_or_inf
from .._udp.socket import UDPSocket


class ServedUDP:
    """A UDP socket that a service stops.

    ``stop``, ``closing`` and ``wait_closed`` work as in ``Server``. The program runs the tasks that
    answer datagrams. When these tasks have ended, the program closes the socket.

    Args:
      udp: the socket.

    Attributes:
      closing: set once the socket receives no new datagrams.
    """

    def __init__(self, udp: UDPSocket) -> None:
        self._udp = udp
        self.closing = trio.Event()
        self._receive_scope = trio.CancelScope()
        self._answer_scope = trio.CancelScope()

    async def run(self) -> None:
        """Wait for the stop, then wait until the program closes the socket or the grace ends."""
        try:
            with self._receive_scope:
                await self._udp.wait_closed()
            self._udp.stop_receiving()
            self.closing.set()
            with self._answer_scope:
                await self._udp.wait_closed()
        finally:
            self._udp.abort()

    def stop(self, grace: float | None, *, delay: float) -> None:
        """Begin to stop: see ``Server.stop``. A second call can only make the times earlier."""
        if _fork.in_copied_run():
            self._udp.abort()
            return
        begin = trio.current_time() + seconds_or_inf("delay", delay)
        end = begin + (math.inf if grace is None else grace)
        self._receive_scope.deadline = min(self._receive_scope.deadline, begin)
        self._answer_scope.deadline = min(self._answer_scope.deadline, end)

    async def wait_closed(self) -> None:
        """Wait until the socket is closed."""
        await self._udp.wait_closed()
