"""Pluto's names: ``socket`` and ``listener``. The package's docstring says how to use them."""

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

from .blocking import (
    InsideTrio,
    PendingCall,
    Run,
    RunBound,
    async_or_blocking,
    background,
    close_descriptor,
    current_run,
    describe,
    log_reason,
)
from .intent import Intent
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

# weakref registers its exit handler when the first finalizer is created. We create one now, because
# exit handlers run in reverse order: the program's exit handlers then run first, and can still use
# the sockets.
weakref.finalize(background, len, ())

# These exceptions mean that the connection is over. Pluto reports this without an exception.
_OVER = (trio.BrokenResourceError, trio.ClosedResourceError)


class socket(RunBound):  # noqa: N801 (Pluto's name)
    """A connection, made by ``connect`` for a client, by ``accept`` or ``bind`` for a server.

    Garbage collection closes a socket silently. Calls can also be written as on Pluto's page:
    ``socket.send(s, data)``.
    """

    def __init__(self, sock: trisock.Socket, run: Run | None, *, owned: bool = True) -> None:
        super().__init__(run)
        self._sock = sock
        self._to_push_back = b""  # data that could not be pushed back yet
        self._upgrade, self._closing = Intent(sock), Intent(sock)
        if owned:  # a Server owns all other sockets, and would crash if we closed their descriptors
            weakref.finalize(self, close_descriptor, sock.stream.socket)

    def __repr__(self) -> str:
        return f"<trisock.pluto.{type(self).__name__} {self._sock!r}>"

    @staticmethod
    def connect(host: str, port: int) -> _Made:
        """Connect over TCP. Await it inside Trio; it blocks outside.

        Args:
          host: an IPv4 or IPv6 address, or a name that resolves to one.
          port: the port.

        Returns: a socket, or ``None`` on failure.

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
            return cast("_Made", PendingCall(make()))
        try:
            return cast("_Made", background.call(make))
        except ThreadStartError as exc:  # such as EMFILE
            log_reason(exc)
            return cast("_Made", None)

    @staticmethod
    def listen(port: int) -> listener | None:
        """Listen on a port, on all addresses of this machine. Synchronous.

        Args:
          port: the port; 0 for a free one (see ``listener.port``).

        Returns: a listener, or ``None`` on failure, such as a port already in use.

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
        """Serve a port: run ``handler(s)`` in its own task for each client. Synchronous.

        The server listens immediately. It serves clients while the scheduler runs, and closes each
        socket when its handler returns. If a handler raises an exception, it is logged on the
        logger ``trisock.server``.

        Args:
          sched: the scheduler that runs the server.
          port: the port; 0 for a free one (see the listener's ``port``).
          handler: an async function, or a function that returns an awaitable.

        Returns: the listener. After ``listener.close()``, no more clients are accepted, and the
        server ends when its last handler has ended.

        Raises ``OSError`` if it cannot listen on the port. (Pluto also raises an error.)
        Source: ``socket.bind``.
        """
        if not isinstance(sched, scheduler):
            raise TypeError(f"a server runs in a scheduler, not in {describe(sched)}")
        if not callable(handler):
            raise TypeError(f"a handler must be an async function, not {describe(handler)}")
        bound = listener(trisock.listen_nowait(port), current_run())
        sched.add(functools.partial(bound._serve, handler))
        return bound

    @async_or_blocking()
    async def send(self, data: str | bytes) -> bool:
        """Send all of the data. Await it inside Trio; it blocks outside.

        Returns: whether the data was sent. After ``False``, nothing more can be sent. But data may
        still arrive, so ``isopen`` may still be True, for example after a Ctrl-C interrupted the
        send. (Pluto's ``send`` returns nothing.) Source: ``socket.send``.
        """
        try:
            self._check()
            await self._sock.send(_to_bytes(data))
        except _OVER as exc:
            return self._is_over(exc)
        return True

    def _unrecv(self, data: bytes | None) -> None:
        self._to_push_back += data or b""
        # If another thread is already reading, the next call pushes the data back.
        with contextlib.suppress(trio.BusyResourceError):
            self._push_back()

    def _push_back(self, more: bytes = b"") -> None:
        self._check()
        if self._to_push_back:
            with contextlib.suppress(*_OVER):  # closed: the data is dropped
                self._sock.unrecv(self._to_push_back)
            self._to_push_back = b""
        if more != b"":
            self._sock.unrecv(more)

    @async_or_blocking(undo=_unrecv)
    async def recv(self) -> bytes | None:
        """Return the oldest unread chunk. Await it inside Trio; it blocks outside.

        Returns: the data of one read from the kernel or, with TLS, of one record. Returns ``None``
        when the connection is over. Source: ``socket.recv``.
        """
        try:
            self._push_back()
            return await self._sock.recv() or None
        except _OVER as exc:
            self._is_over(exc)
            return None

    @async_or_blocking()
    async def peek(self) -> bytes | None:
        """Return the chunk that ``recv`` would return next, without consuming it or waiting for it.

        Returns: the chunk, or ``None`` if no data has arrived. Inside Trio, the call must still be
        awaited. Source: ``socket.peek``.
        """
        try:
            self._push_back()
            return await self._sock.peek() or None
        except _OVER as exc:
            self._is_over(exc)
            return None

    def unrecv(self, data: str | bytes) -> None:
        """Push data to the front of the receive buffer: the next ``recv`` returns it. Synchronous.

        If ``starttls`` is called next, it reads the pushed data, such as a ClientHello. After
        ``close``, this does nothing. Source: ``socket.unrecv``.
        """
        chunk = _to_bytes(data)
        try:
            self._call(functools.partial(self._push_back, chunk))
        except _OVER as exc:
            self._is_over(exc)

    @async_or_blocking(undo=lambda self, _: self._sock.abort(), intent="_upgrade")
    async def starttls(self, tls: TLS) -> bool | None:
        """Upgrade the connection to TLS. Await it inside Trio; it blocks outside.

        Args:
          tls: for a client, the name that the server's certificate must match. For a server, a list
            of certificates, each a mapping with the fields ``chain`` and ``private_key`` (PEM, any
            key type). Any ``tls`` argument of ``trisock.Socket.starttls`` also works.

        Returns: True on success, False on failure (the socket is then closed), and ``None`` if TLS
        is already in use.

        A Ctrl-C closes the socket. Invalid certificates raise ``TypeError`` or ``ValueError`` and
        leave the connection untouched. Source: ``socket.starttls``.
        """
        with self._upgrade.work():
            if self._sock.istls():
                return None
            try:
                self._push_back()
                await self._sock.starttls(tls)
            except _OVER as exc:
                await self._sock.close()  # needed if the connection was broken before TLS began
                return self._is_over(exc)
            return True

    @async_or_blocking(intent="_closing")
    async def close(self) -> None:
        """Close the connection; no sent data is lost. Await it inside Trio; it blocks outside.

        Source: ``socket.close``.
        """
        with self._closing.work():
            await self._sock.close()

    def getpeer(self) -> tuple[str, int]:
        """Return the peer's address and port: ``ip, port = s.getpeer()``. Synchronous.

        This works both inside and outside Trio, even after ``close``. Source: ``socket.getpeer``.
        """
        return self._sock.getpeer()

    def getside(self) -> Literal["client", "server"]:
        """Return which side of the connection this is. Synchronous. Source: ``socket.getside``."""
        return self._sock.getside()

    def istls(self) -> bool:
        """Return whether the connection is encrypted. Synchronous. Source: ``socket.istls``."""
        return self._sock.istls()

    def isopen(self) -> bool:
        """Return whether the connection is open. Synchronous. Source: ``socket.isopen``."""
        return self._call(
            lambda: self._check() and (bool(self._to_push_back) or self._sock.isopen())
        )

    def _check(self) -> bool:
        return self._upgrade.check() and self._closing.check()

    def _is_over(self, reason: Exception) -> Literal[False]:
        log_reason(reason)
        return False


class async_socket(socket, InsideTrio):  # noqa: N801 (named like socket)
    """A socket made inside Trio: its calls are awaited."""


if TYPE_CHECKING:

    class _Made(socket, Awaitable[async_socket | None]):
        """The result of a call that makes a socket: an awaitable inside Trio, a socket outside."""


class listener(RunBound):  # noqa: N801 (Pluto's name)
    """A listening socket, made by ``socket.listen``. Garbage collection closes it silently."""

    def __init__(self, listening: trisock.Listener, run: Run | None) -> None:
        super().__init__(run)
        self._listening = listening
        # accept returns these before it waits for another.
        self._undelivered: collections.deque[socket] = collections.deque()
        self._serving = self._closed = False
        self._server: trisock.Server | None = None
        weakref.finalize(self, listening.abort)

    def __repr__(self) -> str:
        return f"<trisock.pluto.listener {self._listening!r}>"

    @property
    def port(self) -> int:
        """The listener's port. (Pluto has neither this attribute nor port 0.)"""
        return self._listening.port

    def _keep(self, accepted: socket | None) -> None:
        if accepted is not None and not self._closed:
            self._undelivered.append(accepted)

    @async_or_blocking(undo=_keep, wrap=PendingCall)
    async def accept(self) -> _Made:
        """Wait for a client. Await it inside Trio; it blocks outside.

        Returns: the client's socket, or ``None`` when the listener is closed. Raises ``OSError`` if
        the system has run out of a resource. Source: ``accept``.
        """
        accepted = self._undelivered.popleft() if self._undelivered else None
        with contextlib.suppress(trio.ClosedResourceError):
            accepted = accepted or _wrap(await self._listening.accept(), self._run)
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

        If the listener was made by ``bind``, this also stops the server, which ends when its last
        handler has ended. (In Pluto, garbage collection ends the server.)
        """
        self._closed = True
        self._undelivered.clear()
        if self._server is not None:
            self._server.stop(grace=None)
        if self._server is not None or not self._serving:
            self._listening.abort()
        await trio.lowlevel.checkpoint()
        return cast("Done", None)

    async def _serve(self, handler: Callable[[async_socket], Awaitable[object]]) -> None:
        """Run the server until it is closed.

        The listener belongs to this run of Trio until then.
        """

        async def handle(sock: trisock.Socket) -> None:
            awaitable = handler(async_socket(sock, self._run, owned=False))
            if not inspect.isawaitable(awaitable):  # a plain function: it has awaited nothing
                raise TypeError(
                    "a handler must be an async function: "
                    f"{describe(handler)} returned nothing to await"
                )
            await awaitable

        if self._closed:
            return
        self._serving = True
        bound_in, self._run = self._run, current_run()
        try:
            async with trio.open_nursery() as nursery:
                self._server = await trisock.bind(nursery, self._listening, handle)
                if self._closed:
                    self._server.stop(grace=None)
        finally:
            self._listening.abort()  # needed if cancelled before the server owned the listener
            self._run = bound_in


def _wrap(sock: trisock.Socket, run: Run | None) -> socket:
    return socket(sock, None) if run is None else async_socket(sock, run)


def _to_bytes(data: str | bytes) -> bytes:
    return data.encode() if isinstance(data, str) else data
