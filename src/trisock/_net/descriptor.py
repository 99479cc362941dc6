"""Descriptor: the file descriptor of one connection, and the errors that name its peer."""

from __future__ import annotations

import contextlib
import errno
import socket as stdlib_socket
import weakref
from typing import TypeVar

import trio

from .. import _fork
from .._address import Address, address_from_sockaddr
from .._errors import StartTLSError, is_peer_to_blame
from .._text import set_message
from .syscalls import BorrowedSocket

# The errnos (Unix, Windows) of calls on a descriptor that other code has closed.
_CLOSED_ERRNOS = {errno.EBADF, errno.ENOTSOCK}

FailureT = TypeVar("FailureT", bound=BaseException)


class ReadInterrupted(Exception):
    """``Transport.interrupt_read`` has woken a read, which has consumed nothing."""


class Descriptor:
    """One connection's descriptor. This is the base class of ``Transport``.

    Args: as in ``Transport``.

    Attributes:
      closing: whether this side has begun to close the connection.
    """

    __slots__ = ("_failures", "_peer", "_raw", "_socket", "_stream", "closing")

    def __init__(
        self,
        connection: trio.SocketStream | trio.socket.SocketType,
        raw: stdlib_socket.socket | None,
    ) -> None:
        self._stream: trio.SocketStream | None = None
        if isinstance(connection, trio.SocketStream):
            self._stream = connection
            connection = connection.socket
        self._socket = connection
        self._raw: stdlib_socket.socket | BorrowedSocket
        if raw is not None and raw.fileno() == connection.fileno():
            self._raw = raw
        else:
            self._raw = BorrowedSocket(connection)
        # A sockaddr, which is converted to Address lazily, or the Address of a PROXY header.
        self._peer: object = connection.getpeername()
        self.closing = False
        # The failures that ``caused()`` recognizes. The keys are ids, because the class of an
        # exception may not support hashing or comparison.
        self._failures: weakref.WeakValueDictionary[int, BaseException] | None = None

    def __str__(self) -> str:
        return f"the connection with {self.peer}"

    @property
    def socket(self) -> trio.socket.SocketType:
        """Trio's socket. Do not close it or transfer data with it: this breaks the connection."""
        return self._socket

    @property
    def stream(self) -> trio.SocketStream:
        """Trio's stream. It is created at the first use (benchmark rows connections and memory)."""
        if self._stream is None:
            self._stream = trio.SocketStream(self._socket)
        return self._stream

    @property
    def peer(self) -> Address:
        """The peer's address. Behind a proxy: the client's address."""
        if isinstance(self._peer, Address):
            return self._peer
        return address_from_sockaddr(self._socket.family, self._peer)

    @peer.setter
    def peer(self, address: Address) -> None:
        self._peer = address

    def descriptor(self) -> int:
        """Return the descriptor. Raises ``ClosedResourceError`` if it is closed."""
        descriptor = self._socket.fileno()
        if descriptor < 0 or self.closing:
            raise self.closed_error()
        return descriptor

    def wake_tasks(self) -> None:
        """Wake waiting tasks with ``ClosedResourceError``."""
        if self._socket.fileno() >= 0:
            _fork.notify_closing(self._socket.fileno())

    def close_descriptor(self) -> None:
        """Close the descriptor, and wake the tasks that wait for it."""
        if _fork.can_wake_tasks():
            self._socket.close()
            return
        with contextlib.suppress(OSError):  # EBADF, if it is already closed
            stdlib_socket.close(self._socket.detach())

    # ---- errors ----

    def closed_error(self) -> trio.ClosedResourceError:
        """Return the error for a call made after this side has closed the connection."""
        return self._error(trio.ClosedResourceError(), "this side has already closed {}")

    def broken(self, why: str) -> trio.BrokenResourceError:
        """Return a new error that says why the connection is broken. ``caused`` recognizes it."""
        return self.remember_failure(self._error(trio.BrokenResourceError(), "{} is broken: ", why))

    def _error(self, error: FailureT, message: str, why: str = "") -> FailureT:
        """Set the message of an error, in which ``{}`` stands for this connection."""
        without_peer = message.format("the connection") + why
        return set_message(error, message.format(self) + why, without_peer=without_peer)

    def _broken_from(self, exc: OSError) -> trio.BrokenResourceError:
        if exc.errno in _CLOSED_ERRNOS:  # other code closed the socket
            raise self.closed_error() from None
        return self.broken(exc.strerror or str(exc))

    def remember_failure(self, failure: FailureT) -> FailureT:
        """Remember that this connection caused the failure, and return the failure."""
        if self._failures is None:
            self._failures = weakref.WeakValueDictionary()
        self._failures[id(failure)] = failure
        return failure

    def caused(self, exc: BaseException) -> bool:
        """Return whether this connection caused the error.

        True if ``remember_failure`` was called with this very exception, or if a STARTTLS
        negotiation on this connection raised it.
        """
        if type(exc) is StartTLSError:
            return is_peer_to_blame(exc, self._socket)
        return self._failures is not None and self._failures.get(id(exc)) is exc
