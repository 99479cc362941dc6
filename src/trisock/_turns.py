"""Who may use one direction of a connection.

One task may read and one may write at the same time. A second of either is a mistake in the
program, and gets ``BusyResourceError``. A server's ``broadcast`` is not: it waits for its turn to
send, and the connection's own task waits for it.
"""

from __future__ import annotations

import trio


class Exclusive:
    """One task at a time; a second one gets ``BusyResourceError``.

    A hot path sets ``held`` itself, after ``check``: two calls fewer than ``with``.

    Attributes:
      held: whether a task is inside.
      closed: whether the socket is closed. Then a conflict is not the program's mistake: the task
        inside was woken and has not left yet.
    """

    __slots__ = ("_conflict", "closed", "held")

    def __init__(self, conflict: str) -> None:
        self._conflict = conflict
        self.held = self.closed = False

    def __enter__(self) -> None:
        if self.held:
            self.check()
        self.held = True

    def __exit__(self, *_: object) -> None:
        self.held = False

    def check(self) -> None:
        """Raise ``BusyResourceError`` if a task is inside."""
        if self.held:
            if self.closed:
                raise trio.ClosedResourceError("this socket was already closed")
            raise trio.BusyResourceError(self._conflict)


class SendTurn(Exclusive):
    """One sender at a time: the application's tasks collide, broadcasts queue.

    ``async with`` takes the turn for a task of the application. A broadcast calls ``take`` and
    ``give`` itself.

    Invariant: ``held`` while a task of the application is inside or waits to be, ``taken`` from
    when any sender goes in until the queue is empty and the last one came out; a sender
    that leaves hands the turn to the one that has waited longest, so that what was asked for first
    is sent first.
    """

    __slots__ = ("queue", "taken")

    def __init__(self, conflict: str) -> None:
        super().__init__(conflict)
        self.taken = False
        self.queue: trio.lowlevel.ParkingLot | None = None

    async def __aenter__(self) -> None:
        """Take the turn for a task of the application. A checkpoint only if it must wait."""
        self.__enter__()
        try:
            await self.take()
        except BaseException:
            self.__exit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()
        self.give()

    async def take(self) -> None:
        """Take the turn, or wait for it. A checkpoint only if it must wait."""
        if self.taken:
            if self.queue is None:
                self.queue = trio.lowlevel.ParkingLot()
            await self.queue.park()  # whoever unparks us leaves the turn taken, for us
        else:
            self.taken = True

    def give(self) -> None:
        """Give the turn to the next one, if there is one."""
        if self.queue:
            self.queue.unpark()
        else:
            self.taken = False
