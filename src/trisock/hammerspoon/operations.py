"""What is queued for a connection of hs.socket's kind, what that costs, and the queue itself."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeAlias

import trio

from .callbacks import cost

# Seconds that an operation of one direction may take when the other one is over; and how many bytes
# of a write are worth a second more.
HALF_OPEN_SECONDS = 60.0
_BYTES_PER_SECOND = 65536


class ReadBudget:
    """What the reads cost that are queued for all clients of a server; each counts once."""

    def __init__(self) -> None:
        self.held = 0


class Read:
    """One read, that several connections may have to do.

    Args:
      wanted: how many bytes, or what to read up to.
      timeout: seconds from when its turn comes; ``math.inf`` for none.
      give: gets what was read.
      tag: counted in the cost.
    """

    __slots__ = ("_budget", "_cost", "_holders", "give", "timeout", "wanted")

    def __init__(
        self, wanted: int | bytes, timeout: float, give: Callable[[bytes], object], tag: object
    ) -> None:
        self.wanted = wanted
        self.timeout = timeout
        self.give = give
        self._cost = cost(wanted, tag)
        self._holders = 0
        self._budget: ReadBudget | None = None

    def hold(self, budget: ReadBudget) -> None:
        """Count one connection that has it queued."""
        if not self._holders:
            self._budget = budget
            budget.held += self._cost
        self._holders += 1

    def release(self) -> None:
        """Count one connection that has done it, or dropped it."""
        self._holders -= 1
        if not self._holders and self._budget is not None:
            self._budget.held -= self._cost


class Delivery:
    """One message to several connections: ``done`` is called when all that are left have it."""

    __slots__ = ("_done", "_has_arrived", "_left")

    def __init__(self, recipients: int, done: Callable[[], object] | None) -> None:
        self._left = recipients
        self._has_arrived = False
        self._done = done

    def over(self, delivered: bool) -> None:
        """Count one recipient: it has the message, or it is lost."""
        self._left -= 1
        self._has_arrived |= delivered
        if not self._left and self._has_arrived and self._done is not None:
            self._done()


@dataclass(eq=False)
class Write:
    """One write, to one connection."""

    __slots__ = ("data", "delivery", "timeout")
    data: bytes
    timeout: float
    delivery: Delivery


# Besides reads and writes: whatever has to be done in its turn.
Operation: TypeAlias = "Read | Write | Callable[[], Awaitable[object]]"


class Queue:
    """Operations of one direction, done in order; ``meanwhile`` runs while there is none.

    What an operation waits for is inside ``step``, to be bounded once the other direction is over.
    """

    def __init__(self, meanwhile: Callable[[], Awaitable[object]]) -> None:
        self._meanwhile = meanwhile
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
        """Restart ``meanwhile``, if it runs."""
        self._idle.cancel()

    async def run(self, perform: Callable[[Operation], Awaitable[object]]) -> None:
        """Perform operations in order, for good."""
        while True:
            while not self.operations:
                with trio.CancelScope() as self._idle:
                    await self._meanwhile()
            await perform(self.operations.popleft())

    @contextmanager
    def step(self, size: int = 0) -> Iterator[None]:
        """Do one operation of ``size`` bytes; ``TimeoutError`` if it is bounded and too slow."""
        self._limit = HALF_OPEN_SECONDS + size / _BYTES_PER_SECOND
        with trio.CancelScope() as self._step:
            if self._is_bounded:
                self.bound()
            yield
        if self._step.cancelled_caught:
            raise TimeoutError(
                f"one direction is over, and the other has waited for {self._limit:.0f} s"
            )

    def bound(self) -> None:
        """Bound the step that runs, and each from now on."""
        self._is_bounded = True
        deadline = trio.current_time() + self._limit
        self._step.deadline = min(self._step.deadline, deadline)
