"""ListeningSockets: what a Listener or a Server accepts from."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterable, Sequence

import trio

from .. import _fork
from .._address import address_from_sockaddr
from .._arguments import quoted
from .._net.connection import Connection
from .._net.unix_path import BoundPath

# The kernel keeps it in 16 bits and cuts it to what the system allows: as much as there is.
_MAX_BACKLOG = 0xFFFF

# How many connections that are dead already accept takes from a socket before it lets other tasks
# run: whoever fills the backlog with them must not stop the program.
_MAX_DEAD_PER_PASS = 64

# What accept(2) reports about a connection that died before it was accepted (accept(2), "Error
# handling", and what Trio has found on other systems). Everything else is about us.
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
    """Listening sockets, and the connections that wait there.

    Args:
      sockets: listening stream sockets, which are taken over.
      bound_path: the path of a Unix socket, removed at the close.

    Raises TypeError or ValueError if there is none, or one is not a listening stream socket.

    Invariant: all of them listen until ``close``, which closes all of them.

    Attributes:
      addresses: all addresses that they listen on, also after the close.
      dropped: how many connections died before they could be accepted.
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
        self.closed = False
        self.dropped = 0
        # Accepted ahead of its time, for the next accept, and by which process: after a fork the
        # connection is the parent's.
        self._ahead: Connection | None = None
        self._ahead_by = 0

    def accept_ahead(self) -> bool:
        """Accept a connection for the next accept, if one is waiting; return whether there is."""
        self.check_open()
        self._drop_inherited()
        if self._ahead is None:
            with contextlib.suppress(OSError):  # accept will raise it
                self._ahead = self.accept_nowait()
                self._ahead_by = os.getpid()
        return self.has_ahead()

    def has_ahead(self) -> bool:
        """Return whether a connection was accepted for the next accept."""
        return self._ahead is not None

    def accept_nowait(self) -> Connection | None:
        """Accept one connection from any of them, if one is waiting."""
        for index, sock in enumerate(self.sockets):
            accepted = self.accept_from(sock)
            if accepted is not None:
                # The others come first now: none can keep them out.
                self.sockets = self.sockets[index + 1 :] + self.sockets[: index + 1]
                return accepted
        return None

    def accept_from(self, sock: socket.socket) -> Connection | None:
        """Accept one connection from one of them, if one is waiting there."""
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
                    raise
                self.dropped += 1
                continue
            try:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
                return Connection(stream, "server", raw)
            except OSError:  # reset in the backlog: it has no peer any more
                raw.close()
                self.dropped += 1
        return None

    async def wait(self) -> None:
        """Wait until one of the sockets may have a connection."""
        if len(self.sockets) == 1:
            await trio.lowlevel.wait_readable(self.sockets[0])
            return

        async def wait_for(sock: socket.socket) -> None:
            if self.closed:  # since the nursery was opened
                return
            with contextlib.suppress(trio.ClosedResourceError):  # accept looks for itself
                await trio.lowlevel.wait_readable(sock)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for sock in self.sockets:
                nursery.start_soon(wait_for, sock)

    def close(self) -> None:
        """Stop listening. Connections that nobody has accepted are reset.

        In the child of a fork it leaves the path and the parent's sockets alone.
        """
        if self.closed:
            return
        self.closed = True
        if self._bound_path is not None:
            self._bound_path.remove()
        for sock in self.sockets:
            _fork.notify_closing(sock.fileno())
            sock.close()
        self._drop_inherited()
        if self._ahead is not None:
            self._ahead.abort()

    def check_open(self) -> None:
        """Raise ``ClosedResourceError`` if they are closed."""
        if self.closed:
            raise trio.ClosedResourceError("this listener was already closed")

    def _drop_inherited(self) -> None:
        """Forget a connection that another process has accepted, and leave it alone."""
        if self._ahead is not None and self._ahead_by != os.getpid():
            with contextlib.suppress(OSError):  # closed already
                os.close(self._ahead.stream.socket.detach())
            self._ahead = None


def bind_all(
    targets: Sequence[tuple[int, tuple[object, ...]]],
    port: int,
    backlog: int,
    reuse_port: bool,
) -> list[socket.socket]:
    """Return sockets that listen on all targets that this machine has, at one port."""
    sockets: list[socket.socket] = []
    missing: list[OSError] = []
    with contextlib.ExitStack() as on_error:
        for family, sockaddr in targets:
            try:
                sock = socket.socket(family, socket.SOCK_STREAM)
            except OSError as exc:
                if exc.errno != errno.EAFNOSUPPORT:  # no descriptor is left, for instance
                    raise
                missing.append(exc)  # a kernel without this family
                continue
            on_error.callback(sock.close)
            if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
                # SO_REUSEADDR would let another program take our connections there.
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
            else:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if reuse_port:
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                # IPv4 has a socket of its own: so it works where IPv6 is switched off.
                sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            try:
                sock.bind((sockaddr[0], port, *sockaddr[2:]))
            except OSError as exc:
                if exc.errno != errno.EADDRNOTAVAIL:
                    raise
                sock.close()
                # A family that is switched off, or one address of a name that is not there.
                missing.append(exc)
                continue
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
    with contextlib.suppress(OSError):  # macOS does not tell
        if not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise ValueError(f"not a listening socket: {sock!r}")
    if isinstance(sock, trio.socket.SocketType):
        sock = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    sock.setblocking(False)
    return sock


def backlog_size(backlog: int | None) -> int:
    """Return the backlog to ask for, or raise an error for what is none."""
    if backlog is None:
        return _MAX_BACKLOG
    if not isinstance(backlog, int) or isinstance(backlog, bool):
        raise TypeError(f"backlog is an int or None, not {quoted(backlog)}")
    if backlog < 0:
        raise ValueError(f"backlog must be 0 or more, not {quoted(backlog)}")
    return min(backlog, _MAX_BACKLOG)
