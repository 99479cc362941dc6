"""Transport: one connection's descriptor, with no TLS and no buffer.

A Transport uses the descriptor of one of Trio's sockets. Unlike ``trio.SocketStream``, it tries one
plain system call first and waits only after ``EAGAIN``. It can also read and write without waiting
(for ``peek`` and TLS), and send several buffers in one call. Closing it does not lose data in
flight.

After a failed send, reads continue until EOF or an error, because data that the peer sent earlier
may still be in the kernel.

``receive`` and ``send`` are hot: all plain text goes through them, and Python code is half the cost
of an echo. So each of them checks a single attribute to detect a broken or closed connection, and
leaves rare cases to other functions (benchmark rows ``echo64``, ``echo1``, ``receive``, ``send``).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

import trio

from .._errors import unraised_copy
from .descriptor import Descriptor, ReadInterrupted
from .linger import linger
from .syscalls import (
    IOV_MAX,
    POLLERR,
    RECEIVE_SIZE,
    SEND_FLAGS,
    abort_connection,
    end_connection,
    peek_byte,
    poll_readable,
    sending_is_over,
    unacknowledged_bytes,
    unread_bytes,
    writable_poller,
)

# A read asks for RECEIVE_SIZE bytes, to bound the memory per connection. After a full read, later
# reads may ask for twice as many bytes: when data arrives that fast, a pass through the scheduler
# costs more than copying. This raises our speed in benchmark row ``receive`` from 1.25 to 1.5 times
# that of bare Trio. 256 KiB is slower than 128 KiB, because it exceeds the CPU cache.
_LARGE_RECEIVE_SIZE = 131072

# After four EAGAINs in a row, each of the next 15 reads waits before it calls recv. The peer is
# probably waiting for our answers, so an immediate recv would find nothing (benchmark row echo1).
_MAX_EAGAINS = 4
_WAIT_FIRST_READS = 15

# Marks a connection that this side has closed. Calls raise a new error instead of this object,
# because each raise would add to the traceback of this object.
_CLOSED = trio.ClosedResourceError()

# After a send that was cut short, later sends fail: the peer cannot tell where the next message
# begins.
CUT_SHORT = "an earlier send was cut short, so nothing more can be sent"


class Transport(Descriptor):
    """One connection's descriptor. ``str(transport)`` names the connection in error messages.

    Args:
      connection: the connection, as Trio's stream or as Trio's socket. Only the Transport may
          read, write or close it. Other code may use it for everything else, such as socket
          options.
      raw: the ``socket.socket`` that the connection was made from, if known. Calls on ``raw`` are
          cheaper than calls on a ``BorrowedSocket``, and just as safe.

    Raises OSError if the connection is already dead (``ENOTCONN``).

    Invariant: once ``_read_failure`` is set, every read raises a copy of it. Once ``_send_failure``
    is set, every send raises a copy of it. Once ``closing`` is set, both failures are set, and only
    the methods that close use the descriptor. A send that was cut short sets ``_send_failure``,
    because the peer cannot tell where the next message begins. ``_reset`` is the error of an
    earlier send; a read that finds EOF raises a copy of it. Once ``_at_eof`` is set, a read has
    found EOF, so nothing is unread in the kernel, and the peer can send nothing more.

    Attributes:
      interrupts: how often ``interrupt_read`` was called.
      peer_may_be_sending: whether the peer may send a request at any moment while we close.
      sent_count: how many bytes ``send_nowait`` has sent. A long send that makes progress
        increases it.
    """

    __slots__ = (
        "_at_eof",
        "_eagain_count",
        "_poll_writable",
        "_read_failure",
        "_receive_size",
        "_reset",
        "_send_failure",
        "interrupts",
        "peer_may_be_sending",
        "sent_count",
    )

    def __init__(
        self, connection: trio.SocketStream | trio.socket.SocketType, raw: socket.socket | None
    ) -> None:
        super().__init__(connection, raw)
        self._receive_size = RECEIVE_SIZE
        self._eagain_count = 0
        self.interrupts = 0
        self._poll_writable: Callable[[int], object] | None = None
        self._at_eof = False
        self._read_failure: Exception | None = None
        self._send_failure: Exception | None = None
        self._reset: trio.BrokenResourceError | None = None
        self.peer_may_be_sending = False
        self.sent_count = 0

    # ---- reading ----

    async def receive(self) -> bytes:
        """Wait for bytes and return them. Returns ``b""`` at EOF. A full checkpoint.

        If cancelled, it has read nothing from the kernel.
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
        return await self.wait_and_receive()

    async def wait_and_receive(self, max_bytes: int | None = None) -> bytes:
        """Do the same as ``receive``, but wait first. Call it after an EAGAIN."""
        while True:
            descriptor = self._raw.fileno()
            if descriptor < 0:  # other code closed the socket
                raise self.closed_error()
            interrupts = self.interrupts
            try:
                await trio.lowlevel.wait_readable(descriptor)
            except trio.ClosedResourceError:  # Trio's message names no peer
                if self._was_interrupted(interrupts):
                    raise ReadInterrupted from None
                raise self.closed_error() from None
            try:
                return self.receive_nowait(max_bytes)
            except BlockingIOError:
                pass

    def receive_nowait(self, max_bytes: int | None = None) -> bytes:
        """Return bytes that have arrived, or ``b""`` at EOF.

        Raises ``BlockingIOError`` if no bytes have arrived. Other errors are stored, and later
        reads raise copies of them. The kernel reports a reset only once, and after that it reports
        EOF.
        """
        if self._read_failure is not None:
            self._raise_failure(self._read_failure)
        try:
            data = self._raw.recv(max_bytes or self._receive_size)
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
        self._at_eof = True
        return b""

    def _reading_failed(self, exc: OSError) -> trio.BrokenResourceError:
        failure = self._broken_from(exc)
        self._read_failure = unraised_copy(failure)
        return failure

    def at_end(self) -> bool:
        """Return whether the kernel has no unread bytes and no more can arrive. Consumes nothing.

        FIONREAD, the count of unread bytes, is not enough to tell. It omits bytes after the mark of
        urgent data. On a Unix socket it still counts an urgent byte that reads have already passed.
        """
        if self._read_failure is not None:
            return True
        try:
            descriptor = self.descriptor()
            events = poll_readable(descriptor)
            if not events:
                return False
            if events & POLLERR and not unread_bytes(descriptor):
                return True  # any read, even with MSG_PEEK, would clear the error
            return not peek_byte(self._socket)
        except BlockingIOError:  # only urgent data is readable
            return False
        except trio.ClosedResourceError:  # other code closed the socket
            return True
        except OSError as exc:
            with contextlib.suppress(trio.ClosedResourceError):
                self._reading_failed(exc)  # stored for the next read
            return True

    # ---- writing ----

    async def send(self, buffers: Sequence[bytes | memoryview], *, schedule: bool = True) -> None:
        """Send all bytes of all buffers. Every call is a cancel point.

        If cancelled before the first byte is sent, it changes nothing. If cancelled later, every
        later send fails.

        ``schedule``: whether the call is a schedule point even if the kernel accepts all bytes at
        once.
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
                raise self.sending_failed(exc) from exc
            if sent != len(data):
                await self._send_rest([memoryview(data)[sent:]], started=bool(sent))
            elif schedule:
                await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            views = [memoryview(each) for each in buffers if len(each)]
            if not views:
                self.check_sending()
            await self._send_rest(views, started=False, schedule=schedule)

    async def _send_rest(
        self, views: list[memoryview], *, started: bool, schedule: bool = True
    ) -> None:
        first = 0  # the index of the first view with unsent bytes
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
                    await trio.lowlevel.checkpoint()  # because the loop may be long
                    checkpointed = True
        except BaseException:
            if started:
                self.cut_short()
            raise
        if schedule and not checkpointed:
            await trio.lowlevel.cancel_shielded_checkpoint()

    def writable_now(self) -> bool:
        """Return False if a send would block now, and True if it would send bytes or fail."""
        if self._poll_writable is None:  # created at the first use, because only TLS needs it
            self._poll_writable = writable_poller(self.descriptor())
        return bool(self._poll_writable(0))

    async def wait_writable(self) -> None:
        """Wait until ``writable_now`` would return True. A full checkpoint."""
        while True:
            interrupts = self.interrupts
            try:
                await trio.lowlevel.wait_writable(self.descriptor())
                break
            except trio.ClosedResourceError:  # Trio's message names no peer
                if not self._was_interrupted(interrupts):
                    raise self.closed_error() from None
        self.descriptor()  # raises if it was closed while we waited

    def interrupt_read(self) -> None:
        """Make a waiting read raise ``ReadInterrupted``. A waiting send continues to wait."""
        self.interrupts += 1
        self.wake_tasks()

    def _was_interrupted(self, interrupts: int) -> bool:
        """Return whether ``interrupt_read`` ended a wait. ``interrupts``: the earlier count."""
        return self.interrupts != interrupts and not self.closing and self._socket.fileno() >= 0

    async def send_eof(self) -> None:
        """Send FIN. Reading still works. A second call changes nothing. A full checkpoint.

        Raises the error of an earlier send that was cut short: FIN would claim that the data is
        complete.
        """
        if self._send_failure is not None:
            self._raise_failure(self._send_failure)
        self.descriptor()
        try:
            await self.stream.send_eof()
        except trio.ClosedResourceError:  # Trio's message names no peer
            raise self.closed_error() from None
        except trio.BrokenResourceError as exc:
            cause = exc.__cause__
            assert isinstance(cause, OSError)
            raise self._broken_from(cause) from cause
        self.descriptor()  # raises if it was closed while we waited

    def can_send(self) -> bool:
        """Return whether a send may still succeed. Asks the kernel."""
        if self._send_failure or self._read_failure or self._reset or self.eof_sent:
            return False
        try:
            return not sending_is_over(self.descriptor())
        except (OSError, trio.ClosedResourceError):  # other code closed the socket
            return False

    @property
    def eof_sent(self) -> bool:
        """Whether ``send_eof`` was called."""
        return self._socket.did_shutdown_SHUT_WR

    def check_sending(self) -> None:
        """Raise the error that the next send would raise, if it is already known."""
        if self._send_failure is not None:
            self._raise_failure(self._send_failure)
        self.descriptor()
        if self.eof_sent:
            raise self._eof_error()

    def cut_short(self) -> None:
        """Make later sends fail, because only part of a message or a file was sent."""
        if self._send_failure is None:
            self._send_failure = self.broken(CUT_SHORT)

    def send_nowait(self, *buffers: bytes | memoryview, flags: int = SEND_FLAGS) -> int:
        """Send as many bytes as the kernel accepts now, and return their number (it may be 0)."""
        if self._send_failure is not None:
            self._raise_failure(self._send_failure)
        try:
            if sys.platform == "win32" or len(buffers) == 1:  # Windows has no sendmsg
                sent = self._raw.send(buffers[0], flags)
            else:
                sent = self._raw.sendmsg(buffers, (), flags)
        except BlockingIOError:
            return 0
        except OSError as exc:
            raise self.sending_failed(exc) from exc
        self.sent_count += sent
        return sent

    def sending_failed(self, exc: OSError) -> trio.BrokenResourceError:
        """Return the error to raise for a failed send. ``exc`` is the system call's error."""
        failure = self._broken_from(exc)
        # EPIPE means that the peer had sent FIN before, so the EOF of later reads is genuine. After
        # any other error, the kernel reports only EOF, so keep the error for a later read.
        if exc.errno != errno.EPIPE:
            self._reset = unraised_copy(failure)
        if self.eof_sent:
            raise self._eof_error() from None
        return failure

    # ---- closing ----

    def begin_close(self) -> None:
        """Begin to close: wake waiting tasks with ``ClosedResourceError``.

        After this, only the methods that close the descriptor have an effect.
        """
        self._mark_closing()
        self.wake_tasks()

    async def close(self, final_bytes: bytes = b"") -> None:
        """Send ``final_bytes``, then FIN, and close without losing data in flight.

        If input is unread at ``close(2)``, or arrives after it, the kernel sends RST. RST destroys
        data in flight (RFC 1122, section 4.2.2.13; RFC 2525, section 2.17). So we read until the
        peer sends FIN, for at most ``LINGER_SECONDS`` and ``LINGER_BYTES``. If all input has been
        read and the peer has acknowledged all our data, we close immediately.

        This is a checkpoint only if it has to wait. If cancelled, it closes immediately. It raises
        no error except ``Cancelled``.
        """
        self._mark_closing()
        all_read = False
        try:
            with contextlib.suppress(OSError, trio.ClosedResourceError):
                all_read = not final_bytes and self._is_drained()
                if not all_read:
                    all_read = await linger(
                        self._socket,
                        self._raw,
                        final_bytes,
                        fin_sent=self.eof_sent,
                    )
        finally:
            end_connection(self._socket, may_be_unread=not all_read)
            self.close_descriptor()

    def close_if_drained(self) -> bool:
        """If no data can be lost, close and return True. Otherwise return False and do nothing.

        Call this only while no task waits on the connection, because it does not wake tasks.
        """
        try:
            if not self._is_drained():
                return False
        except OSError:
            return False
        self._mark_closing()
        end_connection(self._socket, may_be_unread=False)
        self.close_descriptor()
        return True

    def has_ended(self) -> bool:
        """Return whether EOF has been read. If not, first try one read, and drop its data."""
        if not self._at_eof:
            with contextlib.suppress(
                BlockingIOError, trio.BrokenResourceError, trio.ClosedResourceError
            ):
                self.receive_nowait()
        return self._at_eof

    def _mark_closing(self) -> None:
        """Make all reads and sends fail, except those of ``close`` itself."""
        self.closing = True
        self._read_failure = self._send_failure = _CLOSED

    def _is_drained(self) -> bool:
        """Return whether data in flight is safe from later input.

        It is safe if the peer's FIN has been read, or if all input has been read and the peer
        has acknowledged all our data.
        """
        if self._at_eof:  # usual after a short connection (benchmark row connections)
            return True
        descriptor = self._socket.fileno()
        if descriptor < 0:  # other code closed the socket
            return True
        if self.peer_may_be_sending:
            return False
        return unread_bytes(descriptor) == 0 and unacknowledged_bytes(self._socket) == 0

    def abort(self) -> None:
        """Reset the connection immediately. Data that is still in the kernel is discarded.

        The connection is reset even if another process, such as a forked child, holds the
        descriptor. If the system cannot reset a shared connection, we shut it down instead.
        """
        self.begin_close()
        if self._socket.fileno() >= 0:
            abort_connection(self._socket)
        self.close_descriptor()

    def close_immediately(self) -> None:
        """Close immediately, as ``trio.SocketStream`` does. The kernel still sends queued data."""
        self.begin_close()
        end_connection(self._socket, may_be_unread=True)
        self.close_descriptor()

    def close_descriptor_only(self) -> None:
        """Close only our descriptor: another process that holds the connection keeps it open."""
        self.begin_close()
        with contextlib.suppress(OSError):  # EBADF, if other code closed the socket
            socket.close(self._socket.detach())

    # ---- errors ----

    def _raise_failure(self, failure: Exception) -> NoReturn:
        if isinstance(failure, trio.BrokenResourceError):
            raise self.remember_failure(unraised_copy(failure))
        raise self.closed_error()

    def _eof_error(self) -> trio.ClosedResourceError:
        return self._error(trio.ClosedResourceError(), "nothing can be sent after send_eof on {}")
