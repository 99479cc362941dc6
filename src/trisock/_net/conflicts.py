"""Who may use one direction of a connection.

One task may read and one may write at the same time. A second reader or writer is a mistake in the
program, and gets ``BusyResourceError``. A server's ``broadcast`` is no mistake: it waits for its
turn to send, and the connection's own task waits for it.
"""

from __future__ import annotations

import trio


class ConflictDetector:
    """One task at a time; a second one gets ``BusyResourceError``.

    A hot path sets ``in_use`` itself, after ``check``: two calls fewer than ``with``.

    Attributes:
      in_use: whether a task is inside.
      closed: whether the socket is closed. Then a conflict is not the program's mistake: the task
        inside was woken and has not left yet.
    """

    __slots__ = ("_conflict", "closed", "in_use")

    def __init__(self, conflict: str) -> None:
        self._conflict = conflict
        self.in_use = self.closed = False

    def __enter__(self) -> None:
        if self.in_use:
            self.check()
        self.in_use = True

    def __exit__(self, *_: object) -> None:
        self.in_use = False

    def check(self) -> None:
        """Raise ``BusyResourceError`` if a task is inside."""
        if self.in_use:
            if self.closed:
                raise trio.ClosedResourceError("this socket was already closed")
            raise trio.BusyResourceError(self._conflict)


class SendLock(ConflictDetector):
    """One sender at a time: the application's tasks collide, broadcasts wait.

    ``async with`` acquires it for a task of the application. A broadcast calls ``acquire`` and
    ``release`` itself.

    Invariant: ``in_use`` while a task of the application is inside or waits to be. ``locked`` while
    any sender is inside. A sender that leaves passes the lock to the one that has waited longest,
    so data is sent in the order in which it was asked for.
    """

    __slots__ = ("locked", "waiters")

    def __init__(self, conflict: str) -> None:
        super().__init__(conflict)
        self.locked = False
        self.waiters: trio.lowlevel.ParkingLot | None = None

    async def __aenter__(self) -> None:
        """Acquire it for a task of the application. A checkpoint only if it must wait."""
        self.__enter__()
        try:
            await self.acquire()
        except BaseException:
            self.__exit__()
            raise

    async def __aexit__(self, *_: object) -> None:
        self.__exit__()
        self.release()

    async def acquire(self) -> None:
        """Acquire it, or wait for it. A checkpoint only if it must wait."""
        if self.locked:
            if self.waiters is None:
                self.waiters = trio.lowlevel.ParkingLot()
            await self.waiters.park()  # release leaves it locked, for us
        else:
            self.locked = True

    def release(self) -> None:
        """Pass it to the next waiter, or unlock it."""
        if self.waiters:
            self.waiters.unpark()
        else:
            self.locked = False
