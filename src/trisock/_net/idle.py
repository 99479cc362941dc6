"""IdleBlock: marks where a handler waits for its peer's next request.

A waiting read in such a block fails when the server begins to stop, or after a timeout. Once bytes
of a request have arrived, only the timeout makes the read fail.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import TypeVar

import trio

from .._errors import IdleTimeoutError, ServerClosing
from .._not_copyable import NotCopyable
from .._text import format_seconds, set_message
from .connection import Connection
from .descriptor import ReadInterrupted

ResultT = TypeVar("ResultT")

# A new connection does not count as idle for this many seconds, even if no data has arrived,
# because its first request is probably in flight. (Go's http.Server.Shutdown has the same rule.)
FRESH_SECONDS = 5


class IdleBlock(NotCopyable):
    """The context manager that ``Socket.idle`` returns.

    Invariant: ``connection.idle`` is the most recently entered active block. The ``_outer`` of a
    block is the active block that was entered before it.

    Attributes:
      active: whether the block was entered and has not been exited yet.
      begun: whether bytes of a request have arrived: bytes were unread when the block was entered,
        or a read in the block has received bytes.
    """

    __slots__ = ("_connection", "_outer", "_timeout", "active", "begun")

    def __init__(self, connection: Connection, timeout: float = math.inf) -> None:
        self._connection = connection
        self._timeout = timeout
        self._outer: IdleBlock | None = None
        self.active = False
        self.begun = False

    def __enter__(self) -> None:
        if self.active:
            raise RuntimeError("this idle block is already in use: call idle() for each block")
        connection = self._connection
        self.active = True
        self.begun = len(connection.buffer) > 0
        self._outer = connection.idle
        connection.idle = self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.active = False
        if self._connection.idle is self:
            self._connection.idle = self._outer
        else:  # another task has entered a later block, and is still in it
            later = self._connection.idle
            while later is not None and later._outer is not self:
                later = later._outer
            assert later is not None
            later._outer = self._outer
        self._outer = None
        if self._connection.in_idle_read:  # let another task's read check which block it is in now
            self._connection.interrupt_idle_read()

    def timeout(self) -> float:
        """Return the shortest timeout of this block and its outer blocks."""
        if self._outer is None:
            return self._timeout
        return min(self._timeout, self._outer.timeout())

    def begin(self) -> None:
        """Record that bytes of a request have arrived, for this block and its outer blocks."""
        self.begun = True
        if self._outer is not None:
            self._outer.begin()


async def receive_idle(connection: Connection, block: IdleBlock) -> bytes:
    """Receive a chunk inside an idle block, like ``connection.layer.receive``.

    Raises ``ServerClosing`` if the server is stopping and no request has begun, and
    ``IdleTimeoutError`` if no byte arrives in time. Before it raises one of these errors, it checks
    once more whether a chunk has arrived. If it fails or is cancelled, it consumes nothing.
    """
    if connection.buffer.size:
        block.begin()
    timeout = block.timeout()
    deadline = _deadline(timeout)
    server = connection.server_state
    has_waited = False
    connection.in_idle_read = True
    try:
        while True:
            until, closing = deadline, False
            if server is not None and not block.begun and server.closing.is_set():
                until, closing = min(deadline, connection.fresh_until, server.last_call), True
            is_over = (closing or has_waited or not timeout) and until <= trio.current_time()
            chunk = None
            try:
                if is_over:
                    if not has_waited:
                        await trio.lowlevel.checkpoint()
                elif closing or server is None or has_waited:
                    with trio.CancelScope(deadline=until):
                        chunk = await connection.layer.receive()
                elif timeout == math.inf:
                    chunk = await connection.layer.receive()
                else:  # without a cancel scope, for speed (benchmark row idle-timeout)
                    server.idle_deadlines.add(connection, timeout)
                    try:
                        chunk = await connection.layer.receive()
                    finally:
                        server.idle_deadlines.discard(connection, timeout)
            except ReadInterrupted:
                if not block.active or block.timeout() != timeout:  # another task exited a block
                    remaining = block if block.active else connection.idle
                    if remaining is None:
                        connection.in_idle_read = False
                        return await connection.layer.receive()
                    block = remaining
                    timeout = block.timeout()
                    deadline = _deadline(timeout)
            has_waited = True
            if chunk is None:
                chunk = connection.receive_nowait()
            if chunk is not None:
                break
            if is_over:
                connection.transport.peer_may_be_sending = True
                if deadline > until:
                    raise _server_closing(connection)
                raise _idle_timeout(connection, block)
    finally:
        connection.in_idle_read = False
    if chunk:
        block.begin()
    return chunk


def _deadline(timeout: float) -> float:
    return math.inf if timeout == math.inf else trio.current_time() + timeout


def while_idle(
    connection: Connection, read: Callable[[], Awaitable[ResultT]]
) -> Callable[[], Awaitable[ResultT]]:
    """Return a function that reads in an idle block."""
    block = IdleBlock(connection)

    async def read_in_block() -> ResultT:
        connection.reading.check()  # a second reader must not enter the first reader's block
        with block:
            return await read()

    return read_in_block


def _server_closing(connection: Connection) -> ServerClosing:
    why = "the server is stopping, and no request has begun"
    error = set_message(ServerClosing(), f"{why} on {connection.transport}", without_peer=why)
    return connection.transport.remember_failure(error)


def _idle_timeout(connection: Connection, block: IdleBlock) -> IdleTimeoutError:
    error = IdleTimeoutError(at_boundary=not block.begun)
    why = f"sent nothing for {format_seconds(block.timeout())}"
    set_message(error, f"{connection.peer} {why}", without_peer=f"the peer {why}")
    return connection.transport.remember_failure(error)
