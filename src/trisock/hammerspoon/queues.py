"""Connections that do in the background what is queued for them: hs.socket's way.

Each has two queues, for reads and for writes, because a read that waits for the peer must not hold
up the write that the peer waits for. Each is done in order. What changes the connection, TLS,
stands in both: it begins when both have come to it, and both go on when it is done.

A reader that has nothing to do watches for the end of the stream: a chunk that it gets meanwhile
goes back to the front of the buffer, and from then on it waits for the hangup behind it.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import trio

import trisock

from .._guard import log
from .._text import printable
from .callbacks import CallbackLine, cost
from .hangup import wait_for_hangup
from .operations import Delivery, Operation, Queue, Read, ReadBudget, Write

# hs.socket has no bounds. How many bytes a read may look for its delimiter in:
MAX_READ = 16 * 1024 * 1024

# And of a server, whose clients can make it write and read for each other, with what each entry of
# a queue costs: how many bytes may wait for a client that does not take them, how many reads for
# one that says nothing (a server's callback asks for the next line of whoever has spoken, and so
# for one more of each), and how many bytes the reads of all clients may cost.
MAX_UNSENT = 64 * 1024 * 1024
MAX_READS = 1000
MAX_READS_HELD = 16 * 1024 * 1024

# Seconds for a handshake that has no limit of its own: a silent peer there is an attack.
_HANDSHAKE_TIMEOUT = 60

# Seconds until a connection is dropped whose peer is gone, with data unread and no read queued.
UNREAD_SECONDS = 2.0

# How long a reader without work leaves unread data alone (seconds). A callback that asks for more
# has done so by then, and what it would cost to wait for the hangup is saved.
_SETTLE_SECONDS = 0.05

logger = logging.getLogger("trisock.hammerspoon")


# What is worth a line in the log; anything else is worth a traceback.
_EXPECTED = (
    OSError,
    ValueError,  # such as a verified TLS client that knows no name
    trio.BrokenResourceError,
    trio.ClosedResourceError,
    trisock.LimitExceededError,
)


@contextmanager
def at_most(seconds: float, what: str) -> Iterator[None]:
    """Raise ``TimeoutError`` where the block takes longer."""
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise TimeoutError(f"{what} has taken more than {seconds} s") from None


class QueuedConnection:
    """One connection and its two queues, which can be filled before it is there.

    Args:
      callbacks: where those of the object are queued.
      name: what it is called in the log.
      max_unsent: how many bytes may wait for the peer; one more write ends it then.
      max_reads: how many reads may wait for it; one more is dropped then.
      budget: what the reads of all of a server's clients cost.
      loglevel: at which level it is logged that something went wrong with the connection.

    Timeouts are in seconds, ``math.inf`` for none, and begin with the operation's turn.

    Invariant: ``_unsent`` is what the writes cost that are queued, and the one that is done now;
    ``_unread`` is how many reads those are. After ``_sending_is_over`` no write is queued.
    """

    def __init__(
        self,
        callbacks: CallbackLine,
        name: str,
        *,
        max_unsent: float = math.inf,
        max_reads: float = math.inf,
        budget: ReadBudget | None = None,
        loglevel: int = logging.WARNING,
    ) -> None:
        self.sock: trisock.Socket | None = None  # while it is connected
        self._callbacks = callbacks
        self._name = printable(name)
        self._max_unsent = max_unsent
        self._max_reads = max_reads
        self._budget = budget
        self._loglevel = loglevel
        self._unsent = 0
        self._unread = 0
        self._sending_is_over = False
        self._is_ending = False
        self._has_tls = False  # or will have, when its turn comes
        self._scope = trio.CancelScope()
        self._reads = Queue(self._watch_for_the_end)
        self._writes = Queue(trio.sleep_forever)

    # ---- plain calls ----

    def read(self, read: Read) -> None:
        """Queue a read."""
        if self._unread >= self._max_reads:
            return
        if self._budget is not None:
            if self._unread and self._budget.held > MAX_READS_HELD:
                return
            read.hold(self._budget)
        self._unread += 1
        self._reads.put(read)

    def write(self, data: bytes, timeout: float, delivery: Delivery) -> None:
        """Queue a write."""
        if self._unsent > self._max_unsent and not self._scope.cancel_called:
            self.fail(trio.BrokenResourceError(f"{self._unsent} bytes are waiting for it already"))
        if self._sending_is_over:
            delivery.over(False)
            return
        self._unsent += cost(data)
        self._writes.put(Write(data, timeout, delivery))

    def start_tls(
        self, tls: trisock.ClientTLS | trisock.ServerTLS, name: str | None, timeout: float
    ) -> None:
        """Queue a handshake, behind the reads and writes that are queued now."""
        if self._has_tls:
            log(logger, self._loglevel, "%s: it is using TLS already", self._name)
            return
        self._has_tls = True
        reads_done, secured = trio.Event(), trio.Event()

        async def make_way() -> None:
            reads_done.set()
            await secured.wait()

        async def start() -> None:
            await reads_done.wait()
            await self._start_tls(tls, name, timeout)
            secured.set()

        self._reads.put(make_way)
        self._writes.put(start)

    def disconnect(self) -> None:
        """Drop what is queued, and end."""
        self._scope.cancel()

    def fail(self, exc: Exception) -> None:
        """Log what went wrong with the connection, and end it."""
        self._log(exc)
        self.disconnect()

    def _log(self, exc: Exception) -> None:
        if issubclass(type(exc), _EXPECTED):
            # Once: a write that failed is often followed by a read that fails for the same reason.
            level = logging.DEBUG if self._sending_is_over else self._loglevel
            log(logger, level, "%s: %s", self._name, _text_of(exc))
        else:
            log(logger, logging.ERROR, "%s failed", self._name, exc_info=exc)

    # ---- in the background ----

    async def run(self, sock: trisock.Socket) -> None:
        """Do what is queued, until the end. It raises nothing but ``Cancelled``, closes nothing."""
        self.sock = sock
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._work_off, self._reads)
                    nursery.start_soon(self._work_off, self._writes)
        finally:
            self.sock = None
            log(logger, logging.DEBUG, "%s: disconnected", self._name)
            self._end_sending()
            for operation in self._reads.operations:
                if isinstance(operation, Read):
                    operation.release()
            self._reads.operations.clear()

    async def _work_off(self, queue: Queue) -> None:
        try:
            await queue.run(self._perform)
        except Exception as exc:
            self.fail(exc)

    async def _perform(self, operation: Operation) -> None:
        if isinstance(operation, Read):
            try:
                await self._read(operation)
            finally:
                self._unread -= 1
                operation.release()
        elif isinstance(operation, Write):
            delivered = False
            try:
                delivered = await self._write(operation)
            finally:
                self._unsent -= cost(operation.data)
                operation.delivery.over(delivered)
        else:
            await operation()

    async def _read(self, read: Read) -> None:
        assert self.sock is not None
        await self._callbacks.room()
        try:
            with at_most(read.timeout, "a read"), self._reads.step():
                if isinstance(read.wanted, int):
                    data = await self.sock.recv_exactly(read.wanted)
                else:
                    data = await self.sock.recv_until(read.wanted, max_bytes=MAX_READ)
        except trisock.IncompleteReadError:
            self._end_in_order()
        else:
            log(logger, logging.DEBUG, "%s: data read", self._name)
            read.give(data)

    async def _watch_for_the_end(self) -> None:
        """While no read is queued: end when the peer is gone, and what it sent is not asked for."""
        assert self.sock is not None
        if not self._sending_is_over:
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
        # A callback that is queued may ask for what is unread, or write an answer.
        flushed = trio.Event()

        async def flush() -> None:
            flushed.set()

        self._callbacks.put(self._writes.put, flush)
        await flushed.wait()
        self.disconnect()

    def _end_in_order(self) -> None:
        """Disconnect behind the callbacks that are queued now, and what they write."""
        if self._is_ending:
            return
        self._is_ending = True
        self._writes.bound()

        async def end() -> None:
            self.disconnect()

        self._callbacks.put(self._writes.put, end)

    async def _write(self, write: Write) -> bool:
        """Write; False if it cannot be written. What has arrived can still be read then."""
        assert self.sock is not None
        try:
            # In one send: under TLS, what is cut short must not be followed by a clean end.
            with at_most(write.timeout, "a write"), self._writes.step(len(write.data)):
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
        """Drop the writes that are queued, and take no more."""
        self._sending_is_over = True
        operations, self._writes.operations = self._writes.operations, deque()
        for operation in operations:
            if isinstance(operation, Write):
                self._unsent -= cost(operation.data)
                operation.delivery.over(False)
            else:
                self._writes.operations.append(operation)

    async def _start_tls(
        self, tls: trisock.ClientTLS | trisock.ServerTLS, name: str | None, timeout: float
    ) -> None:
        assert self.sock is not None
        limit = _HANDSHAKE_TIMEOUT if timeout == math.inf else timeout
        await self.sock.starttls(tls, server_hostname=name, handshake_timeout=limit)
        log(logger, logging.DEBUG, "%s: secured", self._name)


def connection_of_a_server(
    callbacks: CallbackLine, name: str, budget: ReadBudget
) -> QueuedConnection:
    """Return a connection whose peer is a server's client: with the bounds for those."""
    return QueuedConnection(
        callbacks,
        name,
        max_unsent=MAX_UNSENT,
        max_reads=MAX_READS,
        budget=budget,
        loglevel=logging.INFO,  # or else anybody could fill the log
    )


def _text_of(exc: Exception) -> str:
    try:
        return printable(str(exc))
    except Exception:  # of a class of the program's, such as a TLS context of its own raises
        return type(exc).__name__
