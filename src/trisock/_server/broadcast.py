"""Broadcast: the same data to many connections at once."""

from __future__ import annotations

import trio

from .._net.connection import Connection


class Broadcast:
    """One broadcast: what is sent, and what came of it.

    Attributes:
      scope: cancels it.
      done: set when it has ended.
      failure: what nobody expected, for the caller: it must not end the server.
    """

    def __init__(self, content: bytes, timeout: float) -> None:
        self.content = content
        self.timeout = timeout
        self.delivered = 0
        self.aborted = 0
        self.failure: Exception | None = None
        self.scope = trio.CancelScope()
        self.done = trio.Event()

    # A Ctrl-C here would keep ``done`` from being set, for which the caller waits with a shield.
    @trio.lowlevel.enable_ki_protection
    async def run(self, targets: list[tuple[Connection, int]]) -> None:
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    for connection, generation in targets:
                        nursery.start_soon(self._send, connection, generation)
        except Exception as exc:
            self.failure = exc
        finally:
            self.done.set()

    async def _send(self, connection: Connection, generation: int) -> None:
        try:
            if await connection.broadcast(self.content, generation, self.timeout):
                self.delivered += 1
        except trio.TooSlowError:
            self.aborted += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
