"""Transport: the kernel's end of a connection, read and written without waste.

It stands on a ``trio.SocketStream`` and uses the same descriptor. What it adds:

- the first try of every read and write is one plain system call, and only where
  the kernel says "not now" does the task wait;
- reads and writes that do not wait at all (``receive_nowait``, ``send_nowait``),
  for looking ahead and for closing;
- several buffers in one system call, files without copying;
- a close that loses nothing that was sent.

A failed send says nothing about reading: what the peer said before can still be in the
kernel, so reads go on until they meet the end or an error.

``receive`` and ``send`` are hot: every byte goes through them, and half of what an echo
costs here is Python. So they ask one attribute whether anything is out of the ordinary, and leave
all that is to other functions (``nox -s bench``, rows echo64, echo1, receive, send).
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
from .linger import linger
from .syscalls import (
    HAS_SENDFILE,
    IOV_MAX,
    LINGER_AND_RESET,
    NO_LINGER,
    POLLERR,
    SEND_FLAGS,
    Descriptor,
    close_resets,
    peek_byte,
    poll_readable,
    reset_connection,
    unacknowledged_bytes,
    unread_bytes,
    writable_poller,
)

# What one read takes at most: Trio's own choice at first, for each connection that is being read
# costs that much memory. Where a read was filled, the next one takes twice as much: then the
# pass through the scheduler is the dearer part (row receive: 1.5 times bare Trio's speed in
# place of 1.25; 256 KiB is slower again, the cache ends).
RECEIVE_SIZE = 65536
_LARGE_RECEIVE_SIZE = 131072

# A read tries before it waits, unless so many tries in a row were in vain: then the peer waits for
# our answers, and so many reads wait at once (row echo1).
_MISSES = 4
_SKIPPED = 15

# What it says of a file, or an offset, that it does not take.
_NOT_BY_SENDFILE = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EOVERFLOW}

# What os.sendfile takes at a time. The call reads the file itself, and does not return before
# it has: a small count keeps the event loop's pauses short when the file is on a slow disk.
_SENDFILE_SIZE = 1024 * 1024

FailureT = TypeVar("FailureT", bound=BaseException)

_CLOSED_ERRNOS = {errno.EBADF, errno.ENOTSOCK}


class Transport:
    """One connection's descriptor.

    Args:
      stream: the connection. The Transport uses it and closes it; it stays
          usable for what the Transport does not do, such as socket options.
      raw: the socket that the stream was made of, where it is known: its calls are
          cheaper than those on a descriptor, and as safe.

    Invariant: ``_read_failure`` is what every read from now on raises, ``_send_failure`` what every
    send does, and ``None`` while all is well. Both are set once ``closing`` is: no public
    method touches the descriptor then but the close itself. What cut off a send has set the latter,
    because the peer cannot tell where it would go on.
    """

    __slots__ = (
        "_failures",
        "_misses",
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
        self._raw: socket.socket | Descriptor
        if raw is not None and raw.fileno() == stream.socket.fileno():
            self._raw = raw
        else:
            self._raw = Descriptor(stream.socket)
        self._receive_size = RECEIVE_SIZE
        self._misses = 0
        self._poll_writable: Callable[[int], object] | None = None
        self.closing = False
        self._read_failure: Exception | None = None
        self._send_failure: Exception | None = None
        self._reset: trio.BrokenResourceError | None = None
        # By identity: an exception may be of a class that cannot be hashed or compared.
        self._failures: weakref.WeakValueDictionary[int, BaseException] | None = None

    # ---- reading ----

    async def receive(self) -> bytes:
        """Wait for bytes and return them; ``b""`` at the end. A full checkpoint.

        Cancelled, it has taken nothing from the kernel.
        """
        if self._read_failure is not None:
            self._refuse(self._read_failure)
        if self._misses < _MISSES:
            await trio.lowlevel.checkpoint_if_cancelled()
            try:
                data = self._raw.recv(self._receive_size)
            except BlockingIOError:
                self._misses += 1
            except OSError as exc:
                raise self._reading_failed(exc) from exc
            else:
                await trio.lowlevel.cancel_shielded_checkpoint()
                self._misses = 0
                if len(data) >= RECEIVE_SIZE:
                    self._receive_size = _LARGE_RECEIVE_SIZE
                return data if data else self._end()
        elif self._misses < _MISSES + _SKIPPED:
            self._misses += 1
        else:
            self._misses = _MISSES - 1
        while True:
            descriptor = self._raw.fileno()
            if descriptor < 0:  # closed below us
                self._refuse(_CLOSED)
            await trio.lowlevel.wait_readable(descriptor)
            try:
                return self.receive_nowait()
            except BlockingIOError:
                pass

    def receive_nowait(self) -> bytes:
        """Return what has arrived; ``b""`` at the end, ``BlockingIOError`` if nothing has.

        An error is raised again each time: the kernel reports a reset once, to the first call
        that comes, and then a clean end.
        """
        if self._read_failure is not None:
            self._refuse(self._read_failure)
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
            self._misses = 0
        return data if data else self._end()

    def _end(self) -> bytes:
        if self._reset is not None:
            self._read_failure = self._reset
            raise self._reset.with_traceback(None)
        return b""

    def _reading_failed(self, exc: OSError) -> trio.BrokenResourceError:
        self._read_failure = failure = self._broken_by(exc)
        return failure

    def at_end(self) -> bool:
        """Whether nothing is left to read and nothing will come. Consumes nothing.

        A count of the unread bytes does not tell: beside urgent data FIONREAD stops at the mark,
        and on a Unix socket it goes on counting an urgent byte that was read over.
        """
        if self._read_failure is not None:
            return True
        try:
            descriptor = self._descriptor()
            events = poll_readable(descriptor)
            if not events:
                return False
            if events & POLLERR and not unread_bytes(descriptor):
                return True  # a read, with MSG_PEEK too, would take the error away
            return not peek_byte(self._socket)
        except BlockingIOError:  # what can be read is urgent data only
            return False
        except trio.ClosedResourceError:  # closed below us
            return True
        except OSError as exc:
            with contextlib.suppress(trio.ClosedResourceError):
                self._reading_failed(exc)  # kept for the next read
            return True

    # ---- writing ----

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all buffers. A full checkpoint.

        Cancelled before the first byte it changes nothing; later, sending is over.
        """
        if self._send_failure is not None:
            self._refuse(self._send_failure)
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
        first = 0  # the first view of which something is left
        passed = False
        try:
            while first < len(views):
                sent = self.send_nowait(*views[first : first + IOV_MAX])
                if not sent:
                    await self.wait_writable()
                    passed = True
                    continue
                started = True
                while first < len(views) and sent >= len(views[first]):
                    sent -= len(views[first])
                    first += 1
                if first < len(views):
                    views[first] = views[first][sent:]
                    await trio.lowlevel.checkpoint()  # there may be many rounds
                    passed = True
        except BaseException:
            if started:
                self.cut_off()
            raise
        if not passed:
            await trio.lowlevel.cancel_shielded_checkpoint()

    async def send_file(
        self, descriptor: int, offset: int, count: int, on_sent: Callable[[int], None]
    ) -> bool:
        """Send a part of a file without copying it; False if the kernel cannot, for this file.

        Calls ``on_sent`` with the size of each piece. Ends early at the end of the file.
        Cancellation as in ``send``. A full checkpoint.
        """
        await trio.lowlevel.checkpoint()
        self.check_sending()
        if sys.platform == "win32" or not HAS_SENDFILE:
            return False
        if signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL:
            return False  # sendfile(2) has no MSG_NOSIGNAL: a peer that leaves would kill us
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
                    if not started and exc.errno in _NOT_BY_SENDFILE:
                        return False
                    if exc.errno == errno.EIO:  # the file's, not the connection's
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
                self.cut_off()
            raise
        return True

    def writable_now(self) -> bool:
        """Whether the kernel would take at least one byte now, or report an error."""
        if self._poll_writable is None:  # once under TLS, never in the clear
            self._poll_writable = writable_poller(self._descriptor())
        return bool(self._poll_writable(0))

    async def wait_writable(self) -> None:
        """Wait until ``writable_now``. A full checkpoint."""
        await trio.lowlevel.wait_writable(self._descriptor())
        self._descriptor()  # closed while we waited: then it is not writable but over

    async def send_eof(self) -> None:
        """Send FIN; reading goes on. A full checkpoint. Once more changes nothing."""
        self._descriptor()
        try:
            await self.stream.send_eof()
        except trio.BrokenResourceError as exc:
            raise self.note(exc) from exc.__cause__

    @property
    def eof_sent(self) -> bool:
        """Whether ``send_eof`` was called."""
        return self._socket.did_shutdown_SHUT_WR

    def check_sending(self) -> None:
        """Raise what a send would raise, as far as that is known."""
        if self._send_failure is not None:
            self._refuse(self._send_failure)
        self._descriptor()
        if self.eof_sent:
            raise trio.ClosedResourceError("nothing can be sent after send_eof")

    def cut_off(self) -> None:
        """Let nothing follow what was sent: it was only a part of something."""
        if self._send_failure is None:
            self._send_failure = self.broken("an earlier send was cut off")

    def send_nowait(self, *buffers: bytes | memoryview) -> int:
        """Send what the kernel takes now and return how much that was."""
        if self._send_failure is not None:
            self._refuse(self._send_failure)
        try:
            if sys.platform == "win32" or len(buffers) == 1:  # there is no sendmsg there
                return self._raw.send(buffers[0], SEND_FLAGS)
            return self._raw.sendmsg(buffers, (), SEND_FLAGS)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise self._sending_failed(exc) from exc

    def _sending_failed(self, exc: OSError) -> trio.BrokenResourceError:
        failure = self._broken_by(exc)
        if exc.errno != errno.EPIPE:  # which is what comes after the peer's FIN: a clean end
            self._reset = failure  # the kernel does not tell of it again
        if self.eof_sent:
            raise trio.ClosedResourceError("nothing can be sent after send_eof") from None
        return failure

    # ---- closing ----

    def wake(self) -> None:
        """Wake the tasks that wait on this connection with ``ClosedResourceError``.

        From here on only ``close`` and ``abort`` do anything.
        """
        self._stop()
        if self._socket.fileno() >= 0:
            _fork.notify_closing(self._socket.fileno())

    async def close(self, due: bytes = b"") -> None:
        """Send ``due``, then FIN, and close in such a way that the peer gets it all.

        ``close(2)`` with unread input, or a byte that comes after it, makes the kernel send RST,
        and RST destroys what is on its way (RFC 1122, section 4.2.2.13; RFC 2525, section
        2.17). So the peer is read from until it ends its side, for at most ``LINGER_SECONDS``
        and ``LINGER_BYTES``. Where nothing is unread and all that was sent is
        acknowledged there is nothing to lose, and the close is immediate.

        A checkpoint if it has to wait. Cancelled, it closes immediately; it raises nothing but
        ``Cancelled``.
        """
        self._stop()
        settled = False
        try:
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                settled = not due and self._settled()
                if not settled:
                    await linger(self._socket, self._raw, due, fin_sent=self.eof_sent)
        finally:
            self._end_connection(may_be_unread=not settled)
            self._close_descriptor()

    def close_at_once(self) -> bool:
        """Close if there is nothing to lose, and nobody to wake; else return False."""
        try:
            if not self._settled():
                return False
        except OSError:
            return False
        self._stop()
        self._end_connection(may_be_unread=False)
        self._close_descriptor()
        return True

    def _stop(self) -> None:
        """Let nothing be read or sent any more but by the close."""
        self.closing = True
        self._read_failure = self._send_failure = _CLOSED

    def _settled(self) -> bool:
        """Whether nothing is unread here, and nothing on its way to the peer."""
        descriptor = self._socket.fileno()
        if descriptor < 0:  # closed below us
            return True
        return unread_bytes(descriptor) == 0 and unacknowledged_bytes(self._socket) == 0

    def abort(self) -> None:
        """Reset the connection at once: nothing that is still in the kernel is kept for the peer.

        Also if others hold the descriptor, such as a forked child. Where the system cannot reset
        then, it is shut down.
        """
        self.wake()
        if self._socket.fileno() >= 0 and not reset_connection(self._socket):
            with contextlib.suppress(OSError):
                self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_AND_RESET)
                # With FIN before RST some peers take a connection that was cut short for one that
                # has ended. So FIN is for those that close(2) does not reset.
                if not close_resets(self._socket):
                    self._socket.shutdown(socket.SHUT_RDWR)
        self._close_descriptor()

    def close_hard(self) -> None:
        """Close at once, as ``trio.SocketStream`` does; the kernel still sends what it has."""
        self.wake()
        self._end_connection()
        self._close_descriptor()

    def _end_connection(self, *, may_be_unread: bool = True) -> None:
        """Do to the connection what close(2) does, for all who hold the descriptor.

        close(2) does it for the last one only. So a forked child would keep the peer waiting.
        """
        sock = self._socket
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, NO_LINGER)
            if not (may_be_unread and unread_bytes(sock.fileno()) and reset_connection(sock)):
                sock.shutdown(socket.SHUT_RDWR)
        except (OSError, ValueError):  # the connection is over already, or was closed below us
            pass

    def release(self) -> None:
        """Close our descriptor and leave the connection to the process that has another of it."""
        self.wake()
        with contextlib.suppress(OSError):  # closed below us
            socket.close(self._socket.detach())

    def _close_descriptor(self) -> None:
        if not _fork.wakes_nobody():
            self._socket.close()
            return
        with contextlib.suppress(OSError):  # closed already
            socket.close(self._socket.detach())

    # ---- errors ----

    def _descriptor(self) -> int:
        descriptor = self._socket.fileno()
        if descriptor < 0 or self.closing:
            raise trio.ClosedResourceError(*_CLOSED.args)
        return descriptor

    def _refuse(self, failure: Exception) -> NoReturn:
        if failure is _CLOSED:
            raise trio.ClosedResourceError(*_CLOSED.args)
        raise failure.with_traceback(None)

    def _broken_by(self, exc: OSError) -> trio.BrokenResourceError:
        if exc.errno in _CLOSED_ERRNOS:  # below us
            raise trio.ClosedResourceError(*_CLOSED.args) from None
        return self.broken(exc.strerror or str(exc))

    def broken(self, why: str) -> trio.BrokenResourceError:
        """Make the error of a broken connection, and remember it as this connection's."""
        return self.note(trio.BrokenResourceError(f"the connection is broken: {why}"))

    def note(self, failure: FailureT) -> FailureT:
        """Remember that a failure is this connection's."""
        if self._failures is None:
            self._failures = weakref.WeakValueDictionary()
        self._failures[id(failure)] = failure
        return failure

    def has_failed_by(self, exc: BaseException) -> bool:
        """Whether an exception is a failure of this very connection."""
        return self._failures is not None and self._failures.get(id(exc)) is exc


# What everything raises after a close: never this very one, for it would collect tracebacks.
_CLOSED = trio.ClosedResourceError("this socket was already closed")
