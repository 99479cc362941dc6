"""A peer whose bytes are mutated in transit."""

from __future__ import annotations

import contextlib
import itertools
import socket
from collections import deque
from collections.abc import AsyncIterator, Callable

import trio.testing
from hypothesis import strategies as st

from helpers.fuzzing import AN_OFFSET, Change, changed
from helpers.pairs import closing, raw_unix_pair
from helpers.peers import Peer, Script
from trisock import Socket


class Mutant(Peer):
    """A peer that sends each flight in pieces, and mutates one flight.

    ``flight`` is the number of the mutated flight, counted from 0 (-1: no flight).
    """

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
        offsets = sorted({0, len(data), *(cut % (len(data) + 1) for cut in self._cuts)})
        self._pieces += [data[start:end] for start, end in itertools.pairwise(offsets)]

    def conversing(self, clock: trio.testing.MockClock, ending: str) -> Script:
        """Respond until idle. Then send FIN if ``ending`` is ``"ended"``, otherwise stay silent."""
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
            assert idle < 100, "the Socket hangs"


@contextlib.asynccontextmanager
async def mutant_pair(
    cuts: list[int],
    changes: list[Change] | None = None,
    flight: int = -1,
    *,
    make: Callable[[], tuple[Socket, socket.socket]] = raw_unix_pair,
) -> AsyncIterator[tuple[Socket, Mutant]]:
    """Connect a Socket to a mutant; close both at the end."""
    sock, raw = make()
    mutant = Mutant(raw, changes or [], flight, cuts)
    with mutant:
        async with closing(sock):
            yield sock, mutant


SOME_CUTS = st.lists(AN_OFFSET, max_size=4)
