"""Endpoint: the socket of an hs.socket.udp object, with its queue of sends and connects."""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import trio

import trisock

from ..._guard import log, text
from ..callbacks import PendingCallbacks, cost
from ..queues import logger
from .lookup import known_hosts, look_up
from .receiving import Receiving
from .settings import Settings, choose_host, version_of

# The maximum cost in bytes of the sends that an object has queued. Sends wait for a lookup, for
# room in the kernel's buffer, or for callbacks. Further sends are dropped, as in a full network.
MAX_UNSENT = 16 * 1024 * 1024

# The errnos that report an ICMP error about an earlier datagram. A send that raises such an error
# has sent nothing.
_ICMP_ERRNOS = {errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ECONNRESET}

# These exceptions are logged as one line. All others are logged with a traceback.
_EXPECTED = (OSError, ValueError)


@dataclass(eq=False, slots=True)
class Send:
    """One datagram to send. Without a host, it goes to the peer of ``connect``.

    ``timeout`` is in seconds; ``math.inf`` means no timeout.
    """

    data: bytes
    host: str | None
    port: int
    tag: int
    fn: Callable[..., object] | None
    timeout: float

    @property
    def cost(self) -> int:
        """The memory cost in bytes."""
        return cost(self.data, self.host, self.tag)


@dataclass(eq=False, slots=True)
class Connect:
    """A connect that waits for a lookup, or for earlier sends."""

    host: str
    port: int
    fn: Callable[..., object] | None

    @property
    def cost(self) -> int:
        """The memory cost in bytes."""
        return cost(self.host)


class Endpoint:
    """An open socket. It receives datagrams, and sends the queued ones in order.

    Args:
      owner: the object, for the log.
      settings: the object's settings.
      callbacks: the object's queued callbacks.
      sock: the socket, or ``None`` if ``connect`` is called next.
      is_server: whether ``listen`` has bound the socket.

    Attributes:
      sock: the socket, or ``None`` before the first connect has succeeded.
      has_peer: whether ``connect`` was called. From then on, sends take no host.
      is_over: whether the endpoint is closed. A closed endpoint cannot be used again.

    Invariant: ``_unsent`` is the cost of the queued operations and the current one. No connect is
    queued or running unless ``has_peer`` is set.
    """

    def __init__(
        self,
        owner: object,
        settings: Settings,
        callbacks: PendingCallbacks,
        sock: trisock.UDPSocket | None,
        *,
        is_server: bool = False,
    ) -> None:
        self.sock = sock
        self.is_server = is_server
        self.has_peer = False
        self.is_over = False
        self.receiving = Receiving(owner, sock, settings, callbacks, self._report)
        self._owner = owner
        self._settings = settings
        self._callbacks = callbacks
        self._operations: deque[Send | Connect] = deque()
        self._unsent = 0
        self._is_full = False
        self._added = trio.lowlevel.ParkingLot()
        self._scope = trio.CancelScope()

    @property
    def versions(self) -> set[int]:
        """The IP versions of the socket."""
        if self.sock is None:
            return set()
        if version_of(self.sock.getlocal().host) == 4:
            return {4}
        # A socket on all IPv6 addresses also has IPv4, unless the program has disabled IPv4.
        return {6} if self.sock.getpeer() is not None else set(self._settings.enabled)

    # ---- synchronous calls ----

    def send(self, send: Send) -> None:
        """Queue a datagram, or drop it if too much is queued."""
        if self._unsent and self._unsent + send.cost > MAX_UNSENT:
            if not self._is_full:  # log once each time the queue becomes full
                self._is_full = True
                self._report(OSError(f"datagrams are dropped: {self._unsent} bytes are queued"))
            return
        self._is_full = False
        self._queue(send)

    def connect(self, host: str, port: int, fn: Callable[..., object] | None) -> None:
        """Connect now if nothing is queued and the host needs no lookup, else queue the connect."""
        self.has_peer = True
        connect, hosts = Connect(host, port, fn), known_hosts(host)
        if hosts is None or self._unsent:
            self._queue(connect)
        else:
            self._try_connect(connect, hosts)

    def close(self) -> None:
        """Close the socket, drop the queued operations, and end ``run``."""
        if not self.is_over:
            log(logger, logging.DEBUG, "%r: closed", self._owner)
        self.is_over = True
        self._operations.clear()
        self._scope.cancel()
        if self.sock is not None:
            self.sock.abort()

    def _queue(self, operation: Send | Connect) -> None:
        self._operations.append(operation)
        self._unsent += operation.cost
        self._added.unpark_all()

    # ---- in the background ----

    async def run(self) -> None:
        """Send and receive until closed."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self.receiving.run)
                    nursery.start_soon(self._run_operations)
        finally:
            self.close()

    async def _run_operations(self) -> None:
        while True:
            while not self._operations:
                await self._added.park()
            operation = self._operations.popleft()
            try:
                if isinstance(operation, Connect):
                    await self._look_up_and_connect(operation)
                else:
                    await self._perform(operation)
            finally:
                self._unsent -= operation.cost

    async def _look_up_and_connect(self, connect: Connect) -> None:
        try:
            hosts = known_hosts(connect.host) or await look_up(connect.host, connect.port)
        except Exception as exc:
            self._connect_failed(exc)
        else:
            self._try_connect(connect, hosts)

    def _try_connect(self, connect: Connect, hosts: Sequence[str]) -> None:
        settings = self._settings
        try:
            target = connect.host, connect.port
            host = choose_host(hosts, settings.enabled, settings.preferred, target)
            sock = trisock.connect_udp_nowait(host, connect.port, broadcast=settings.broadcast)
        except Exception as exc:
            self._connect_failed(exc)
            return
        if self.sock is not None:  # an earlier send has opened the socket
            self.sock.abort()
        self.sock = sock
        self.receiving.replace_socket(sock)
        log(logger, logging.DEBUG, "%r: connected", self._owner)
        if connect.fn is not None:
            self._callbacks.put(connect.fn)

    def _connect_failed(self, exc: Exception) -> None:
        self._report(exc)
        self.has_peer = False
        # Drop the sends behind the connect, which have no host.
        self._unsent -= sum(operation.cost for operation in self._operations)
        self._operations.clear()
        if self.sock is None:
            self.close()

    async def _perform(self, send: Send) -> None:
        if send.fn is not None:
            await self._callbacks.wait_for_room()
        try:
            with _time_limit(send.timeout):
                await self._send(send)
        except Exception as exc:
            self._report(exc)
            await trio.lowlevel.checkpoint()  # let other tasks run: many sends may fail
        else:
            log(logger, logging.DEBUG, "%r: data written", self._owner)
            if send.fn is not None:
                self._callbacks.put(send.fn, send.tag)

    async def _send(self, send: Send) -> None:
        assert self.sock is not None
        if send.host is not None:
            hosts = known_hosts(send.host) or await look_up(send.host, send.port)
            target = send.host, send.port
            host = choose_host(hosts, self.versions, self._settings.preferred, target)
            await self.sock.send(send.data, (host, send.port))
            return
        try:
            await self.sock.send(send.data)
        except OSError as exc:
            if exc.errno not in _ICMP_ERRNOS:
                raise
            await self.sock.send(send.data)
            self._report(exc)  # an earlier datagram has failed, not this one

    def _report(self, exc: Exception) -> None:
        """Log an error of the socket."""
        if issubclass(type(exc), _EXPECTED):
            # At WARNING, the default level, anyone could flood a server's log with datagrams that
            # the server cannot answer.
            level = logging.INFO if self.is_server else logging.WARNING
            log(logger, level, "%r: %s", self._owner, text(exc))
        else:
            log(logger, logging.ERROR, "%r failed", self._owner, exc_info=exc)


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """Raise ``TimeoutError`` if a send in the block has to wait longer than ``seconds``."""
    with trio.CancelScope() as scope:
        # Do not pass the deadline to CancelScope: a timeout of 0 seconds would then cancel even a
        # send that need not wait.
        scope.deadline = trio.current_time() + seconds
        yield
    if scope.cancelled_caught:
        raise TimeoutError(f"a send took more than {seconds} s")
