"""Broadcast: send the same data to many connections at once."""

from __future__ import annotations

import trio

from .._net.connection import Connection


class Broadcast:
    """One broadcast: its data, and the results.

    Attributes:
      delivered: the number of connections to which all of the data was sent.
      aborted: the number of connections that were aborted because they were too slow.
      scope: cancels the broadcast.
      done: set when the broadcast has ended.
      failure: an unexpected exception. It is raised in the caller, and does not end the server.
    """

    def __init__(self, content: bytes, timeout: float) -> None:
        self.content = content
        self.timeout = timeout
        self.delivered = 0
        self.aborted = 0
        self.failure: Exception | None = None
        self.scope = trio.CancelScope()
        self.done = trio.Event()

    # The caller waits for ``done`` in a shielded scope, so ``done`` must be set even after a
    # Ctrl-C.
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
