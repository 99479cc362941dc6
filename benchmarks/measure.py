"""One measurement: one server does one kind of work, after a warm-up."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import Client, Wrong
from .rows import Row
from .server import Server, ServerEnded


class Failed(Exception):
    """The server did not do the work, so there is no figure. The text gives the reason."""


@dataclass(frozen=True)
class Measurement:
    """The result of one measurement.

    Attributes:
      amount: the amount of work, or the number of idle connections.
      cpu: CPU seconds used by the server.
      wall: seconds of wall-clock time.
      memory: growth of the server's memory in bytes.
    """

    amount: int
    cpu: float
    wall: float
    memory: int

    def figure(self, row: Row) -> float:
        """Return the figure that the row compares: work per CPU second, or bytes per connection."""
        return self.memory / self.amount if row.is_memory else self.amount / self.cpu


def measure(row: Row, server: Server, amount: int, authority: Path) -> Measurement:
    """Measure a fresh server while it does a row's work. Then stop the server.

    Raises:
      Failed: the server did not do exactly that work.
    """
    client: Client | None = None
    try:
        client = Client(server.port(), authority if row.tls else None)
        client.open(row.connections)
        load: Callable[[int], None] = getattr(client, row.load)
        # The warm-up excludes one-time costs from the measurement: imports, caches, specialization
        # of bytecode, and TCP's slow start.
        load(row.warm_up(amount))
        memory = server.private_bytes()
        cpu, wall = server.cpu_seconds(), time.perf_counter()
        load(amount)
        wall = time.perf_counter() - wall
        cpu = server.cpu_seconds() - cpu
        return Measurement(amount, cpu, wall, server.private_bytes() - memory)
    except (Wrong, ServerEnded, OSError, ValueError) as exc:
        raise Failed("; ".join(filter(None, [str(exc), server.stop()]))) from exc
    finally:
        server.stop()
        if client is not None:
            client.close()
