"""The endpoints of an hs.socket object: a client, or a server with its clients."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable

import trio

import trisock

from .._guard import log
from .._text import printable
from .callbacks import PendingCallbacks
from .operations import ReadBudget
from .queues import QueuedConnection, accepted_connection, logger, time_limit

# A client waits at most this long (seconds) for a server in the same program to accept the
# connection. Usually, the server accepts within a few passes of the scheduler.
_ACCEPT_SECONDS = 1.0

# If a server accepts nothing for this many passes of the scheduler, we assume that it has accepted
# all pending connections. Accepting takes three passes: the listening socket becomes readable, the
# server accepts, and the handler starts. The other passes are a safety margin.
_QUIET_PASSES = 16

_servers: trio.lowlevel.RunVar[set[QueuedServer]] = trio.lowlevel.RunVar("hammerspoon's servers")


class QueuedClient:
    """A client: connecting at first, then connected.

    Args:
      connect: makes the connection.
      connected: called when the client is connected, in order with the other callbacks.
      callbacks: the object's queued callbacks.
      timeout: seconds that ``connect`` may take; ``math.inf`` for no limit.
      name: the client's name in the log.
      path: the path of a Unix socket, or ``""``.
      sock: the connection, if the client is already connected.
    """

    def __init__(
        self,
        connect: Callable[[], Awaitable[trisock.Socket]],
        connected: Callable[[], object] | None,
        callbacks: PendingCallbacks,
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
        self._disconnected = False

    def disconnect(self) -> None:
        """Drop the queued operations, and end ``run``."""
        self._disconnected = True
        self._scope.cancel()

    async def run(self, finish: Callable[[object], object]) -> None:
        """Connect, and do the queued operations until disconnected.

        Then call ``finish(self)``, and close.
        """
        [connection] = self.connections
        sock = connection.sock
        try:
            with self._scope:
                try:
                    if sock is None:
                        with time_limit(self._timeout, "the connect"):
                            sock = await self._connect()
                except Exception as exc:
                    connection.fail(exc)
                else:
                    connection.sock = sock
                    log(logger, logging.DEBUG, "%s: connected", printable(str(sock.getpeer())))
                    if self._connected is not None:
                        await _wait_accepted(sock)
                        self._callbacks.put(self._connected)
                    await connection.run(sock)
        finally:
            connection.sock = None
            finish(self)
            if sock is not None:
                # If the program has disconnected, the end of open_sockets must not cancel the
                # close: the peer could miss close_notify. The close has its own time limit.
                with trio.CancelScope(shield=self._disconnected):
                    await sock.close()


class QueuedServer:
    """A server. Each of its clients has its own queues.

    Args:
      listener: the listener, which the server then owns.
      callbacks: the object's queued callbacks.
      path: the path of a Unix socket, or ``""``.
    """

    def __init__(
        self, listener: trisock.Listener, callbacks: PendingCallbacks, path: str = ""
    ) -> None:
        self.path = path
        self.connections: list[QueuedConnection] = []
        self._listener = listener
        self._callbacks = callbacks
        self._budget = ReadBudget()
        self._server: trisock.Server | None = None
        self._scope = trio.CancelScope()
        # Clients in the same program use these to wait until the server has accepted them.
        self._is_open = True
        self._accepted = 0
        self._changed = trio.lowlevel.ParkingLot()
        _local_servers().add(self)

    @property
    def addresses(self) -> list[trisock.Address]:
        """The addresses that the server listens on: IPv4 first, as in hs.socket."""
        return sorted(self._listener.addresses, key=lambda address: ":" in address.host)

    def disconnect(self) -> None:
        """Stop listening, drop the queued operations of all clients, and disconnect the clients."""
        self._end()
        if self._server is None:
            self._scope.cancel()
            self._listener.abort()
        else:
            # As in QueuedClient.run, the end of open_sockets does not cut off the closes.
            self._scope.shield = True
            self._server.stop(grace=None)
            self._listener.abort()
        for connection in self.connections:
            connection.disconnect()

    async def run(self, finish: Callable[[object], object]) -> None:
        """Serve until stopped or failed, then call ``finish(self)``."""
        try:
            with self._scope:
                async with trio.open_nursery() as nursery:
                    self._server = await trisock.bind(nursery, self._listener, self._serve)
                    self._changed.unpark_all()
        except Exception as exc:  # accept(2) failed permanently, or disconnect came first
            if not self._is_open:
                return
            where = printable(self.path or str(self.addresses[0]))
            log(logger, logging.ERROR, "the server on %s failed", where, exc_info=exc)
        finally:
            self._end()
            self._listener.abort()
            finish(self)

    def _end(self) -> None:
        self._is_open = False
        self._changed.unpark_all()
        _local_servers().discard(self)

    async def _serve(self, sock: trisock.Socket) -> None:
        if not self._is_open:  # disconnected after it had accepted this client
            return
        peer = sock.getpeer()
        connection = accepted_connection(self._callbacks, f"the client {peer}", self._budget)
        self.connections.append(connection)
        log(logger, logging.DEBUG, "%s: connected", printable(str(peer)))
        self._accepted += 1
        try:
            connection.sock = sock
            self._changed.unpark_all()
            await connection.run(sock)
        finally:
            self.connections.remove(connection)

    # ---- for clients of the same program ----

    def may_be_peer(self, sock: trisock.Socket) -> bool:
        """Return whether a local client's socket may be connected to this server."""
        here, there = sock.getlocal(), sock.getpeer()
        if there.port == 0:  # a Unix socket
            return there in self.addresses
        # The server listens on all addresses.
        is_here = here.host == there.host or there.host.startswith("127.")
        return is_here and any(address.port == there.port for address in self.addresses)

    async def wait_accepted(self, sock: trisock.Socket) -> None:
        """Wait until a client's connection is in ``connections``, or the server has ended."""
        here, there = sock.getlocal(), sock.getpeer()
        while self._is_open and self._server is None:
            await self._changed.park()
        if there.port:
            # The TCP handshake may complete later on the server's side than on the client's.
            while self._is_open and not any(
                each.sock is not None and each.sock.getpeer() == here for each in self.connections
            ):
                await self._changed.park()
            return
        # Unix clients have no address to compare. But the connection of a Unix client is in the
        # backlog immediately, so it is enough to wait until the backlog is empty.
        quiet = 0
        while self._is_open and quiet < _QUIET_PASSES:
            accepted = self._accepted
            await trio.lowlevel.checkpoint()
            quiet = quiet + 1 if accepted == self._accepted else 0


def _local_servers() -> set[QueuedServer]:
    """Return the servers of this run of Trio."""
    try:
        return _servers.get()
    except LookupError:
        _servers.set(set())
        return _servers.get()


async def _wait_accepted(sock: trisock.Socket) -> None:
    """If a client's server is in this program, wait until the server has accepted the client."""
    for server in tuple(_local_servers()):
        if server.may_be_peer(sock):
            with trio.move_on_after(_ACCEPT_SECONDS):
                await server.wait_accepted(sock)
