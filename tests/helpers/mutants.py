"""A peer whose bytes are changed, and runs with a clock that only it moves."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

import trio
import trio.testing
from hypothesis import strategies as st

from helpers.fuzzing import AN_OFFSET, Change, changed
from helpers.peers import Peer, Script


class Mutant(Peer):
    """A peer of which one flight is changed, and comes in pieces."""

    def __init__(
        self, raw: socket.socket, changes: list[Change], flight: int, cuts: list[int]
    ) -> None:
        super().__init__(raw)
        self._changes = changes
        self._flight = flight
        self._cuts = cuts
        self._pieces: deque[bytes] = deque()

    def send(self, data: bytes) -> None:
        if self._flight == 0:
            data = changed(data, self._changes)
        self._flight -= 1
        places = sorted({0, len(data), *(cut % (len(data) + 1) for cut in self._cuts)})
        self._pieces += [data[start:end] for start, end in itertools.pairwise(places)]

    def conversing(self, clock: trio.testing.MockClock, ending: str) -> Script:
        """Act until there is nothing more to say, and then end, or be silent."""
        for idle in itertools.count():
            yield
            self.act()
            if self._pieces:
                super().send(self._pieces.popleft())
                continue
            if ending == "ended" and idle:
                with contextlib.suppress(OSError):
                    self.raw.shutdown(socket.SHUT_WR)
            clock.jump(10)
            assert idle < 100, "it hangs"


def run(function: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Run an async function with a clock that stands, but for what the peer makes of it."""
    clock = trio.testing.MockClock()
    trio.run(function, clock, *args, clock=clock)


SOME_CUTS = st.lists(AN_OFFSET, max_size=4)
