"""Platform differences, and system calls that Python and Trio do not offer.

All descriptors here are non-blocking, because they belong to Trio's sockets.
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

from .._arguments import Buffer

# Maximum bytes per read; the same as Trio's default.
RECEIVE_SIZE = 65536

# Maximum number of buffers per sendmsg.
IOV_MAX = os.sysconf("SC_IOV_MAX") if hasattr(os, "sysconf") else 1

HAS_SENDFILE = hasattr(os, "sendfile")

# SO_LINGER takes a struct linger: a switch and a number of seconds (socket(7)). If the switch is
# off, close(2) returns immediately. If it is on, and the number is 0, close(2) resets the
# connection. If it is on, and the number is larger, close(2) blocks the thread, even for a
# non-blocking socket.
_LINGER_FORMAT = "hh" if sys.platform == "win32" else "ii"
LINGER_AND_RESET = struct.pack(_LINGER_FORMAT, 1, 0)
_NO_LINGER = struct.pack(_LINGER_FORMAT, 0, 0)

# MSG_NOSIGNAL prevents SIGPIPE. Python sets SIGPIPE to be ignored, but command-line tools often
# restore its default action. Then a send to a peer that has closed the connection would kill the
# process. macOS lacks the flag. Windows lacks it too, but has no SIGPIPE.
SEND_FLAGS: int = getattr(socket, "MSG_NOSIGNAL", 0)

# The flags for sending the last bytes before FIN. With MSG_MORE, Linux sends these bytes and FIN in
# one packet (benchmark row tls-handshakes).
FINAL_SEND_FLAGS: int = SEND_FLAGS | getattr(socket, "MSG_MORE", 0)


class _BorrowedSocket(socket.socket):
    """A socket object that does not own its descriptor, and therefore never closes it."""

    def __del__(self) -> None:
        self.detach()


class BorrowedSocket:
    """The methods of ``socket.socket`` that Transport calls, for a stream that the user passed in.

    Trio hides the stream's ``socket.socket``, so we know only the descriptor. Each method first
    checks that the stream still owns the descriptor. Other code may have closed the stream, and an
    unrelated connection may have got the same descriptor number. Without this check, we would use
    that connection.
    """

    __slots__ = ("_borrowed", "_number", "fileno")

    def __init__(self, sock: trio.socket.SocketType) -> None:
        self.fileno = sock.fileno
        self._number = sock.fileno()
        self._borrowed = _BorrowedSocket(sock.family, sock.type, sock.proto, fileno=self._number)
        self._borrowed.setblocking(False)  # undoes the effect of socket.setdefaulttimeout

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

    def peer_ended(handle: int) -> bool:
        return False

    def readable_poller(handle: int) -> Callable[[int], object]:
        return lambda timeout: select.select([handle], [], [], timeout)[0]

    def writable_poller(handle: int) -> Callable[[int], object]:
        return lambda timeout: select.select([], [handle], [], timeout)[1]

    def sending_is_over(handle: int) -> bool:
        return False

    def unread_bytes(handle: int) -> int:
        with _borrow(handle) as sock, contextlib.suppress(BlockingIOError):
            return len(sock.recv(1, socket.MSG_PEEK))
        return 0

else:
    import fcntl
    import termios

    POLLERR = select.POLLERR

    def poll_readable(descriptor: int, events: int = select.POLLIN) -> int:
        """Return the events and errors that poll(2) reports now, as a bit mask. 0 means none."""
        poll = select.poll()
        poll.register(descriptor, events)
        return sum(found for _, found in poll.poll(0))

    def peer_ended(descriptor: int) -> bool:
        """Return whether the peer has sent FIN or a reset, even if data before it is unread.

        Only Linux reports a FIN while data is unread.
        """
        return bool(poll_readable(descriptor, getattr(select, "POLLRDHUP", 0)))

    def readable_poller(descriptor: int) -> Callable[[int], object]:
        """Return a function that takes a timeout and returns whether a read would not block."""
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        return poll.poll

    def writable_poller(descriptor: int) -> Callable[[int], object]:
        """Return a function that takes a timeout and returns whether a send would not block."""
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT)
        return poll.poll

    def sending_is_over(descriptor: int) -> bool:
        """Return whether poll(2) reports that sending is over, such as after a reset.

        A peer that has only ended its own side (FIN) may still read, so the result is False.
        """
        # On macOS, POLLHUP means the end of sending only if POLLOUT is requested. Otherwise, the
        # peer's FIN sets POLLHUP too.
        return bool(poll_readable(descriptor, select.POLLOUT) & select.POLLHUP)

    def unread_bytes(descriptor: int) -> int:
        """Return the number of bytes in the kernel's receive queue.

        If urgent data is pending, the number may be wrong, but it is at least 1, because an unread
        urgent byte also makes close(2) send RST.
        """
        answer = fcntl.ioctl(descriptor, termios.FIONREAD, bytes(4))
        count = int.from_bytes(answer, sys.byteorder)
        if not count and poll_readable(descriptor, select.POLLPRI) & select.POLLPRI:
            return 1
        return count


def set_option(
    sock: socket.socket | trio.socket.SocketType,
    level: int,
    option: int,
    value: int | Buffer | None,
    length: int | None,
) -> None:
    """Set a socket option: to a value, or to a NULL pointer and a length."""
    if value is None and length is not None:
        sock.setsockopt(level, option, None, length)
    elif value is not None and length is None:
        sock.setsockopt(level, option, value)
    else:
        raise TypeError("setsockopt takes a value, or None and a length")


def peek_byte(sock: trio.socket.SocketType) -> bytes:
    """Return the next byte without consuming it, or ``b""`` at EOF. Skips an urgent byte."""
    borrowed = socket.socket(sock.family, sock.type, sock.proto, fileno=sock.fileno())
    try:
        borrowed.setblocking(False)  # undoes the effect of socket.setdefaulttimeout
        return borrowed.recv(1, socket.MSG_PEEK)
    finally:
        borrowed.detach()


def send_queue_size(sock: trio.socket.SocketType) -> int:
    """Return the number of sent bytes that the peer's kernel has not acknowledged.

    For a Unix socket, the number is a measure of the bytes that the peer has not read. Returns 0 on
    systems other than Linux, because only Linux reports the number.
    """
    if sys.platform == "linux":
        answer = fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4))  # tcp(7): SIOCOUTQ
        return int.from_bytes(answer, sys.byteorder)
    return 0


def unacknowledged_bytes(sock: trio.socket.SocketType) -> int:
    """Return the number of sent bytes that the peer's kernel has not acknowledged.

    Returns 0 for a Unix socket: its data goes directly to the peer's receive queue, and stays there
    after a close. Returns 0 on systems other than Linux, because only Linux reports the number.
    """
    if sys.platform == "linux" and sock.family == socket.AF_UNIX:
        return 0
    return send_queue_size(sock)


INTERNET_FAMILIES = (socket.AF_INET, socket.AF_INET6)

# A struct sockaddr of family AF_UNSPEC.
_UNSPECIFIED = bytes(16)


def _load_connect() -> Callable[[int, bytes, int], int] | None:
    """Return the C function connect(2), because ``socket.connect`` does not support AF_UNSPEC."""
    if sys.platform == "linux":
        # Some builds of Python lack ctypes.
        with contextlib.suppress(ImportError, OSError, AttributeError):
            import ctypes

            connect: Callable[[int, bytes, int], int] = ctypes.CDLL(None).connect
            return connect
    return None  # pragma: no cover (tests run on Linux)


# Loaded at import: loading needs a free descriptor, and later the process may have none.
_connect = _load_connect()


def _reset_connection(sock: trio.socket.SocketType) -> bool:
    """Reset a TCP connection for all processes that hold it. Returns False if that is impossible.

    On Linux, connect(2) to AF_UNSPEC disconnects the socket and sends RST (tcp_disconnect).
    """
    if _connect is None or sock.family not in INTERNET_FAMILIES:
        return False
    return _connect(sock.fileno(), _UNSPECIFIED, len(_UNSPECIFIED)) == 0


def _close_resets(sock: trio.socket.SocketType) -> bool:
    """Return whether our close(2) with ``LINGER_AND_RESET`` is enough to send RST.

    It is not enough if another process may hold the connection.
    """
    return sock.family in INTERNET_FAMILIES and not _has_forked and _connect is None


# Whether a fork may have copied our descriptors into another process.
_has_forked = False


def _notice_fork() -> None:
    global _has_forked
    _has_forked = True


if sys.platform != "win32":  # pragma: no branch (tests run on Linux)
    os.register_at_fork(after_in_parent=_notice_fork, after_in_child=_notice_fork)


def abort_connection(sock: trio.socket.SocketType) -> None:
    """Reset a connection, either now or at close(2), which the caller must call next.

    If the system cannot reset the connection, shut it down instead.
    """
    if _reset_connection(sock):
        return
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_AND_RESET)
        # A peer that receives FIN before RST may see a clean EOF. So send FIN only if close(2) will
        # not reset the connection.
        if not _close_resets(sock):
            sock.shutdown(socket.SHUT_RDWR)


def end_connection(sock: trio.socket.SocketType, *, may_be_unread: bool) -> None:
    """End a connection as close(2) would, even if other processes hold the descriptor.

    close(2) has no effect on the connection while another process, such as a forked child, holds
    the descriptor. Like close(2), this function sends RST if input is unread. (The function checks
    for unread input only if ``may_be_unread`` is True.)
    """
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
        if not (may_be_unread and unread_bytes(sock.fileno()) and _reset_connection(sock)):
            sock.shutdown(socket.SHUT_RDWR)
    except (OSError, ValueError):  # the connection has ended, or other code closed it
        pass
