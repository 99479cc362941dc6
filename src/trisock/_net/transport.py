"""Transport: one connection's descriptor, with no TLS and no buffer.

It wraps a ``trio.SocketStream`` and uses the same descriptor. It adds:

- reads and writes that start with one plain system call; the task waits only after ``EAGAIN``;
- reads and writes that never wait (``receive_nowait``, ``send_nowait``), for reading ahead
  and for closing;
- several buffers in one system call, and files without copying;
- a close that does not lose data in flight.

A failed send does not stop reading. Data that the peer sent earlier may still be in the
kernel, so reads continue until EOF or an error.

``receive`` and ``send`` are hot: every byte goes through them, and Python is half the cost of
an echo. So they check one attribute for anything unusual and leave the rest to other
functions (``nox -s bench``, rows echo64, echo1, receive, send).
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import socket
import sys
import weakref
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar

import trio

from .. import _fork
from .._errors import unraised_copy
from .linger import linger
from .syscalls import (
    HAS_SENDFILE,
    IOV_MAX,
    POLLERR,
    RECEIVE_SIZE,
    SEND_FLAGS,
    BorrowedSocket,
    abort_connection,
    end_connection,
    peek_byte,
    poll_readable,
    unacknowledged_bytes,
    unread_bytes,
    writable_poller,
)

# One read takes at most RECEIVE_SIZE, which bounds the memory per connection. After a full read the
# next one may take twice as many bytes: when data arrives that fast, a pass through the scheduler
# costs more than the copy (row receive: 1.5 times bare Trio's speed instead of 1.25). 256 KiB is
# slower than 128 KiB, because it exceeds the cache.
_LARGE_RECEIVE_SIZE = 131072

# After four EAGAINs in a row, wait first for the next 15 reads: the peer waits for our answers, so
# an immediate recv would find nothing (row echo1).
_MAX_EAGAINS = 4
_WAIT_FIRST_READS = 15

# The errors of os.sendfile for a file or an offset that it does not support.
_SENDFILE_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EOVERFLOW}

# Maximum bytes per os.sendfile call. The call blocks while it reads the file, so a small count
# keeps the event loop's pauses short on a slow disk.
_SENDFILE_SIZE = 1024 * 1024

# The errnos of a descriptor that was closed underneath us (Unix, Windows).
_CLOSED_ERRNOS = {errno.EBADF, errno.ENOTSOCK}

# The error after a close. Raise copies of it, because this object would collect tracebacks.
_CLOSED = trio.ClosedResourceError("this socket was already closed")

FailureT = TypeVar("FailureT", bound=BaseException)


class Transport:
    """One connection's descriptor.

    Args:
      stream: the connection. The Transport uses and closes it; it remains usable for
          everything else, such as socket options.
      raw: the ``socket.socket`` that the stream was made from, if known. Its calls are
          cheaper than a ``BorrowedSocket``'s, and as safe.

    Invariant: once ``_read_failure`` is set, every read raises a copy of it; the same holds for
    ``_send_failure`` and sends. Once ``closing`` is set, both are set, and only the close touches
    the descriptor. A send that was cut short sets ``_send_failure``, because the peer cannot tell
    where the next one begins. ``_reset`` is an error that a send got; a read raises it at EOF.
    """

    __slots__ = (
        "_eagain_count",
        "_failures",
        "_poll_writable",
        "_raw",
        "_read_failure",
        "_receive_size",
        "_reset",
        "_send_failure",
        "_socket",
        "closing",
        "stream",
    )

    def __init__(self, stream: trio.SocketStream, raw: socket.socket | None = None) -> None:
        self.stream = stream
        self._socket = stream.socket
        self._raw: socket.socket | BorrowedSocket
        if raw is not None and raw.fileno() == stream.socket.fileno():
            self._raw = raw
        else:
            self._raw = BorrowedSocket(stream.socket)
        self._receive_size = RECEIVE_SIZE
        self._eagain_count = 0
        self._poll_writable: Callable[[int], object] | None = None
        self.closing = False
        self._read_failure: Exception | None = None
        self._send_failure: Exception | None = None
        self._reset: trio.BrokenResourceError | None = None
        # Keyed by identity: the exception's class may not be hashable or comparable.
        self._failures: weakref.WeakValueDictionary[int, BaseException] | None = None

    # ---- reading ----

    async def receive(self) -> bytes:
        """Wait for bytes and return them; ``b""`` at EOF. A full checkpoint.

        A cancelled call has read nothing from the kernel.
        """
        if self._read_failure is not None:
            self._raise_failure(self._read_failure)
        if self._eagain_count < _MAX_EAGAINS:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                data = self._raw.recv(self._receive_size)
            except BlockingIOError:
                self._eagain_count += 1
            except OSError as exc:
                raise self._reading_failed(exc) from exc
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._eagain_count = 0
                if len(data) >= RECEIVE_SIZE:
                    self._receive_size = _LARGE_RECEIVE_SIZE
                return data if data else self._end_of_stream()
        else:
            self._eagain_count += 1
            if self._eagain_count == _MAX_EAGAINS + _WAIT_FIRST_READS:
                self._eagain_count = _MAX_EAGAINS - 1
        while True:
            descriptor = self._raw.fileno()
            if descriptor < 0:  # closed underneath us
                self._raise_failure(_CLOSED)
            await trio.lowlevel.wait_readable(descriptor)
            try:
                return self.receive_nowait()
            except BlockingIOError:
                pass

    def receive_nowait(self) -> bytes:
        """Return the bytes that have arrived, ``b""`` at EOF. ``BlockingIOError`` if nothing has.

        Errors are stored and raised again: the kernel reports a reset only once, to the first
        call after it, and then a clean end.
        """
        if self._read_failure is not None:
            self._raise_failure(self._read_failure)
        try:
            data = self._raw.recv(self._receive_size)
        except BlockingIOError:
            raise
        except OSError as exc:
            raise self._reading_failed(exc) from exc
        if len(data) < RECEIVE_SIZE:
            self._receive_size = RECEIVE_SIZE
        else:
            self._receive_size = _LARGE_RECEIVE_SIZE
            self._eagain_count = 0
        return data if data else self._end_of_stream()

    def _end_of_stream(self) -> bytes:
        if self._reset is not None:
            self._read_failure = self._reset
            self._raise_failure(self._reset)
        return b""

    def _reading_failed(self, exc: OSError) -> trio.BrokenResourceError:
        failure = self._broken_from(exc)
        self._read_failure = unraised_copy(failure)
        return failure

    def at_end(self) -> bool:
        """Return whether nothing is unread and nothing more will come. Consumes nothing.

        A count of unread bytes is not enough. FIONREAD stops at the mark of urgent data, and on
        a Unix socket it keeps counting an urgent byte after the read has passed it.
        """
        if self._read_failure is not None:
            return True
        try:
            descriptor = self._descriptor()
            events = poll_readable(descriptor)
            if not events:
                return False
            if events & POLLERR and not unread_bytes(descriptor):
                return True  # any read, even with MSG_PEEK, would clear the error
            return not peek_byte(self._socket)
        except BlockingIOError:  # only urgent data is readable
            return False
        except trio.ClosedResourceError:  # closed underneath us
            return True
        except OSError as exc:
            with contextlib.suppress(trio.ClosedResourceError):
                self._reading_failed(exc)  # stored for the next read
            return True

    # ---- writing ----

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all buffers. A full checkpoint.

        Cancelled before the first byte, it changes nothing. Cancelled later, sending is over.
        """
        if self._send_failure is not None:
            self._raise_failure(self._send_failure)
        await trio.lowlevel.checkpoint_if_cancelled()
        if len(buffers) == 1:
            data = buffers[0]
            try:
                sent = self._raw.send(data, SEND_FLAGS)
            except BlockingIOError:
                sent = 0
            except OSError as exc:
                raise self._sending_failed(exc) from exc
            if sent == len(data):
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                await self._send_rest([memoryview(data)[sent:]], started=bool(sent))
        else:
            views = [memoryview(each) for each in buffers if len(each)]
            if not views:
                self.check_sending()
            await self._send_rest(views, started=False)

    async def _send_rest(self, views: list[memoryview], *, started: bool) -> None:
        first = 0  # the first view with unsent bytes
        checkpointed = False
        try:
            while first < len(views):
                sent = self.send_nowait(*views[first : first + IOV_MAX])
                if not sent:
                    await self.wait_writable()
                    checkpointed = True
                    continue
                started = True
                while first < len(views) and sent >= len(views[first]):
                    sent -= len(views[first])
                    first += 1
                if first < len(views):
                    views[first] = views[first][sent:]
                    await trio.lowlevel.checkpoint()  # this loop may be long
                    checkpointed = True
        except BaseException:
            if started:
                self.cut_short()
            raise
        if not checkpointed:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def sendfile(
        self, descriptor: int, offset: int, count: int, on_sent: Callable[[int], None]
    ) -> bool:
        """Send part of a file without copying it. Returns False if the kernel cannot send it.

        Calls ``on_sent`` with the size of each piece. Stops early at the file's EOF.
        Cancellation is as in ``send``. A full checkpoint.
        """
        await trio.lowlevel.checkpoint()
        self.check_sending()
        if sys.platform == "win32" or not HAS_SENDFILE:
            return False
        if signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL:
            return False  # sendfile(2) has no MSG_NOSIGNAL: SIGPIPE would kill the process
        started = False
        end = offset + count
        try:
            while offset < end:
                try:
                    sent = os.sendfile(
                        self._descriptor(), descriptor, offset, min(_SENDFILE_SIZE, end - offset)
                    )
                except BlockingIOError:
                    await self.wait_writable()
                    continue
                except OSError as exc:
                    if not started and exc.errno in _SENDFILE_UNSUPPORTED:
                        return False
                    if exc.errno == errno.EIO:  # an error of the file, not of the connection
                        raise
                    raise self._sending_failed(exc) from exc
                if sent == 0:
                    break
                started = True
                offset += sent
                on_sent(sent)
                await trio.lowlevel.checkpoint()
        except BaseException:
            if started:
                self.cut_short()
            raise
        return True

    def writable_now(self) -> bool:
        """Return whether the kernel would take at least one byte now, or report an error."""
        if self._poll_writable is None:  # only TLS needs it
            self._poll_writable = writable_poller(self._descriptor())
        return bool(self._poll_writable(0))

    async def wait_writable(self) -> None:
        """Wait until ``writable_now``. A full checkpoint."""
        await trio.lowlevel.wait_writable(self._descriptor())
        self._descriptor()  # may have been closed while we waited

    async def send_eof(self) -> None:
        """Send FIN; reading goes on. A full checkpoint. Calling it again changes nothing."""
        self._descriptor()
        try:
            await self.stream.send_eof()
        except trio.BrokenResourceError as exc:
            raise self.remember_failure(exc) from exc.__cause__

    @property
    def eof_sent(self) -> bool:
        """Whether ``send_eof`` was called."""
        return self._socket.did_shutdown_SHUT_WR

    def check_sending(self) -> None:
        """Raise the error that a send would raise, as far as it is known without sending."""
        if self._send_failure is not None:
            self._raise_failure(self._send_failure)
        self._descriptor()
        if self.eof_sent:
            raise trio.ClosedResourceError("nothing can be sent after send_eof")

    def cut_short(self) -> None:
        """Refuse later sends: only part of a message or a file was sent."""
        if self._send_failure is None:
            self._send_failure = self.broken("an earlier send was cut short")

    def send_nowait(self, *buffers: bytes | memoryview) -> int:
        """Send as many bytes as the kernel takes now; return their number."""
        if self._send_failure is not None:
            self._raise_failure(self._send_failure)
        try:
            if sys.platform == "win32" or len(buffers) == 1:  # Windows has no sendmsg
                return self._raw.send(buffers[0], SEND_FLAGS)
            return self._raw.sendmsg(buffers, (), SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise self._sending_failed(exc) from exc

    def _sending_failed(self, exc: OSError) -> trio.BrokenResourceError:
        failure = self._broken_from(exc)
        if exc.errno != errno.EPIPE:  # EPIPE follows the peer's FIN, so the read ends cleanly
            self._reset = unraised_copy(failure)  # the kernel does not report it again
        if self.eof_sent:
            raise trio.ClosedResourceError("nothing can be sent after send_eof") from None
        return failure

    # ---- closing ----

    def begin_close(self) -> None:
        """Begin to close: wake waiting tasks with ``ClosedResourceError``.

        From now on only ``close``, ``abort``, ``close_immediately`` and ``release`` have an effect.
        """
        self._mark_closing()
        if self._socket.fileno() >= 0:
            _fork.notify_closing(self._socket.fileno())

    async def close(self, final_bytes: bytes = b"") -> None:
        """Send ``final_bytes``, then FIN, and close without losing data in flight.

        If ``close(2)`` finds unread input, or input arrives after it, the kernel sends RST, and
        RST destroys data in flight (RFC 1122, section 4.2.2.13; RFC 2525, section 2.17). So we
        read until the peer ends its side, for at most ``LINGER_SECONDS`` and ``LINGER_BYTES``.
        If nothing is unread and everything sent is acknowledged, we close immediately.

        A checkpoint only if it has to wait. A cancelled call closes immediately. Raises nothing
        but ``Cancelled``.
        """
        self._mark_closing()
        drained = False
        try:
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                drained = not final_bytes and self._is_drained()
                if not drained:
                    await linger(self._socket, self._raw, final_bytes, fin_sent=self.eof_sent)
        finally:
            end_connection(self._socket, may_be_unread=not drained)
            self._close_descriptor()

    def close_if_drained(self) -> bool:
        """Close if nothing can be lost, and return True; else do nothing and return False.

        No task may be waiting on the connection: none is woken.
        """
        try:
            if not self._is_drained():
                return False
        except OSError:
            return False
        self._mark_closing()
        end_connection(self._socket, may_be_unread=False)
        self._close_descriptor()
        return True

    def _mark_closing(self) -> None:
        """Refuse every read and send except those of the close."""
        self.closing = True
        self._read_failure = self._send_failure = _CLOSED

    def _is_drained(self) -> bool:
        """Return whether nothing is unread here and nothing is in flight to the peer."""
        descriptor = self._socket.fileno()
        if descriptor < 0:  # closed underneath us
            return True
        return unread_bytes(descriptor) == 0 and unacknowledged_bytes(self._socket) == 0

    def abort(self) -> None:
        """Reset the connection immediately. Data that is still in the kernel is discarded.

        This also works when others hold the descriptor, such as a forked child. Where the system
        cannot reset a shared connection, it is shut down.
        """
        self.begin_close()
        if self._socket.fileno() >= 0:
            abort_connection(self._socket)
        self._close_descriptor()

    def close_immediately(self) -> None:
        """Close immediately, as ``trio.SocketStream`` does. The kernel still sends its data."""
        self.begin_close()
        end_connection(self._socket, may_be_unread=True)
        self._close_descriptor()

    def release(self) -> None:
        """Close our descriptor and leave the connection to the other process that holds it."""
        self.begin_close()
        with contextlib.suppress(OSError):  # closed underneath us
            socket.close(self._socket.detach())

    def _close_descriptor(self) -> None:
        if _fork.can_wake_tasks():
            self._socket.close()
            return
        with contextlib.suppress(OSError):  # already closed
            socket.close(self._socket.detach())

    # ---- errors ----

    def _descriptor(self) -> int:
        descriptor = self._socket.fileno()
        if descriptor < 0 or self.closing:
            raise trio.ClosedResourceError(*_CLOSED.args)
        return descriptor

    def _raise_failure(self, failure: Exception) -> NoReturn:
        if isinstance(failure, trio.BrokenResourceError):
            raise self.remember_failure(unraised_copy(failure))
        raise trio.ClosedResourceError(*_CLOSED.args)

    def _broken_from(self, exc: OSError) -> trio.BrokenResourceError:
        if exc.errno in _CLOSED_ERRNOS:  # closed underneath us
            raise trio.ClosedResourceError(*_CLOSED.args) from None
        return self.broken(exc.strerror or str(exc))

    def broken(self, why: str) -> trio.BrokenResourceError:
        """Create the error of a broken connection and remember it as one of ours."""
        return self.remember_failure(trio.BrokenResourceError(f"the connection is broken: {why}"))

    def remember_failure(self, failure: FailureT) -> FailureT:
        """Remember that this failure belongs to this connection, and return it."""
        if self._failures is None:
            self._failures = weakref.WeakValueDictionary()
        self._failures[id(failure)] = failure
        return failure

    def caused(self, exc: BaseException) -> bool:
        """Return whether this connection raised the exception."""
        return self._failures is not None and self._failures.get(id(exc)) is exc
