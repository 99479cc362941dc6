"""bind and Server: run a handler for each connection. A failed handler does not end the server."""

from __future__ import annotations

import contextlib
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeAlias

import trio

from .. import _fork, _guard
from .._address import Address
from .._arguments import Buffer, bytes_view, quoted, seconds_or_inf
from .._errors import IncompleteReadError
from .._net.connection import Connection
from .._net.socket import Socket, new_socket
from .._not_copyable import NotCopyable
from .._text import message_without_peer
from .._tls.roles import ClientTLS, TLSArgument, TLSRole, resolve_role
from .accepting import Acceptor
from .broadcast import Broadcast
from .handshake_timer import HandshakeTimer
from .listener import Listener, listen, take_over
from .listening import ListeningSockets
from .proxies import ProxyHeaderError, TrustedProxies
from .slots import Slots
from .stats import ServerStats

Handler: TypeAlias = "Callable[[Socket], Awaitable[object]]"

_logger = logging.getLogger("trisock.server")


async def bind(
    nursery: trio.Nursery,
    port_or_listener: int | Listener,
    handler: Handler,
    *,
    host: str | None = None,
    tls: TLSArgument | None = None,
    max_connections: int | None = None,
    max_connections_per_host: int | None = None,
    admit: object = None,
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
    (``BrokenResourceError``, ``TLSError``, ``IncompleteReadError``, ``LimitExceededError``). Any
    other exception is logged at ERROR with a traceback. Anything that is not an ``Exception``
    (``KeyboardInterrupt``, ``SystemExit``) ends the server.

    If a handler leaves a cancel scope open, this counts as the handler's error in two cases: the
    scope has cancelled the handler, or the scope's deadline is earlier than the deadlines of all
    scopes around the server. Other open scopes go unnoticed and cancel nothing. The server cannot
    handle a nursery that is left open: this corrupts Trio's own state.

    Args:
      nursery: runs the server's task. Cancelling the nursery cancels the handlers.
      port_or_listener: the port to ``listen`` on, or a ``Listener``, which the server then owns.
      handler: an async function that takes a ``Socket``.
      host, backlog, reuse_port: as in ``listen``; not allowed with a ``Listener``.
      tls: the server's TLS role, as in ``Socket.starttls``. Each connection then starts with TLS.
        ``None``: each connection starts in plain text.
      max_connections: the maximum number of concurrent connections. A connection counts from just
        before ``accept(2)`` until its handler has ended. Further connections wait in the listener's
        backlog. In addition, the same number of connections may be closing, for at most 2 seconds
        each. So a limit of 1,000 needs memory for 2,000 connections, and clients that never close
        can open 2,000 connections every 2 seconds. ``None``: no limit.
      trusted_proxies: the proxies in front of the server, such as HAProxy: networks
        (``"10.0.0.0/8"``), addresses (``"::1"``) or ``"unix"``. Each connection must then begin
        with a header of the PROXY protocol (version 1 or 2), before TLS. ``getpeer``, ``getlocal``
        and the log show the addresses in the header, unless the proxy itself is the client (health
        checks). A connection from elsewhere, or without a valid header, is reset and logged at
        INFO. ``None``: no connection begins with a header.
      handshake_timeout: the maximum seconds for a TLS handshake, including the PROXY header.
        ``None``: no limit.

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
    if max_connections is not None:
        if not isinstance(max_connections, int) or isinstance(max_connections, bool):
            found = quoted(max_connections)
            raise TypeError(f"max_connections must be an int or None, not {found}")
        if max_connections < 1:
            raise ValueError(f"max_connections must be 1 or more, not {quoted(max_connections)}")
    role = None if tls is None else _server_role(tls)
    proxies = None if trusted_proxies is None else TrustedProxies(trusted_proxies)
    timeout = seconds_or_inf("handshake_timeout", handshake_timeout)
    if isinstance(port_or_listener, Listener):
        if host is not None or backlog is not None or reuse_port:
            raise ValueError("host, backlog and reuse_port are for a port, not for a Listener")
        listener = port_or_listener
    else:
        listener = await listen(port_or_listener, host=host, backlog=backlog, reuse_port=reuse_port)
    server = Server(take_over(listener), handler, role, max_connections, proxies, timeout)
    try:
        if listener is port_or_listener:  # otherwise listen was the checkpoint
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
      closing: a ``trio.Event``, set when the server begins to stop. Idle handlers can wait for it.

    Invariant: a connection is in ``_handshakes`` exactly while ``_open`` waits for its PROXY header
    or for the handshake of ``bind(tls=)``, and in ``_connections`` exactly while its handler runs.
    ``stop`` closes the connections in ``_handshakes``, and ``broadcast`` sends to those in
    ``_connections``.
    """

    def __init__(
        self,
        listening: ListeningSockets,
        handler: Handler,
        tls: TLSRole | None,
        max_connections: int | None,
        proxies: TrustedProxies | None,
        handshake_timeout: float,
    ) -> None:
        self._listening = listening
        self._handler = handler
        self._tls = tls
        self._slots = None if max_connections is None else Slots(max_connections)
        self._proxies = proxies
        self._connections: dict[Connection, Socket] = {}
        self._handshakes = HandshakeTimer(handshake_timeout)
        self._counts: Counter[str] = Counter()
        self._accept_scope = trio.CancelScope()
        self._handler_scope = trio.CancelScope()
        self._handler_nursery: trio.Nursery | None = None
        self._closed = trio.Event()
        self.closing = trio.Event()

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
        back to plain text. If this raises, nothing changes.
        """
        self._tls = _server_role(tls)

    def stop(self, grace: float | None = None) -> None:
        """Begin to stop the server. Synchronous. Handlers may also call this.

        The server stops accepting, sets ``closing`` and drops the ``bind(tls=)`` handshakes that
        are in progress. Handlers may continue for ``grace`` seconds, and are then cancelled. A
        second call can only shorten that time. In a forked child, this closes the child's listening
        sockets and leaves the parent's server alone.

        Args:
          grace: the seconds for which handlers may continue. ``None`` means as long as they need.
        """
        seconds = seconds_or_inf("grace", grace)
        # In a forked child, cancelling tasks would remove descriptors from the parent's epoll set.
        if _fork.in_copied_run():
            self._listening.close()
            return
        self.closing.set()
        self._accept_scope.cancel()
        self._listening.close()
        for connection in self._handshakes:
            connection.close_immediately()
        deadline = trio.current_time() + seconds
        self._handler_scope.deadline = min(self._handler_scope.deadline, deadline)

    async def wait_closed(self) -> None:
        """Wait until the last handler has ended and the last connection is closed.

        Cancelling the wait changes nothing.
        """
        await self._closed.wait()

    async def broadcast(self, data: Buffer, *, timeout: float = 10) -> int:
        """Send the same data to all connections that are open now, concurrently.

        If a handler's send is in progress, the broadcast first waits for the end of this send, and
        thus never splits a handler's message. If the wait takes longer than ``timeout`` seconds,
        the connection is skipped but not aborted, because something other than the client may block
        the handler. After the wait, the connection is aborted if the broadcast's own send takes
        longer than ``timeout`` seconds. A slow client does not delay the others.

        A connection in a handshake, ``starttls`` or ``stoptls`` is skipped, even if that operation
        begins while the broadcast waits for the handler's send. So a connection that used TLS when
        the broadcast began never gets the data in plain text, and a connection that used plain text
        never gets it over TLS. A connection in ``relay`` is skipped in the same way. A client that
        has half-closed its connection still gets the data.

        Args:
          data: the data to send. Mutable data is copied.
          timeout: seconds to wait for the handler's send, and again for the broadcast's own send.
            With ``math.inf``, a client that does not read blocks the call, and so does a handler's
            ``send_file`` from a pipe that is silent.

        Returns: the number of connections to which all of the data was sent (to the kernel's
        buffers).

        If this is cancelled before it begins, nothing is sent. After that, the call is shielded
        from cancellation (for at most twice ``timeout``), because a message that is cut short makes
        its connection unusable. With an infinite ``timeout`` there is no shield: after a
        cancellation it is unknown which connections got all of the data. One that got only part can
        send nothing more. A broadcast also ends when the server's handlers are cancelled.
        """
        content = bytes(bytes_view(data))
        limit = seconds_or_inf("timeout", timeout)
        await trio.lowlevel.checkpoint_if_cancelled()
        targets = [(each, each.generation) for each in self._connections if not each.is_reserved()]
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
                async with trio.open_nursery() as handler_nursery:
                    self._handler_nursery = handler_nursery
                    with self._accept_scope:
                        await self._accept()
        finally:
            self.closing.set()
            self._listening.close()
            self._closed.set()

    async def _accept(self) -> None:
        """Accept connections and time their handshakes, until the server closes."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._handshakes.run)
            await Acceptor(self._listening, self._slots, self.closing, self._start).run()
            nursery.cancel_scope.cancel()

    def _start(self, connection: Connection) -> None:
        """Start a task for a connection."""
        assert self._handler_nursery is not None
        self._handler_nursery.start_soon(self._serve, connection)

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
            if (self._tls is None and self._proxies is None) or await self._open(connection):
                if False:
                    self._counts["refused"] += 1
                else:
                    sock = new_socket(connection)
                    self._connections[connection] = sock
                    try:
                        await self._handler(sock)
                    finally:
                        del self._connections[connection]
        except BaseException as exc:
            failure = exc
        deadline = trio.current_effective_deadline()
        # A finite deadline may come from a cancel scope that the handler entered but never exited.
        if failure is None and deadline == math.inf and connection.close_if_drained():
            self._counts["active"] -= 1
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
        try:
            try:
                if failure is not None:
                    # If the peer sent EOF between two messages, no response to the peer is missing.
                    complete = (
                        connection.caused(failure)
                        and type(failure) is IncompleteReadError
                        and failure.at_boundary
                    )
                    self._log_or_raise(connection, _guard.stray_cancelled(failure) or failure)
                elif deadline < math.inf and deadline < trio.current_effective_deadline():
                    complete = False
                    self._log(connection, RuntimeError("the handler left a cancel scope open"))
            finally:
                # Everything that a handler sent arrives, even if the handler failed. But after a
                # failure we send no close_notify, which would claim that nothing is missing. If the
                # handler was cancelled, close() does not wait: the kernel sends its buffer.
                slots = self._slots
                with contextlib.nullcontext() if slots is None else slots.while_closing():
                    await connection.close(complete=complete)
        finally:
            self._counts["active"] -= 1
            del failure

    def _log_or_raise(self, connection: Connection, failure: BaseException) -> None:
        """Log each ``Exception``, and raise the rest."""
        errors, rest = _guard.split_errors(failure)
        if errors is not None:
            self._log(connection, errors)
        if rest is failure:
            raise failure
        if rest is not None:
            raise rest from None

    async def _open(self, connection: Connection) -> bool:
        """Receive the PROXY header, then do the TLS handshake, within one time limit.

        Returns whether the handler may run.
        """
        if self.closing.is_set():  # Server.stop was called before this task ran
            self._counts["refused"] += 1
            return False
        self._handshakes.add(connection)
        try:
            proxies = self._proxies
            if proxies is not None and not await self._receive_header(proxies, connection):
                return False
            # Here, connection.peer is the client's address, also behind a proxy.
            return self._tls is None or await self._handshake(connection)
        finally:
            self._handshakes.discard(connection)

    async def _receive_header(self, proxies: TrustedProxies, connection: Connection) -> bool:
        """Receive the PROXY header. If that fails, log it and reset the connection."""
        try:
            await proxies.receive_header(connection)
        except ProxyHeaderError as exc:
            self._counts[exc.counter] += 1
            message = "refused the connection with %s: %s"
            _guard.log(_logger, logging.INFO, message, str(connection.peer), str(exc))
            connection.abort()
            return False
        except trio.ClosedResourceError:  # Server.stop was called
            self._counts["refused"] += 1
            return False
        return True

    async def _handshake(self, connection: Connection) -> bool:
        """Do the TLS handshake. Return whether it succeeded, and log a failure."""
        assert self._tls is not None
        try:
            await connection.starttls(
                self._tls, https_compatible=False, timeout=math.inf, close=False
            )
        except Exception as exc:
            if type(exc) is trio.ClosedResourceError and self.closing.is_set():
                self._counts["refused"] += 1
                return False
            self._counts["failed_handshakes"] += 1
            if connection.caused(exc):
                _guard.log(_logger, logging.INFO, "%s", _guard.text(exc))
            else:
                message = "the TLS handshake with %s failed"
                _guard.log(_logger, logging.ERROR, message, str(connection.peer), exc_info=exc)
            return False
        return True

    def _log(self, connection: Connection, errors: BaseException) -> None:
        """Log the ``Exception``, or the group, that a handler raised."""
        each = _guard.leaves(errors)
        if all(connection.caused(leaf) for leaf in each):
            self._counts["peer_errors"] += 1
            if not _guard.is_logged(_logger, logging.INFO):
                return
            why = "; ".join(dict.fromkeys(_reason(leaf) for leaf in each))
            message = "closed the connection with %s: %s"
            _guard.log(_logger, logging.INFO, message, str(connection.peer), why)
        else:
            self._counts["handler_errors"] += 1
            message = "the handler of %s failed"
            _guard.log(_logger, logging.ERROR, message, str(connection.peer), exc_info=errors)


def _reason(exc: BaseException) -> str:
    # A ClosedResourceError gets here only after an abort, by a broadcast or by the handler.
    if type(exc) is trio.ClosedResourceError:
        return "it was aborted"
    return message_without_peer(exc) or _guard.text(exc)
