"""Broadcast: send the same data to many connections at once."""

from __future__ import annotations

from collections.abc import Container, Iterable

import trio

from .._arguments import quoted
from .._net.connection import Connection
from .._net.connection_state import ConnectionState
from .._net.linger import LINGER_SECONDS
from .._net.socket import Socket, connection_of


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
            if await broadcast_to(connection, self.content, generation, self.timeout):
                self.delivered += 1
        except trio.TooSlowError:
            self.aborted += 1
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass


async def broadcast_to(
    connection: Connection, data: bytes, generation: int, timeout: float
) -> bool:
    """Send the data of a broadcast to one connection, once no other send is in progress.

    This first waits at most ``timeout`` seconds for the send lock. If another task holds the lock
    for longer, nothing is sent. The connection is not aborted, because that task may be waiting for
    something other than the peer. After it has acquired the lock, this sends for at most
    ``timeout`` seconds. If the peer has not accepted all data by then, the connection is aborted
    (``trio.TooSlowError``).

    The data is meant only for this ``generation`` of the connection. If a ``starttls``, ``stoptls``
    or ``relay`` has begun since then, nothing is sent. If a ``starttls`` or ``stoptls`` begins
    during the send, the connection is not aborted.

    Returns: whether all of the data was sent.
    """
    if generation != connection.generation:
        return False
    lock = connection.sending
    with trio.move_on_after(timeout) as waiting:
        await lock.acquire()
    if waiting.cancelled_caught:
        return False
    try:
        if generation != connection.generation:
            return False
        with trio.CancelScope() as sending:
            # Set after the scope was entered, so that a ``timeout`` of 0 allows the first attempt.
            sending.deadline = trio.current_time() + timeout
            await connection.send([memoryview(data)])
            return True
        # If a starttls is waiting for this lock, let it proceed. The starttls raises an error if
        # our send was cut short.
        if connection.state is ConnectionState.CHANGING:
            return False
        connection.abort()
        raise trio.TooSlowError
    finally:
        lock.release()


async def finish_broadcasts(connection: Connection) -> bool:
    """Before a close, wait until the broadcasts to the connection have ended.

    A handler may end while a broadcast is in progress. If the connection were closed then, the
    message would be cut short, and in plain text the client could not notice this. A broadcast may
    have no timeout, so the wait has the same time limit as any close. If the limit is exceeded, the
    connection is aborted. If the wait is cancelled, the connection is closed immediately.

    Returns: whether the connection was aborted.
    """
    lock = connection.sending
    if lock.in_use or not lock.locked:
        return False
    try:
        with trio.move_on_after(LINGER_SECONDS):
            await lock.acquire()
            lock.release()
            return False
    except BaseException:
        connection.close_immediately()
        raise
    connection.abort()
    return True


def members_of(
    connections: Container[Connection], socks: Iterable[Socket]
) -> dict[Connection, None]:
    """Return those of ``connections`` that belong to these sockets, without duplicates."""
    if not isinstance(socks, Iterable):
        raise TypeError(f"broadcast(to=) must be an iterable of Sockets, not {quoted(socks)}")
    found: dict[Connection, None] = {}
    for sock in socks:
        if not isinstance(sock, Socket):
            raise TypeError(f"broadcast(to=) must contain only Sockets, not {quoted(sock)}")
        connection = connection_of(sock)
        if connection in connections:
            found[connection] = None
    return found
