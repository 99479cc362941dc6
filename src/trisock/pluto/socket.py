"""Pluto's names: ``socket`` and ``listener``. The package's docstring says how to use them."""

from __future__ import annotations

import collections
import contextlib
import functools
import weakref
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Literal, cast

import trio

import trisock

from .blocking import (
    InsideTrio,
    PendingCall,
    Run,
    RunBound,
    async_or_blocking,
    background,
    current_run,
    describe,
    log_reason,
)
from .scheduler import coroutine, scheduler
from .server import server
from .starttls import TLS, TLSOptions, TLSResult
from .tcp import TCPTransport
from .trio_thread import ThreadStartError
from .udp import UDPTransport, connect_udp
from .where import parse_where

if TYPE_CHECKING:
    from .scheduler import Done

Transport = TCPTransport | UDPTransport

__all__ = ["async_socket", "coroutine", "listener", "scheduler", "server", "socket"]

# weakref registers its exit handler when the first finalizer is created. We create one now, because
# exit handlers run in reverse order: the program's exit handlers then run first, and can still use
# the sockets.
weakref.finalize(background, len, ())


class socket(RunBound):  # noqa: N801 (Pluto's name)
    """A connection, made by ``connect`` for a client, by ``accept`` or ``bind`` for a server.

    ``connect`` and ``udpserver`` also make UDP sockets. A UDP socket is not connected: its peer is
    the address that it sends to. Datagrams are not encrypted, and can be lost, arrive twice, or
    arrive in another order.

    Garbage collection closes a socket silently. Calls can also be written as on Pluto's page:
    ``socket.send(s, data)``.
    """

    def __init__(self, transport: Transport, run: Run | None) -> None:
        super().__init__(run)
        self._transport = transport

    def __repr__(self) -> str:
        return f"<trisock.pluto.{type(self).__name__} {self._transport!r}>"

    @staticmethod
    def connect(host: str, port: int, transport: Literal["tcp", "udp"] = "tcp") -> _Made:
        """Connect over TCP, or open a UDP socket. Await it inside Trio; it blocks outside.

        Args:
          host: an IPv4 or IPv6 address, or a name that resolves to one.
          port: the port.
          transport: ``"tcp"`` or ``"udp"``. With UDP, nothing is sent yet, so this succeeds even if
            the peer does not exist. ``recv`` receives only from this peer and those of ``setpeer``.
            If one of these is a multicast or broadcast address, ``recv`` receives from anybody.

        Returns: a socket, or ``None`` on failure.

        Raises ``TypeError`` or ``ValueError`` if there is no such transport. A cancelled call
        leaves nothing open. Source: ``socket.connect``.
        """
        if not isinstance(transport, str):
            raise TypeError(f"a transport must be a str, not {describe(transport)}")
        if transport not in ("tcp", "udp"):
            raise ValueError("a transport must be 'tcp' or 'udp'")
        run = current_run()

        async def make() -> socket | None:
            try:
                if transport == "udp":
                    return _wrap(await connect_udp(host, port), run)
                return _wrap(TCPTransport(await trisock.connect(host, port)), run)
            except (OSError, ValueError) as exc:
                log_reason(exc)
                return None

        if run is not None:
            return cast("_Made", PendingCall(make()))
        try:
            return cast("_Made", background.call(make))
        except ThreadStartError as exc:  # such as EMFILE
            log_reason(exc)
            return cast("_Made", None)

    @staticmethod
    def listen(where: int | str) -> listener | None:
        """Listen for TCP connections. Synchronous.

        Args:
          where: a port (on all addresses of this machine), or an address and a port, such as
            ``"1.2.3.4:567"`` or ``"[::1]:567"``. Port 0 means any free port.

        Returns: a listener, or ``None`` on failure, such as a port already in use.

        Source: ``socket.listen``.
        """
        try:
            return listener(_listen(where), current_run())
        except (OSError, ValueError) as exc:
            log_reason(exc)
            return None

    @staticmethod
    def bind(
        sched: scheduler, where: int | str, handler: Callable[[async_socket], Awaitable[object]]
    ) -> server:
        """Serve a port: run ``handler(s)`` in its own task for each client. Synchronous.

        The server listens immediately. It serves clients while the scheduler runs, and closes each
        socket when its handler returns. If a handler raises an exception, the exception is logged
        on the logger ``trisock.server``, and passed to the scheduler's ``errorfunc``, if any.

        Args:
          sched: the scheduler that runs the server.
          where: a port, or an address and a port, as in ``listen``.
          handler: an async function, or a function that returns an awaitable.

        Returns: the coroutine that was added to the scheduler. Its ``close`` ends the server, and
        its ``port`` is the server's port.

        Raises ``OSError`` or ``ValueError`` if the server cannot listen there, and ``TypeError`` if
        an argument has a wrong type. Source: ``socket.bind``.
        """
        if not isinstance(sched, scheduler):
            raise TypeError(f"a server runs in a scheduler, not in {describe(sched)}")
        if not callable(handler):
            raise TypeError(f"a handler must be an async function, not {describe(handler)}")
        bound = server(_listen(where), handler, _of_server)
        sched.add(bound)
        return bound

    @staticmethod
    def udpserver(where: int | str) -> socket | None:
        """Open a UDP socket for a server. Synchronous.

        ``recv`` returns the next datagram from anybody, and ``send`` then replies to its sender.
        Inside Trio, the result is an ``async_socket``. (To satisfy type checkers, call
        ``async_socket.udpserver`` there.)

        Args:
          where: a port, or an address and a port, as in ``listen``.

        Returns: the socket, or ``None`` on failure, such as a port already in use.

        Source: ``socket.udpserver``.
        """
        try:
            port, host = parse_where(where)
            udp = trisock.open_udp_nowait(port, host=host)
        except (OSError, ValueError) as exc:
            log_reason(exc)
            return None
        return _wrap(UDPTransport(udp, "server"), current_run())

    @async_or_blocking()
    async def send(self, data: str | bytes) -> bool:
        """Send all of the data. Await it inside Trio; it blocks outside.

        Returns: whether the data was sent. After ``False``, nothing more can be sent. But data may
        still arrive, so ``isopen`` may still be True, for example after a Ctrl-C interrupted the
        send. (Pluto's ``send`` returns nothing.)

        A UDP socket sends one datagram to its peer. False means that the datagram was not sent: it
        is too long, or there is no route, for example. True does not mean that the datagram
        arrives.

        Cancellation has the same effect as in ``trisock.Socket.send``. Over UDP, a cancelled call
        has sent nothing. Source: ``socket.send``.
        """
        return await self._transport.send(_to_bytes(data))

    def _undo_recv(self, data: bytes | None) -> None:
        self._transport.undo_recv(data)

    @async_or_blocking(undo=_undo_recv)
    async def recv(self) -> bytes | None:
        """Return the oldest unread chunk. Await it inside Trio; it blocks outside.

        Returns: the data of one read from the kernel or, with TLS, of one record. Returns ``None``
        when the connection is over.

        A UDP socket returns one datagram, and ``None`` only when it is closed. Empty datagrams are
        dropped. If cancelled, ``recv`` consumes nothing. Source: ``socket.recv``.
        """
        return await self._transport.recv()

    @async_or_blocking()
    async def peek(self) -> bytes | None:
        """Return the chunk that ``recv`` would return next, without consuming it or waiting for it.

        Returns: the chunk, or ``None`` if no data has arrived. Inside Trio, the call must still be
        awaited. If cancelled, it consumes nothing. Source: ``socket.peek``.
        """
        return await self._transport.peek()

    def unrecv(self, data: str | bytes) -> None:
        """Push data to the front of the receive buffer: the next ``recv`` returns it. Synchronous.

        If ``starttls`` is called next, it reads the pushed data, such as a ClientHello. After
        ``close``, this does nothing. Source: ``socket.unrecv``.
        """
        self._call(functools.partial(self._transport.unrecv, _to_bytes(data)))

    def _undo_starttls(self, result: object) -> None:
        self._transport.undo_starttls()

    @async_or_blocking(undo=_undo_starttls, intent=lambda self: self._transport.upgrade)
    async def starttls(self, tls: TLS, options: TLSOptions | None = None) -> TLSResult:
        """Upgrade the connection to TLS. Await it inside Trio; it blocks outside.

        Args:
          tls: for a client, the name that the server's certificate must match. For a server, a list
            of certificates, each a mapping with the fields ``chain`` and ``private_key`` (PEM, any
            key type). Any ``tls`` argument of ``trisock.Socket.starttls`` also works.
          options: a dict. A value of ``None`` means that the option is not set.

            - ``alpn``: a list of protocols to negotiate, in order of preference.
            - ``early_data`` (for a client): what to send directly after the handshake. (Python's
              ``ssl`` cannot send it earlier.)
            - ``require_ecdhe`` (for a client): True to offer only the cipher suites that trisock's
              servers accept. All these suites use ECDHE.

        Returns: True on success, False on failure (the socket is then closed), and ``None`` if TLS
        is already in use. With ``alpn``, success returns a tuple, ``(True, protocol)``. The
        protocol is ``None`` if the two sides have none in common.

        A cancellation or a Ctrl-C closes the socket. Invalid certificates and options raise
        ``TypeError`` or ``ValueError`` and leave the connection untouched. For a UDP socket, the
        result is False. Source: ``socket.starttls``.
        """
        return await self._transport.starttls(tls, options)

    @async_or_blocking(intent=lambda self: self._transport.closing)
    async def close(self) -> None:
        """Close the connection; no sent data is lost. Await it inside Trio; it blocks outside.

        If cancelled, it closes immediately. Source: ``socket.close``.
        """
        await self._transport.close()

    def getpeer(self) -> tuple[str, int]:
        """Return the peer's address and port: ``ip, port = s.getpeer()``. Synchronous.

        This works both inside and outside Trio, even after ``close``. The peer of a UDP socket is
        the address that ``send`` sends to. Before a server has received anything, its peer is
        ``("::", 0)``. Source: ``socket.getpeer``.
        """
        return self._transport.getpeer()

    def setpeer(self, ip: str, port: int) -> None:
        """Change the peer that a UDP socket sends to. Synchronous.

        A server's next ``recv`` changes the peer again.

        Args:
          ip: an IPv4 or IPv6 address, not a name.
          port: 1 to 65535.

        Raises ``TypeError`` for a TCP socket, and ``TypeError`` or ``ValueError`` if an argument is
        invalid. Source: ``socket.setpeer``.
        """
        self._call(functools.partial(self._transport.setpeer, ip, port))

    def getside(self) -> Literal["client", "server"]:
        """Return which side of the connection this is. Synchronous. Source: ``socket.getside``."""
        return self._transport.getside()

    def istls(self) -> bool:
        """Return whether the connection is encrypted. Synchronous. Source: ``socket.istls``."""
        return self._transport.istls()

    def isudp(self) -> bool:
        """Return whether this is a UDP socket. Synchronous. Source: ``socket.isudp``."""
        return self._transport.is_udp

    @property
    def port(self) -> int:
        """The local port, which is useful after ``udpserver(0)``.

        Pluto has neither this attribute nor port 0.
        """
        return self._transport.port

    def isopen(self) -> bool:
        """Return whether the connection is open. Synchronous. Source: ``socket.isopen``."""
        return self._call(self._transport.isopen)


class async_socket(socket, InsideTrio):  # noqa: N801 (named like socket)
    """A socket made inside Trio: its calls are awaited."""

    if TYPE_CHECKING:

        @staticmethod
        def udpserver(where: int | str) -> async_socket | None:
            """See ``socket.udpserver``."""


if TYPE_CHECKING:

    class _Made(socket, Awaitable[async_socket | None]):
        """The result of a call that makes a socket: an awaitable inside Trio, a socket outside."""


class listener(RunBound):  # noqa: N801 (Pluto's name)
    """A listening socket, made by ``socket.listen``. Garbage collection closes it silently."""

    def __init__(self, listening: trisock.Listener, run: Run | None) -> None:
        super().__init__(run)
        self._listening = listening
        # accept returns these sockets before it waits for another client.
        self._undelivered: collections.deque[socket] = collections.deque()
        self._closed = False
        weakref.finalize(self, listening.abort)

    def __repr__(self) -> str:
        return f"<trisock.pluto.listener {self._listening!r}>"

    @property
    def port(self) -> int:
        """The local port. (Pluto has neither this attribute nor port 0.)"""
        return self._listening.port

    def _keep(self, accepted: socket | None) -> None:
        if accepted is not None and not self._closed:
            self._undelivered.append(accepted)

    @async_or_blocking(undo=_keep, wrap=PendingCall)
    async def accept(self) -> _Made:
        """Wait for a client. Await it inside Trio; it blocks outside.

        Returns: the client's socket, or ``None`` when the listener is closed. Raises ``OSError`` if
        the system has run out of a resource. A cancelled call has accepted nothing. Source:
        ``accept``.
        """
        accepted = self._undelivered.popleft() if self._undelivered else None
        with contextlib.suppress(trio.ClosedResourceError):
            accepted = accepted or _wrap(TCPTransport(await self._listening.accept()), self._run)
        return cast("_Made", accepted)

    def hasconnection(self) -> bool:
        """Return whether a client is pending. If so, the next ``accept`` does not wait.

        Synchronous. Returns False after ``close``. Source: ``hasconnection``.
        """
        with contextlib.suppress(trio.ClosedResourceError):
            return self._call(lambda: bool(self._undelivered) or self._listening.hasconnection())
        return False

    @async_or_blocking()
    async def close(self) -> Done:
        """Stop listening. Await it inside Trio; it blocks outside.

        The listener is closed even if this call is cancelled. (Pluto has no such call: garbage
        collection closes its listeners.)
        """
        self._closed = True
        self._undelivered.clear()
        self._listening.abort()
        await trio.lowlevel.checkpoint()
        return cast("Done", None)


def _listen(where: int | str) -> trisock.Listener:
    port, host = parse_where(where)
    return trisock.listen_nowait(port, host=host)


def _of_server(sock: trisock.Socket) -> async_socket:
    run = current_run()
    assert run is not None
    return async_socket(TCPTransport(sock, owned=False), run)


def _wrap(transport: Transport, run: Run | None) -> socket:
    return socket(transport, None) if run is None else async_socket(transport, run)


def _to_bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data
