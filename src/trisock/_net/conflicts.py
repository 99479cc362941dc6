"""Exclusive use of each direction of a connection.

One task may read while another one sends. A second reader or sender is a bug in the program, and
gets ``BusyResourceError``. A server's ``broadcast`` is not a bug: it waits for its turn to send,
and the connection's own task waits for it.
"""

from __future__ import annotations

import trio


class ConflictDetector:
    """One task at a time. A second one gets ``BusyResourceError``.

    A hot path calls ``check`` and sets ``in_use`` itself: two calls fewer than ``with``.

    Attributes:
      in_use: whether a task is inside.
      closed: whether the socket is closed. Then a conflict is not the program's fault: the task
        inside was woken, but has not left yet.
    """

    __slots__ = ("_message", "closed", "in_use")

    def __init__(self, message: str) -> None:
        self._message = message
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
            raise trio.BusyResourceError(self._message)


class SendLock(ConflictDetector):
    """One sender at a time. The application's tasks conflict, broadcasts wait.

    ``async with`` acquires it for a task of the application. A broadcast calls ``acquire`` and
    ``release`` directly.

    Invariant: ``in_use`` is set while a task of the application is inside or waiting, ``locked``
    while any sender is inside. A sender that leaves passes the lock to the longest waiter, so data
    is sent in the order of the calls.
    """

    __slots__ = ("locked", "waiters")

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.locked = False
        self.waiters: trio.lowlevel.ParkingLot | None = None

    async def __aenter__(self) -> None:
        """Acquire it for a task of the application. A checkpoint only if it has to wait."""
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
        """Acquire it. A checkpoint only if it has to wait."""
        if self.locked:
            if self.waiters is None:
                self.waiters = trio.lowlevel.ParkingLot()
            await self.waiters.park()  # release() leaves it locked for us
        else:
            self.locked = True

    def release(self) -> None:
        """Pass it to the next waiter, or unlock it."""
        if self.waiters:
            self.waiters.unpark()
        else:
            self.locked = False
