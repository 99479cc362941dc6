"""ServedUDP: a UDP socket of a service, which stops as a Server does."""

from __future__ import annotations

import math

import trio

from .. import _fork
from .._arguments import seconds_or_inf
from .._udp.socket import UDPSocket


class ServedUDP:
    """A UDP socket that a service stops.

    ``stop``, ``closing`` and ``wait_closed`` are those of ``Server``. The tasks that answer the
    datagrams are the program's. It closes the socket when they have ended.

    Args:
      udp: the socket.

    Attributes:
      closing: set once the socket receives nothing new.
    """

    def __init__(self, udp: UDPSocket) -> None:
        self._udp = udp
        self.closing = trio.Event()
        self._receive_scope = trio.CancelScope()
        self._answer_scope = trio.CancelScope()

    async def run(self) -> None:
        """Wait for the stop, then for the program to close the socket, and close it if need be."""
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
