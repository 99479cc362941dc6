"""Connections that do in the background what is queued for them: hs.socket's way.

Each has two queues, for reads and for writes, because a read that waits for the peer must not hold
up the write that the peer waits for. Each is done in order. What changes the connection, TLS,
stands in both: it begins when both have come to it, and both go on when it is done.

A reader that has nothing to do looks out for the end of the stream, and for nothing more than
that: a chunk that it gets meanwhile goes back to the front of the buffer.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

import trio

import trisock

# hs.socket has no bounds. How many bytes a read may look for its delimiter in:
MAX_READ = 16 * 1024 * 1024

# And of a server, whose clients can make it write and read for each other: how many bytes may wait
# for one that does not take them, and how many reads for one that says nothing (a server's callback
# asks for the next line of whoever has spoken, and so for one more of each).
MAX_UNSENT = 64 * 1024 * 1024
MAX_READS = 1000

# Seconds for a handshake that has no limit of its own: a silent peer there is an attack.
_HANDSHAKE_TIMEOUT = 60

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
def _at_most(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise TimeoutError(f"{what} has taken more than {seconds} s") from None


class _Queue:
    """Operations of one direction, done in order; ``meanwhile`` runs while there is none."""

    def __init__(self, meanwhile: Callable[[], Awaitable[object]]) -> None:
        self._meanwhile = meanwhile
        self._operations: deque[Callable[[], Awaitable[object]]] = deque()
        self._idle = trio.CancelScope()

    def __len__(self) -> int:
        return len(self._operations)

    def put(self, operation: Callable[[], Awaitable[object]]) -> None:
        self._operations.append(operation)
        self._idle.cancel()

    async def run(self) -> None:
        while True:
            while not self._operations:
                with trio.CancelScope() as self._idle:
                    await self._meanwhile()
            await self._operations.popleft()()


class Delivery:
    """One message to several connections: ``done`` is called when all that are left have it."""

    def __init__(self, recipients: int, done: Callable[[], object] | None) -> None:
        self._left = recipients
        self._has_arrived = False
        self._done = done

    def over(self, delivered: bool) -> None:
        """Count one recipient: it has the message, or it is lost."""
        self._left -= 1
        self._has_arrived |= delivered
        if not self._left and self._has_arrived and self._done is not None:
            self._done()


class QueuedConnection:
    """One connection and its two queues, which can be filled before it is there.

    Args:
      in_order: calls a function behind the callbacks that are due.
      name: what it is called in the log.
      max_unsent: how many bytes may wait for the peer; one more write ends it then.
      max_reads: how many reads may wait for it; one more is dropped then.
      loglevel: at which level it is logged that something went wrong with the connection.

    Timeouts are in seconds, ``math.inf`` for none, and begin with the operation's turn.

    Invariant: ``_deliveries`` has one for each write that is not done, and ``_unsent`` is how many
    bytes those have.
    """

    def __init__(
        self,
        in_order: Callable[..., object],
        name: str,
        *,
        max_unsent: float = math.inf,
        max_reads: float = math.inf,
        loglevel: int = logging.WARNING,
    ) -> None:
        self.sock: trisock.Socket | None = None  # while it is connected
        self._in_order = in_order
        self._name = name
        self._max_unsent = max_unsent
        self._max_reads = max_reads
        self._loglevel = loglevel
        self._unsent = 0
        self._deliveries: deque[Delivery] = deque()
        self._scope = trio.CancelScope()
        self._reads = _Queue(self._look_out_for_the_end)
        self._writes = _Queue(trio.sleep_forever)

    # ---- plain calls ----

    def read(self, wanted: int | bytes, timeout: float, give: Callable[[bytes], object]) -> None:
        """Queue a read, of so many bytes or up to a delimiter; ``give`` gets what was read."""
        if len(self._reads) < self._max_reads:
            self._reads.put(partial(self._read, wanted, timeout, give))

    def write(self, data: bytes, timeout: float, delivery: Delivery) -> None:
        """Queue a write."""
        if self._unsent > self._max_unsent:
            self.fail(trio.BrokenResourceError(f"{self._unsent} bytes are waiting for it already"))
        self._unsent += len(data)
        self._deliveries.append(delivery)
        self._writes.put(partial(self._write, data, timeout))

    def start_tls(
        self, tls: trisock.ClientTLS | trisock.ServerTLS, name: str | None, timeout: float
    ) -> None:
        """Queue a handshake, behind the reads and writes that are queued now."""
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
        if isinstance(exc, _EXPECTED):
            logger.log(self._loglevel, "%s: %s", self._name, exc)
        else:
            logger.error("%s failed", self._name, exc_info=exc)
        self.disconnect()

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
            logger.debug("%s: disconnected", self._name)
            while self._deliveries:
                self._deliveries.popleft().over(False)

    async def _work_off(self, queue: _Queue) -> None:
        try:
            await queue.run()
        except Exception as exc:
            self.fail(exc)

    async def _read(
        self, wanted: int | bytes, timeout: float, give: Callable[[bytes], object]
    ) -> None:
        assert self.sock is not None
        try:
            with _at_most(timeout, "a read"):
                if isinstance(wanted, int):
                    data = await self.sock.recv_exactly(wanted)
                else:
                    data = await self.sock.recv_until(wanted, max_bytes=MAX_READ)
        except trisock.IncompleteReadError:
            self._end_in_order()
        else:
            logger.debug("%s: data read", self._name)
            give(data)

    async def _look_out_for_the_end(self) -> None:
        assert self.sock is not None
        chunk = await self.sock.recv()
        if not chunk:
            self._end_in_order()
        self.sock.unrecv(chunk)
        await trio.sleep_forever()  # or until there is a read to be done

    def _end_in_order(self) -> None:
        """Disconnect behind the callbacks that are due now, and what they write."""

        async def end() -> None:
            self.disconnect()

        self._in_order(self._writes.put, end)

    async def _write(self, data: bytes, timeout: float) -> None:
        assert self.sock is not None
        with _at_most(timeout, "a write"):
            await self.sock.send(data)
        logger.debug("%s: data written", self._name)
        self._unsent -= len(data)
        self._deliveries.popleft().over(True)

    async def _start_tls(
        self, tls: trisock.ClientTLS | trisock.ServerTLS, name: str | None, timeout: float
    ) -> None:
        assert self.sock is not None
        if self.sock.istls():
            logger.error("%s: it is using TLS already", self._name)
            return
        limit = _HANDSHAKE_TIMEOUT if timeout == math.inf else timeout
        await self.sock.starttls(tls, server_hostname=name, handshake_timeout=limit)
        logger.debug("%s: secured", self._name)


class QueuedClient:
    """A connection that is made, from the moment on when it is asked for.

    Args:
      connect: makes it.
      connected: called (``in_order``) when it is there.
      in_order: calls a function behind the callbacks that are due.
      timeout: seconds that ``connect`` may take; ``math.inf`` for no limit.
      name: what it is called in the log.
      path: of a Unix socket, or ``""``.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[trisock.Socket]],
        connected: Callable[[], object] | None,
        in_order: Callable[..., object],
        timeout: float,
        *,
        name: str,
        path: str = "",
    ) -> None:
        self.path = path
        self.connections = [QueuedConnection(in_order, name)]
        self._connect = connect
        self._connected = connected
        self._in_order = in_order
        self._timeout = timeout
        self._scope = trio.CancelScope()

    def disconnect(self) -> None:
        """Drop what is queued, and end."""
        self._scope.cancel()

    async def run(self, free: Callable[[object], object]) -> None:
        """Connect, and do what is queued until the end; then ``free(self)``, and close."""
        sock = None
        [connection] = self.connections
        try:
            with self._scope:
                try:
                    with _at_most(self._timeout, "the connect"):
                        sock = await self._connect()
                except Exception as exc:
                    connection.fail(exc)
                else:
                    logger.debug("%s: connected", sock.getpeer())
                    if self._connected is not None:
                        self._in_order(self._connected)
                    await connection.run(sock)
        finally:
            free(self)
            if sock is not None:
                await sock.close()


class QueuedServer:
    """A server, each of whose clients has queues of its own.

    Args:
      listener: where it listens; taken over.
      in_order: calls a function behind the callbacks that are due.
      path: of a Unix socket, or ``""``.
    """

    def __init__(
        self, listener: trisock.Listener, in_order: Callable[..., object], path: str = ""
    ) -> None:
        self.path = path
        self.connections: list[QueuedConnection] = []
        self._listener = listener
        self._in_order = in_order
        self._server: trisock.Server | None = None
        self._scope = trio.CancelScope()

    @property
    def addresses(self) -> list[trisock.Address]:
        """Where it listens; IPv4 first, as hs.socket has it."""
        return sorted(self._listener.addresses, key=lambda address: ":" in address.host)

    def disconnect(self) -> None:
        """Stop listening, drop what is queued for the clients, and disconnect them."""
        if self._server is None:
            self._scope.cancel()
            self._listener.abort()
        else:
            self._server.stop()
        for connection in self.connections:
            connection.disconnect()

    async def run(self, free: Callable[[object], object]) -> None:
        """Serve until the end; then ``free(self)``."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._server = await trisock.bind(nursery, self._listener, self._serve)
        except Exception as exc:  # accept(2) has failed for good
            logger.error("the server on %s failed", self.path or self.addresses[0], exc_info=exc)
        finally:
            self._listener.abort()
            free(self)

    async def _serve(self, sock: trisock.Socket) -> None:
        connection = QueuedConnection(
            self._in_order,
            f"the client {sock.getpeer()}",
            max_unsent=MAX_UNSENT,
            max_reads=MAX_READS,
            loglevel=logging.INFO,  # or else anybody could fill the log
        )
        self.connections.append(connection)
        logger.debug("%s: connected", sock.getpeer())
        try:
            await connection.run(sock)
        finally:
            self.connections.remove(connection)
