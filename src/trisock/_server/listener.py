"""listen, listen_unix and Listener: accept connections."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterable, Sequence

import trio

from .._address import (
    Address,
    advice_for_bind,
    check_port,
    format_host_port,
    to_ascii_host,
    with_message,
)
from .._arguments import quoted
from .._net.conflicts import ConflictDetector
from .._net.socket import Socket, new_socket
from .._net.unix_path import (
    listening_unix_socket,
    listening_unix_socket_nowait,
    unix_path,
)
from .._not_copyable import NotCopyable
from .activation import activated_sockets
from .listening import ListeningSockets, backlog_size, bind_all

# With port 0, the kernel chooses a free port for the first address, and the other addresses must
# use the same port. If that port is in use on one of them, we try another port, up to this many
# ports in all.
_SAME_PORT_TRIES = 32


async def listen(
    port: int,
    *,
    host: str | None = None,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> Listener:
    """Listen for TCP connections.

    Args:
      port: 0 to 65535; 0 lets the system choose a free port (see ``Listener.port``).
      host: the local address or name to listen on. ``None`` means all addresses of this machine,
        IPv4 and IPv6, on one port. If ``host`` is a name, the listener uses only the addresses of
        this name that belong to this machine. ``"::"`` is IPv6 only, and ``"0.0.0.0"`` is IPv4
        only.
      backlog: how many connections may wait to be accepted. ``None`` means the system's maximum.
      reuse_port: share the port with other listeners of the same user; the kernel distributes the
        connections among them (``SO_REUSEPORT``).

    Returns: a ``Listener`` that is already listening.

    Raises:
      OSError: the system refuses to listen on this address (``EADDRINUSE``, ``EACCES``, ...). The
        message contains the address.
      TypeError, ValueError: an argument is invalid.

    A cancelled call leaves nothing open. Source: Pluto's ``socket.listen``.
    """
    host_to_bind = _check(port, host, reuse_port)
    backlog = backlog_size(backlog)
    try:
        found = await trio.socket.getaddrinfo(
            host_to_bind, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
    except OSError as exc:
        raise with_message(exc, f"cannot listen on {_where(port, host)}") from exc
    return _listen(found, port, host, backlog, reuse_port)


def listen_nowait(
    port: int,
    *,
    host: str | None = None,
    backlog: int | None = None,
    reuse_port: bool = False,
) -> Listener:
    """Do the same as ``listen``, but synchronously. This also works outside Trio.

    Use it before Trio runs: to check that the port is free, or to bind a privileged port before the
    program drops its privileges. The listener can then be used in any Trio run.

    Args:
      port, backlog, reuse_port: as in ``listen``.
      host: the local address to listen on, or ``None``. A name raises ``ValueError``, because a
        lookup could block.

    Returns: a ``Listener`` that is already listening.

    Raises: the same errors as ``listen``.
    """
    host_to_bind = _check(port, host, reuse_port)
    backlog = backlog_size(backlog)
    flags = socket.AI_PASSIVE | socket.AI_NUMERICHOST
    try:
        found = socket.getaddrinfo(host_to_bind, port, type=socket.SOCK_STREAM, flags=flags)
    except socket.gaierror:
        raise ValueError(f"listen_nowait needs an address, not a name: {quoted(host)}") from None
    return _listen(found, port, host, backlog, reuse_port)


def _check(port: int, host: str | None, reuse_port: bool) -> bytes | None:
    """Check the arguments, and return the host in the form that the resolver needs."""
    check_port(port, host)
    if host is not None and not isinstance(host, str):
        raise TypeError(f"a host must be a str or None, not {quoted(host)}")
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
    """Listen on those resolved addresses that belong to this machine, all on one port."""
    targets = list(dict.fromkeys((family, sockaddr) for family, _, _, _, sockaddr in found))
    for tries_left in reversed(range(_SAME_PORT_TRIES)):
        try:
            return new_listener(ListeningSockets(bind_all(targets, port, backlog, reuse_port)))
        except OSError as exc:
            if port != 0 or exc.errno != errno.EADDRINUSE or not tries_left:
                message = f"cannot listen on {_where(port, host)}"
                raise with_message(exc, message, advice_for_bind(exc, port)) from exc
    raise AssertionError("the last attempt has returned or raised")  # pragma: no cover


async def listen_unix(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    mode: int | None = None,
    backlog: int | None = None,
) -> Listener:
    r"""Listen on a Unix socket.

    Closing the listener removes the path, unless another socket has replaced ours. Only the
    process that bound the path removes it; a forked child does not. If a dead program has left the
    path behind, the path is replaced. If another program listens on the path, it is not replaced.

    Args:
      path: the path; on Linux also an abstract name (``"\0name"``), which has no file.
      mode: the file's permissions, such as ``0o660``. The permissions are set before the first
        client can connect, and only on the newly bound socket. ``None``: the umask decides.
      backlog: as in ``listen``.

    Returns: a ``Listener`` that is already listening.

    Raises:
      OSError: the system refuses to listen on this path (the error's ``filename``), or has no Unix
        sockets. ``EADDRINUSE``: another program listens on the path, or the file is not a socket.
        ``EEXIST``: the file was replaced before its mode was set.
      TypeError, ValueError: an argument is invalid.

    A cancelled call leaves nothing open.
    """
    name = unix_path(path)
    backlog = backlog_size(backlog)
    sock, bound_path = await listening_unix_socket(name, mode, backlog)
    return new_listener(ListeningSockets([sock], bound_path))


def listen_unix_nowait(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    mode: int | None = None,
    backlog: int | None = None,
) -> Listener:
    """Do the same as ``listen_unix``, but synchronously. This also works outside Trio.

    Args: as in ``listen_unix``.

    Returns: a ``Listener`` that is already listening.

    Raises:
      BlockingIOError: another program of the same user is replacing the same path at this moment.
        (``listen_unix`` waits for that program, up to 10 seconds.)
      OSError, TypeError, ValueError: as in ``listen_unix``.
    """
    name = unix_path(path)
    sock, bound_path = listening_unix_socket_nowait(name, mode, backlog_size(backlog))
    return new_listener(ListeningSockets([sock], bound_path))


class Listener(NotCopyable, trio.abc.Listener[Socket]):
    """One or more listening sockets, and the connections they accept.

    ``listen`` and ``listen_unix`` return a Listener. For sockets that already listen (socket
    activation), call ``Listener(sockets)``. The new Listener then owns these sockets.

    ``async for sock in listener`` accepts one connection after the other. If the wait for a
    connection is cancelled, nothing was accepted.

    Args:
      sockets: listening stream sockets, of ``socket`` or ``trio.socket``.

    Raises:
      TypeError, ValueError: ``sockets`` is empty, or one of them is not a listening stream socket.

    The ``sockets`` count as shared with another process. When a server that uses them stops, it
    closes its copies at once, and leaves the clients in the backlog to the other process.

    All accepted connections have the options of ``trio.SocketStream`` (such as ``TCP_NODELAY``) and
    TCP keepalive, with the times of ``connect``. If keepalive is already on for one of the
    ``sockets``, this socket keeps its own times. A connection that is already in the backlog keeps
    the options that its listening socket had when the client connected. To turn keepalive off for
    one connection, call ``Socket.setsockopt``.
    """

    def __init__(self, sockets: Iterable[socket.socket | trio.socket.SocketType]) -> None:
        self._set_up(ListeningSockets(sockets))
        self._listening.shared = True

    @classmethod
    def from_systemd(cls, name: str | None = None) -> Listener:
        """Return a Listener for sockets that systemd has opened for this program.

        In the socket unit, ``ListenStream=`` opens the sockets. systemd also keeps them open, so no
        client is lost while the program restarts. Child processes do not inherit the sockets.

        Args:
          name: the name of the sockets (``FileDescriptorName=``; by default the socket unit's
            name). ``None``: all sockets that no earlier call has returned.

        Raises:
          OSError: systemd has passed no such sockets to this process, or an earlier call has
            returned them.
          ValueError: one of the sockets is not a listening stream socket. A later call can still
            return them.

        On success, this removes the variables ``LISTEN_*`` from the environment. Source:
        sd_listen_fds(3).
        """
        with activated_sockets(name) as sockets:
            return cls(sockets)

    def _set_up(self, listening: ListeningSockets) -> None:
        self._listening = listening
        self._accepting = ConflictDetector("accepting from", listening)

    def __repr__(self) -> str:
        state = "closed" if self._listening.closed else "open"
        return f"<trisock.Listener {', '.join(map(str, self.addresses))} {state}>"

    @property
    def port(self) -> int:
        """The port, or 0 for a Unix socket. Still available after the listener is closed."""
        return self.addresses[0].port

    @property
    def addresses(self) -> tuple[Address, ...]:
        """All addresses of the listening sockets. Still available after the listener is closed."""
        return self._listening.addresses

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """The listening sockets, for a program that passes them to another process.

        Once this property was read, the sockets count as shared: a server that stops leaves the
        clients in the backlog to the other process. Do not accept from these sockets in this
        process: that breaks the listener.
        """
        self._listening.shared = True
        return tuple(self._listening.sockets)

    @property
    def dropped(self) -> int:
        """The number of connections that died before they could be accepted."""
        return self._listening.dropped

    async def accept(self) -> Socket:
        """Wait for a connection and return it, as a ``Socket`` whose side is ``"server"``.

        A connection that dies before it is accepted is dropped (and counted in ``dropped``).

        Raises:
          trio.ClosedResourceError: the listener is closed.
          OSError: the system has run out of a resource, such as descriptors (``EMFILE``).
          trio.BusyResourceError: another task is accepting.

        A cancelled call has accepted nothing. This is always a checkpoint. Source: Pluto's
        ``accept``.
        """
        with self._accepting:
            await trio.lowlevel.checkpoint()
            while True:
                connection = self._listening.accept_nowait()
                if connection is not None:
                    return new_socket(connection)
                await self._listening.wait()

    def hasconnection(self) -> bool:
        """Return whether a connection is ready. If so, the next ``accept`` does not wait.

        Returns False while another task is in ``accept``, because that task gets the connection.
        Source: Pluto's ``hasconnection``.
        """
        listening = self._listening
        listening.check_open()
        return not self._accepting.in_use and listening.accept_ahead()

    def __aiter__(self) -> Listener:
        """Iterate over connections: ``async for sock in listener``. ``close`` ends the loop."""
        return self

    async def __anext__(self) -> Socket:
        try:
            return await self.accept()
        except trio.ClosedResourceError:
            raise StopAsyncIteration from None

    async def close(self) -> None:
        """Stop listening. The same as ``aclose``. Connections that were not accepted are reset.

        A task in ``accept`` gets ``trio.ClosedResourceError``. The path of a Unix socket is
        removed. This is a checkpoint; the listener is closed even if this is cancelled.
        """
        self.abort()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Stop listening. The same as ``close``, even if cancelled."""
        await self.close()

    def abort(self) -> None:
        """Stop listening immediately: the same as ``close``, but synchronous.

        While no task is accepting, this may also be called outside Trio or from a finaliser. In a
        forked child, it leaves the path and the parent's sockets alone. To stop the listener of a
        ``Server``, call ``Server.stop``.
        """
        self._listening.close()


def new_listener(listening: ListeningSockets) -> Listener:
    """Return a Listener for sockets that the library itself has opened."""
    listener = object.__new__(Listener)
    listener._set_up(listening)
    return listener


def take_over(listener: Listener) -> ListeningSockets:
    """Return the sockets of a listener, and reserve them for a server.

    After this call, ``Listener.accept`` raises BusyResourceError. The call itself raises
    BusyResourceError if a task is accepting, and ClosedResourceError if the listener is closed.
    """
    listener._accepting.check()
    listener._listening.check_open()
    listener._accepting.in_use = True
    return listener._listening
