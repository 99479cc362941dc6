"""listen, listen_unix and Listener: where connections come in."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
from collections.abc import Iterable, Sequence

import trio

from . import _fork
from ._address import (
    Address,
    address_from_sockaddr,
    check_port,
    format_host_port,
    oserror,
    quoted,
    to_ascii_host,
)
from ._socket import Socket
from ._turns import Exclusive
from ._uncopied import Uncopied
from ._unix import (
    BoundPath,
    listening_unix_socket,
    listening_unix_socket_nowait,
    unix_path,
)

# The kernel keeps it in 16 bits and cuts it to what the system allows: as much as there is.
_MAX_BACKLOG = 0xFFFF

# With port 0 the first address gets a free port, and the others must get the same. Somebody may
# have it there; then the next try gets another.
_SAME_PORT_TRIES = 32

# How many connections that are dead already accept takes from a socket before it lets other tasks
# run: whoever fills the backlog with them must not stop the program.
_DEAD_IN_A_ROW = 64

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


async def listen(
    port: int,
    host: str | None = None,
    *,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> Listener:
    """Listen for TCP connections.

    Args:
      port: 0 to 65535; 0 lets the system choose a free one (``Listener.port`` tells which).
      host: the local address or name to listen on. With none, it is all addresses of this machine,
        IPv4 and IPv6, at one port. A name stands for all its addresses that this machine has.
        ``"::"`` is IPv6 only, ``"0.0.0.0"`` IPv4 only.
      backlog: how many connections may wait to be accepted; ``None`` for as many as the system
        allows.
      reuse_port: share the port with other listeners of the same user, among which the kernel
        divides the connections (``SO_REUSEPORT``).

    Returns: a ``Listener``, listening.

    Raises:
      OSError: it cannot listen there (``EADDRINUSE``, ``EACCES``, ...); the text has the address.
      TypeError, ValueError: an argument cannot be used.

    Cancelled, it leaves nothing open. Source: Pluto's ``socket.listen``.
    """
    host_to_bind = _check(port, host, reuse_port)
    backlog = _backlog(backlog)
    try:
        found = await trio.socket.getaddrinfo(
            host_to_bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as exc:
        raise oserror(exc, f"cannot listen on {_where(port, host)}") from exc
    return _listen(found, port, host, backlog, reuse_port)


def listen_nowait(
    port: int,
    host: str | None = None,
    *,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> Listener:
    """Do the same as ``listen`` in a plain call, which may come from outside Trio.

    For what has to be known at once, or before Trio runs: whether the port is free, or while
    the program is still allowed to have it. The listener can be used in any Trio program then.

    Args:
      port, backlog, reuse_port: as in ``listen``.
      host: the local address to listen on, or ``None``. A name is a ``ValueError``: it would have
        to be resolved.

    Returns: a ``Listener``, listening.

    Raises: as ``listen``.
    """
    host_to_bind = _check(port, host, reuse_port)
    backlog = _backlog(backlog)
    flags = socket.AI_PASSIVE | socket.AI_NUMERICHOST
    try:
        found = socket.getaddrinfo(host_to_bind, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        raise ValueError(f"listen_nowait takes an address, not a name: {quoted(host)}") from None
    return _listen(found, port, host, backlog, reuse_port)


def _check(port: int, host: str | None, reuse_port: bool) -> bytes | None:
    """Return the host as the resolver takes it."""
    check_port(port, host)
    if host is not None and not isinstance(host, str):
        raise TypeError(f"a host is a str or None, not {quoted(host)}")
    if reuse_port and not hasattr(socket, "SO_REUSEPORT"):
        raise OSError(errno.EOPNOTSUPP, "there is no SO_REUSEPORT on this platform")
    return None if host is None else to_ascii_host(host).encode()


def _where(port: int, host: str | None) -> str:
    return format_host_port("*" if host is None else host, port)


def _listen(
    found: Sequence[tuple[int, int, int, str, tuple[object, ...]]],
    port: int,
    host: str | None,
    backlog: int,
    reuse_port: bool,
) -> Listener:
    """Listen on all the addresses that were found and that this machine has, at one port."""
    targets = list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))
    for tries_left in reversed(range(_SAME_PORT_TRIES)):
        try:
            return Listener(_bind_all(targets, port, backlog, reuse_port))
        except OSError as exc:
            if port != 0 or exc.errno != errno.EADDRINUSE or not tries_left:
                raise oserror(exc, f"cannot listen on {_where(port, host)}") from exc
    raise AssertionError("the last try has returned or raised")  # pragma: no cover


def _bind_all(
    targets: Sequence[tuple[int, tuple[object, ...]]],
    port: int,
    backlog: int,
    reuse_port: bool,
) -> list[socket.socket]:
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


async def listen_unix(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    mode: int | None = None,
    backlog: int | None = None,
) -> Listener:
    r"""Listen on a Unix socket.

    The path goes away with the listener, unless it has become somebody else's by then. Only the
    process that made it removes it: after a fork, the child does not. A path that a dead program
    has left is replaced; one where somebody listens is not.

    Args:
      path: where; on Linux also an abstract name (``"\0name"``), which has no file.
      mode: the file's permissions, such as ``0o660``, set before the first client can connect, on
        the socket just bound and on no other file. ``None`` leaves them to the umask.
      backlog: as in ``listen``.

    Returns: a ``Listener``, listening.

    Raises:
      OSError: it cannot listen there, with the path as its file name: ``EADDRINUSE`` where somebody
        listens or the file is no socket, ``EEXIST`` where somebody has swapped the file before its
        mode was set; or there are no Unix sockets on this platform.
      TypeError, ValueError: an argument cannot be used.

    Cancelled, it leaves nothing open.
    """
    name = unix_path(path)
    backlog = _backlog(backlog)
    sock, bound_path = await listening_unix_socket(name, mode, backlog)
    return Listener([sock], _bound_path=bound_path)


def listen_unix_nowait(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    mode: int | None = None,
    backlog: int | None = None,
) -> Listener:
    """Do the same as ``listen_unix`` in a plain call, which may come from outside Trio.

    Args: as in ``listen_unix``.

    Returns: a ``Listener``, listening.

    Raises:
      BlockingIOError: another program of the same user is replacing the same path just now, which
        ``listen_unix`` would wait for (up to 10 seconds).
      OSError, TypeError, ValueError: as ``listen_unix``.
    """
    name = unix_path(path)
    sock, bound_path = listening_unix_socket_nowait(name, mode, _backlog(backlog))
    return Listener([sock], _bound_path=bound_path)


class Listener(Uncopied, trio.abc.Listener[Socket]):
    """Accepts connections from one or more listening sockets.

    Made by ``listen`` and ``listen_unix``, or from listening sockets that exist (socket
    activation), which it takes over.

    Args:
      sockets: listening stream sockets, of ``socket`` or ``trio.socket``.

    Raises:
      TypeError, ValueError: there is none, or one is not a listening stream socket.

    Attributes:
      dropped: how many connections died before they could be accepted.
    """

    def __init__(
        self,
        sockets: Iterable[socket.socket | trio.socket.SocketType],
        *,
        _bound_path: BoundPath | None = None,
    ) -> None:
        self._sockets = [_adopt(sock) for sock in sockets]
        if not self._sockets:
            raise ValueError("a Listener needs at least one socket")
        self._addresses = tuple(
            address_from_sockaddr(sock.family, sock.getsockname()) for sock in self._sockets
        )
        self._bound_path = _bound_path
        self._closed = False
        self._accepting = Exclusive("another task is accepting from this listener")
        # What hasconnection has accepted for the next accept.
        self._accepted: Socket | None = None
        self._accepted_by = 0  # the process: after a fork the connection is the parent's
        self.dropped = 0

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<trisock.Listener {', '.join(map(str, self._addresses))} {state}>"

    @property
    def port(self) -> int:
        """The port, also after closing; 0 for a Unix socket."""
        return self._addresses[0].port

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All addresses that it listens on, also after closing."""
        return self._addresses

    async def accept(self) -> Socket:
        """Wait for a connection and return it, as a ``Socket`` whose side is ``"server"``.

        A connection that dies before it is one is dropped (and counted in ``dropped``).

        Raises:
          trio.ClosedResourceError: the listener was closed.
          OSError: the system has run out of something, such as descriptors (``EMFILE``).
          trio.BusyResourceError: another task is accepting.

        Cancelled, it has accepted nothing. A full checkpoint. Source: Pluto's ``accept``.
        """
        with self._accepting:
            await trio.lowlevel.checkpoint()
            while True:
                sock = self._accept_nowait()
                if sock is not None:
                    return sock
                await self._wait()

    def hasconnection(self) -> bool:
        """Return whether the next ``accept`` will not wait: True is certain.

        False while another task is in ``accept``, which gets the connection. Source: Pluto's
        ``hasconnection``.
        """
        self._check_open()
        self._drop_inherited()
        if self._accepted is None and not self._accepting.held:
            with contextlib.suppress(OSError):  # accept will raise it
                self._accepted = self._accept_nowait()
                self._accepted_by = os.getpid()
        return self._accepted is not None

    def __aiter__(self) -> Listener:
        """Iterate over connections: ``async for sock in listener``; ends when it is closed."""
        return self

    async def __anext__(self) -> Socket:
        try:
            return await self.accept()
        except trio.ClosedResourceError:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        """Stop listening. The same as ``aclose``. Connections that nobody has accepted are reset.

        Wakes the task in ``accept`` with ``trio.ClosedResourceError``. Removes the path of a Unix
        socket. A checkpoint; it is closed also when cancelled.
        """
        self.abort()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Stop listening. The same as ``close``."""
        await self.close()

    def abort(self) -> None:
        """Stop listening at once: what ``close`` does, in a plain call.

        While no task accepts, it may come from outside Trio, or from a finaliser. In the child of a
        fork it leaves the path and the parent's listening alone. A ``Server``'s listener is stopped
        by ``Server.stop``.
        """
        if self._closed:
            return
        self._closed = True
        if self._bound_path is not None:
            self._bound_path.remove()
        for sock in self._sockets:
            _fork.notify_closing(sock.fileno())
            sock.close()
        self._drop_inherited()
        if self._accepted is not None:
            self._accepted.abort()

    def _drop_inherited(self) -> None:
        """Forget a connection that another process has accepted, and leave it alone."""
        if self._accepted is not None and self._accepted_by != os.getpid():
            with contextlib.suppress(OSError):  # closed already
                os.close(self._accepted.stream.socket.detach())
            self._accepted = None

    def _check_open(self) -> None:
        if self._closed:
            raise trio.ClosedResourceError("this listener was already closed")

    def _accept_nowait(self) -> Socket | None:
        """Accept one connection, if one is waiting."""
        for index, sock in enumerate(self._sockets):
            accepted = self._accept_from(sock)
            if accepted is not None:
                # The others come first now: none can keep them out.
                self._sockets = self._sockets[index + 1 :] + self._sockets[: index + 1]
                return accepted
        return None

    def _accept_from(self, sock: socket.socket) -> Socket | None:
        """Accept one connection from one of the sockets, if one is waiting there."""
        self._check_open()
        if self._accepted is not None:
            self._drop_inherited()
        if self._accepted is not None:
            accepted, self._accepted = self._accepted, None
            return accepted
        for _ in range(_DEAD_IN_A_ROW):
            try:
                connection, _ = sock.accept()
            except BlockingIOError:
                break
            except OSError as exc:
                if exc.errno not in _DEAD_CONNECTION:
                    raise
                self.dropped += 1
                continue
            try:
                stream = trio.SocketStream(trio.socket.from_stdlib_socket(connection))
                return Socket(stream, side="server", _raw=connection)
            except OSError:  # reset in the backlog: it has no peer any more
                connection.close()
                self.dropped += 1
        return None

    async def _wait(self) -> None:
        """Wait until one of the sockets may have a connection."""
        if len(self._sockets) == 1:
            await trio.lowlevel.wait_readable(self._sockets[0])
            return

        async def wait_for(sock: socket.socket) -> None:
            if self._closed:  # since the nursery was opened
                return
            with contextlib.suppress(trio.ClosedResourceError):  # accept looks for itself
                await trio.lowlevel.wait_readable(sock)
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for sock in self._sockets:
                nursery.start_soon(wait_for, sock)


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


def _backlog(backlog: int | None) -> int:
    if backlog is None:
        return _MAX_BACKLOG
    if not isinstance(backlog, int) or isinstance(backlog, bool):
        raise TypeError(f"backlog is an int or None, not {quoted(backlog)}")
    if backlog < 0:
        raise ValueError(f"backlog must be 0 or more, not {quoted(backlog)}")
    return min(backlog, _MAX_BACKLOG)
