"""ServerState: what a server shares with its connections."""

from __future__ import annotations

import math
import weakref
from collections import Counter

import trio

from .connection import Connection
from .deadlines import Deadlines

# The last part of the grace, in which the handler of a new connection can say goodbye: a tenth of
# it, and at most this many seconds.
_LAST_SECONDS = 1.0


class ServerState:
    """The part of a server that its connections use.

    Attributes:
      server: returns the ``Server``. A weak reference, because the server refers to this object.
      closing: set when the server begins to stop.
      last_call: the time from which a new connection counts as idle too: shortly before the grace
        ends, so that its handler can say goodbye.
      idle_deadlines: the deadlines of the reads that wait in an idle block.
      counts: the server's counters.
    """

    def __init__(self, server: object) -> None:
        self.server = weakref.ref(server)
        self.closing = trio.Event()
        self.last_call = math.inf
        self._grace = math.inf, math.inf
        self.idle_deadlines: Deadlines[Connection] = Deadlines(_interrupt_idle_read)
        self.counts: Counter[str] = Counter()

    def limit_grace(self, begin: float, end: float) -> None:
        """Note when the grace begins and ends. Each call can only make these times earlier."""
        if (begin, end) != self._grace and end < math.inf:
            self._grace = begin, end
            seconds = end - max(begin, trio.current_time())
            self.last_call = end - min(_LAST_SECONDS, seconds / 10)


def _interrupt_idle_read(connection: Connection, timeout: float) -> None:
    connection.interrupt_idle_read()
