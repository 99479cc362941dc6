"""System calls that Python or Trio do not have, and what differs per platform.

All of them work on a descriptor that is non-blocking because Trio made it so.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import struct
import sys
from collections.abc import Callable, Iterator, Sequence

import trio

# The most buffers that one sendmsg takes.
IOV_MAX = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 1

HAS_SENDFILE = hasattr(os, "sendfile")

# struct linger (socket(7)). On with no time: close(2) resets the connection. Off: close(2) returns
# at once. On with some time it would keep the whole thread waiting, on a non-blocking socket too.
_LINGER_FORMAT = "hh" if sys.platform == "win32" else "ii"
LINGER_AND_RESET = struct.pack(_LINGER_FORMAT, 1, 0)
NO_LINGER = struct.pack(_LINGER_FORMAT, 0, 0)

# Python ignores SIGPIPE at its start, but programs may give it its default action back (command
# line tools do): then a write to a peer that has left would end the process. macOS and Windows do
# not have the flag; Windows has no such signal either.
SEND_FLAGS: int = getattr(socket, "MSG_NOSIGNAL", 0)


class _Borrowed(socket.socket):
    """A socket object for a descriptor that belongs to somebody else: it never closes it."""

    def __del__(self) -> None:
        self.detach()


class Descriptor:
    """The calls of a ``socket.socket`` that the Transport needs, on a stream that it was given.

    The socket inside is not for us to see there, only its descriptor. Each call first asks whether
    the stream still has it: whoever closes the stream below us must not make us read from the
    connection that gets the number next.
    """

    __slots__ = ("_borrowed", "_number", "fileno")

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.fileno = sock.fileno
        self._number = sock.fileno()
        self._borrowed = _Borrowed(sock.family, sock.type, sock.proto, fileno=self._number)
        self._borrowed.setblocking(False)  # as it is; socket.setdefaulttimeout must not matter

    def recv(self, max_bytes: int) -> bytes:
        if self.fileno() != self._number:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._borrowed.recv(max_bytes)

    def send(self, data: bytes | memoryview, flags: int) -> int:
        if self.fileno() != self._number:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return self._borrowed.send(data, flags)

    if sys.platform != "win32":  # pragma: no branch (tests run on Linux)

        def sendmsg(
            self, buffers: Sequence[bytes | memoryview], ancillary: tuple[()], flags: int
        ) -> int:
            if self.fileno() != self._number:
                raise OSError(errno.EBADF, os.strerror(errno.EBADF))
            return self._borrowed.sendmsg(buffers, ancillary, flags)


if sys.platform == "win32":  # pragma: no cover (tests run on Linux with ctypes)

    @contextlib.contextmanager
    def _borrow(handle: int) -> Iterator[socket.socket]:
        sock = socket.socket(fileno=handle)
        try:
            yield sock
        finally:
            sock.detach()

    POLLERR = 0

    def poll_readable(handle: int) -> int:
        return len(select.select([handle], [], [], 0)[0])

    def writable_poller(handle: int) -> Callable[[int], object]:
        return lambda timeout: select.select([], [handle], [], timeout)[1]

    def unread_bytes(handle: int) -> int:
        with _borrow(handle) as sock, contextlib.suppress(BlockingIOError):
            return len(sock.recv(1, socket.MSG_PEEK))
        return 0

else:
    import fcntl
    import termios

    POLLERR = select.POLLERR

    def poll_readable(descriptor: int, events: int = select.POLLIN) -> int:
        """Return those of some events, and of errors, that poll(2) reports; 0 for none."""
        poll = select.poll()
        poll.register(descriptor, events)
        return sum(found for _, found in poll.poll(0))

    def writable_poller(descriptor: int) -> Callable[[int], object]:
        """Return a function that tells whether a descriptor can be written to within so long."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return poll.poll

    def unread_bytes(descriptor: int) -> int:
        """Return the number of bytes in the kernel's receive queue.

        It is exact unless there is urgent data: then it is 1 at least, because close(2) takes an
        urgent byte for unread, too.
        """
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
        count = int.from_bytes(answer, sys.byteorder)
        if not count and poll_readable(descriptor, select.POLLPRI) & select.POLLPRI:
            return 1
        return count


def peek_byte(sock: trio.socket.SocketType) -> bytes:
    """Look at the next byte, past an urgent one; ``b""`` at the end."""
    borrowed = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
    try:
        borrowed.setblocking(False)  # as it is; socket.setdefaulttimeout must not matter
        return borrowed.recv(1, socket.MSG_PEEK)
    finally:
        borrowed.detach()


def unacknowledged_bytes(sock: trio.socket.SocketType) -> int:
    """Return the number of bytes sent that the peer's kernel has not acknowledged.

    A Unix socket puts everything into the peer's queue at once, and closing leaves it
    there. Where the kernel is not asked in this way (other systems than Linux), what is
    left after the peer was drained is taken to be acknowledged.
    """
    if sys.platform == "linux" and sock.family != socket.AF_UNIX:
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))  # tcp(7): SIOCOUTQ
        return int.from_bytes(answer, sys.byteorder)
    return 0


INTERNET_FAMILIES = (socket.AF_INET, socket.AF_INET6)

# A struct sockaddr of the family AF_UNSPEC.
_UNSPECIFIED = bytes(16)


def _load_connect() -> Callable[[int, bytes, int], int] | None:
    """Return connect(2), to which Python's ``socket.connect`` gives no address of no family."""
    if sys.platform == "linux":
        # Some builds of Python do without ctypes.
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            connect: Callable[[int, bytes, int], int] = ctypes.CDLL(None).connect
            return connect
    return None  # pragma: no cover (tests run on Linux)


# Loaded now: later there may be no descriptor left to load it by.
_connect = _load_connect()


def reset_connection(sock: trio.socket.SocketType) -> bool:
    """Reset a TCP connection, whoever else holds it; False if the system cannot.

    On Linux, connect(2) to no address dissolves the connection (tcp_disconnect), which sends RST.
    """
    if _connect is None or sock.family not in INTERNET_FAMILIES:
        return False
    return _connect(sock.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)) == 0


def close_resets(sock: trio.socket.SocketType) -> bool:
    """Whether close(2) resets a connection that has ``LINGER_AND_RESET``, for all who hold it."""
    return sock.family in INTERNET_FAMILIES and not _has_forked and _connect is None


# Whether a fork may have given our descriptors to another process.
_has_forked = False


def _notice_fork() -> None:
    global _has_forked
    _has_forked = True


if sys.platform != "win32":  # pragma: no branch (tests run on Linux)
    os.register_at_fork(after_in_parent=_notice_fork, after_in_child=_notice_fork)
