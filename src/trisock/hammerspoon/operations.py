"""The operations that are queued for a connection, their cost, and the queue."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import trio

from .callbacks import cost

# When one direction of a connection has ended, an operation in the other direction may take at most
# HALF_OPEN_SECONDS. A write may take one second longer for each _BYTES_PER_SECOND bytes.
HALF_OPEN_SECONDS = 60.0
_BYTES_PER_SECOND = 65536


class ReadBudget:
    """The cost of all reads that are queued for a server's clients. A shared read counts once."""

    def __init__(self) -> None:
        self.held = 0


class Read:
    """One read, possibly shared by several connections.

    Args:
      until: a number of bytes, or the delimiter to read up to.
      timeout: seconds from the start of the read; ``math.inf`` for no timeout.
      deliver: called with the data.
      tag: used only to compute the cost of the read.
    """

    __slots__ = ("_budget", "_cost", "_references", "deliver", "timeout", "until")

    def __init__(
        self, until: int | bytes, timeout: float, deliver: Callable[[bytes], object], tag: object
    ) -> None:
        self.until = until
        self.timeout = timeout
        self.deliver = deliver
        self._cost = cost(until, tag)
        self._references = 0
        self._budget: ReadBudget | None = None

    def acquire(self, budget: ReadBudget) -> None:
        """Count one more connection that has queued this read."""
        if not self._references:
            self._budget = budget
            budget.held += self._cost
        self._references += 1

    def release(self) -> None:
        """Count one connection fewer, because it has finished or dropped this read."""
        self._references -= 1
        if not self._references and self._budget is not None:
            self._budget.held -= self._cost


class Delivery:
    """One message that is sent to several connections.

    ``done`` is called when the message was sent on all connections that are not lost. If all
    connections are lost, ``done`` is not called.
    """

    __slots__ = ("_any_delivered", "_done", "_pending")

    def __init__(self, recipients: int, done: Callable[[], object] | None) -> None:
        self._pending = recipients
        self._any_delivered = False
        self._done = done

    def finish(self, delivered: bool) -> None:
        """Count one connection as finished. Unless it delivered the message, it counts as lost."""
        self._pending -= 1
        self._any_delivered |= delivered
        if not self._pending and self._any_delivered and self._done is not None:
            self._done()


@dataclass(eq=False)
class Write:
    """One write, to one connection."""

    __slots__ = ("data", "delivery", "timeout")
    data: bytes
    timeout: float
    delivery: Delivery


# The callable is any other action that must run in order with the reads or writes.
Operation: TypeAlias = "Read | Write | Callable[[], Awaitable[object]]"


class Queue:
    """The operations of one direction, done in order. While the queue is empty, ``when_idle`` runs.

    An operation may wait for the peer only inside ``step``. So ``bound`` can limit this wait when
    the other direction has ended.
    """

    def __init__(self, when_idle: Callable[[], Awaitable[object]]) -> None:
        self._when_idle = when_idle
        self.operations: deque[Operation] = deque()
        self._idle = trio.CancelScope()
        self._step = trio.CancelScope()
        self._limit = HALF_OPEN_SECONDS
        self._is_bounded = False

    def put(self, operation: Operation) -> None:
        """Queue an operation."""
        self.operations.append(operation)
        self.wake()

    def wake(self) -> None:
        """Restart ``when_idle``, if it is running."""
        self._idle.cancel()

    async def run(self, perform: Callable[[Operation], Awaitable[object]]) -> None:
        """Perform operations in order, forever."""
        while True:
            while not self.operations:
                with trio.CancelScope() as self._idle:
                    await self._when_idle()
            await perform(self.operations.popleft())

    @contextmanager
    def step(self, size: int = 0) -> Iterator[None]:
        """Run the block as one operation of ``size`` bytes.

        Raises ``TimeoutError`` if the operation is bounded and takes too long.
        """
        self._limit = HALF_OPEN_SECONDS + size / _BYTES_PER_SECOND
        with trio.CancelScope() as self._step:
            if self._is_bounded:
                self.bound()
            yield
        if self._step.cancelled_caught:
            raise TimeoutError(
                f"one direction has ended, and the other waited {self._limit:.0f} s for the peer"
            )

    def bound(self) -> None:
        """Limit the duration of the current step and of all later steps."""
        self._is_bounded = True
        deadline = trio.current_time() + self._limit
        self._step.deadline = min(self._step.deadline, deadline)
