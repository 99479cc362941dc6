"""What an object of hs.socket's is while it is in use: a client, or a server with its clients."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

import trisock

from .._guard import log
from .._text import printable
from .callbacks import CallbackLine
from .operations import ReadBudget
from .queues import QueuedConnection, at_most, connection_of_a_server, logger

# How long a client waits for a server of its own program to have the connection (seconds): that is
# some passes through the scheduler, unless the server cannot accept.
_HANDOVER_SECONDS = 1.0

# After so many passes in which a server took no connection, it has taken all that waited. One makes
# the listening socket readable, one accepts, one starts the handler; the rest is to spare.
_QUIET_PASSES = 16

_servers: trio.lowlevel.RunVar[set[QueuedServer]] = trio.lowlevel.RunVar("hammerspoon's servers")


class QueuedClient:
    """A connection that is made, from the moment on when it is asked for.

    Args:
      connect: makes it.
      connected: called, in order with the other callbacks, when it is there.
      callbacks: where those of the object are queued.
      timeout: seconds that ``connect`` may take; ``math.inf`` for no limit.
      name: what it is called in the log.
      path: of a Unix socket, or ``""``.
      sock: the connection, if it is there already.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[trisock.Socket]],
        connected: Callable[[], object] | None,
        callbacks: CallbackLine,
        timeout: float,
        *,
        name: str,
        path: str = "",
        sock: trisock.Socket | None = None,
    ) -> None:
        self.path = path
        self.connections = [QueuedConnection(callbacks, name)]
        self.connections[0].sock = sock
        self._connect = connect
        self._connected = connected
        self._callbacks = callbacks
        self._timeout = timeout
        self._scope = trio.CancelScope()

    def disconnect(self) -> None:
        """Drop what is queued, and end."""
        self._scope.cancel()

    async def run(self, free: Callable[[object], object]) -> None:
        """Connect, and do what is queued until the end; then ``free(self)``, and close."""
        [connection] = self.connections
        sock = connection.sock
        try:
            with self._scope:
                try:
                    if sock is None:
                        with at_most(self._timeout, "the connect"):
                            sock = await self._connect()
                except Exception as exc:
                    connection.fail(exc)
                else:
                    connection.sock = sock
                    log(logger, logging.DEBUG, "%s: connected", printable(str(sock.getpeer())))
                    if self._connected is not None:
                        await _handed_over(sock)
                        self._callbacks.put(self._connected)
                    await connection.run(sock)
        finally:
            connection.sock = None
            free(self)
            if sock is not None:
                await sock.close()


class QueuedServer:
    """A server, each of whose clients has queues of its own.

    Args:
      listener: where it listens; taken over.
      callbacks: where those of the object are queued.
      path: of a Unix socket, or ``""``.
    """

    def __init__(self, listener: trisock.Listener, callbacks: CallbackLine, path: str = "") -> None:
        self.path = path
        self.connections: list[QueuedConnection] = []
        self._listener = listener
        self._callbacks = callbacks
        self._budget = ReadBudget()
        self._server: trisock.Server | None = None
        self._scope = trio.CancelScope()
        # For clients of this program that wait to be taken on.
        self._is_open = True
        self._taken = 0
        self._news = trio.lowlevel.ParkingLot()
        _servers_here().add(self)

    @property
    def addresses(self) -> list[trisock.Address]:
        """Where it listens; IPv4 first, as hs.socket has it."""
        return sorted(self._listener.addresses, key=lambda address: ":" in address.host)

    def disconnect(self) -> None:
        """Stop listening, drop what is queued for the clients, and disconnect them."""
        self._end()
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
                    self._news.unpark_all()
        except Exception as exc:  # accept(2) has failed for good
            where = printable(self.path or str(self.addresses[0]))
            log(logger, logging.ERROR, "the server on %s failed", where, exc_info=exc)
        finally:
            self._end()
            self._listener.abort()
            free(self)

    def _end(self) -> None:
        self._is_open = False
        self._news.unpark_all()
        _servers_here().discard(self)

    async def _serve(self, sock: trisock.Socket) -> None:
        peer = sock.getpeer()
        connection = connection_of_a_server(self._callbacks, f"the client {peer}", self._budget)
        self.connections.append(connection)
        log(logger, logging.DEBUG, "%s: connected", printable(str(peer)))
        self._taken += 1
        try:
            connection.sock = sock
            self._news.unpark_all()
            await connection.run(sock)
        finally:
            self.connections.remove(connection)

    # ---- for clients of the same program ----

    def listens_for(self, sock: trisock.Socket) -> bool:
        """Whether it may be the server that a client of this machine is connected to."""
        here, there = sock.getlocal(), sock.getpeer()
        if there.port == 0:  # a Unix socket
            return there in self.addresses
        # It listens on all addresses.
        is_here = here.host == there.host or there.host.startswith("127.")
        return is_here and any(address.port == there.port for address in self.addresses)

    async def has_taken(self, sock: trisock.Socket) -> None:
        """Wait until a connection to it is among its ``connections``, or it has ended."""
        here, there = sock.getlocal(), sock.getpeer()
        while self._is_open and self._server is None:
            await self._news.park()
        if there.port:
            # The kernel may complete the handshake on its side later than on the client's.
            while self._is_open and not any(
                each.sock is not None and each.sock.getpeer() == here for each in self.connections
            ):
                await self._news.park()
            return
        # Unix sockets have no names to compare, but they are in the listener's queue at once: it is
        # enough to wait until that is empty.
        quiet = 0
        while self._is_open and quiet < _QUIET_PASSES:
            taken = self._taken
            await trio.lowlevel.checkpoint()
            quiet = quiet + 1 if taken == self._taken else 0


def _servers_here() -> set[QueuedServer]:
    """Return the servers of this run of Trio."""
    try:
        return _servers.get()
    except LookupError:
        _servers.set(set())
        return _servers.get()


async def _handed_over(sock: trisock.Socket) -> None:
    """Wait until a server of this program has a connection, if it is to one."""
    for server in tuple(_servers_here()):
        if server.listens_for(sock):
            with trio.move_on_after(_HANDOVER_SECONDS):
                await server.has_taken(sock)
