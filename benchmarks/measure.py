"""One measurement: one server, one kind of work, from after its warm-up to its end."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .client import Client, Wrong
from .rows import Row
from .server import Server, ServerEnded


class Failed(Exception):
    """There is no figure, because the server did not do the work; the text says what happened."""


@dataclass(frozen=True)
class Measurement:
    """What one measurement found.

    Attributes:
      amount: how much work was done, or how many connections were opened and held.
      cpu: the CPU seconds that the server used for it.
      wall: how many seconds it took.
      memory: by how many bytes the server's memory has grown.
    """

    amount: int
    cpu: float
    wall: float
    memory: int

    def figure(self, row: Row) -> float:
        """Return what the row compares: work per CPU second, or bytes per connection."""
        return self.memory / self.amount if row.is_memory else self.amount / self.cpu


def measure(row: Row, server: Server, amount: int, authority: Path) -> Measurement:
    """Let a server that was just started do a row's work, see what that takes, and stop it.

    Raises:
      Failed: it did not do all of it, and nothing else.
    """
    client: Client | None = None
    try:
        client = Client(server.port(), authority if row.tls else None)
        client.open(row.connections)
        load: Callable[[int], None] = getattr(client, row.load)
        # What happens only once (imports, caches, the interpreter's specialisation of
        # bytecode, TCP's slow start) is not what is compared.
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
