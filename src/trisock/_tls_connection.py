"""TLSConnection: one TLS conversation over a Transport.

The state machine is ``trio.SSLStream``'s. This module gives it a transport and a context
of our own making, and by these two sees what it needs to:

- ``_Carrier`` is the transport. It tells the end of the connection from the end of the
  encrypted stream by an exception of its own, and keeps a failed send to itself so that what
  the peer said before can still be read.
- ``_Tap`` is the context. ``SSLStream`` asks it for one thing, ``wrap_bio``, and so it gets
  to hold the ``SSLObject`` and the memory BIOs: for the alert that ``SSLStream`` leaves there
  when a handshake fails, and for reading without waiting.
"""

from __future__ import annotations

import contextlib
import os
import re
import ssl
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, TypeVar, cast

import trio

from ._address import Address
from ._client_hello import ClientHelloReader, TooLongError
from ._errors import TLSError
from ._tls import TLSInfo, TLSRole, has_expired
from ._transport import Transport

# The most that one TLS record holds (RFC 8446, section 5.1): reading this much of it at a
# time gives one record a read.
_RECORD_SIZE = 16384

# The most that one record takes on the wire (RFC 5246, section 6.2.3), and its header.
_HEADER_SIZE = 5
_MAX_CIPHERTEXT = _HEADER_SIZE + 16384 + 2048

# How the header of a record with data begins.
_DATA_HEADER = b"\x17\x03\x03"

# How many bytes of answers a peer can make us keep by not reading them: some 2000 key updates.
_MOST_ANSWERS = 65536

# How many records without data are decrypted before other tasks run. A key update costs some
# microseconds and 22 bytes, and an honest peer sends one at a time. (Go ends the connection after
# 16 in a row.)
_MOST_EMPTY_RECORDS = 16

# How many records are decrypted ahead before other tasks run: some two milliseconds.
_MOST_RECORDS = 1024

# How often ``peek`` looks into the kernel for a record with data: a peer can send what has none
# without end.
_MOST_LOOKS = 16

# How much goes into one system call: the ciphertext of a send does not exist all at once, however
# much is sent.
_SEND_SIZE = 65536

# ---- what is never shared ----


# How many forks lie between the program's first process and this one. Two processes that go on with
# the same keys encrypt different data under one nonce, and so give both away. A counter and not
# os.getpid(): reads and sends compare it, and getpid is a system call.
_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # pragma: no branch (Windows has no fork)
    os.register_at_fork(after_in_child=_count_fork)

_FORKED = "TLS stays with the process that began it, and this one was forked from it: fork first"


def _clear_error_queue() -> None:
    """Clear OpenSSL's error queue, which all connections of a thread share.

    Whatever failed before, or succeeded and left an error behind, makes OpenSSL report the next
    WANT_READ as that error. A handshake clears the queue, both when it starts and when it has
    nothing to read.
    """
    with contextlib.suppress(ssl.SSLWantReadError):
        _spare.ssl_object.do_handshake()


class _Spare(threading.local):
    """An SSLObject that waits for a client for good; one for each thread, like the queue."""

    def __init__(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.ssl_object = context.wrap_bio(ssl.MemoryBIO(), ssl.MemoryBIO(), server_side=True)


_spare = _Spare()


ResultT = TypeVar("ResultT")


class _EndOfTransport(Exception):
    """The connection ended; whether the encrypted stream had is for the reader to say."""


class _Arrived:
    """Ciphertext that was read from the kernel and that OpenSSL does not have yet.

    OpenSSL gets it by the record: what is written into a ``MemoryBIO`` at once sets the size that
    this keeps, and a read decrypts all records in there until one has data.

    Invariant: the next byte is the first of a record's header if ``_missing`` is 0 and ``_header``
    is empty. Else ``_header`` is the part of the header that was taken, or ``_missing`` the number
    of bytes that the record still has. A peer that does not speak TLS does no harm: OpenSSL gets
    the same bytes in the same order, only in other pieces.

    Attributes:
      pending: how many bytes there are.
    """

    __slots__ = ("_data", "_header", "_missing", "_start", "pending")

    def __init__(self) -> None:
        self._data = b""
        self._start = 0
        self._header = b""
        self._missing = 0
        self.pending = 0

    def write(self, data: bytes) -> None:
        """Add what was read from the kernel."""
        if self.pending:
            data = self._data[self._start :] + data
            self._start = 0
        self._data = data
        self.pending = len(data)

    def take(self) -> bytes | memoryview:
        """Take the oldest record, or the part of it that is here; ``b""`` if nothing is."""
        data, start, size = self._data, self._start, self._missing
        if not size:
            if self.pending < _HEADER_SIZE or self._header:
                size = self._take_header()
            else:
                size = _HEADER_SIZE + (data[start + 3] << 8) + data[start + 4]
        if size == self.pending:  # the hot path: one record has come (row tls-echo1)
            self._missing = self._start = self.pending = 0
            self._data = b""
            return memoryview(data)[start:] if start else data
        end = min(start + size, start + _MAX_CIPHERTEXT, len(data))
        self._missing = size - (end - start)
        return self._take_to(end)

    def _take_header(self) -> int:
        """Return how much to take where a header is split."""
        part = self._data[self._start : self._start + _HEADER_SIZE - len(self._header)]
        header = self._header + part
        if len(header) < _HEADER_SIZE:
            self._header = header
            return len(part)
        self._header = b""
        return len(part) + int.from_bytes(header[3:], "big")

    def take_many(self) -> tuple[bytes | memoryview, int]:
        """Take a few whole records, or a part of one, and return it and how many reads it is for.

        That is the number of records, 0 for a part of one that looks as data does, and else 1.
        """
        data, start = self._data, self._start
        end, count = start, 0
        if not self._missing and not self._header:
            size = len(data)
            while count < _MOST_EMPTY_RECORDS and end + _HEADER_SIZE <= size:
                following = end + _HEADER_SIZE + (data[end + 3] << 8) + data[end + 4]
                if following - start > _MAX_CIPHERTEXT:
                    break
                if following > size:
                    if not count and data.startswith(_DATA_HEADER, start):
                        return self.take(), 0
                    break
                end = following
                count += 1
        if not count:
            return self.take(), 1
        return self._take_to(end), count

    def _take_to(self, end: int) -> bytes | memoryview:
        data, start = self._data, self._start
        if end == len(data):
            self._data = b""  # gives the memory back
            self._start = self.pending = 0
            return memoryview(data)[start:] if start else data
        self._start = end
        self.pending = len(data) - end
        return memoryview(data)[start:end]

    def take_all(self) -> bytes:
        """Take everything."""
        data = self._data[self._start :]
        self._data = b""
        self._start = self.pending = 0
        return data

    def restart(self, data: bytes) -> None:
        """Put ``data`` before everything else. A record starts there."""
        data += self.take_all()
        self._header, self._missing = b"", 0
        self.write(data)


class _Carrier(trio.abc.Stream):
    """What ``SSLStream`` takes for its transport.

    It is a checkpoint only where it must wait: ``SSLStream`` takes a lock before each call, and
    that is one.

    ``unsent`` goes out with the next thing that does, and before it. That is what a TLS 1.3 server
    wants to send right after the handshake, the session tickets: a client that closes without
    reading them would destroy what it has sent (``trio.SSLStream`` has the story).

    Invariant: ``cut_off`` is set from before the first byte of a piece of ciphertext goes
    out until the last one has, and for good when a message ended before its last piece. Then
    nothing may follow on the wire: it could not be decrypted, or would vouch for half a message.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._forks = _forks
        self.arrived = _Arrived()
        self.cut_off = False
        self.unsent: bytes | memoryview = b""
        self.send_failure: trio.BrokenResourceError | None = None
        self._room = trio.Lock()  # a sender and an answer may wait for it, a descriptor has one

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return a few whole records, or a part of one; cancelled, it has taken none."""
        arrived = self.arrived
        if not arrived.pending:
            self.check_process()
            try:
                data = self._transport.receive_nowait()
            except BlockingIOError:
                data = await self._transport.receive()
            if not data:
                raise _EndOfTransport
            arrived.write(data)
        return bytes(arrived.take_many()[0])

    def check_process(self) -> None:
        if self._forks != _forks:
            raise self._transport.broken(_FORKED)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # What is encrypted must go out, so there is no cancel point before the first try.
        with contextlib.suppress(trio.BrokenResourceError):
            rest = self.send_nowait(bytes(data))
            if rest is not None:
                await self.send_rest(rest)

    def send_nowait(self, data: bytes) -> memoryview | None:
        """Send what has been encrypted; return what is left of it, for ``send_rest``."""
        if self.unsent:
            data, self.unsent = bytes(self.unsent) + data, b""
        try:
            sent = self._transport.send_nowait(data)
        except trio.BrokenResourceError as exc:
            self.cut_off = True
            self.send_failure = exc
            raise
        if sent == len(data):
            self.cut_off = False
            return None
        self.cut_off = True
        return memoryview(data)[sent:]

    async def send_rest(self, rest: memoryview) -> None:
        """Send what ``send_nowait`` has left, before anything else goes out."""
        try:
            while len(rest):
                await self.wait_writable()
                self.check_process()
                rest = rest[self._transport.send_nowait(rest) :]
        except trio.BrokenResourceError as exc:
            self.send_failure = exc
            raise
        self.cut_off = False

    async def wait_writable(self) -> None:
        try:  # nearly always nobody else waits; Lock.acquire would be a checkpoint more
            self._room.acquire_nowait()
        except trio.WouldBlock:
            await self._room.acquire()
        try:
            await self._transport.wait_writable()
        finally:
            self._room.release()

    async def wait_send_all_might_not_block(self) -> None:
        """Do nothing: the Socket asks the Transport itself."""

    async def aclose(self) -> None:
        """Leave closing to the Socket: there is more to it than ``SSLStream`` knows."""


class _Tap:
    """What ``SSLStream`` takes for its context, and what the context makes.

    As the latter it is the ``SSLObject``, but for two things. It keeps the tickets of a TLS 1.3
    server for us, where ``SSLStream`` would keep them for itself and lose them when it fails. And
    it tells an alert from a close_notify when TLS ends.

    A server's ``SSLObject`` is made once the ClientHello is whole, which says what context is the
    right one. (With a context of the user's there is no choice, but the name is to be known.)
    """

    ssl_object: ssl.SSLObject
    incoming: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO

    def __init__(self, role: TLSRole, carrier: _Carrier) -> None:
        self._role = role
        self._carrier = carrier
        self._hello = ClientHelloReader() if role.server_side else None
        self.requested_name: str | None = None  # what a client has asked a server for

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **_: object) -> _Tap:
        self.incoming, self.outgoing = incoming, outgoing
        if self._role.contexts is None:
            self._wrap(self._role.context)
        return self

    def _wrap(self, context: ssl.SSLContext) -> None:
        self.ssl_object = context.wrap_bio(
            self.incoming,
            self.outgoing,
            server_side=self._role.server_side,
            server_hostname=self._role.server_hostname,
        )

    def do_handshake(self) -> None:
        self._carrier.check_process()
        if self._hello is not None:
            self._read_hello(self._hello)
        try:
            self.ssl_object.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLError as exc:
            # A useless certificate in a good chain leaves an error that hides WANT_READ. A
            # handshake that has failed fails again.
            try:
                self.ssl_object.do_handshake()
            except ssl.SSLWantReadError:
                raise
            except ssl.SSLError:
                raise exc from None
        # The peer's certificates may have left an error though all is well.
        _clear_error_queue()
        if self._role.server_side and self.ssl_object.version() == "TLSv1.3":
            self._carrier.unsent = self.outgoing.read()

    def _read_hello(self, reader: ClientHelloReader) -> None:
        try:
            hello = reader.feed(self.incoming.read())
        except TooLongError as exc:
            raise trio.BrokenResourceError(str(exc)) from None
        if hello is None:
            raise ssl.SSLWantReadError
        # OpenSSL reads it from the start, by the record like everything else.
        arrived = self._carrier.arrived
        arrived.restart(reader.wire())
        self.incoming.write(arrived.take())
        self._hello = None
        self.requested_name = hello.host_name
        if self._role.contexts is not None:
            self._wrap(self._role.contexts.choose(hello))

    def unwrap(self) -> None:
        """End TLS. OpenSSL takes an alert for the peer's close_notify; a read tells which it was.

        It also takes the error of the alert away, which OpenSSL leaves in the thread's queue: there
        the next connection would find it, and fail by it.
        """
        self._carrier.check_process()
        _clear_error_queue()
        self.ssl_object.unwrap()
        with contextlib.suppress(ssl.SSLZeroReturnError):
            self.ssl_object.read(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ssl_object, name)


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
        self._carrier = _Carrier(transport)
        self._tap = _Tap(role, self._carrier)
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
        self._forks = _forks
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
                        raise _EndOfTransport
                if self.arrived.pending:
                    self._incoming.write(self.arrived.take())
                await self._stream.do_handshake()
            except _EndOfTransport:
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
        elif self._forks != _forks:  # before anything is taken that is the other process's
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
        if self._forks != _forks:
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
        for _ in range(_MOST_EMPTY_RECORDS):
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
            self.failure = self._carrier.send_failure = self._transport.broken(_FORKED)
        raise self.failure.with_traceback(None)

    def receive_arrived(self) -> list[bytes]:
        """Return the bytes of each record that was read from the kernel already.

        Of many records it returns the first, in bounded time. Raises nothing: an error, like the
        end, is for the next ``receive`` to tell.
        """
        records: list[bytes] = []
        if not self.can_decrypt or self._forks != _forks:
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
        return self._forks != _forks

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
            for piece in _pieces(buffers):
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
        if self._forks != _forks:
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
        if self._forks != _forks:
            self._refuse_in_fork()
        if self.failure is not None or self._carrier.send_failure is not None:
            raise self._fail("it was cut off before")
        if self.unfinished:  # close_notify would vouch for the rest
            raise self._fail("a file was sent in part only")
        try:
            _, trailing = await self._stream.unwrap()
        except _EndOfTransport:
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
            _clear_error_queue()  # of an alert that had come
        due = bytes(self._carrier.unsent) + self._outgoing.read()
        return b"" if self._carrier.cut_off or self.unfinished else due

    # ---- errors ----

    def _check(self) -> None:
        if self._forks != _forks:
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
            describe(exc),
            reason=reason_of(exc) or None,
            verify_code=getattr(exc, "verify_code", None),
        )


def _pieces(buffers: Sequence[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    """Give the same bytes with small buffers joined and large ones cut to ``_SEND_SIZE``."""
    if len(buffers) == 1 and 0 < len(buffers[0]) <= _SEND_SIZE:
        return buffers
    return _cut(buffers)


def _cut(buffers: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    parts: list[memoryview] = []
    size = 0
    for each in buffers:
        view = memoryview(each)
        for start in range(0, len(view), _SEND_SIZE):
            part = view[start : start + _SEND_SIZE]
            if size + len(part) > _SEND_SIZE:
                yield _joined(parts)
                parts, size = [], 0
            parts.append(part)
            size += len(part)
    if parts:
        yield _joined(parts)


def _joined(parts: list[memoryview]) -> bytes | memoryview:
    return parts[0] if len(parts) == 1 else b"".join(parts)


# OpenSSL's reasons for a peer that does not speak TLS: what its first bytes looked like.
_NOT_TLS = {
    "WRONG_VERSION_NUMBER",
    "HTTP_REQUEST",
    "HTTPS_PROXY_REQUEST",
    "UNKNOWN_PROTOCOL",
    "PACKET_LENGTH_TOO_LONG",
    "RECORD_LENGTH_MISMATCH",
    "UNEXPECTED_MESSAGE",
    "BAD_RECORD_TYPE",
}

_IN_WORDS = {
    "UNSUPPORTED_PROTOCOL": "the peer speaks no TLS version that is accepted here",
    "VERSION_TOO_LOW": "the peer speaks no TLS version that is accepted here",
    "NO_PROTOCOLS_AVAILABLE": "the context allows no TLS version",
    "NO_SHARED_CIPHER": "the two sides share no cipher, or no certificate that fits one",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer showed no certificate, and one is required",
    "NO_APPLICATION_PROTOCOL": "the two sides share no ALPN protocol",
    "APPLICATION_DATA_AFTER_CLOSE_NOTIFY": "the peer was still sending encrypted data",
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "a record was forged or damaged",
    "UNEXPECTED_EOF_WHILE_READING": "the peer closed the connection",
}


def reason_of(exc: ssl.SSLError) -> str:
    """Return OpenSSL's name for it, if there is one.

    Python's table of them has gaps, such as the alert that there is no ALPN protocol: there the
    text alone says it.
    """
    if exc.reason:
        return exc.reason
    found = re.match(r"\[SSL\] (.+) \(", str(exc))
    return found[1].upper().replace(" ", "_") if found else ""


def describe(exc: ssl.SSLError) -> str:
    """Say in words what an SSLError means."""
    if isinstance(exc, ssl.SSLZeroReturnError):
        return "the peer ended it"
    if isinstance(exc, ssl.SSLCertVerificationError):
        return f"the certificate was refused: {exc.verify_message}"
    reason = reason_of(exc)
    if reason in _NOT_TLS:
        return f"the peer does not speak TLS ({_spaced(reason)})"
    if reason in _IN_WORDS:
        return _IN_WORDS[reason]
    if alert := re.match(r"(?:SSLV3|TLSV1|TLSV13)_(?:ALERT_)?(.+)", reason):
        return f"the peer refused, with the alert '{_spaced(alert[1])}'"
    return _spaced(reason) or str(exc)


def _spaced(reason: str) -> str:
    return reason.lower().replace("_", " ")
