"""TLSConnection: TLS over a Transport.

``trio.SSLStream`` runs the handshake and the shutdown. We pass it our own transport and context to
observe it:

- ``CiphertextStream`` is the transport. It tells the end of the connection from the end of the
  encrypted stream by an exception of its own. It also keeps a failed send to itself, so that what
  the peer sent before can still be read.
- ``SSLObjectTap`` is the context. ``SSLStream`` calls only its ``wrap_bio``, which gives it the
  ``SSLObject`` and the memory BIOs: for the alert that ``SSLStream`` leaves there when a handshake
  fails, and for reading without waiting.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Iterator, Sequence
from typing import NoReturn, TypeVar, cast

import trio

from .. import _fork
from .._address import Address
from .._errors import TLSError, describe_ssl_error, fresh, ssl_reason
from .._tls.error_queue import clear_error_queue
from .._tls.info import TLSInfo, has_expired, new_tls_info
from .._tls.roles import TLSRole
from .ciphertext import MAX_EMPTY_RECORDS, pieces
from .ssl_stream import FORKED, CiphertextStream, EndOfTransport, SSLObjectTap
from .transport import Transport

# The plaintext limit of a TLS record (RFC 8446, section 5.1): a read of this size returns one
# record.
_RECORD_SIZE = 16384

# How many bytes of responses are queued for a peer that does not read them: some 2000 key updates.
_MAX_RESPONSES = 65536

# How many records are decrypted ahead before other tasks run: some two milliseconds.
_MAX_RECORDS_AHEAD = 1024

# How often ``peek`` reads from the kernel to find a record with data: a peer can send empty records
# forever.
_MAX_PEEK_READS = 16


ResultT = TypeVar("ResultT")


class TLSConnection:
    """TLS over one Transport, from the handshake to the last record.

    Args:
      transport: the connection.
      role: our TLS role, and the peer that we expect.
      early: bytes received earlier that belong to TLS.
      https_compatible: as in ``trio.SSLStream``: ``close_notify`` is neither sent nor required.
      peer: the peer's address, for errors.

    Invariant: once ``failure`` is set, every read and send raises it. The state of the encryption
    is unknown then, or the peer has proved that it cannot be trusted. Every read takes a whole
    record, so no decrypted bytes wait inside OpenSSL.

    Attributes:
      incoming: ciphertext that was read from the kernel but not passed to OpenSSL yet.
      unfinished: whether a message or a file was sent only in part.
    """

    def __init__(
        self,
        transport: Transport,
        role: TLSRole,
        *,
        early: bytes,
        https_compatible: bool,
        peer: Address,
    ) -> None:
        self._transport = transport
        self._role = role
        self._https_compatible = https_compatible
        self._peer = peer
        self._ciphertext_stream = CiphertextStream(transport)
        self._tap = SSLObjectTap(role, self._ciphertext_stream)
        self._ssl_stream = trio.SSLStream(
            self._ciphertext_stream, cast(ssl.SSLContext, self._tap), server_side=role.server_side
        )
        self._ssl_object: ssl.SSLObject  # set by the handshake
        self._incoming_bio = self._tap.incoming_bio
        self.incoming = self._ciphertext_stream.incoming
        self._outgoing_bio = self._tap.outgoing_bio
        self.incoming.write(early)
        self.failure: trio.BrokenResourceError | None = None
        self._in_ssl_stream = self._released = False
        self._ended = False
        self.unfinished = False
        self._response_unsent = False  # a part of one is in the stream's unsent
        self._forks = _fork.count
        self._filling = False
        self._filled: trio.Event | None = None  # set when the task that fills is done
        self.info: TLSInfo | None = None

    # ---- handshake ----

    async def handshake(self, deadline: float, timeout: float) -> TLSInfo:
        """Negotiate keys and verify the peer. Raises ``TLSError`` if that fails.

        If it fails or is cancelled, the connection is unusable, and ``final_bytes`` is what to send
        to the peer before closing.
        """
        with trio.CancelScope(deadline=deadline) as scope:
            try:
                if self._role.server_side and not self.incoming.pending:
                    # The client speaks first: wait for it without asking OpenSSL.
                    self.incoming.write(await self._transport.receive())
                    if not self.incoming.pending:
                        raise EndOfTransport
                if self.incoming.pending:
                    self._incoming_bio.write(self.incoming.take())
                with self._using_ssl_stream():
                    await self._ssl_stream.do_handshake()
            except EndOfTransport:
                raise self._fail("the peer closed the connection") from None
            except trio.BrokenResourceError as exc:
                raise self._fail_from(exc) from exc.__cause__
        if scope.cancelled_caught:
            raise self._fail(f"not finished within {timeout:g} seconds")
        if self._ciphertext_stream.send_failure is not None:
            raise self._fail("the peer closed the connection")
        self.incoming.restart(self._incoming_bio.read())
        ssl_object = self._ssl_object = self._tap.ssl_object
        alpn_protocol = ssl_object.selected_alpn_protocol()
        if self._role.require_alpn and alpn_protocol is None:
            raise self._fail("the peer shares no ALPN protocol, and one is required")
        version = ssl_object.version()
        cipher = ssl_object.cipher()
        assert version is not None
        assert cipher is not None
        certificate = ssl_object.getpeercert(binary_form=True)
        session_reused = bool(ssl_object.session_reused)
        try:
            expired = session_reused and certificate is not None and has_expired(certificate)
        except ValueError as exc:
            raise self._fail(str(exc)) from None
        if expired:
            # OpenSSL verified it when the session began, up to two hours ago, and not now.
            raise self._fail(
                "the certificate was refused: certificate has expired",
                reason="CERTIFICATE_VERIFY_FAILED",
                verify_code=10,
            )
        server_hostname = self._role.server_hostname
        if self._role.server_side:
            server_hostname = self._tap.requested_name
        info = TLSInfo(
            version=version,
            cipher=cipher[0],
            alpn_protocol=alpn_protocol,
            server_hostname=server_hostname,
            peer_certificate=certificate,
            session_reused=session_reused,
        )
        self.info = new_tls_info(
            info,
            tls_unique=None if version == "TLSv1.3" else ssl_object.get_channel_binding(),
            server_certificate=None if self._role.server_side else certificate,
        )
        return self.info

    # ---- reading ----

    async def receive(self) -> bytes:
        """Return one record's bytes, or ``b""`` after ``close_notify``. A full checkpoint.

        If cancelled, it consumes nothing. ``receive_pending`` returns what else has arrived with
        it.
        """
        if self.failure is not None:
            self._check()
        if self._ended or self.incoming.pending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._feed_record()
            data = self._decrypt()
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
        elif self._forks != _fork.count:  # before we take the other process's data
            self._refuse_in_fork()
        while True:
            if self.incoming.pending:  # many empty records
                await trio.lowlevel.checkpoint()
            elif self._filling or self._outgoing_bio.pending or self._response_unsent:
                self._flush_responses()
                if not await self._fill():
                    return self._transport_ended()
            else:  # _fill, inlined: the hot path (row tls-echo1)
                self._filling = True
                try:
                    ciphertext = await self._transport.receive()
                finally:
                    self._filling = False
                    if self._filled is not None:
                        self._wake_waiter()
                if not ciphertext:
                    return self._transport_ended()
                self.incoming.write(ciphertext)
            self._feed_record()
            data = self._decrypt()
            if data is not None:
                return data

    async def _fill(self) -> bool:
        """Wait for ciphertext. Returns False at the end of the connection.

        A sender may need ciphertext too, if half a TLS message has arrived. Then one task reads,
        and the other one waits for it. A full checkpoint. If cancelled, it consumes nothing.
        """
        if self._filling:
            self._filled = trio.Event()
            await self._filled.wait()
            return True
        self._filling = True
        try:
            if self._outgoing_bio.pending or self._response_unsent:
                return await self._receive_and_flush()
            ciphertext = await self._transport.receive()
            self.incoming.write(ciphertext)
        finally:
            self._filling = False
            if self._filled is not None:
                self._wake_waiter()
        return bool(ciphertext)

    def _wake_waiter(self) -> None:
        """Wake the task that waits for this one's read."""
        assert self._filled is not None
        self._filled.set()
        self._filled = None

    def _flush_responses(self) -> None:
        """If there is room, send OpenSSL's responses to what it has read, such as to a key update.

        Otherwise they stay queued: for the next send (RFC 8446, section 4.6.3), or for the reader,
        which waits for room as well as for data, because the peer may be waiting for them.
        """
        stream = self._ciphertext_stream
        with contextlib.suppress(trio.BrokenResourceError):
            stream.check_process()
            # Never in the middle of a message.
            if not stream.cut_short and self._transport.writable_now():
                stream.unsent = stream.send_nowait(self._outgoing_bio.read()) or b""
                stream.cut_short = False  # the rest is not lost: it goes out first
                self._response_unsent = bool(stream.unsent)
        if self._outgoing_bio.pending + len(stream.unsent) > _MAX_RESPONSES:
            raise self._fail("the peer asks for responses but does not read them")

    async def _receive_and_flush(self) -> bool:
        """Wait as ``_fill`` does, and flush responses when there is room."""
        failure: Exception | None = None
        ciphertext = b""

        async def receive() -> None:
            nonlocal ciphertext, failure
            try:
                ciphertext = await self._transport.receive()
                self.incoming.write(ciphertext)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                failure = exc
            nursery.cancel_scope.cancel()

        async def flush() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while self._outgoing_bio.pending or self._response_unsent:
                    await self._ciphertext_stream.wait_writable()
                    self._check_sending()
                    self._flush_responses()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(flush)
        if failure is not None:
            raise failure
        return bool(ciphertext)

    def _feed_record(self) -> None:
        """Pass OpenSSL the next record. What follows ``close_notify`` may be plain text."""
        if self.incoming.pending and not self._ended:
            self._incoming_bio.write(self.incoming.take())

    def _decrypt(self) -> bytes | None:
        """Return one record's bytes, ``b""`` at the end, ``None`` if it needs more ciphertext.

        Also ``None`` after many empty records. Then ``incoming`` still holds some, and other tasks
        must run. Sends OpenSSL's responses to what it has read.
        """
        if self._forks != _fork.count:
            self._refuse_in_fork()
        data: bytes | None
        try:
            data = self._ssl_object.read(_RECORD_SIZE)
        except ssl.SSLError as exc:
            data = self._decrypt_more(exc)
        if self._outgoing_bio.pending:
            self._flush_after_read(data)
        if data is not None and not data:
            self._ended = True
        return data

    def _decrypt_more(self, exc: ssl.SSLError) -> bytes | None:
        """Continue after an exception. Most often the record was empty."""
        for _ in range(MAX_EMPTY_RECORDS):
            if not isinstance(exc, ssl.SSLWantReadError):
                return self._retry(exc, lambda: self._ssl_object.read(_RECORD_SIZE))
            if not self.incoming.pending:
                break
            self._feed_record()
            try:
                return self._ssl_object.read(_RECORD_SIZE)
            except ssl.SSLError as another:
                exc = another
        return None

    def _flush_after_read(self, data: bytes | None) -> None:
        """Flush responses. If that fails, decrypted data is not lost: the next call raises."""
        try:
            self._flush_responses()
        except TLSError:
            if not data:
                raise

    def _retry(self, exc: ssl.SSLError, call: Callable[[], ResultT]) -> ResultT | None:
        """Retry an OpenSSL call whose error may be another connection's; ``None`` if it must read.

        The error queue belongs to the thread. An error that something else left there replaces
        WANT_READ (and close_notify), and nothing tells whose it is. But after an error of this
        connection its handshake fails. Otherwise the handshake is finished and does nothing, or has
        to read. The queue is empty now: Python clears it when it raises. Clearing it before each
        call would cost 1.5 microseconds, a tenth of a small message.
        """
        try:
            self._ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            raise self._fail_from_ssl(exc) from exc
        try:
            return call()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as own:
            raise self._fail_from_ssl(own) from own

    def _refuse_in_fork(self) -> NoReturn:
        """Refuse to use another process's keys: the next record would reuse a nonce."""
        if self.failure is None:
            self.failure = self._ciphertext_stream.send_failure = self._transport.broken(FORKED)
        raise self._transport.note(fresh(self.failure))

    def receive_pending(self) -> list[bytes]:
        """Return the bytes of each record that was already read from the kernel.

        Of many records it returns the first ones, in bounded time. Never raises: the next
        ``receive`` reports an error, like the end.
        """
        records: list[bytes] = []
        if not self.can_decrypt or self._forks != _fork.count:
            return records
        incoming = self.incoming
        read = self._ssl_object.read
        data: bytes | None = None
        try:
            while incoming.pending and len(records) < _MAX_RECORDS_AHEAD:
                ciphertext, count = incoming.take_many()
                self._incoming_bio.write(ciphertext)
                for _ in range(count):  # _decrypt, inlined (row tls-receive)
                    try:
                        data = read(_RECORD_SIZE)
                    except ssl.SSLError as exc:
                        data = self._decrypt_more(exc)
                    if not data:
                        break
                    records.append(data)
                if self._outgoing_bio.pending:
                    self._flush_responses()
                if not data and (data is not None or incoming.pending):
                    break  # the end, or many empty records: other tasks must run
        except trio.BrokenResourceError:
            pass
        if data is not None and not data:
            self._ended = True
            incoming.restart(self._incoming_bio.read())  # plain text may follow close_notify
        return records

    @property
    def can_decrypt(self) -> bool:
        """Whether ciphertext was read from the kernel but not decrypted yet."""
        return bool(self.incoming.pending) and self.failure is None and not self._ended

    def receive_nowait(self) -> bytes | None:
        """Return one record's bytes, ``b""`` at the end, ``None`` if no whole record has arrived.

        Also ``None`` if many empty records come first. Never raises: an error is kept for the next
        ``receive``.
        """
        for _ in range(_MAX_PEEK_READS):
            if self.failure is not None:
                break
            try:
                self._feed_record()
                data = self._decrypt()
                if data is not None:
                    return data
                if self._filling or self.incoming.pending:
                    break  # a sender's read comes first, or many empty records
                ciphertext = self._transport.receive_nowait()
            except (BlockingIOError, trio.BrokenResourceError):
                return None
            if not ciphertext:
                return b"" if self._https_compatible else None
            self.incoming.write(ciphertext)
        return None

    @property
    def forked(self) -> bool:
        """Whether another process began TLS and keeps the connection."""
        return self._forks != _fork.count

    def at_end(self) -> bool:
        """Whether nothing is left to read, as far as is known without decrypting."""
        if self.failure is not None or self._ended or self.forked:
            return True
        if self.incoming.pending:
            return False
        return self._transport.at_end()

    def _transport_ended(self) -> bytes:
        if self._https_compatible:
            return b""
        # RFC 8446, section 6.1. This must not depend on the context: the user's, or that of a later
        # Python, may have OP_IGNORE_UNEXPECTED_EOF set.
        raise self._fail("the peer ended the connection without close_notify: data may be missing")

    # ---- sending ----

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Encrypt and send all bytes of all buffers. A full checkpoint.

        If cancelled before the first byte is sent, nothing changes. Later, the connection is
        unusable.
        """
        started = False
        unfinished = self.unfinished
        try:
            for piece in pieces(buffers):
                while True:
                    if self.failure is not None or self._ciphertext_stream.send_failure is not None:
                        self._check_sending()
                    # What is encrypted must be sent. So wait first: until there is room for a byte,
                    # cancellation does no harm.
                    if not self._transport.writable_now():
                        await self._ciphertext_stream.wait_writable()
                        self._check_sending()  # a reader may have failed meanwhile
                    await trio.lowlevel.checkpoint_if_cancelled()
                    if self._encrypt(piece):
                        break
                    self._flush_responses()
                    if self.incoming.pending:
                        self._feed_record()
                        await trio.lowlevel.checkpoint()
                    elif not await self._fill():
                        self._transport_ended()
                        raise self._transport.broken("the peer has ended the connection")
                started = self.unfinished = True
                rest = self._ciphertext_stream.send_nowait(self._outgoing_bio.read())
                self._response_unsent = False  # its unsent part is in rest
                if rest is None:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                else:
                    await self._ciphertext_stream.send_rest(rest)
        except BaseException as exc:
            if started:
                self._ciphertext_stream.cut_short = True
                if not isinstance(exc, Exception) and self.failure is None:
                    self.failure = self._transport.broken("an earlier send was cut off")
            raise
        self.unfinished = unfinished
        if not started:
            self._check_sending()
            await trio.lowlevel.checkpoint()

    def _encrypt(self, piece: bytes | memoryview) -> bool:
        """Encrypt. Returns False if OpenSSL must read first, inside a TLS message."""
        if self._forks != _fork.count:
            self._refuse_in_fork()
        try:
            self._ssl_object.write(piece)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            return self._retry(exc, lambda: self._ssl_object.write(piece)) is not None
        return True

    async def wait_writable(self) -> None:
        """Wait until a send might not block. A full checkpoint."""
        self._check_sending()
        await self._ciphertext_stream.wait_writable()

    def _check_sending(self) -> None:
        self._check()
        if self._ciphertext_stream.send_failure is not None:
            raise self._transport.note(fresh(self._ciphertext_stream.send_failure))

    def cut_off(self) -> None:
        """Let nothing follow what was sent: it was cut short."""
        self._ciphertext_stream.cut_short = True
        self._ciphertext_stream.send_failure = self._transport.broken("an earlier send was cut off")

    # ---- shutdown ----

    async def unwrap(self) -> bytes:
        """Exchange ``close_notify`` and return the plain text that followed the peer's.

        Raises ``TLSError`` if the peer still sends encrypted data, or does not end TLS properly. If
        it fails or is cancelled, the connection is unusable.
        """
        if self._forks != _fork.count:
            self._refuse_in_fork()
        if self.failure is not None or self._ciphertext_stream.send_failure is not None:
            raise self._fail("it was cut off before")
        if self.unfinished:  # close_notify would vouch for the rest
            raise self._fail("a file was sent in part only")
        try:
            with self._using_ssl_stream():
                _, trailing = await self._ssl_stream.unwrap()
        except EndOfTransport:
            raise self._fail("the peer ended the connection without close_notify") from None
        except trio.BrokenResourceError as exc:
            raise self._fail_from(exc) from exc.__cause__
        if self._ciphertext_stream.send_failure is not None:
            raise self._fail("the peer closed the connection")
        return bytes(trailing) + self.incoming.take_all()

    @contextlib.contextmanager
    def _using_ssl_stream(self) -> Iterator[None]:
        self._in_ssl_stream = True
        try:
            yield
        finally:
            self._in_ssl_stream = False
            if self._released:
                self.release()

    def release(self) -> None:
        """Break the reference cycle of ``SSLStream``, which nobody uses any more.

        It refers to itself by a bound method. Without this, each ended connection (and a server's
        context, with its sessions) would wait for the garbage collector.
        """
        self._released = True
        if not self._in_ssl_stream:
            vars(self._ssl_stream).clear()

    def final_bytes(self) -> bytes:
        """Return what to send before FIN: ``close_notify``, or the alert that says why.

        Empty if the peer could not decrypt it (after ciphertext that was cut short), if it would
        vouch for something ``unfinished``, or in a forked process. Nothing can be sent afterwards.
        """
        if self.forked:
            return b""
        if self.failure is None:
            if self.info is None or self._https_compatible:
                return b""
            # Unread data stays in ``incoming``: SSL_shutdown would fail on it and send nothing.
            with contextlib.suppress(ssl.SSLError):  # it does not wait for the peer's
                self._ssl_object.unwrap()
            clear_error_queue()  # an alert may have left an error
        data = bytes(self._ciphertext_stream.unsent) + self._outgoing_bio.read()
        return b"" if self._ciphertext_stream.cut_short or self.unfinished else data

    # ---- errors ----

    def _check(self) -> None:
        if self._forks != _fork.count:
            self._refuse_in_fork()
        if self.failure is not None:
            raise self._transport.note(fresh(self.failure))

    def _fail(
        self, why: str, *, reason: str | None = None, verify_code: int | None = None
    ) -> TLSError:
        what = "TLS handshake" if self.info is None else "TLS"
        text = f"{what} with {self._role.named(self._peer)} failed: {why}"
        error = TLSError(text, reason=reason, verify_code=verify_code)
        self.failure = fresh(error)
        return self._transport.note(error)

    def _fail_from(self, exc: trio.BrokenResourceError) -> TLSError:
        """Convert an error from ``SSLStream`` into the one to raise."""
        if isinstance(exc.__cause__, ssl.SSLError):
            return self._fail_from_ssl(exc.__cause__)
        return self._fail(str(exc) or "it was cut off")

    def _fail_from_ssl(self, exc: ssl.SSLError) -> TLSError:
        return self._fail(
            describe_ssl_error(exc),
            reason=ssl_reason(exc) or None,
            verify_code=getattr(exc, "verify_code", None),
        )
