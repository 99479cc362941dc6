"""bind and Server: run a handler for each connection. A failed handler does not end the server."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

import trio

from .. import _fork
from .._address import Address
from .._arguments import Buffer, bytes_view, check_bool, quoted, seconds_or_inf
from .._net.connection import Connection
from .._net.idle import FRESH_SECONDS
from .._net.server_state import ServerState
from .._net.socket import Socket, new_socket
from .._not_copyable import NotCopyable
from .._tls.roles import ClientTLS, ServerTLS, TLSArgument, TLSRole, resolve_role
from .accepting import Acceptor
from .admission import Admission
from .broadcast import Broadcast, finish_broadcasts, members_of
from .handler_errors import (
    LEFT_OPEN,
    is_cancelled,
    is_complete,
    is_normal_end,
    log,
    log_end_of_grace,
    log_or_raise,
)
from .listener import Listener, listen, take_over
from .listening import ListeningSockets
from .opening import Opening
from .proxies import TrustedProxies
from .slots import Slots
from .stats import ServerStats

Handler: TypeAlias = "Callable[[Socket], Awaitable[object]]"

# If a server stops with ``stop(grace=None)``, this timeout (in seconds) applies to each PROXY
# header and TLS handshake that has no other timeout.
_LAST_HANDSHAKE_TIMEOUT = 60


async def bind(
    nursery: trio.Nursery,
    port_or_listener: int | Listener,
    handler: Handler,
    *,
    host: str | None = None,
    tls: TLSArgument | None = None,
    max_connections: int | trio.CapacityLimiter | None = None,
    max_connections_per_host: int | None = None,
    admit: Callable[[Address], bool] | None = None,
    trusted_proxies: Iterable[str] | None = None,
    handshake_timeout: float | None = 60,
    https_compatible: bool = False,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> Server:
    """Listen, and run ``handler(sock)`` in its own task for each connection.

    The server is listening when this returns. It runs in one task of the nursery, with the
    semantics of ``trio.serve_listeners``. When the handler returns, the socket is closed
    gracefully.

    An ``Exception`` from a handler, alone or in a group, ends only that handler's connection. It is
    logged on the logger ``trisock.server`` with the peer's address. The log entry is one line at
    INFO if the exception comes from the handler's own socket and is one that the peer can cause
    (``BrokenResourceError``, ``TLSError``, ``IncompleteReadError``, ``LimitExceededError``,
    ``IdleTimeoutError``). Two exceptions of the handler's own socket are normal ends, and are not
    logged: ``ServerClosing``, and an ``IncompleteReadError`` whose ``at_boundary`` is True. Any
    other exception is logged at ERROR with a traceback. Anything that is not an ``Exception``
    (``KeyboardInterrupt``, ``SystemExit``) ends the server.

    If a handler leaves a cancel scope open, this counts as the handler's error in two cases: the
    scope has cancelled the handler, or the scope's deadline is earlier than the deadlines of all
    scopes around the server. Other open scopes go unnoticed and cancel nothing. A nursery that a
    handler leaves open corrupts Trio's own state. The server cannot handle this.

    Args:
      nursery: runs the server's task. Cancelling the nursery cancels the handlers.
      port_or_listener: the port to ``listen`` on, or a ``Listener``, which the server then owns.
      handler: an async function that takes a ``Socket``.
      host, backlog, reuse_port: as in ``listen``; not allowed with a ``Listener``.
      tls: the server's TLS role, as in ``Socket.starttls``. Each connection then starts with TLS.
        ``None``: each connection starts in plain text.
      max_connections: the maximum number of concurrent connections. A connection counts from just
        before ``accept(2)`` until its handler has ended. Further connections wait in the listener's
        backlog. The same number of other connections may be closing, for at most 2 seconds each. So
        a limit of 1,000 needs memory for 2,000 connections. Clients that never close their side can
        open 2,000 connections every 2 seconds. Servers that get the same ``trio.CapacityLimiter``
        share its limit; the program may change ``total_tokens`` at any time. ``None``: no limit.
      max_connections_per_host: the maximum number of connections from one host. A connection counts
        until it is closed. A host is an IPv4 address or an IPv6 network (/64); a link-local address
        is a host of its own. Clients of a Unix socket have no host, so this limit does not apply to
        them. A connection above the limit is reset at once and holds no slot. ``None``: no limit.
      admit: a plain function that takes the client's ``Address`` and returns whether the client may
        connect. The function must not block. If it returns False or raises, the connection is reset
        at once and holds no slot. It is called only for clients that are within
        ``max_connections_per_host``. Behind a proxy, both options wait for the address in the PROXY
        header. ``stats().refused`` counts the refused connections. At most once a minute, the log
        gets one line at INFO about a host above its limit, and one line at ERROR about an ``admit``
        that raises.
      trusted_proxies: the proxies in front of the server, such as HAProxy: networks
        (``"10.0.0.0/8"``), addresses (``"::1"``) or ``"unix"``. Each connection must then begin
        with a header of the PROXY protocol (version 1 or 2), before TLS. ``getpeer``, ``getlocal``
        and the log show the addresses in the header, unless the proxy itself is the client (health
        checks). A connection from another address, or without a valid header, is reset and logged
        at INFO. ``None``: no connection begins with a header.
      handshake_timeout: the maximum seconds for a TLS handshake, including the PROXY header.
        ``None``: no limit.
      https_compatible: as in ``Socket.starttls``, for the TLS of ``tls``: a client may end the
        connection without ``close_notify``, and the server sends none.

    Returns: the ``Server``. No handler starts before ``bind`` has returned.

    Raises:
      OSError: as in ``listen``.
      TypeError, ValueError: an argument is invalid. Nothing was started, and a ``Listener`` still
        belongs to the caller.

    A cancelled call leaves nothing listening. Source: Pluto's ``socket.bind``, ``trio.serve_tcp``.
    """
    if not isinstance(nursery, trio.Nursery):
        raise TypeError(f"a server needs a trio.Nursery, not {quoted(nursery)}")
    if not callable(handler):
        raise TypeError(f"a handler must be an async function, not {quoted(handler)}")
    slots = None if max_connections is None else Slots(max_connections)
    admission = None
    if max_connections_per_host is not None or admit is not None:
        admission = Admission(max_connections_per_host, admit)
    role = None if tls is None else _server_role(tls)
    proxies = None if trusted_proxies is None else TrustedProxies(trusted_proxies)
    timeout = seconds_or_inf("handshake_timeout", handshake_timeout)
    check_bool("https_compatible", https_compatible)
    if isinstance(port_or_listener, Listener):
        if host is not None or backlog is not None or reuse_port:
            raise ValueError("host, backlog and reuse_port are for a port, not for a Listener")
        listener = port_or_listener
    else:
        listener = await listen(port_or_listener, host=host, backlog=backlog, reuse_port=reuse_port)
    opening = Opening(role, proxies, admission, timeout, https_compatible=https_compatible)
    server = Server(take_over(listener), handler, opening, slots)
    try:
        if listener is port_or_listener:  # otherwise listen() was a checkpoint
            await trio.lowlevel.checkpoint()
        nursery.start_soon(server._run, name=f"trisock server on {listener.addresses[0]}")
    except BaseException:  # cancelled, or the nursery is closed
        listener.abort()
        raise
    return server


def _server_role(tls: object) -> TLSRole:
    """Return the TLS role for each connection. Raises an error if it is not a server's role."""
    if isinstance(tls, (str, ClientTLS)):
        raise TypeError(f"a server needs certificates, not a {type(tls).__name__}")
    role = resolve_role(tls, server_hostname=None, connected_host=None, side="server")
    if not role.server_side:
        raise ValueError("a server needs the context of a TLS server")
    return role


class Server(NotCopyable):
    """A running server, made by ``bind``.

    Attributes:
      closing: a ``trio.Event``, set when the server begins to stop and lets no new clients in.
    """

    # Invariant: a connection is in _connections exactly while its handler runs. broadcast sends to
    # these connections. _accept_scope.deadline is the time at which closing is set, and
    # _handler_scope.deadline is the end of the grace.

    def __init__(
        self,
        listening: ListeningSockets,
        handler: Handler,
        opening: Opening,
        slots: Slots | None,
    ) -> None:
        self._listening = listening
        self._handler = handler
        self._opening = opening
        self._slots = slots
        self._connections: dict[Connection, Socket] = {}
        self._state = ServerState(self)
        self._counts = opening.counts = self._state.counts
        self._accept_scope = trio.CancelScope()
        self._handler_scope = trio.CancelScope()
        self._handler_nursery: trio.Nursery | None = None
        self._ready = True
        self._closed = trio.Event()
        self.closing = self._state.closing

    def __repr__(self) -> str:
        state = (
            "closed" if self._closed.is_set() else "closing" if self.closing.is_set() else "open"
        )
        where = ", ".join(map(str, self.addresses))
        return f"<trisock.Server {where} {state}, {self._counts['active']} connections>"

    @property
    def port(self) -> int:
        """The port that the server listens on. Still available after the server is closed."""
        return self.addresses[0].port

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All addresses that the server listens on. Still available after the server is closed."""
        return self._listening.addresses

    @property
    def connections(self) -> tuple[Socket, ...]:
        """The sockets whose handlers are running. This excludes ``bind(tls=)`` handshakes."""
        return tuple(self._connections.values())

    def stats(self) -> ServerStats:
        """Return the counters."""
        return ServerStats(dropped=self._listening.dropped, **self._counts)

    def set_tls(self, tls: TLSArgument) -> None:
        """Use other certificates (or other TLS settings) for new connections.

        Raises TypeError or ValueError if ``tls`` is invalid or ``None``: a server does not fall
        back to plain text. Raises RuntimeError if the server was not bound with ``tls``: its
        connections start in plain text, and handlers pass their own role to ``starttls``. If this
        raises, nothing changes.
        """
        if self._opening.tls is None:
            raise RuntimeError("set_tls needs a server that was bound with tls")
        self._opening.tls = _server_role(tls)

    @property
    def ready(self) -> bool:
        """Whether a load balancer should send new clients: False as soon as ``stop`` was called.

        Report this in the health check.
        """
        return self._ready

    def stop(self, grace: float | None = 30, *, delay: float = 0) -> None:
        """Begin to stop the server, without losing a client. Synchronous. Handlers may call this.

        1. For ``delay`` seconds, the server still accepts new clients, but ``ready`` is already
           False. A load balancer can notice this.
        2. Then ``closing`` is set, and the server lets no new clients in. It still serves the
           clients that are in the backlog or in the handshake, and closes its listening sockets.
           (If another process may hold these sockets, the server closes its copies at once, and the
           other process gets the backlog.) Reads in an idle block end (see ``Socket.idle``).
        3. After ``grace`` more seconds, the handlers are cancelled, and all connections are reset.

        A second call can only make these times earlier. In a forked child, this closes the child's
        listening sockets and leaves the parent's server alone.

        On Linux, a filter drops the first packet (SYN) of each new client. The client tries again a
        second later, perhaps at another server. If the system does not allow the filter, new
        clients wait in a full backlog. New clients of a Unix socket get ECONNREFUSED.

        Args:
          grace: the seconds for which handlers may continue. ``None`` means as long as they need; a
            TLS handshake without a timeout then gets 60 seconds. 0 stops everything at once.
          delay: the seconds before the server begins to stop.

        Raises ``ValueError`` or ``TypeError`` if an argument is invalid.
        """
        seconds = seconds_or_inf("grace", grace)
        if delay is None:
            raise TypeError("delay must be a number of seconds, not None")
        begin = trio.current_time() + seconds_or_inf("delay", delay)
        # In a forked child, cancelling tasks would remove descriptors from the parent's epoll set.
        if _fork.in_copied_run():
            self._listening.close()
            return
        self._ready = False
        self._accept_scope.deadline = min(self._accept_scope.deadline, begin)
        self._handler_scope.deadline = min(self._handler_scope.deadline, begin + seconds)
        self._state.limit_grace(self._accept_scope.deadline, self._handler_scope.deadline)
        if self._accept_scope.deadline <= trio.current_time():
            self._begin_closing()
        if self._handler_scope.deadline <= trio.current_time():
            self._listening.close()

    async def wait_closed(self) -> None:
        """Wait until the last handler has ended and the last connection is closed.

        Cancelling the wait does not affect the server.
        """
        await self._closed.wait()

    async def broadcast(
        self, data: Buffer, *, to: Iterable[Socket] | None = None, timeout: float = 10
    ) -> int:
        """Send the same data to many connections of this server, concurrently.

        If a handler's send is in progress, the broadcast first waits for the end of this send, and
        thus never splits a handler's message. If the wait takes longer than ``timeout`` seconds,
        the connection is skipped but not aborted, because something other than the client may block
        the handler. After the wait, the connection is aborted if the broadcast's own send takes
        longer than ``timeout`` seconds. A slow client does not delay the others.

        If a handler ends during the broadcast, its client still gets the whole message. But if that
        takes more than 2 seconds from the handler's end, the connection is aborted.

        A connection in a handshake, ``starttls`` or ``stoptls`` is skipped, even if that operation
        begins while the broadcast waits for the handler's send. So a connection that used TLS when
        the broadcast began never gets the data in plain text, and a connection that used plain text
        never gets it over TLS. A connection in ``relay`` is skipped in the same way. A client that
        has half-closed its connection still gets the data.

        Args:
          data: the data to send. Mutable data is copied.
          to: the sockets to send to, such as the members of a chat room. Closed sockets and sockets
            of other servers are skipped. A socket that occurs twice gets the data once. ``None``:
            all connections that are open now.
          timeout: the maximum seconds to wait for a handler's send, and also the maximum seconds
            for the broadcast's own send. With ``math.inf``, a client that does not read blocks the
            call. A handler's ``send_file`` that waits for data from a pipe also blocks it.

        Returns: the number of connections whose kernel buffer has accepted all of the data.

        Raises TypeError if ``to`` contains anything other than Sockets. Then nothing is sent.

        If this is cancelled before it begins, nothing is sent. After that, the call is shielded
        from cancellation (for at most twice ``timeout``), because a message that is cut short makes
        its connection unusable. With an infinite ``timeout`` there is no shield: after a
        cancellation it is unknown which connections got all of the data. A connection that got only
        part can send nothing more. A broadcast also ends when the server's handlers are cancelled.
        """
        content = bytes(bytes_view(data))
        limit = seconds_or_inf("timeout", timeout)
        members = self._connections if to is None else members_of(self._connections, to)
        await trio.lowlevel.checkpoint_if_cancelled()
        targets = [(each, each.generation) for each in members if not each.is_reserved()]
        if not targets:
            await trio.lowlevel.cancel_shielded_checkpoint()
            return 0
        # The broadcast's tasks run in the handlers' nursery. So cancelling the caller does not
        # directly cancel these tasks.
        assert self._handler_nursery is not None
        broadcast = Broadcast(content, limit)
        self._handler_nursery.start_soon(broadcast.run, targets)
        try:
            with trio.CancelScope(shield=limit < math.inf):
                await broadcast.done.wait()
        except BaseException:
            broadcast.scope.cancel()
            raise
        finally:
            self._counts["aborted"] += broadcast.aborted
        if broadcast.failure is not None:
            raise broadcast.failure
        return broadcast.delivered

    # ---- the server's task ----

    async def _run(self) -> None:
        try:
            with self._handler_scope:
                async with trio.open_nursery() as background:
                    background.start_soon(self._opening.deadlines.run)
                    background.start_soon(self._state.idle_deadlines.run)
                    try:
                        async with trio.open_nursery() as self._handler_nursery:
                            await self._accept(background)
                    finally:
                        self._opening.deadlines.close()
                        self._state.idle_deadlines.close()
                    background.cancel_scope.cancel()
            if self._handler_scope.cancelled_caught and self._counts["cancelled"]:
                log_end_of_grace(self.addresses[0], self._counts["cancelled"])
        finally:
            self._ready = False
            self.closing.set()
            self._listening.close()
            self._closed.set()

    async def _accept(self, background: trio.Nursery) -> None:
        """Accept until the server begins to stop. Then accept the clients in the backlog."""
        acceptor = Acceptor(self._listening, self._slots, self.closing, self._start, background)
        with self._accept_scope:
            await acceptor.run()
        self._begin_closing()
        try:
            await acceptor.drain()
        finally:
            self._listening.close()

    def _begin_closing(self) -> None:
        """Set ``closing``, and end the idle reads. May be called more than once."""
        self.closing.set()
        self._accept_scope.cancel()
        if self._handler_scope.deadline == math.inf:
            self._opening.limit(_LAST_HANDSHAKE_TIMEOUT)
        for connection in self._connections:
            connection.interrupt_idle_read()

    def _start(self, connection: Connection) -> None:
        """Start a task for a connection."""
        if self._opening.admission is not None and self._refuses(connection):
            return
        assert self._handler_nursery is not None
        self._handler_nursery.start_soon(self._serve, connection)

    def _refuses(self, connection: Connection) -> bool:
        """Refuse a connection if its address is not admitted, and then release its slot."""
        refused = True
        try:
            refused = self._opening.refuses_early(connection)
        finally:
            if refused:
                self._counts["accepted"] += 1
                if self._slots is not None:
                    self._slots.release()
        return refused

    async def _serve(self, connection: Connection) -> None:
        """Serve one connection, from its accept until its handler has ended.

        If the handler leaves a cancel scope open, that scope can still cancel this task. So we
        await nothing after the handler. A close that has to wait runs in ``_finish``, in its own
        task. (A cancel scope around each handler would limit the effect to the handler, but would
        cost an eighth of the memory of an idle connection.)
        """
        self._counts["accepted"] += 1
        self._counts["active"] += 1
        failure: BaseException | None = None
        try:
            if self._opening.is_empty() or await self._opening.run(connection):
                connection.server_state = self._state
                if not connection.buffer.size:  # otherwise data came with the handshake
                    connection.fresh_until = trio.current_time() + FRESH_SECONDS
                sock = new_socket(connection)
                self._connections[connection] = sock
                try:
                    await self._handler(sock)
                finally:
                    del self._connections[connection]
        except BaseException as exc:
            failure = None if is_normal_end(connection, exc) else exc
        deadline = trio.current_effective_deadline()
        # A finite deadline may come from a cancel scope that the handler entered but never exited.
        if failure is None and deadline == math.inf and connection.close_if_drained():
            self._forget(connection)
            if self._slots is not None:
                self._slots.release()
        else:
            assert self._handler_nursery is not None
            self._handler_nursery.start_soon(self._finish, connection, failure, deadline)
        del failure  # its traceback refers to this frame

    async def _finish(
        self, connection: Connection, failure: BaseException | None, deadline: float
    ) -> None:
        """Log the handler's exception, and close its connection.

        Args:
          failure: the exception that the handler raised, if any.
          deadline: ``trio.current_effective_deadline()`` when the handler ended.
        """
        complete = True  # whether the handler sent everything it meant to send
        slots = self._slots
        try:
            with contextlib.nullcontext() if slots is None else slots.while_closing():
                try:
                    if failure is not None:
                        complete = is_complete(connection, failure)
                        log_or_raise(connection, failure, self._counts)
                    elif deadline < math.inf and deadline < trio.current_effective_deadline():
                        complete = False
                        why = RuntimeError(LEFT_OPEN)
                        log(connection, why, self._counts)
                except BaseException as exc:
                    has_run = connection.server_state is not None
                    self._counts["cancelled"] += has_run and is_cancelled(exc)
                    # Do not await here: a Cancelled would replace a SystemExit.
                    connection.close_immediately()
                    raise
                self._counts["aborted"] += await finish_broadcasts(connection)
                # Everything that a handler sent arrives, even if the handler failed. But after a
                # failure we send no close_notify, which would claim that nothing is missing.
                await connection.close(complete=complete)
        finally:
            self._forget(connection)
            del failure

    def _forget(self, connection: Connection) -> None:
        """Stop counting a connection that is closed."""
        self._counts["active"] -= 1
        if self._opening.admission is not None:
            self._opening.admission.release(connection)


def server_tls_of(server: Server) -> ServerTLS | None:
    """Return the role of new connections, which a service reloads."""
    return None if server._opening.tls is None else server._opening.tls.server_tls
