"""ListeningSockets: the sockets that a Listener or a Server accepts from."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterable, Sequence

import trio

from .. import _fork, _guard
from .._address import address_from_sockaddr, with_message
from .._arguments import quoted
from .._net.connection import Connection
from .._net.keepalive import enable_keepalive
from .._net.unix_path import BoundPath

# The kernel stores the backlog in 16 bits and caps it at the system's limit.
_MAX_BACKLOG = 0xFFFF

# After this many dead connections in a row, let other tasks run: a client that fills the backlog
# with dead connections must not block the program.
_MAX_DEAD_PER_PASS = 64

# The errors of accept(2) for a connection that died before it was accepted. (The list is from
# accept(2), "Error handling", plus the errors that Trio has found on other systems.) Any other
# error concerns this process.
_DEAD_CONNECTION = {
    getattr(errno, name)
    for name in (
        "ECONNABORTED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH", "ENETDOWN", "ENETUNREACH",
        "ENONET", "ENOPROTOOPT", "ENOSR", "ENOTCONN", "EOPNOTSUPP", "EPERM", "EPROTO",
        "EPROTONOSUPPORT", "ESOCKTNOSUPPORT", "ETIMEDOUT",
    )
    if hasattr(errno, name)
}  # fmt: skip


class ListeningSockets:
    """Listening sockets, and the connections that are pending on them.

    Args:
      sockets: listening stream sockets; this object takes ownership of them.
      bound_path: the path of a Unix socket, which ``close`` removes.

    Raises TypeError or ValueError if there is no socket, or if one is not a listening stream
    socket.

    Invariant: each of the ``sockets`` listens until ``close`` or ``close_one`` closes it.

    Attributes:
      addresses: all addresses that the sockets listen on; still available after ``close``.
      dropped: the number of connections that died before they could be accepted.
      shared: whether the program has had access to the sockets, and may have passed them to another
        process.
    """

    def __init__(
        self,
        sockets: Iterable[socket.socket | trio.socket.SocketType],
        bound_path: BoundPath | None = None,
    ) -> None:
        self.sockets = [_adopt(sock) for sock in sockets]
        if not self.sockets:
            raise ValueError("a Listener needs at least one socket")
        self.addresses = tuple(
            address_from_sockaddr(sock.family, sock.getsockname()) for sock in self.sockets
        )
        self._bound_path = bound_path
        self._forks = _fork.forks
        self.shared = False
        self.closed = False
        self.dropped = 0
        # A connection that was accepted in advance. The next accept returns it. After a fork, it
        # still belongs to the process that accepted it. ``_ahead_pid`` is that process's ID.
        self._ahead: Connection | None = None
        self._ahead_pid = 0

    def __str__(self) -> str:
        return f"the listener on {' and '.join(map(str, self.addresses))}"

    def accept_ahead(self) -> bool:
        """Accept a connection and keep it for the next accept. Return ``has_ahead()``."""
        self.check_open()
        self._drop_inherited()
        if self._ahead is None:
            with contextlib.suppress(OSError):  # the next accept raises the error
                self._ahead = self.accept_nowait()
                self._ahead_pid = os.getpid()
        return self.has_ahead()

    def has_ahead(self) -> bool:
        """Return whether a connection is kept for the next accept."""
        return self._ahead is not None

    def accept_nowait(self) -> Connection | None:
        """Accept one connection from any of the sockets. Return ``None`` if none is pending."""
        for index, sock in enumerate(self.sockets):
            accepted = self.accept_from(sock)
            if accepted is not None:
                # Round robin: one busy socket must not starve the others.
                self.sockets = self.sockets[index + 1 :] + self.sockets[: index + 1]
                return accepted
        return None

    def accept_from(self, sock: socket.socket) -> Connection | None:
        """Accept one connection from the given socket. Return ``None`` if none is pending."""
        self.check_open()
        if self._ahead is not None:
            self._drop_inherited()
        if self._ahead is not None:
            accepted, self._ahead = self._ahead, None
            return accepted
        for _ in range(_MAX_DEAD_PER_PASS):
            try:
                raw, _ = sock.accept()
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno not in _DEAD_CONNECTION:
                    raise with_message(exc, f"cannot accept from {self}") from exc
                self.dropped += 1
                continue
            try:
                return Connection(trio.socket.from_stdlib_socket(raw), "server", raw)
            except OSError:  # it was reset in the backlog, so getpeername fails
                raw.close()
                self.dropped += 1
        return None

    async def wait(self) -> None:
        """Wait until one of the sockets may have a pending connection."""
        if len(self.sockets) == 1:
            await trio.lowlevel.wait_readable(self.sockets[0])
            return

        async def wait_for(sock: socket.socket) -> None:
            if self.closed:  # closed before this task ran
                return
            with contextlib.suppress(trio.ClosedResourceError):  # the next accept raises it
                await trio.lowlevel.wait_readable(sock)
            nursery.cancel_scope.cancel()

        with _guard.bare():
            async with trio.open_nursery() as nursery:
                for sock in self.sockets:
                    nursery.start_soon(wait_for, sock)

    def close(self) -> None:
        """Stop listening. Connections that were not accepted are reset.

        In a forked child, this leaves the path and the parent's sockets alone.
        """
        if self.closed:
            return
        self.closed = True
        if self._bound_path is not None:
            self._bound_path.remove()
        for sock in self.sockets:
            self.close_one(sock)
        self._drop_inherited()
        if self._ahead is not None:
            self._ahead.abort()
            self._ahead = None

    def close_one(self, sock: socket.socket) -> None:
        """Stop listening on one of the sockets. ``close`` must follow."""
        if sock.fileno() >= 0:
            _fork.notify_closing(sock.fileno())
            sock.close()

    def is_shared(self) -> bool:
        """Return whether another process may hold the sockets."""
        return self.shared or self._forks != _fork.forks

    def check_open(self) -> None:
        """Raise ``ClosedResourceError`` if the sockets are closed."""
        if self.closed:
            raise trio.ClosedResourceError(f"this side has already closed {self}")

    def _drop_inherited(self) -> None:
        """Forget a connection that the parent process accepted. It stays open in the parent."""
        if self._ahead is not None and self._ahead_pid != os.getpid():
            with contextlib.suppress(OSError):  # EBADF, if the descriptor is already closed
                os.close(self._ahead.socket.detach())
            self._ahead = None


def bind_all(
    targets: Sequence[tuple[int, tuple[object, ...]]],
    port: int,
    backlog: int,
    reuse_port: bool,
) -> list[socket.socket]:
    """Listen on those targets that belong to this machine, on one port. Returns the sockets."""
    sockets: list[socket.socket] = []
    missing: list[OSError] = []
    with contextlib.ExitStack() as on_error:
        for family, sockaddr in targets:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as exc:
                if exc.errno != errno.EAFNOSUPPORT:  # such as EMFILE
                    raise
                missing.append(exc)  # the kernel lacks this family
                continue
            on_error.callback(sock.close)
            if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
                # On Windows, SO_REUSEADDR would let another program take our connections.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # IPv4 gets its own socket, so that IPv4 works where IPv6 is disabled.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((sockaddr[0], port, *sockaddr[2:]))
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL:
                    raise
                sock.close()
                # The family is disabled, or the name also resolves to another machine's address.
                missing.append(exc)
                continue
            enable_keepalive(sock)  # before any client can connect
            _set_stream_options(sock)
            sock.listen(backlog)
            port = sock.getsockname()[1]
            sockets.append(sock)
        if not sockets:
            raise missing[0]
        on_error.pop_all()
    return sockets


def _adopt(sock: socket.socket | trio.socket.SocketType) -> socket.socket:
    if not isinstance(sock, (socket.socket, trio.socket.SocketType)):
        raise TypeError(f"a Listener needs sockets, not {quoted(sock)}")
    if sock.type != socket.SOCK_STREAM:
        raise ValueError(f"not a stream socket: {sock!r}")
    with contextlib.suppress(OSError):  # macOS does not support SO_ACCEPTCONN
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"not a listening socket: {sock!r}")
    if isinstance(sock, trio.socket.SocketType):
        sock = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    sock.setblocking(False)
    enable_keepalive(sock)
    _set_stream_options(sock)
    return sock


def _set_stream_options(sock: socket.socket) -> None:
    """Set the options that ``trio.SocketStream`` sets, such as ``TCP_NODELAY``.

    Later connections inherit these options, as they inherit keepalive. To set the options on each
    connection would add a twentieth to the cost of a short connection (row connections).
    """
    borrowed = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
    try:
        trio.SocketStream(trio.socket.from_stdlib_socket(borrowed))
    finally:
        borrowed.detach()


def backlog_size(backlog: int | None) -> int:
    """Return the backlog for listen(2). Raises ``TypeError`` or ``ValueError`` if it is invalid."""
    if backlog is None:
        return _MAX_BACKLOG
    if not isinstance(backlog, int) or isinstance(backlog, bool):
        raise TypeError(f"backlog must be an int or None, not {quoted(backlog)}")
    if backlog < 0:
        raise ValueError(f"backlog must be 0 or more, not {quoted(backlog)}")
    return min(backlog, _MAX_BACKLOG)
