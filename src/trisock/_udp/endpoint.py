"""Endpoint: the descriptor of a UDP socket, its addresses, its options, and its close."""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass
from typing import overload

import trio

from .. import _fork
from .._address import Address, address_from_sockaddr
from .._arguments import Buffer, quoted
from .._net.conflicts import ConflictDetector
from .._net.syscalls import set_option
from .._not_copyable import NotCopyable
from . import groups
from .local_hosts import Destinations, Sources
from .syscalls import dropped_datagrams, receiver, request_packet_info

# The errnos (Unix, Windows) of calls on a descriptor that is closed.
_CLOSED_ERRNOS = {errno.EBADF, errno.ENOTSOCK}

# If this many calls in a row do not wait, at least one of them is a schedule point. A pass through
# the scheduler costs as much as a call (benchmark row udp-echo64).
_CALLS_PER_CHECKPOINT = 16


@dataclass(frozen=True)
class UDPInfo:
    """A snapshot of a UDP socket's properties.

    Attributes:
      local: our own address.
      peer: the one peer of the socket, or ``None``.
      isopen: the result of ``UDPSocket.isopen()``.
      dropped: how many datagrams the kernel has dropped at this socket since it was opened, mostly
        because its buffer (``SO_RCVBUF``) was full. This is the counter of ``SO_RXQ_OVFL``, which
        wraps around at 2**32. ``None`` once the socket is closed, on Linux before 4.12, and on
        other systems.
    """

    local: Address
    peer: Address | None
    isopen: bool
    dropped: int | None


class Endpoint(NotCopyable, trio.abc.AsyncResource):
    """The state and the methods that receiving and sending share. A base class of ``UDPSocket``.

    Args: as in ``UDPSocket``.

    Invariant: ``_rest`` is ``None`` until ``stop_receiving``. Then it is the maximum number of
    datagrams that may still be received.
    """

    def __init__(self, sock: socket.socket | trio.socket.SocketType) -> None:
        self._socket = _adopt(sock)
        self._family = self._socket.family
        self._local = address_from_sockaddr(self._family, self._socket.getsockname())
        self._peer = _peer_of(self._socket)
        # The destination of each datagram, if the socket has only one address.
        self._destination = None if is_wildcard(self._local.host) else self._local
        if self._destination is None:
            request_packet_info(self._socket)
        groups.only_joined_groups(self._socket)
        self._destinations = Destinations(self._local.port)
        self._sources = Sources(self._family, self._local)
        self._receive = receiver(self._socket, self._peer is not None)
        self._receiving = ConflictDetector("receiving from", str(self))  # self: a reference cycle
        self._calls_left = 0
        self._rest: int | None = None
        self._send_lock: trio.Lock | None = None
        # The cancel scopes of sends that look up a name. Closing the socket cancels these scopes.
        self._lookups: set[trio.CancelScope] = set()
        self._closed = trio.Event()

    def __str__(self) -> str:
        if self._peer is not None:
            return f"the UDP socket {self._local} with the peer {self._peer}"
        return f"the UDP socket {self._local}"

    def __repr__(self) -> str:
        ends = f"{self._local}" if self._peer is None else f"{self._local} <-> {self._peer}"
        return f"<trisock.UDPSocket {ends} {'open' if self.isopen() else 'closed'}>"

    async def close(self) -> None:
        """Close the socket. The same as ``aclose``.

        Waiting tasks are woken with ``trio.ClosedResourceError``, and an iteration ends. Datagrams
        that were not received are lost. A second call changes nothing. This is a checkpoint; the
        socket is closed even if this is cancelled.
        """
        self.abort()
        await trio.lowlevel.checkpoint()

    async def aclose(self) -> None:
        """Close the socket. The same as ``close``, even if cancelled."""
        await self.close()

    def abort(self) -> None:
        """Close the socket immediately: the same as ``close``, but synchronous.

        While no task uses the socket, this may also be called outside Trio.
        """
        if self.isopen():
            self._receiving.closed = True
            if _fork.can_wake_tasks():
                for lookup in self._lookups:
                    lookup.cancel()
            _fork.notify_closing(self._socket.fileno())
        self._socket.close()
        self._closed.set()

    async def wait_closed(self) -> None:
        """Wait until the socket is closed. Always a checkpoint.

        Cancelling the wait does not affect the socket.
        """
        await self._closed.wait()

    # ---- information ----

    def isopen(self) -> bool:
        """Return whether the socket is open."""
        return self._socket.fileno() >= 0

    def getlocal(self) -> Address:
        """Return our own address, even after ``close``.

        The host is ``"::"`` or ``"0.0.0.0"`` if the socket is bound to all addresses of this
        machine.
        """
        return self._local

    def getpeer(self) -> Address | None:
        """Return the one peer (see ``connect_udp``) or ``None``. Also works after ``close``."""
        return self._peer

    def info(self) -> UDPInfo:
        """Return a snapshot of the socket's properties."""
        isopen = self.isopen()
        return UDPInfo(
            local=self._local,
            peer=self._peer,
            isopen=isopen,
            dropped=dropped_datagrams(self._socket) if isopen else None,
        )

    def fileno(self) -> int:
        """Return the file descriptor, or -1 once it is closed."""
        return self._socket.fileno()

    @overload
    def setsockopt(self, level: int, option: int, value: int | Buffer) -> None: ...

    @overload
    def setsockopt(self, level: int, option: int, value: None, length: int) -> None: ...

    def setsockopt(
        self, level: int, option: int, value: int | Buffer | None, length: int | None = None
    ) -> None:
        """Set a socket option; see ``socket.socket.setsockopt``."""
        self._check_open()
        set_option(self._socket, level, option, value, length)

    @overload
    def getsockopt(self, level: int, option: int) -> int: ...

    @overload
    def getsockopt(self, level: int, option: int, buffersize: int) -> bytes: ...

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Return a socket option; see ``socket.socket.getsockopt``."""
        self._check_open()
        return self._socket.getsockopt(level, option, buffersize)

    # ---- for the methods of the subclasses ----

    async def _schedule(self) -> None:
        """Let other tasks run, after a call that did not wait."""
        self._calls_left = _CALLS_PER_CHECKPOINT - 1
        await trio.lowlevel.cancel_shielded_checkpoint()

    async def _count_call(self) -> None:
        """Count a call that did not wait: a loop of failing calls must not starve other tasks."""
        if self._calls_left:
            self._calls_left -= 1
        else:
            await self._schedule()

    def _check_open(self) -> None:
        if self._socket.fileno() < 0:
            raise self._closed_error()

    def _closed_error(self) -> trio.ClosedResourceError:
        return trio.ClosedResourceError(f"this side has already closed {self}")

    def _is_closed_error(self, exc: OSError) -> bool:
        """Return whether a system call has failed because the descriptor is closed."""
        return exc.errno in _CLOSED_ERRNOS


def is_wildcard(host: str) -> bool:
    """Return whether a socket with this host is bound to all addresses of the machine."""
    return host in ("0.0.0.0", "::")  # noqa: S104


def _adopt(sock: socket.socket | trio.socket.SocketType) -> socket.socket:
    if not isinstance(sock, (socket.socket, trio.socket.SocketType)):
        raise TypeError(f"a UDPSocket needs a socket, not {quoted(sock)}")
    is_internet = sock.family in (socket.AF_INET, socket.AF_INET6)
    if sock.type != socket.SOCK_DGRAM or not is_internet:
        raise ValueError(f"not a UDP socket: {sock!r}")
    if not _is_bound(sock):
        raise ValueError(f"not a bound socket: {sock!r}")
    if isinstance(sock, trio.socket.SocketType):
        sock = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.detach())
    sock.setblocking(False)
    return sock


def _is_bound(sock: socket.socket | trio.socket.SocketType) -> bool:
    try:
        return bool(sock.getsockname()[1])
    except OSError:  # WSAEINVAL on Windows: the socket is not bound
        return False


def _peer_of(sock: socket.socket) -> Address | None:
    try:
        return address_from_sockaddr(sock.family, sock.getpeername())
    except OSError:  # ENOTCONN
        return None
