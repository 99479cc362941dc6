"""ServerState: what a server shares with its connections."""

from __future__ import annotations

import math
import weakref
from collections import Counter

import trio

from .connection import Connection
from .deadlines import Deadlines

# In the last part of the grace, the handler of a new connection can send a last message. This part
# is a tenth of the grace, but at most this many seconds.
_LAST_SECONDS = 1.0


class ServerState:
    """The part of a server that its connections use.

    Attributes:
      server: a weak reference to the ``Server``, because the server refers to this object.
      closing: set when the server begins to stop.
      last_call: the time, shortly before the grace ends, from which even a new connection counts as
        idle, so that its handler can send a last message.
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
        """Set ``last_call`` for a grace from ``begin`` to ``end``. Both can only become earlier."""
        if (begin, end) != self._grace and end < math.inf:
            self._grace = begin, end
            seconds = end - max(begin, trio.current_time())
            self.last_call = end - min(_LAST_SECONDS, seconds / 10)


def _interrupt_idle_read(connection: Connection, timeout: float) -> None:
    connection.interrupt_idle_read()
