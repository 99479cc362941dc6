"""HandshakeTimer: the deadlines of a server's TLS handshakes."""

from __future__ import annotations

from collections.abc import Iterator

import trio

from .._net.connection import Connection


class HandshakeTimer:
    """The handshakes in progress of one server, and the task that ends the overdue ones.

    One task for all handshakes is cheaper than a cancel scope for each (row tls-handshakes).

    Args:
      timeout: the maximum seconds for a handshake, or ``math.inf``.

    Invariant: all handshakes have the same timeout. So ``_deadlines`` is in the order of the
    deadlines.
    """

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._deadlines: dict[Connection, float] = {}
        self._added = trio.Event()  # set when there may be a handshake

    def __iter__(self) -> Iterator[Connection]:
        return iter(self._deadlines)

    def add(self, connection: Connection) -> None:
        """Begin to time the connection's handshake."""
        self._deadlines[connection] = trio.current_time() + self._timeout
        self._added.set()

    def discard(self, connection: Connection) -> None:
        """Stop timing the connection's handshake: it has ended."""
        self._deadlines.pop(connection, None)

    async def run(self) -> None:
        """End each handshake that is overdue. Runs until it is cancelled."""
        while True:
            self._end_overdue()
            if self._deadlines:
                await trio.sleep_until(next(iter(self._deadlines.values())))
            else:
                self._added = trio.Event()
                await self._added.wait()

    def _end_overdue(self) -> None:
        now = trio.current_time()
        while self._deadlines:  # no copy of the dict: thousands of clients may be silent
            connection, deadline = next(iter(self._deadlines.items()))
            if deadline > now:
                break
            self.discard(connection)
            connection.time_out_handshake(self._timeout)
