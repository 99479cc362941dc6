"""TLSConnection: one TLS conversation over a Transport.

The state machine is ``trio.SSLStream``'s. This module gives it a transport and a context
of our own making, and by these two sees what it needs to:

- ``CiphertextStream`` is the transport. It tells the end of the connection from the end of the
  encrypted stream by an exception of its own, and keeps a failed send to itself so that what
  the peer said before can still be read.
- ``SSLObjectTap`` is the context. ``SSLStream`` asks it for one thing, ``wrap_bio``, and so it gets
  to hold the ``SSLObject`` and the memory BIOs: for the alert that ``SSLStream`` leaves there
  when a handshake fails, and for reading without waiting.
"""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import Callable, Sequence
from typing import NoReturn, TypeVar, cast

import trio

from .. import _fork
from .._address import Address
from .._errors import TLSError, describe_ssl_error, ssl_reason
from .._tls.error_queue import clear_error_queue
from .._tls.info import TLSInfo, has_expired
from .._tls.roles import TLSRole
from .ciphertext import MAX_EMPTY_RECORDS, pieces
from .ssl_stream import FORKED, CiphertextStream, EndOfTransport, SSLObjectTap
from .transport import Transport

# The most that one TLS record holds (RFC 8446, section 5.1): reading this much of it at a
# time gives one record a read.
_RECORD_SIZE = 16384

# How many bytes of answers a peer can make us keep by not reading them: some 2000 key updates.
_MOST_ANSWERS = 65536

# How many records are decrypted ahead before other tasks run: some two milliseconds.
_MOST_RECORDS = 1024

# How often ``peek`` looks into the kernel for a record with data: a peer can send what has none
# without end.
_MOST_LOOKS = 16


ResultT = TypeVar("ResultT")


class TLSConnection:
    """TLS over one Transport, from the handshake to the last record.

    Args:
      transport: the connection.
      role: who we are and whom we expect.
      early: bytes that were received already and belong to TLS.
      https_compatible: as in ``trio.SSLStream``: no ``close_notify``, neither sent nor missed.
      peer: the peer's address, for errors.

    Invariant: once ``failure`` is set, reading and sending raise it, because the state of
    the encryption is not known any more or the peer has shown that it is not to be trusted.
    Every read takes a whole record, so nothing that is decrypted waits inside OpenSSL.

    Attributes:
      arrived: the ciphertext that was read from the kernel and that OpenSSL does not have yet.
      unfinished: whether a part of something is sent, a large message or a file, whose end
        is not.
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
        self._carrier = CiphertextStream(transport)
        self._tap = SSLObjectTap(role, self._carrier)
        self._stream = trio.SSLStream(
            self._carrier, cast(ssl.SSLContext, self._tap), server_side=role.server_side
        )
        self._ssl_object: ssl.SSLObject  # from the end of the handshake on
        self._incoming = self._tap.incoming
        self.arrived = self._carrier.arrived
        self._outgoing = self._tap.outgoing
        self.arrived.write(early)
        self.failure: trio.BrokenResourceError | None = None
        self._ended = False
        self.unfinished = False
        self._answer_cut = False  # a part of an answer is in the carrier's unsent
        self._forks = _fork.count
        self._feeding = False
        self._fed: trio.Event | None = None  # set when a task that feeds is done with it
        self.info: TLSInfo | None = None

    # ---- the beginning ----

    async def handshake(self, deadline: float, timeout: float) -> TLSInfo:
        """Agree on keys and verify the peer; ``TLSError`` if that fails.

        Then, and when it is cancelled, the connection cannot be used any more: what is to be
        sent to the peer before closing is in ``last_bytes``.
        """
        with trio.CancelScope(deadline=deadline) as scope:
            try:
                if self._role.server_side and not self.arrived.pending:
                    # The client speaks first: OpenSSL need not be asked whether it has.
                    self.arrived.write(await self._transport.receive())
                    if not self.arrived.pending:
                        raise EndOfTransport
                if self.arrived.pending:
                    self._incoming.write(self.arrived.take())
                await self._stream.do_handshake()
            except EndOfTransport:
                raise self._fail("the peer closed the connection") from None
            except trio.BrokenResourceError as exc:
                raise self._fail_by(exc) from exc.__cause__
        if scope.cancelled_caught:
            raise self._fail(f"not finished within {timeout:g} seconds")
        if self._carrier.send_failure is not None:
            raise self._fail("the peer closed the connection")
        self.arrived.restart(self._incoming.read())
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
            # OpenSSL has verified it when the session began, up to two hours ago, and not now.
            raise self._fail(
                "the certificate was refused: certificate has expired",
                reason="CERTIFICATE_VERIFY_FAILED",
                verify_code=10,
            )
        server_hostname = self._role.server_hostname
        if self._role.server_side:
            server_hostname = self._tap.requested_name
        self.info = TLSInfo(
            version=version,
            cipher=cipher[0],
            alpn_protocol=alpn_protocol,
            server_hostname=server_hostname,
            peer_certificate=certificate,
            session_reused=session_reused,
            _tls_unique=None if version == "TLSv1.3" else ssl_object.get_channel_binding(),
            _server_certificate=None if self._role.server_side else certificate,
        )
        return self.info

    # ---- reading ----

    async def receive(self) -> bytes:
        """Return one record's bytes; ``b""`` after ``close_notify``. A full checkpoint.

        Cancelled, it has taken nothing. More that has come with it is in ``receive_arrived``.
        """
        if self.failure is not None:
            self._check()
        if self._ended or self.arrived.pending:
            await trio.lowlevel.checkpoint_if_cancelled()
            self._give()
            data = self._decrypt()
            if data is not None:
                await trio.lowlevel.cancel_shielded_checkpoint()
                return data
        elif self._forks != _fork.count:  # before anything is taken that is the other process's
            self._refuse_in_fork()
        while True:
            if self.arrived.pending:  # many records without data
                await trio.lowlevel.checkpoint()
            elif self._feeding or self._outgoing.pending or self._answer_cut:
                self._answer()
                if not await self._feed():
                    return self._transport_ended()
            else:  # as _feed does: the hot path (row tls-echo1)
                self._feeding = True
                try:
                    ciphertext = await self._transport.receive()
                finally:
                    self._feeding = False
                    if self._fed is not None:
                        self._has_fed()
                if not ciphertext:
                    return self._transport_ended()
                self.arrived.write(ciphertext)
            self._give()
            data = self._decrypt()
            if data is not None:
                return data

    async def _feed(self) -> bool:
        """Wait for ciphertext; False at the end of the connection.

        A sender may need some as well, when half a message of TLS has come: then one task reads,
        and the other waits for that. A full checkpoint; cancelled, it has taken nothing.
        """
        if self._feeding:
            self._fed = trio.Event()
            await self._fed.wait()
            return True
        self._feeding = True
        try:
            if self._outgoing.pending or self._answer_cut:
                return await self._receive_and_answer()
            ciphertext = await self._transport.receive()
            self.arrived.write(ciphertext)
        finally:
            self._feeding = False
            if self._fed is not None:
                self._has_fed()
        return bool(ciphertext)

    def _has_fed(self) -> None:
        """Wake the task that waits for what another one has read."""
        assert self._fed is not None
        self._fed.set()
        self._fed = None

    def _answer(self) -> None:
        """Send what OpenSSL has to say to what was read, such as to a key update, if there is room.

        Else it stays where it is, for the next send (RFC 8446, section 4.6.3) or for the reader,
        who waits for room and for data: the peer may be waiting for it.
        """
        carrier = self._carrier
        with contextlib.suppress(trio.BrokenResourceError):
            carrier.check_process()
            # Not into the middle of something.
            if not carrier.cut_off and self._transport.writable_now():
                carrier.unsent = carrier.send_nowait(self._outgoing.read()) or b""
                carrier.cut_off = False  # what is left of it is not lost, and goes out first
                self._answer_cut = bool(carrier.unsent)
        if self._outgoing.pending + len(carrier.unsent) > _MOST_ANSWERS:
            raise self._fail("the peer asks for answers and does not take them")

    async def _receive_and_answer(self) -> bool:
        """Wait as ``_feed`` does, and answer when there is room: the peer may wait for that."""
        failure: Exception | None = None
        ciphertext = b""

        async def receive() -> None:
            nonlocal ciphertext, failure
            try:
                ciphertext = await self._transport.receive()
                self.arrived.write(ciphertext)
            except (trio.BrokenResourceError, trio.ClosedResourceError) as exc:
                failure = exc
            nursery.cancel_scope.cancel()

        async def answer() -> None:
            with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                while self._outgoing.pending or self._answer_cut:
                    await self._carrier.wait_writable()
                    self._check_sending()
                    self._answer()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(receive)
            nursery.start_soon(answer)
        if failure is not None:
            raise failure
        return bool(ciphertext)

    def _give(self) -> None:
        """Give OpenSSL the next record; nothing after ``close_notify``: it may be plain text."""
        if self.arrived.pending and not self._ended:
            self._incoming.write(self.arrived.take())

    def _decrypt(self) -> bytes | None:
        """Return one record's bytes, ``b""`` at the end, ``None`` if more must come before.

        ``None`` also after many records without data: then something is left in ``arrived``, and
        other tasks have to run. What OpenSSL answers to what it has read is sent.
        """
        if self._forks != _fork.count:
            self._refuse_in_fork()
        data: bytes | None
        try:
            data = self._ssl_object.read(_RECORD_SIZE)
        except ssl.SSLError as exc:
            data = self._decrypt_more(exc)
        if self._outgoing.pending:
            self._answer_unless(data)
        if data is not None and not data:
            self._ended = True
        return data

    def _decrypt_more(self, exc: ssl.SSLError) -> bytes | None:
        """Go on after an exception, which says most often that the record had no data."""
        for _ in range(MAX_EMPTY_RECORDS):
            if not isinstance(exc, ssl.SSLWantReadError):
                return self._call_again(exc, lambda: self._ssl_object.read(_RECORD_SIZE))
            if not self.arrived.pending:
                break
            self._give()
            try:
                return self._ssl_object.read(_RECORD_SIZE)
            except ssl.SSLError as another:
                exc = another
        return None

    def _answer_unless(self, data: bytes | None) -> None:
        """Answer; if that fails, what was decrypted is returned and the next call raises."""
        try:
            self._answer()
        except TLSError:
            if not data:
                raise

    def _call_again(self, exc: ssl.SSLError, call: Callable[[], ResultT]) -> ResultT | None:
        """Call OpenSSL again if an error may be another connection's; ``None`` if it has to read.

        The error queue belongs to the thread: an error that something else has left there takes the
        place of WANT_READ (and of close_notify), and nothing tells whose it is. But after an error
        of this connection its handshake fails, and else it is finished and does nothing, or has to
        read. The queue is empty now: Python clears it when it raises. To clear it before
        each call would cost 1.5 microseconds, a tenth of a small message.
        """
        try:
            self._ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            raise self._fail_by_ssl(exc) from exc
        try:
            return call()
        except ssl.SSLWantReadError:
            return None
        except ssl.SSLError as again:
            raise self._fail_by_ssl(again) from again

    def _refuse_in_fork(self) -> NoReturn:
        """Refuse to use keys that another process uses: the next record would have its nonce."""
        if self.failure is None:
            self.failure = self._carrier.send_failure = self._transport.broken(FORKED)
        raise self.failure.with_traceback(None)

    def receive_arrived(self) -> list[bytes]:
        """Return the bytes of each record that was read from the kernel already.

        Of many records it returns the first, in bounded time. Raises nothing: an error, like the
        end, is for the next ``receive`` to tell.
        """
        records: list[bytes] = []
        if not self.can_decrypt or self._forks != _fork.count:
            return records
        arrived = self.arrived
        read = self._ssl_object.read
        data: bytes | None = None
        try:
            while arrived.pending and len(records) < _MOST_RECORDS:
                given, count = arrived.take_many()
                self._incoming.write(given)
                for _ in range(count):  # what _decrypt does, for many (row tls-receive)
                    try:
                        data = read(_RECORD_SIZE)
                    except ssl.SSLError as exc:
                        data = self._decrypt_more(exc)
                    if not data:
                        break
                    records.append(data)
                if self._outgoing.pending:
                    self._answer()
                if not data and (data is not None or arrived.pending):
                    break  # the end; or many records without data, and other tasks have to run
        except trio.BrokenResourceError:
            pass
        if data is not None and not data:
            self._ended = True
            arrived.restart(self._incoming.read())  # plain text may come after close_notify
        return records

    @property
    def can_decrypt(self) -> bool:
        """Whether ciphertext was read from the kernel and is still to be decrypted."""
        return bool(self.arrived.pending) and self.failure is None and not self._ended

    def receive_nowait(self) -> bytes | None:
        """Return one record's bytes, ``b""`` at the end, ``None`` if no whole record is here.

        ``None`` also if what is here begins with many records without data. Raises nothing: an
        error is kept for the next ``receive``.
        """
        for _ in range(_MOST_LOOKS):
            if self.failure is not None:
                break
            try:
                self._give()
                data = self._decrypt()
                if data is not None:
                    return data
                if self._feeding or self.arrived.pending:
                    break  # a sender: what it has taken comes first; or many records without data
                ciphertext = self._transport.receive_nowait()
            except (BlockingIOError, trio.BrokenResourceError):
                return None
            if not ciphertext:
                return b"" if self._https_compatible else None
            self.arrived.write(ciphertext)
        return None

    @property
    def forked(self) -> bool:
        """Whether another process began TLS and keeps the connection."""
        return self._forks != _fork.count

    def at_end(self) -> bool:
        """Whether nothing is left to read, as far as can be told without decrypting."""
        if self.failure is not None or self._ended or self.forked:
            return True
        if self.arrived.pending:
            return False
        return self._transport.at_end()

    def _transport_ended(self) -> bytes:
        if self._https_compatible:
            return b""
        # RFC 8446, section 6.1. Whatever the context says: a context of the user's, or one of a
        # later Python, may have OP_IGNORE_UNEXPECTED_EOF set.
        raise self._fail("the peer ended the connection without close_notify: data may be missing")

    # ---- sending ----

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Encrypt and send all bytes of all buffers. A full checkpoint.

        Cancelled before the first byte it changes nothing; later, the connection is over.
        """
        started = False
        unfinished = self.unfinished
        try:
            for piece in pieces(buffers):
                while True:
                    if self.failure is not None or self._carrier.send_failure is not None:
                        self._check_sending()
                    # What is encrypted must be sent. So wait first: until there is room for a
                    # byte, changing one's mind harms nothing.
                    if not self._transport.writable_now():
                        await self._carrier.wait_writable()
                        self._check_sending()  # a reader may have met an error meanwhile
                    await trio.lowlevel.checkpoint_if_cancelled()
                    if self._encrypt(piece):
                        break
                    self._answer()
                    if self.arrived.pending:
                        self._give()
                        await trio.lowlevel.checkpoint()
                    elif not await self._feed():
                        self._transport_ended()
                        raise self._transport.broken("the peer has ended the connection")
                started = self.unfinished = True
                rest = self._carrier.send_nowait(self._outgoing.read())
                self._answer_cut = False  # what was left of it is in rest
                if rest is None:
                    await trio.lowlevel.cancel_shielded_checkpoint()
                else:
                    await self._carrier.send_rest(rest)
        except BaseException as exc:
            if started:
                self._carrier.cut_off = True
                if not isinstance(exc, Exception) and self.failure is None:
                    self.failure = self._transport.broken("an earlier send was cut off")
            raise
        self.unfinished = unfinished
        if not started:
            self._check_sending()
            await trio.lowlevel.checkpoint()

    def _encrypt(self, piece: bytes | memoryview) -> bool:
        """Encrypt; False if OpenSSL has to read first: it is in the middle of a message of TLS."""
        if self._forks != _fork.count:
            self._refuse_in_fork()
        try:
            self._ssl_object.write(piece)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            return self._call_again(exc, lambda: self._ssl_object.write(piece)) is not None
        return True

    async def wait_writable(self) -> None:
        """Wait until a send might start at once. A full checkpoint."""
        self._check_sending()
        await self._carrier.wait_writable()

    def _check_sending(self) -> None:
        self._check()
        if self._carrier.send_failure is not None:
            raise self._carrier.send_failure.with_traceback(None)

    def cut_off(self) -> None:
        """Let nothing follow what was sent: it was only a part of something."""
        self._carrier.cut_off = True
        self._carrier.send_failure = self._transport.broken("an earlier send was cut off")

    # ---- the end ----

    async def stop(self) -> bytes:
        """Exchange ``close_notify`` and return the clear bytes that came after the peer's.

        Raises ``TLSError`` if the peer still sends encrypted data, or does not speak TLS to the
        end; then, and when it is cancelled, the connection cannot be used any more.
        """
        if self._forks != _fork.count:
            self._refuse_in_fork()
        if self.failure is not None or self._carrier.send_failure is not None:
            raise self._fail("it was cut off before")
        if self.unfinished:  # close_notify would vouch for the rest
            raise self._fail("a file was sent in part only")
        try:
            _, trailing = await self._stream.unwrap()
        except EndOfTransport:
            raise self._fail("the peer ended the connection without close_notify") from None
        except trio.BrokenResourceError as exc:
            raise self._fail_by(exc) from exc.__cause__
        if self._carrier.send_failure is not None:
            raise self._fail("the peer closed the connection")
        return bytes(trailing) + self.arrived.take_all()

    def last_bytes(self) -> bytes:
        """Return what to send before FIN: ``close_notify``, or the alert that says why.

        Nothing, if they could not be understood, after ciphertext that was cut off, or would vouch
        for what is ``unfinished``, or come from a fork. Nothing can be sent afterwards.
        """
        if self.forked:
            return b""
        if self.failure is None:
            if self.info is None or self._https_compatible:
                return b""
            # Unread data stays in ``arrived``: SSL_shutdown would fail on it, and send nothing.
            with contextlib.suppress(ssl.SSLError):  # it does not wait for the peer's
                self._ssl_object.unwrap()
            clear_error_queue()  # of an alert that had come
        due = bytes(self._carrier.unsent) + self._outgoing.read()
        return b"" if self._carrier.cut_off or self.unfinished else due

    # ---- errors ----

    def _check(self) -> None:
        if self._forks != _fork.count:
            self._refuse_in_fork()
        if self.failure is not None:
            raise self.failure.with_traceback(None)

    def _fail(
        self, why: str, *, reason: str | None = None, verify_code: int | None = None
    ) -> TLSError:
        what = "TLS handshake" if self.info is None else "TLS"
        text = f"{what} with {self._role.named(self._peer)} failed: {why}"
        error = TLSError(text, reason=reason, verify_code=verify_code)
        self.failure = self._transport.note(error)
        return error

    def _fail_by(self, exc: trio.BrokenResourceError) -> TLSError:
        """Turn what came out of ``SSLStream`` into the error to raise."""
        if isinstance(exc.__cause__, ssl.SSLError):
            return self._fail_by_ssl(exc.__cause__)
        return self._fail(str(exc) or "it was cut off")

    def _fail_by_ssl(self, exc: ssl.SSLError) -> TLSError:
        return self._fail(
            describe_ssl_error(exc),
            reason=ssl_reason(exc) or None,
            verify_code=getattr(exc, "verify_code", None),
        )
