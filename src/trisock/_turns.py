"""Who may use one direction of a connection.

One task may read and one may write at the same time. A second of either is a mistake in the
program, and gets ``BusyResourceError``. A server's ``broadcast`` is not: it waits for its turn to
send, and the connection's own task waits for it.
"""

from __future__ import annotations

import trio


class Exclusive:
    """One task at a time; a second one gets ``BusyResourceError``."""

    __slots__ = ("_conflict", "held")

    def __init__(self, conflict: str) -> None:
        self._conflict = conflict
        self.held = False

    def __enter__(self) -> None:
        self.check()
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False

    def check(self) -> None:
        """Raise ``BusyResourceError`` if a task is inside."""
        if self.held:
            raise trio.BusyResourceError(self._conflict)


class SendTurn:
    """One sender at a time: the application's tasks collide, broadcasts queue.

    Invariant: ``_taken`` from when a sender goes in until the queue is empty and the last one
    came out; a sender that leaves hands the turn to the one that has waited longest, so
    that what was asked for first is sent first.
    """

    __slots__ = ("_application", "_queue", "_taken")

    def __init__(self) -> None:
        self._application = Exclusive("another task is sending on this socket")
        self._taken = False
        self._queue: trio.lowlevel.ParkingLot | None = None

    def check(self) -> None:
        """Raise ``BusyResourceError`` if a task of the application is sending."""
        self._application.check()

    async def __aenter__(self) -> None:
        """Take the turn for a task of the application. A checkpoint only if it must wait."""
        self._application.__enter__()
        try:
            await self._take()
        except BaseException:
            self._application.__exit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._application.__exit__()
        self._give()

    def for_broadcast(self) -> _BroadcastTurn:
        """Return the turn of a sender that may wait, as an async context manager."""
        return _BroadcastTurn(self)

    async def _take(self) -> None:
        if self._taken:
            if self._queue is None:
                self._queue = trio.lowlevel.ParkingLot()
            await self._queue.park()  # whoever unparks us leaves the turn taken, for us
        else:
            self._taken = True

    def _give(self) -> None:
        if self._queue:
            self._queue.unpark()
        else:
            self._taken = False


class _BroadcastTurn:
    __slots__ = ("_turn",)

    def __init__(self, turn: SendTurn) -> None:
        self._turn = turn

    async def __aenter__(self) -> None:
        await self._turn._take()

    async def __aexit__(self, *_: object) -> None:
        self._turn._give()
