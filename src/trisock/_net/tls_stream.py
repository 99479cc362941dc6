"""TLSStream: TLS over a Transport.

A ``TLSEngine`` encrypts and decrypts. This module moves its ciphertext to and from the transport.
``trio.SSLStream`` runs the handshake and the shutdown, on top of a ``CiphertextStream``.

How reading and sending work together, after the handshake:

- At most one task reads, and at most one task sends. But a reader may have to send, because OpenSSL
  responds to some messages, such as a key update. And a sender may have to read, because OpenSSL
  does not write while it has only part of an incoming TLS message. So each task may have to wait
  until the descriptor is readable or writable.
- One task at a time waits until the descriptor is readable, and sets ``_filling``. A second task
  waits for the event ``_filled`` instead, and then checks for data.
- One task at a time waits until the descriptor is writable, and holds ``_writable_lock``.
- All ciphertext is sent from one queue, in the engine. Bytes that the kernel does not accept return
  to the queue's head, so the order is right whichever task sends. A sender that drains the queue
  (``_sending_rest``) also sends OpenSSL's responses, so no reader has to.
- Data that has been encrypted must be sent: if a record is missing, the peer cannot decrypt the
  later ones. So a sender first waits until the descriptor is writable, where a cancellation does no
  harm. Then it encrypts one piece and tries to send it, with no cancel point in between. If a send
  is cancelled after that, later sends fail (SendState.OVER).
- If OpenSSL must read before it can write, we repeat the same write later (SSL_write(3)). After a
  failed send, reads still work, because the peer's last data or its alert may have arrived.
"""

from __future__ import annotations

import contextlib
import enum
import math
from collections.abc import Sequence

import trio

from .. import _guard
from .._errors import TLSError, unraised_copy
from .._text import format_seconds
from .._tls.engine import TLSEngine, TLSState
from .._tls.info import TLSInfo
from .._tls.records import SEND_SIZE, pieces
from .._tls.roles import TLSRole
from .descriptor import ReadInterrupted
from .ssl_stream import SSLStreamRunner
from .syscalls import FINAL_SEND_FLAGS, SEND_FLAGS
from .transport import CUT_SHORT, Transport

# Maximum number of bytes in OpenSSL's unsent responses, enough for about 2000 key updates. While a
# send waits for room, the same queue also holds one encrypted piece of the message: at most
# SEND_SIZE bytes, plus the overhead of the TLS records.
_MAX_RESPONSE_BYTES = 65536
_MAX_PIECE = SEND_SIZE + 4096

# Maximum number of records to decrypt ahead before other tasks run: about two milliseconds' work.
_MAX_RECORDS_AHEAD = 1024

# Maximum number of times that one ``peek`` reads from the kernel to find a record with data. A peer
# could send empty records forever.
_MAX_PEEK_READS = 16


class SendState(enum.Enum):
    """The state of sending. ``close_notify`` or an alert may be sent only in READY."""

    READY = enum.auto()
    IN_MESSAGE = enum.auto()  # a message or a file was sent in part, and the rest may follow
    # Nothing more may be sent: a record was cut short, or an incomplete file would look complete.
    OVER = enum.auto()


class TLSStream:
    """TLS over one Transport, from the handshake to the last record.

    Args:
      transport: the connection.
      role: our TLS role, and the peer that we expect.
      early: bytes that were received before TLS began, but belong to TLS.
      https_compatible: as in ``trio.SSLStream``: ``close_notify`` is neither sent nor required.

    Invariant: ciphertext is sent in the order in which the engine wrote it, whichever task sends
    it. After a failed send, reads still work: earlier data from the peer may still be unread.

    Attributes:
      engine: encrypts and decrypts.
      send_state: the state of sending. It stays IN_MESSAGE after ``send_file`` if the file ended
        too early.
    """

    def __init__(
        self, transport: Transport, role: TLSRole, *, early: bytes, https_compatible: bool
    ) -> None:
        self._transport = transport
        self._https_compatible = https_compatible
        self.engine = TLSEngine(role, lambda: transport.peer, transport.remember_failure)
        self.engine.incoming.write(early)
        self.send_state = SendState.READY
        self._send_failure: trio.BrokenResourceError | None = None
        self._sending_rest = False  # a sender is draining the queue, responses included
        # Trio allows only one task to wait until a descriptor is writable, but a reader and a
        # sender may both need to wait for that.
        self._writable_lock: trio.Lock | None = None  # created by the first wait
        self._filling = False
        self._filled: trio.Event | None = None  # set when the read in progress ends
        self._runner = SSLStreamRunner(transport, self.engine, self.send_ciphertext)

    # ---- handshake ----

    async def handshake(self, deadline: float, timeout: float) -> TLSInfo:
        """Negotiate keys and verify the peer. Raises ``TLSError`` if the handshake fails.

        After a failure or a cancellation, send only ``final_bytes``, and then close.
        """
        try:
            if deadline == math.inf:  # a scope would cost time (benchmark row tls-handshakes)
                await self._runner.do_handshake()
            else:
                with trio.CancelScope(deadline=deadline) as scope:
                    await self._runner.do_handshake()
                if scope.cancelled_caught:
                    self.time_out(timeout)
        except trio.ClosedResourceError:
            self.engine.check()  # raises if ``time_out`` has woken us
            raise
        self.engine.check()
        self._check_sent()
        return self.engine.finish_handshake()

    def time_out(self, timeout: float) -> None:
        """Make the handshake in progress fail, because it has taken ``timeout`` seconds."""
        self.engine.fail(f"not finished within {format_seconds(timeout)}")
        self._transport.wake_tasks()

    def _check_sent(self) -> None:
        """Raise an error if a send failed, which ``CiphertextStream`` hides from ``SSLStream``."""
        if self._send_failure is not None:
            raise self.engine.fail("the peer closed the connection")

    # ---- reading ----

    async def receive(self) -> bytes:
        """Return one record's bytes, or ``b""`` after ``close_notify``. A full checkpoint.

        If cancelled, it consumes nothing. Other records may have arrived together with this record:
        ``receive_pending`` returns them. ``Transport.interrupt_read`` interrupts this call.
        """
        engine = self.engine
        incoming = engine.incoming
        interrupts = self._transport.interrupts
        if engine.failure is not None:
            engine.check()
        if incoming.pending or engine.state is TLSState.PEER_CLOSED:
            await trio.lowlevel.checkpoint_if_cancelled()
            data = self._read_record()
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
        elif engine.forked:  # refuse before we read the other process's data
            engine.refuse_in_fork()
        while True:
            if incoming.pending:  # _read_record stopped after many empty records
                await trio.lowlevel.checkpoint()
            elif self._filling or (engine.unsent and not self._sending_rest):
                self._flush_responses()
                if not await self._fill():
                    return self._transport_ended()
            else:  # the code of _fill, repeated here for speed (benchmark row tls-echo1)
                self._filling = True
                try:
                    ciphertext = await self._transport.receive()
                finally:
                    self._filling = False
                    if self._filled is not None:
                        self._wake_waiter()
                if not ciphertext:
                    return self._transport_ended()
                incoming.write(ciphertext)
            data = self._read_record()
            if data is not None:
                return data
            if self._transport.interrupts != interrupts:  # interrupted while not waiting
                raise ReadInterrupted

    def _read_record(self) -> bytes | None:
        """Return what ``TLSEngine.read`` returns, and flush OpenSSL's responses.

        If the flush fails after data was decrypted, the next call raises the error.
        """
        data = self.engine.read()
        if self.engine.outgoing.pending:
            try:
                self._flush_responses()
            except TLSError:
                if not data:
                    raise
        return data

    async def _fill(self) -> bool:
        """Wait for ciphertext. Returns False at EOF.

        A sender calls this if only part of a TLS message has arrived. A second caller waits for the
        first one. A full checkpoint. If cancelled, it consumes nothing.
        """
        if self._filling:
            self._filled = trio.Event()
            await self._filled.wait()
            return True
        self._filling = True
        try:
            if self.engine.unsent and not self._sending_rest:
                return await self._receive_and_flush()
            ciphertext = await self._transport.receive()
            self.engine.incoming.write(ciphertext)
        finally:
            self._filling = False
            if self._filled is not None:
                self._wake_waiter()
        return bool(ciphertext)

    def _wake_waiter(self) -> None:
        """Our read has ended: wake the task that waits for our read in ``_fill``."""
        assert self._filled is not None
        self._filled.set()
        self._filled = None

    def _flush_responses(self) -> None:
        """Send OpenSSL's pending responses if the descriptor is writable.

        Otherwise the responses stay queued, and the next send includes them (RFC 8446, section
        4.6.3). Until then, a reader that waits for data also waits until the descriptor is
        writable, because the peer may be waiting for the responses.
        """
        with contextlib.suppress(trio.BrokenResourceError):
            if self.send_state is not SendState.OVER and self._transport.writable_now():
                self._send_nowait()
        if self.engine.unsent > _MAX_RESPONSE_BYTES + (_MAX_PIECE if self._sending_rest else 0):
            raise self.engine.fail("the peer asks for responses but does not read them")

    async def _receive_and_flush(self) -> bool:
        """Wait for ciphertext, as ``_fill`` does, and meanwhile flush the pending responses."""
        failure, ciphertext = None, b""

        async def flush() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while self.engine.unsent and self.send_state is not SendState.OVER:
                    await self._wait_writable()
                    self.check_sending()
                    self._flush_responses()

        with _guard.bare():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush)
                try:
                    ciphertext = await self._transport.receive()
                    self.engine.incoming.write(ciphertext)
                except (trio.BrokenResourceError, trio.ClosedResourceError, ReadInterrupted) as exc:
                    failure = exc  # raise it below: a group would form a reference cycle
                nursery.cancel_scope.cancel()
        if failure is not None:
            try:
                raise failure
            finally:
                del failure  # its traceback refers to this frame
        return bool(ciphertext)

    def receive_pending(self) -> list[bytes]:
        """Return the bytes of each record that was already read from the kernel.

        Stops after ``_MAX_RECORDS_AHEAD`` records. Leaves errors and EOF to the next ``receive``.
        """
        records: list[bytes] = []
        engine = self.engine
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if engine.can_read:
                engine.read_batch(records, _MAX_RECORDS_AHEAD)
                if engine.outgoing.pending:
                    self._flush_responses()
        return records

    def receive_nowait(self) -> bytes | None:
        """Return one record's bytes, or ``b""`` at EOF, without waiting.

        Returns ``None`` if no whole record has arrived, if many empty records arrived first, or
        after an error, which the next ``receive`` raises. The only error that this raises itself is
        ``ClosedResourceError``, if other code has closed the stream.
        """
        for _ in range(_MAX_PEEK_READS):
            if self.engine.failure is not None:
                break
            try:
                data = self._read_record()
                if data is not None:
                    return data
                if self._filling or self.engine.incoming.pending:
                    break  # a sender is reading, or there are many empty records
                ciphertext = self._transport.receive_nowait()
            except (BlockingIOError, trio.BrokenResourceError):
                return None
            if not ciphertext:
                return b"" if self._https_compatible else None
            self.engine.incoming.write(ciphertext)
        return None

    def at_end(self) -> bool:
        """Return whether nothing more can be read. Any unread ciphertext counts as data."""
        engine = self.engine
        if engine.failure is not None or engine.state is TLSState.PEER_CLOSED or engine.forked:
            return True
        return not engine.incoming.pending and self._transport.at_end()

    def _transport_ended(self) -> bytes:
        if self._https_compatible:
            return b""
        # RFC 8446, section 6.1, requires close_notify. We cannot rely on OpenSSL for this check: a
        # user's context, or a later version of Python, may set OP_IGNORE_UNEXPECTED_EOF.
        why = "the peer ended the connection without close_notify: data may be missing"
        raise self.engine.fail(f"{why} (https_compatible=True accepts this)")

    # ---- sending ----

    async def send(self, buffers: Sequence[bytes | memoryview], *, schedule: bool = True) -> None:
        """Encrypt and send all bytes of all buffers. A cancel point.

        If cancelled before the first byte is sent, nothing changes. If cancelled later, the
        connection becomes unusable.

        ``schedule``: as in ``Transport.send``.
        """
        engine = self.engine
        before = self.send_state
        started = False
        try:
            for piece in pieces(buffers):
                while True:
                    if engine.failure is not None or self._send_failure is not None:
                        self.check_sending()
                    # Only the wait before encryption may be cancelled: encrypted data must be sent.
                    if not self._transport.writable_now():
                        await self._wait_writable()
                        self.check_sending()  # a reader may have failed meanwhile
                    await trio.lowlevel.checkpoint_if_cancelled()
                    if engine.write(piece):
                        break
                    self._flush_responses()
                    if engine.incoming.pending:
                        engine.feed_record()
                        await trio.lowlevel.checkpoint()
                    else:
                        with contextlib.suppress(ReadInterrupted):  # which is for a reader
                            if not await self._fill():
                                self._transport_ended()
                                raise self._transport.broken("the peer has ended the connection")
                started = True
                self.send_state = SendState.IN_MESSAGE
                if not self._send_nowait():
                    await self._send_rest()
                elif schedule:
                    await trio.lowlevel.cancel_shielded_checkpoint()
        except BaseException as exc:
            if started:
                self.send_state = SendState.OVER
                if not isinstance(exc, Exception) and engine.failure is None:
                    engine.set_failure(self._transport.broken(CUT_SHORT))
            raise
        self.enter(before)
        if not started:
            self.check_sending()
            await trio.lowlevel.checkpoint()

    def enter(self, state: SendState) -> None:
        """Set ``send_state``, unless it is OVER. (A reader's flush may have failed meanwhile.)"""
        if self.send_state is not SendState.OVER:
            self.send_state = state

    def _send_nowait(self, flags: int = SEND_FLAGS) -> bool:
        """Send the engine's pending ciphertext. Returns whether the kernel accepted all of it."""
        if self.engine.forked:
            self.engine.refuse_in_fork()
        data = self.engine.data_to_send()
        try:
            sent = self._transport.send_nowait(data, flags=flags)
        except trio.BrokenResourceError as exc:
            self.send_state = SendState.OVER
            self._send_failure = unraised_copy(exc)
            raise
        if sent == len(data):
            return True
        self.engine.put_back(memoryview(data)[sent:])
        return False

    async def _send_rest(self) -> None:
        """Send ciphertext that ``_send_nowait`` has left unsent, or that is queued meanwhile."""
        self._sending_rest = True
        try:
            while self.engine.unsent:
                await self._wait_writable()
                self._send_nowait()
        finally:
            self._sending_rest = False

    async def send_ciphertext(self, data: bytes) -> None:
        """Send ciphertext that ``SSLStream`` took from the engine.

        Nothing can cancel the first attempt. If cancelled later, ``send_state`` stays IN_MESSAGE,
        so ``final_bytes`` returns nothing.
        """
        self.engine.put_back(self.engine.data_to_send() + data)
        self.send_state = SendState.IN_MESSAGE
        if not self._send_nowait():
            await self._send_rest()
        self.enter(SendState.READY)

    async def _wait_writable(self) -> None:
        lock = self._writable_lock = self._writable_lock or trio.Lock()
        try:  # the lock is usually free, and Lock.acquire would add a checkpoint
            lock.acquire_nowait()
        except trio.WouldBlock:
            await lock.acquire()
        try:
            await self._transport.wait_writable()
        finally:
            lock.release()

    async def wait_writable(self) -> None:
        """Wait until a send might not block. A full checkpoint."""
        self.check_sending()
        await self._wait_writable()

    def check_sending(self) -> None:
        """Raise the error that the next send would raise, if it is already known."""
        self.engine.check()
        if self._send_failure is not None:
            raise self._transport.remember_failure(unraised_copy(self._send_failure))

    def can_send(self) -> bool:
        """Return whether a send may still succeed. Asks the kernel."""
        if self.send_state is SendState.OVER or self.engine.failure or self.engine.forked:
            return False
        return self._transport.can_send()

    def cut_short(self) -> None:
        """Make later sends fail, because only part of a file was sent."""
        self.send_state = SendState.OVER
        self._send_failure = self._transport.broken(CUT_SHORT)

    # ---- shutdown ----

    async def unwrap(self) -> bytes:
        """Exchange ``close_notify`` with the peer.

        Returns plain text that arrived after the peer's ``close_notify``. Raises ``TLSError`` if
        the peer still sends encrypted data, or ends the connection without ``close_notify``. After
        a failure or a cancellation the connection is unusable.
        """
        engine = self.engine
        if engine.forked:
            engine.refuse_in_fork()
        if engine.failure is not None or self._send_failure is not None:
            raise engine.fail(CUT_SHORT)
        if self.send_state is not SendState.READY:  # close_notify would claim that all was sent
            raise engine.fail("a file was sent only in part")
        trailing = await self._runner.unwrap()
        self._check_sent()
        return trailing + engine.incoming.take_all()

    def break_cycle(self) -> None:
        """Break the reference cycle of our ``SSLStream``, once it is no longer used."""
        self._runner.break_cycle()

    def close_if_ended(self) -> bool:
        """If the peer has ended TLS and the connection, close both and return True.

        Otherwise return False, and leave everything to a close that can wait.
        """
        engine = self.engine
        if engine.state is not TLSState.PEER_CLOSED or engine.forked:
            return False
        if not self._transport.has_ended():
            return False
        if final_bytes := self.final_bytes():
            engine.put_back(final_bytes)
            # A failure here means that the peer no longer reads.
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                if not self._send_nowait(FINAL_SEND_FLAGS):
                    return False
        return self._transport.close_if_drained()

    def final_bytes(self) -> bytes:
        """Return the bytes to send before FIN: ``close_notify``, or an alert after a failure.

        Returns ``b""`` if this process was forked after TLS began, if ``https_compatible`` forbids
        ``close_notify``, or if ``send_state`` is not READY: the peer could not decrypt the bytes,
        or an incomplete message would look complete. Nothing can be sent after this call.
        """
        engine = self.engine
        if engine.forked:
            return b""
        if engine.failure is None:
            if engine.state is TLSState.HANDSHAKE or self._https_compatible:
                return b""
            engine.close_notify()
        return engine.data_to_send() if self.send_state is SendState.READY else b""
