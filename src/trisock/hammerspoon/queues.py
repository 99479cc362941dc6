"""Connections whose operations are queued and done in the background, as in hs.socket.

Each connection has a queue for reads and one for writes, because a read that waits for the peer
must not block the write that the peer waits for. The operations of each queue are done in order. A
TLS handshake is put into both queues. The handshake begins when both queues have reached it, and
both queues continue when it has ended.

While no read is queued, the connection watches for EOF. If a chunk arrives instead, the chunk is
pushed back to the front of the buffer. From then on, the connection reads nothing, and waits for a
hangup.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

import trisock

from .._guard import log, text
from .._text import message_without_peer, printable
from .callbacks import PendingCallbacks, cost
from .hangup import wait_for_hangup
from .operations import Delivery, Operation, Queue, Read, ReadBudget, Write

# A read searches for its delimiter in at most this many bytes. (hs.socket has no limits.)
MAX_READ = 16 * 1024 * 1024

# Limits for a server. One client can cause a server to queue writes and reads for all clients.
# The limits in bytes include the overhead of the queue entries.

# The maximum number of unsent bytes for a client that does not read.
MAX_UNSENT = 64 * 1024 * 1024

# The maximum number of queued reads for a silent client. When one client sends a line, the server's
# callback asks for the next line, which queues one more read for every client.
MAX_READS = 1000

# The maximum cost in bytes of the queued reads of all clients together.
MAX_READ_COST = 16 * 1024 * 1024

# The timeout (seconds) of a handshake if the program set none: a silent peer may be an attacker.
_HANDSHAKE_TIMEOUT = 60

# If the peer has hung up, and data is unread but no read is queued, drop the connection after this
# many seconds.
UNREAD_SECONDS = 2.0

# If data arrives while no read is queued, wait this long (seconds) before watching for a hangup. A
# callback that wants the data usually queues its read sooner, and the watch is then not needed.
_SETTLE_SECONDS = 0.05

logger = logging.getLogger("trisock.hammerspoon")


# These exceptions are logged as one line. All others are logged with a traceback.
_EXPECTED = (
    OSError,
    ValueError,  # for example, a TLS client must verify, but has no server name
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trisock.LimitExceededError,
)


@contextmanager
def time_limit(seconds: float, what: str) -> Iterator[None]:
    """Raise ``TimeoutError`` if the block takes longer than ``seconds``."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise TimeoutError(f"{what} took more than {seconds} s") from None


class QueuedConnection:
    """One connection and its two queues, which can be filled before the connection exists.

    Args:
      callbacks: the object's queued callbacks.
      name: the connection's name in the log.
      max_unsent: if more than this many bytes are queued, the next write ends the connection.
      max_reads: if this many reads are queued, further reads are dropped.
      budget: counts the cost of the reads of all clients of a server.
      loglevel: the level at which errors of the connection are logged.

    Timeouts are in seconds; ``math.inf`` means no timeout. A timeout starts when its operation has
    reached the front of the queue.

    Invariant: ``_unsent`` is the cost of the queued writes and the current one. ``_reads_pending``
    is the number of queued reads and the current one. If ``_sending_ended`` is set, no write is
    queued.
    """

    def __init__(
        self,
        callbacks: PendingCallbacks,
        name: str,
        *,
        max_unsent: float = math.inf,
        max_reads: float = math.inf,
        budget: ReadBudget | None = None,
        loglevel: int = logging.WARNING,
    ) -> None:
        self.sock: trisock.Socket | None = None  # set while connected
        self._callbacks = callbacks
        self._name = printable(name)
        self._max_unsent = max_unsent
        self._max_reads = max_reads
        self._budget = budget
        self._loglevel = loglevel
        self._unsent = 0
        self._reads_pending = 0
        self._sending_ended = False
        self._is_ending = False
        self._has_tls = False  # True as soon as startTLS is queued
        self._scope = trio.CancelScope()
        self._reads = Queue(self._watch_for_end)
        self._writes = Queue(trio.sleep_forever)

    # ---- synchronous calls ----

    def read(self, read: Read) -> None:
        """Queue a read."""
        if self._reads_pending >= self._max_reads:
            return
        if self._budget is not None:
            if self._reads_pending and self._budget.held > MAX_READ_COST:
                return
            read.acquire(self._budget)
        self._reads_pending += 1
        self._reads.put(read)

    def write(self, data: bytes, timeout: float, delivery: Delivery) -> None:
        """Queue a write."""
        if self._unsent > self._max_unsent and not self._scope.cancel_called:
            why = f"the peer reads too slowly: {self._unsent} bytes are queued"
            self.fail(trio.BrokenResourceError(why))
        if self._sending_ended:
            delivery.finish(False)
            return
        self._unsent += cost(data)
        self._writes.put(Write(data, timeout, delivery))

    def start_tls(self, tls: trisock.TLSArgument, name: str | None, timeout: float) -> None:
        """Queue a handshake, after the queued reads and writes."""
        if self._has_tls:
            log(logger, logging.DEBUG, "%s: it is already using TLS", self._name)
            return
        self._has_tls = True
        reads_done, secured = trio.Event(), trio.Event()

        async def pause_reads() -> None:
            reads_done.set()
            await secured.wait()

        async def start() -> None:
            await reads_done.wait()
            await self._start_tls(tls, name, timeout)
            secured.set()

        self._reads.put(pause_reads)
        self._writes.put(start)

    def disconnect(self) -> None:
        """Drop the queued operations, and end ``run``."""
        self._scope.cancel()

    def fail(self, exc: Exception) -> None:
        """Log an error of the connection, and disconnect."""
        self._log(exc)
        self.disconnect()

    def _log(self, exc: Exception) -> None:
        if issubclass(type(exc), _EXPECTED):
            # After a failed write, a read often fails for the same reason: log the second failure
            # only at DEBUG.
            level = logging.DEBUG if self._sending_ended else self._loglevel
            why = message_without_peer(exc) or text(exc)
            log(logger, level, "%s: %s", self._name, why)
        else:
            log(logger, logging.ERROR, "%s failed", self._name, exc_info=exc)

    # ---- in the background ----

    async def run(self, sock: trisock.Socket) -> None:
        """Do the queued operations until disconnected. Raises only ``Cancelled``."""
        self.sock = sock
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._run_queue, self._reads)
                    nursery.start_soon(self._run_queue, self._writes)
        finally:
            self.sock = None
            log(logger, logging.DEBUG, "%s: disconnected", self._name)
            self._end_sending()
            for operation in self._reads.operations:
                if isinstance(operation, Read):
                    operation.release()
            self._reads.operations.clear()

    async def _run_queue(self, queue: Queue) -> None:
        try:
            await queue.run(self._perform)
        except Exception as exc:
            self.fail(exc)

    async def _perform(self, operation: Operation) -> None:
        if isinstance(operation, Read):
            try:
                await self._read(operation)
            finally:
                self._reads_pending -= 1
                operation.release()
        elif isinstance(operation, Write):
            delivered = False
            try:
                delivered = await self._write(operation)
            finally:
                self._unsent -= cost(operation.data)
                operation.delivery.finish(delivered)
        else:
            await operation()

    async def _read(self, read: Read) -> None:
        assert self.sock is not None
        await self._callbacks.wait_for_room()
        try:
            with time_limit(read.timeout, "a read"), self._reads.step():
                if isinstance(read.until, int):
                    data = await self.sock.recv_exactly(read.until)
                else:
                    data = await self.sock.recv_until(read.until, max_bytes=MAX_READ)
        except trisock.IncompleteReadError as exc:
            if not exc.at_boundary:
                message = "%s: the peer has ended its side in the middle of a read"
                log(logger, logging.INFO, message, self._name)
            self._disconnect_in_order()
        except trisock.LimitExceededError as exc:
            # Drop the advice in ``exc``: it is about arguments that a program cannot pass here.
            raise trisock.LimitExceededError(exc.limit) from None
        else:
            log(logger, logging.DEBUG, "%s: data read", self._name)
            read.deliver(data)

    async def _watch_for_end(self) -> None:
        """While no read is queued, wait for the peer to hang up, and then disconnect.

        If there is unread data at the hangup, allow ``UNREAD_SECONDS`` for a read, then disconnect.
        """
        assert self.sock is not None
        if not self._sending_ended:
            chunk: bytes | None = await self.sock.recv()
            if chunk:
                self.sock.unrecv(chunk)
                await trio.sleep(_SETTLE_SECONDS)
                await wait_for_hangup(self.sock.fileno())
        else:
            chunk = await self.sock.peek()
        self._writes.bound()
        if chunk:
            await trio.sleep(UNREAD_SECONDS)
        # Let the queued callbacks run first: they may read the unread data, or write a response.
        flushed = trio.Event()

        async def flush() -> None:
            flushed.set()

        self._callbacks.put(self._writes.put, flush)
        await flushed.wait()
        self.disconnect()

    def _disconnect_in_order(self) -> None:
        """Disconnect when the queued callbacks have run and their writes have been sent."""
        if self._is_ending:
            return
        self._is_ending = True
        self._writes.bound()

        async def end() -> None:
            self.disconnect()

        self._callbacks.put(self._writes.put, end)

    async def _write(self, write: Write) -> bool:
        """Send the data. Return False if sending fails. Received data can still be read."""
        assert self.sock is not None
        try:
            # Send everything in one call. Under TLS, no close_notify follows an interrupted send,
            # so the peer notices that data is missing.
            with time_limit(write.timeout, "a write"), self._writes.step(len(write.data)):
                await self.sock.send(write.data)
        except trio.BrokenResourceError as exc:
            self._log(exc)
            self._end_sending()
            self._reads.bound()
            self._reads.wake()
            return False
        log(logger, logging.DEBUG, "%s: data written", self._name)
        return True

    def _end_sending(self) -> None:
        """Drop the queued writes, and reject later ones."""
        self._sending_ended = True
        operations, self._writes.operations = self._writes.operations, deque()
        for operation in operations:
            if isinstance(operation, Write):
                self._unsent -= cost(operation.data)
                operation.delivery.finish(False)
            else:
                self._writes.operations.append(operation)

    async def _start_tls(self, tls: trisock.TLSArgument, name: str | None, timeout: float) -> None:
        assert self.sock is not None
        limit = _HANDSHAKE_TIMEOUT if timeout == math.inf else timeout
        await self.sock.starttls(tls, server_hostname=name, handshake_timeout=limit)
        log(logger, logging.DEBUG, "%s: secured", self._name)


def accepted_connection(
    callbacks: PendingCallbacks, name: str, budget: ReadBudget
) -> QueuedConnection:
    """Return a connection of a server, with the limits for a server's connections."""
    return QueuedConnection(
        callbacks,
        name,
        max_unsent=MAX_UNSENT,
        max_reads=MAX_READS,
        budget=budget,
        loglevel=logging.INFO,  # at WARNING, the default, any client could flood the log
    )
