"""ServerState: what a server shares with its connections."""

from __future__ import annotations

import weakref
from collections import Counter

import trio

from .connection import Connection
from .deadlines import Deadlines


class ServerState:
    """The part of a server that its connections use.

    Attributes:
      server: returns the ``Server``. A weak reference, because the server refers to this object.
      closing: set when the server begins to stop.
      idle_deadlines: the deadlines of the reads that wait in an idle block.
      counts: the server's counters.
    """

    def __init__(self, server: object) -> None:
        self.server = weakref.ref(server)
        self.closing = trio.Event()
        self.idle_deadlines: Deadlines[Connection] = Deadlines(_interrupt_idle_read)
        self.counts: Counter[str] = Counter()


def _interrupt_idle_read(connection: Connection, timeout: float) -> None:
    connection.interrupt_idle_read()
