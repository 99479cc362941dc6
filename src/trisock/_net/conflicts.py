"""Exclusive use of each direction of a connection.

One task may read while another task sends. A second reader or sender is a bug in the program, and
gets ``BusyResourceError``. A server's ``broadcast`` never conflicts: it waits until an earlier
send has finished, and later sends wait until the broadcast has finished.
"""

from __future__ import annotations

import trio


class ConflictDetector:
    """Lets only one task at a time use a direction of a connection (reading or sending).

    A second task gets ``BusyResourceError``.

    Hot paths use ``in_use`` and ``check`` instead of ``with``, to save two function calls.

    Args:
      action: what a task does with the resource, such as ``"reading from"``.
      resource: the object that error messages name. Only an error calls ``str(resource)``.

    Attributes:
      in_use: whether a task is using the direction.
      closed: whether the socket is closed. If so, a second task gets ``ClosedResourceError``
        instead. This is not a bug in the program, because the close has already woken the first
        task, which is about to stop.
    """

    __slots__ = ("_action", "_resource", "closed", "in_use")

    def __init__(self, action: str, resource: object) -> None:
        self._action = action
        self._resource = resource
        self.in_use = self.closed = False

    def __enter__(self) -> None:
        if self.in_use:
            self.check()
        self.in_use = True

    def __exit__(self, *_: object) -> None:
        self.in_use = False

    def check(self) -> None:
        """Raise ``BusyResourceError`` if a task is using the direction."""
        if self.in_use:
            if self.closed:
                raise trio.ClosedResourceError(f"this side has already closed {self._resource}")
            raise trio.BusyResourceError(
                f"another task is {self._action} {self._resource}: "
                "only one task may do this at a time"
            )


class SendLock(ConflictDetector):
    """Lets only one task at a time send.

    ``async with`` acquires the lock for a task of the application. A second application task gets
    ``BusyResourceError``. A broadcast waits instead: it calls ``acquire`` and ``release`` directly.

    Invariant: ``in_use`` is set while a task of the application holds the lock or waits for it.
    ``locked`` is set while any sender holds the lock. A release passes the lock to the task that
    has waited longest, so data is sent in the order of the calls.
    """

    __slots__ = ("locked", "waiters")

    def __init__(self, action: str, resource: object) -> None:
        super().__init__(action, resource)
        self.locked = False
        self.waiters: trio.lowlevel.ParkingLot | None = None

    async def __aenter__(self) -> None:
        """Acquire the lock for an application task. Not a checkpoint if the lock is free."""
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
        """Acquire the lock. Not a checkpoint if the lock is free."""
        if self.locked:
            if self.waiters is None:
                self.waiters = trio.lowlevel.ParkingLot()
            await self.waiters.park()  # release() does not unlock: it passes the lock to us
        else:
            self.locked = True

    def release(self) -> None:
        """Pass the lock to the task that has waited longest. If no task waits, unlock."""
        if self.waiters:
            self.waiters.unpark()
        else:
            self.locked = False
