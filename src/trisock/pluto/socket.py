"""Pluto's ``socket`` library: the same names, the same results.

For scripts, the REPL, and ports of Pluto programs::

    from trisock.pluto import scheduler, socket

    s = socket.connect("localhost", 8080)
    s.send("GET / HTTP/1.1\\r\\nHost: localhost\\r\\n\\r\\n")
    print(s.recv())

What Pluto does in a coroutine, where calls yield, is done here in a Trio task, where they are
awaited: ``await s.recv()``. Outside of one its calls block, and so they do here outside Trio, where
one background thread does the work for the whole process. A socket stays on the side it was made
on: to use it on the other is a ``RuntimeError``.

Failures are Pluto's too: ``None`` and ``False`` in place of exceptions. The reasons are on the
logger ``trisock.pluto``, at the level INFO. Mistakes in the program (``TypeError``, two tasks
reading at once, a certificate that is none) are exceptions all the same. Data is ``bytes``; where
it goes out, ``str`` is taken as UTF-8.

For type checkers ``socket`` is what a script sees, whose calls give results, and ``async_socket``
what a Trio task sees, whose calls are awaited.

Source: Pluto's documentation, page "Socket". ``docs/dialects.md`` has what differs.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import inspect
import weakref
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, cast

import trio

import trisock

from .announced import Announced
from .blocking import (
    Awaited,
    OneSided,
    Run,
    ToBeAwaited,
    background,
    close_descriptor,
    current_run,
    log_reason,
    shown,
    taken_back_by,
    waits,
)
from .scheduler import scheduler
from .trio_thread import ThreadStartError

if TYPE_CHECKING:
    from .scheduler import Done

__all__ = ["async_socket", "listener", "scheduler", "socket"]

TLS = (
    str
    | Sequence[trisock.Certificate | Mapping[str, str | bytes]]
    | trisock.ClientTLS
    | trisock.ServerTLS
)

# The first finaliser decides when they all are called at exit: after exit handlers that are set
# from now on, and so may still use their sockets.
weakref.finalize(background, len, ())

# What Pluto has no exceptions for: the connection is over.
_OVER = (trio.BrokenResourceError, trio.ClosedResourceError)


class socket(OneSided):  # noqa: N801 (Pluto's name)
    """A connection: a client made by ``connect``, or a server's by ``listen`` or ``bind``.

    One that is dropped is closed when it is collected, without a word. Calls can also be written
    as on Pluto's page: ``socket.send(s, data)``.
    """

    def __init__(self, sock: trisock.Socket, run: Run | None, *, owned: bool = True) -> None:
        super().__init__(run)
        self._sock = sock
        self._taken_back = b""  # what could not be pushed back yet
        self._upgrade, self._end = Announced(sock), Announced(sock)
        if owned:  # a server's is not: to close the descriptor under it would crash it
            weakref.finalize(self, close_descriptor, sock.stream.socket)

    def __repr__(self) -> str:
        return f"<trisock.pluto.{type(self).__name__} {self._sock!r}>"

    @staticmethod
    def connect(host: str, port: int) -> _Made:
        """Connect over TCP.

        Args:
          host: an IPv4 or IPv6 address, or a name that resolves to one.
          port: the port.

        Returns: a socket, or ``None`` on failure. Awaited inside Trio, blocks outside.

        Source: ``socket.connect``.
        """
        run = current_run()

        async def make() -> socket | None:
            try:
                return _wrap(await trisock.connect(host, port), run)
            except (OSError, ValueError) as exc:
                log_reason(exc)
                return None

        if run is not None:
            return cast("_Made", ToBeAwaited(make()))
        try:
            return cast("_Made", background.call(make))
        except ThreadStartError as exc:  # no descriptors left, for instance
            log_reason(exc)
            return cast("_Made", None)

    @staticmethod
    def listen(port: int) -> listener | None:
        """Listen on a port, of all addresses of this machine: a plain call.

        Args:
          port: the port; 0 for a free one (``listener.port`` tells which).

        Returns: a listener, or ``None`` on failure, such as a port that is taken.

        Source: ``socket.listen``.
        """
        try:
            return listener(trisock.listen_nowait(port), current_run())
        except (OSError, ValueError) as exc:
            log_reason(exc)
            return None

    @staticmethod
    def bind(
        sched: scheduler, port: int, handler: Callable[[async_socket], Awaitable[object]]
    ) -> listener:
        """Serve a port: ``handler(s)`` in a task of its own for each client. A plain call.

        It listens at once; clients are served when the scheduler runs. The socket belongs to the
        server, which closes it when the handler returns. What a handler raises is logged
        on the logger ``trisock.server``.

        Args:
          sched: the scheduler that runs it.
          port: the port; 0 for a free one (the listener's ``port`` tells which).
          handler: an async function, or one that returns an awaitable, which is awaited.

        Returns: the listener; its ``close`` ends the serving, when the last handler is done.

        Raises ``OSError`` where it cannot listen: Pluto's own raises too. Source: ``socket.bind``.
        """
        if not callable(handler):
            raise TypeError(f"a handler is an async function, not {shown(handler)}")
        bound = listener(trisock.listen_nowait(port), current_run())
        sched.add(functools.partial(bound._serve, handler))
        return bound

    @waits
    async def send(self, data: str | bytes) -> bool:
        """Send data, all of it.

        Returns: whether it could be sent; ``False`` means that nothing more can be, also where
        there is more to receive and ``isopen`` is True, as after a Ctrl-C in a send. Awaited inside
        Trio, blocks outside. (Pluto returns nothing.) Source: ``socket.send``.
        """
        try:
            self._check()
            await self._sock.send(_to_bytes(data))
        except _OVER as exc:
            return self._is_over(exc)
        return True

    def _unrecv(self, data: bytes | None) -> None:
        self._taken_back += data or b""
        # Another thread may be reading by now: then the next call pushes it back.
        with contextlib.suppress(trio.BusyResourceError):
            self._push_back()

    def _push_back(self, more: bytes = b"") -> None:
        self._check()
        if self._taken_back:
            with contextlib.suppress(*_OVER):  # closed: it has no place to go back to
                self._sock.unrecv(self._taken_back)
            self._taken_back = b""
        if more != b"":
            self._sock.unrecv(more)

    @taken_back_by(_unrecv)
    async def recv(self) -> bytes | None:
        """Return the oldest chunk: what one read of the connection gave or, under TLS, one record.

        Returns: the chunk; ``None`` when the connection is over. Awaited inside Trio, blocks
        outside. Source: ``socket.recv``.
        """
        try:
            self._push_back()
            return await self._sock.recv() or None
        except _OVER as exc:
            self._is_over(exc)
            return None

    @waits
    async def peek(self) -> bytes | None:
        """Return what ``recv`` would return next, without consuming it and without waiting for it.

        Returns: the chunk; ``None`` if nothing has arrived. To be awaited inside Trio all the
        same. Source: ``socket.peek``.
        """
        try:
            self._push_back()
            return await self._sock.peek() or None
        except _OVER as exc:
            self._is_over(exc)
            return None

    def unrecv(self, data: str | bytes) -> None:
        """Push data to the front of the receive buffer: the last pushed is the first received.

        Pushed before ``starttls``, it is given back to that: a ClientHello, for instance.
        After ``close`` it does nothing. A plain call. Source: ``socket.unrecv``.
        """
        chunk = _to_bytes(data)
        try:
            self._at_once(functools.partial(self._push_back, chunk))
        except _OVER as exc:
            self._is_over(exc)

    @taken_back_by(lambda self, _: self._sock.abort(), announced="_upgrade")
    async def starttls(self, tls: TLS) -> bool | None:
        """Add TLS to the connection.

        Args:
          tls: for the client's role, the name that the server's certificate must be for. For the
            server's, a list of certificates, each a mapping with the fields ``chain`` and
            ``private_key`` (PEM, any kind of key). Or what ``trisock.Socket.starttls`` takes.

        Returns: True on success. False on failure; the socket is closed. ``None`` if it is using
        TLS already. Awaited inside Trio, blocks outside.

        A Ctrl-C closes the socket. Raises ``TypeError`` or ``ValueError`` for certificates that
        cannot be used; the connection is untouched. Source: ``socket.starttls``.
        """
        with self._upgrade.work():
            if self._sock.istls():
                return None
            try:
                self._push_back()
                await self._sock.starttls(tls)
            except _OVER as exc:
                await self._sock.close()  # where it was broken before TLS began
                return self._is_over(exc)
            return True

    @taken_back_by(None, announced="_end")
    async def close(self) -> None:
        """Close the connection; nothing that was sent is lost.

        Awaited inside Trio, blocks outside. Source: ``socket.close``.
        """
        with self._end.work():
            await self._sock.close()

    def getpeer(self) -> tuple[str, int]:
        """Return the other end's address and port: ``ip, port = s.getpeer()``.

        A plain call, on any side, also after ``close``. Source: ``socket.getpeer``.
        """
        return self._sock.getpeer()

    def getside(self) -> Literal["client", "server"]:
        """Return which side of the connection it is. A plain call. Source: ``socket.getside``."""
        return self._sock.getside()

    def istls(self) -> bool:
        """Return whether the connection is encrypted. A plain call. Source: ``socket.istls``."""
        return self._sock.istls()

    def isopen(self) -> bool:
        """Return whether the connection is open. A plain call. Source: ``socket.isopen``."""
        return self._at_once(
            lambda: self._check() and (bool(self._taken_back) or self._sock.isopen())
        )

    def _check(self) -> bool:
        return self._upgrade.check() and self._end.check()

    def _is_over(self, reason: Exception) -> Literal[False]:
        log_reason(reason, f"{self._sock.getpeer()}: ")
        return False


class async_socket(socket, Awaited):  # noqa: N801 (as the one above)
    """A socket that was made inside Trio: its calls are awaited."""


if TYPE_CHECKING:

    class _Made(socket, Awaitable[async_socket | None]):
        """A new socket: outside Trio it is one, inside it is waited for."""


class listener(OneSided):  # noqa: N801 (Pluto's name)
    """Accepts connections, made by ``socket.listen``. Closed when collected, without a word."""

    def __init__(self, listening: trisock.Listener, run: Run | None) -> None:
        super().__init__(run)
        self._listening = listening
        self._kept: collections.deque[socket] = collections.deque()  # for the next accepts
        self._serving = self._closed = False
        self._server: trisock.Server | None = None
        weakref.finalize(self, listening.abort)

    def __repr__(self) -> str:
        return f"<trisock.pluto.listener {self._listening!r}>"

    @property
    def port(self) -> int:
        """The port that it listens on. (Pluto cannot tell, and has no port 0.)"""
        return self._listening.port

    def _keep(self, accepted: socket | None) -> None:
        if accepted is not None and not self._closed:
            self._kept.append(accepted)

    @taken_back_by(_keep, ToBeAwaited)
    async def accept(self) -> _Made:
        """Wait for a client.

        Returns: its socket; ``None`` when the listener is closed. Awaited inside Trio, blocks
        outside. Raises ``OSError`` where the system has run out of something. Source: ``accept``.
        """
        accepted = self._kept.popleft() if self._kept else None
        with contextlib.suppress(trio.ClosedResourceError):
            accepted = accepted or _wrap(await self._listening.accept(), self._run)
        return cast("_Made", accepted)

    def hasconnection(self) -> bool:
        """Return whether there is a client: if so, the next ``accept`` does not wait.

        A plain call. False once it is closed. Source: ``hasconnection``.
        """
        with contextlib.suppress(trio.ClosedResourceError):
            return self._at_once(lambda: bool(self._kept) or self._listening.hasconnection())
        return False

    @waits
    async def close(self) -> Done:
        """Stop listening. One of ``bind`` ends its server, when the last handler is done.

        Awaited inside Trio, blocks outside. (In Pluto it ends when it is collected.)
        """
        self._closed = True
        self._kept.clear()
        if self._server is not None:
            self._server.stop()
        elif not self._serving:
            self._listening.abort()
        await trio.lowlevel.checkpoint()
        return cast("Done", None)

    async def _serve(self, handler: Callable[[async_socket], Awaitable[object]]) -> None:
        """Run a server until it is closed. While it runs, the listener is on its side."""

        async def handle(sock: trisock.Socket) -> None:
            waiting = handler(async_socket(sock, self._run, owned=False))
            if not inspect.isawaitable(waiting):  # nothing that it has sent has gone out
                raise TypeError(f"a handler is an async function, which {shown(handler)} is not")
            await waiting

        if self._closed:
            return
        self._serving = True
        bound_in, self._run = self._run, current_run()
        try:
            async with trio.open_nursery() as nursery:
                self._server = await trisock.bind(nursery, self._listening, handle)
                if self._closed:
                    self._server.stop()
        finally:
            self._listening.abort()  # where it was cancelled before the server had it
            self._run = bound_in


def _wrap(sock: trisock.Socket, run: Run | None) -> socket:
    return socket(sock, None) if run is None else async_socket(sock, run)


def _to_bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data
