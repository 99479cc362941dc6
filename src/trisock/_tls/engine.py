"""TLSEngine: one side of a TLS connection, without I/O.

``TLSStream`` carries the ciphertext between the engine and the transport.
"""

from __future__ import annotations

import contextlib
import enum
import ssl
from collections.abc import Callable
from typing import NoReturn, TypeVar

import trio

from .. import _fork
from .._address import Address
from .._errors import CHECK_CLOCK, TLSError, describe_ssl_error, ssl_reason, unraised_copy
from .._text import set_message
from .client_hello import ClientHelloReader, TooLongError
from .error_queue import clear_error_queue
from .info import TLSInfo, has_expired, new_tls_info
from .records import MAX_EMPTY_RECORDS, IncomingCiphertext
from .roles import TLSRole

# The plaintext limit of a TLS record (RFC 8446, section 5.1): a read of this size returns one
# record.
_RECORD_SIZE = 16384

_FORKED = (
    "this process was forked after TLS began, "
    "so it cannot use the connection: fork before TLS begins"
)

ResultT = TypeVar("ResultT")


class TLSState(enum.Enum):
    """The state of a TLS connection. ``TRANSITIONS`` lists the next states of each state."""

    HANDSHAKE = enum.auto()
    OPEN = enum.auto()
    PEER_CLOSED = enum.auto()  # the peer has sent close_notify; we may continue to send
    CLOSING = enum.auto()  # we have sent close_notify and wait for the peer's
    CLOSED = enum.auto()  # both sides have sent close_notify: plain text follows
    FAILED = enum.auto()


# finish_handshake enters OPEN. A read that finds close_notify enters PEER_CLOSED. unwrap enters
# CLOSING and then CLOSED. set_failure enters FAILED. docs/design.md lists the events.
# close_notify(), for a local close, does not change the state.
TRANSITIONS = {
    TLSState.HANDSHAKE: {TLSState.OPEN, TLSState.FAILED},
    TLSState.OPEN: {TLSState.PEER_CLOSED, TLSState.CLOSING, TLSState.FAILED},
    TLSState.PEER_CLOSED: {TLSState.CLOSING, TLSState.FAILED},
    TLSState.CLOSING: {TLSState.CLOSED, TLSState.FAILED},
    TLSState.CLOSED: {TLSState.FAILED},  # our close_notify could not be sent
    TLSState.FAILED: set(),
}


class TLSEngine:
    """One side of a TLS connection: ciphertext in and out, plain bytes in and out.

    ``trio.SSLStream`` does the handshake and the shutdown. It expects an ``ssl.SSLContext`` and an
    ``ssl.SSLObject``, and uses five of their attributes: ``wrap_bio``, ``do_handshake``,
    ``unwrap``, ``server_side`` and ``version``. The engine has these five attributes, and takes the
    place of both objects. With real objects, we could not access the memory BIOs, into which
    OpenSSL writes session tickets and alerts.

    A server's ``SSLObject`` is created when the ClientHello is complete, because the ClientHello
    selects the context. (If the user passed a context, the ``SSLObject`` is created immediately,
    and we parse the ClientHello only to get the requested name.)

    Args:
      role: our TLS role, and the peer that we expect.
      peer: returns the peer's address, for error messages.
      remember: called with each error before it is raised, so that the connection recognizes its
        own errors.

    Invariant: in the state FAILED, ``failure`` is set. Handshakes, reads and writes then raise a
    copy of ``failure``, because the state of the encryption is unknown or the peer cannot be
    trusted. Every read returns a whole record, so OpenSSL holds no decrypted bytes.

    Attributes:
      awaits_peer: whether the handshake needs more bytes from the peer.
      incoming: ciphertext that was read from the kernel but not passed to OpenSSL yet.
      outgoing: ciphertext that OpenSSL has written since the last ``data_to_send``.
      failure: the error in the state FAILED, otherwise ``None``. Only copies of it are raised.
    """

    _ssl_object: ssl.SSLObject
    _incoming_bio: ssl.MemoryBIO
    outgoing: ssl.MemoryBIO

    def __init__(
        self,
        role: TLSRole,
        peer: Callable[[], Address],
        remember: Callable[[trio.BrokenResourceError], trio.BrokenResourceError],
    ) -> None:
        self._role = role
        self._peer = peer
        self._remember = remember
        self._forks = _fork.count
        self._hello = ClientHelloReader() if role.server_side else None
        self._requested_name: str | None = None  # the name that the client requested (SNI)
        self.incoming = IncomingCiphertext()
        self._tickets = b""
        self._unsent: bytes | memoryview = b""
        self.state = TLSState.HANDSHAKE
        self.awaits_peer = False
        self._phase = "TLS handshake"  # how error messages begin
        self.failure: trio.BrokenResourceError | None = None

    # ---- the interface for SSLStream ----

    @property
    def server_side(self) -> bool:
        """Whether this is the server's side."""
        return self._role.server_side

    def version(self) -> str | None:
        """Return the negotiated version, such as ``"TLSv1.3"``."""
        return self._ssl_object.version()

    def wrap_bio(self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **_: object) -> TLSEngine:
        self._incoming_bio, self.outgoing = incoming, outgoing
        if self._role.sni_contexts is None:
            self._create_ssl_object(self._role.context)
        return self

    def _create_ssl_object(self, context: ssl.SSLContext) -> None:
        self._ssl_object = context.wrap_bio(
            self._incoming_bio,
            self.outgoing,
            server_side=self._role.server_side,
            server_hostname=self._role.server_hostname,
        )

    def do_handshake(self) -> None:
        """Advance the handshake. Raises ``ssl.SSLWantReadError`` until it is finished."""
        self.check()
        if self.incoming.pending and not self._incoming_bio.pending:
            self._incoming_bio.write(self.incoming.take_many()[0])
        if self._hello is not None:
            self._read_hello(self._hello)
        self.awaits_peer = False
        try:
            self._ssl_object.do_handshake()
        except ssl.SSLWantReadError:
            self.awaits_peer = True
            raise
        except ssl.SSLZeroReturnError as exc:
            raise self._fail_from_ssl(exc) from exc
        except ssl.SSLError as exc:
            # An unusable certificate in a valid chain leaves an error of the library X509V3 in
            # OpenSSL's queue. OpenSSL then reports this error instead of WANT_READ. So retry once:
            # if the handshake has really failed, it fails again. But after plain text, OpenSSL 3.6
            # does not fail again. That error is of the library SSL, as all failures are.
            if exc.library == "SSL":
                raise self._fail_from_ssl(exc) from exc
            try:
                self._ssl_object.do_handshake()
            except ssl.SSLWantReadError:
                raise
            except ssl.SSLError:
                raise self._fail_from_ssl(exc) from exc
        if self._ssl_object.context.verify_mode is not ssl.CERT_NONE:
            # The peer's certificates may have left an error in the queue, although the handshake
            # succeeded.
            clear_error_queue()
        if self._role.server_side and self.version() == "TLSv1.3":
            # We send the session tickets with the first data. If we sent them now, and the client
            # closed without reading them, the data that the client has sent would be lost
            # (https://github.com/python-trio/trio/issues/819).
            self._tickets = self.outgoing.read()

    def _read_hello(self, reader: ClientHelloReader) -> None:
        try:
            hello = reader.feed(self._incoming_bio.read())
        except TooLongError as exc:
            raise self.fail(str(exc)) from None
        if hello is None:
            raise ssl.SSLWantReadError
        # Replay the ClientHello to OpenSSL, one record at a time.
        self.incoming.restart(reader.wire())
        self._incoming_bio.write(self.incoming.take())
        self._hello = None
        self._requested_name = hello.host_name
        if self._role.sni_contexts is not None:
            self._create_ssl_object(
                self._role.sni_contexts.choose(
                    self._requested_name, supports_tickets=hello.supports_tickets
                )
            )

    def unwrap(self) -> None:
        """Advance the shutdown. Raises ``ssl.SSLWantReadError`` until it is finished.

        SSL_shutdown mistakes a fatal alert for ``close_notify``. So we call ``read`` afterwards,
        which raises if the peer sent an alert. This also removes the alert's error from the
        thread's queue, where the error would make the next connection fail.
        """
        self.check()
        self._enter(TLSState.CLOSING)
        clear_error_queue()
        try:
            self._ssl_object.unwrap()
            with contextlib.suppress(ssl.SSLZeroReturnError):
                self._ssl_object.read(1)
        except ssl.SSLWantReadError:
            raise
        except ssl.SSLError as exc:
            raise self._fail_from_ssl(exc) from exc
        self._enter(TLSState.CLOSED)

    # ---- the handshake ----

    def finish_handshake(self) -> TLSInfo:
        """Make the checks that OpenSSL lacks, and enter OPEN. Return the negotiated parameters."""
        self.incoming.restart(self._incoming_bio.read())
        ssl_object = self._ssl_object
        alpn_protocol = ssl_object.selected_alpn_protocol()
        if self._role.require_alpn and alpn_protocol is None:
            raise self.fail("the peer shares no ALPN protocol, but one is required")
        version = ssl_object.version()
        cipher = ssl_object.cipher()
        assert version is not None
        assert cipher is not None
        certificate = ssl_object.getpeercert(binary_form=True)
        session_reused = bool(ssl_object.session_reused)
        try:
            expired = session_reused and certificate is not None and has_expired(certificate)
        except ValueError as exc:
            raise self.fail(str(exc)) from None
        if expired:
            # OpenSSL verified the certificate when the session began, up to two hours ago. When the
            # session is resumed, OpenSSL does not verify the certificate again.
            raise self.fail(
                f"the certificate was refused: certificate has expired{CHECK_CLOCK}",
                reason="CERTIFICATE_VERIFY_FAILED",
                verify_code=10,
            )
        self._enter(TLSState.OPEN)
        self._phase = "TLS"
        info = TLSInfo(
            version=version,
            cipher=cipher[0],
            alpn_protocol=alpn_protocol,
            server_hostname=self._requested_name or self._role.server_hostname,
            peer_certificate=certificate,
            session_reused=session_reused,
        )
        return new_tls_info(
            info,
            tls_unique=None if version == "TLSv1.3" else ssl_object.get_channel_binding(),
            server_certificate=None if self._role.server_side else certificate,
        )

    # ---- reading ----

    @property
    def can_read(self) -> bool:
        """Whether ciphertext was read from the kernel but not decrypted yet."""
        return (
            bool(self.incoming.pending)
            and self.state is not TLSState.PEER_CLOSED
            and self.failure is None
            and not self.forked
        )

    def feed_record(self) -> None:
        """Pass the next record to OpenSSL, but nothing that follows ``close_notify``."""
        if self.incoming.pending and self.state is not TLSState.PEER_CLOSED:
            self._incoming_bio.write(self.incoming.take())

    def read(self) -> bytes | None:
        """Return the data of one record, or ``b""`` after ``close_notify``.

        Returns ``None`` if more bytes must arrive. Also returns ``None`` after many empty records,
        so that other tasks can run: ``incoming`` then still holds records.
        """
        if self.failure is not None or self._forks != _fork.count:
            self.check()
        self.feed_record()
        data: bytes | None
        try:
            data = self._ssl_object.read(_RECORD_SIZE)
        except ssl.SSLError as exc:
            data = self._read_further(exc)
        if data is not None and not data:
            self._enter(TLSState.PEER_CLOSED)
        return data

    def read_batch(self, records: list[bytes], max_records: int) -> None:
        """Append the data of received records to ``records``, until it has ``max_records`` or more.

        Stops after many empty records, and after ``close_notify``: ``incoming`` then holds the
        bytes that followed it.
        """
        incoming, write, read = self.incoming, self._incoming_bio.write, self._ssl_object.read
        data: bytes | None
        while incoming.pending and len(records) < max_records:
            ciphertext, count = incoming.take_many()
            write(ciphertext)
            for _ in range(count):  # self.read, inlined (benchmark row tls-receive)
                try:
                    data = read(_RECORD_SIZE)
                except ssl.SSLError as exc:
                    data = self._read_further(exc)
                if not data:
                    if data is not None:
                        self._enter(TLSState.PEER_CLOSED)
                        incoming.restart(self._incoming_bio.read())
                    return
                records.append(data)

    def _read_further(self, exc: ssl.SSLError) -> bytes | None:
        """Continue a read that raised ``exc``. The usual cause is an empty record."""
        try:
            for _ in range(MAX_EMPTY_RECORDS):
                if not isinstance(exc, ssl.SSLWantReadError):
                    return self._retry(exc, lambda: self._ssl_object.read(_RECORD_SIZE))
                if not self.incoming.pending:
                    break
                self.feed_record()
                try:
                    return self._ssl_object.read(_RECORD_SIZE)
                except ssl.SSLError as another:
                    exc = another
            return None
        finally:
            del exc  # its traceback refers to this frame, and so to the engine

    # ---- writing ----

    def write(self, data: bytes | memoryview) -> bool:
        """Encrypt ``data``. Returns False if OpenSSL must first read the rest of a TLS message."""
        if self.failure is not None or self._forks != _fork.count:
            self.check()
        try:
            self._ssl_object.write(data)
        except ssl.SSLWantReadError:
            return False
        except ssl.SSLError as exc:
            return self._retry(exc, lambda: self._ssl_object.write(data)) is not None
        return True

    @property
    def unsent(self) -> int:
        """The number of encrypted bytes to send. Session tickets do not count."""
        return len(self._unsent) + self.outgoing.pending

    def data_to_send(self) -> bytes:
        """Remove and return all pending ciphertext, in order."""
        data = self.outgoing.read()
        if self._unsent or self._tickets:
            data = b"".join((self._tickets, self._unsent, data))
            self._tickets = self._unsent = b""
        return data

    def put_back(self, rest: bytes | memoryview) -> None:
        """Put back the bytes from ``data_to_send`` that were not sent."""
        self._unsent = rest

    def close_notify(self) -> None:
        """Write ``close_notify``, without waiting for the peer's."""
        # Unread data stays in ``incoming``. If it were in OpenSSL, SSL_shutdown would fail and send
        # nothing.
        with contextlib.suppress(ssl.SSLError):
            self._ssl_object.unwrap()
        if self.state is not TLSState.PEER_CLOSED:
            clear_error_queue()  # an alert may have left an error in the queue

    # ---- errors ----

    @property
    def forked(self) -> bool:
        """Whether this process was forked after TLS began. The parent keeps the connection."""
        return self._forks != _fork.count

    def check(self) -> None:
        """Raise an error if TLS has failed, or if this process was forked after TLS began."""
        if self._forks != _fork.count:
            self.refuse_in_fork()
        if self.failure is not None:
            raise self._remember(unraised_copy(self.failure))

    def refuse_in_fork(self) -> NoReturn:
        """Raise an error: this process and its parent would use the same keys and nonces."""
        if self.failure is None:
            failure = set_message(
                trio.BrokenResourceError(),
                f"the connection with {self._peer()} is broken: {_FORKED}",
                without_peer=f"the connection is broken: {_FORKED}",
            )
            self.set_failure(failure)
        assert self.failure is not None
        raise self._remember(unraised_copy(self.failure))

    def set_failure(self, failure: trio.BrokenResourceError) -> None:
        """Enter FAILED. Every later call raises a copy of ``failure``."""
        self.failure = unraised_copy(failure)
        self._enter(TLSState.FAILED)

    def _enter(self, state: TLSState) -> None:
        if state is not self.state:
            assert state in TRANSITIONS[self.state], f"{self.state} cannot become {state}"
            self.state = state

    def fail(
        self, why: str, *, reason: str | None = None, verify_code: int | None = None
    ) -> TLSError:
        """Enter FAILED, and return the error to raise."""
        error = self._role.failure(self._phase, self._peer(), why)
        error.reason, error.verify_code = reason, verify_code
        self.set_failure(error)
        self._remember(error)
        return error

    def _fail_from_ssl(self, exc: ssl.SSLError) -> TLSError:
        return self.fail(
            describe_ssl_error(exc, server_side=self._role.server_side),
            reason=ssl_reason(exc) or None,
            verify_code=getattr(exc, "verify_code", None),
        )

    def _retry(self, exc: ssl.SSLError, call: Callable[[], ResultT]) -> ResultT | None:
        """Retry an OpenSSL call whose error may belong to another connection.

        Returns ``None`` if the call must read first.

        All connections of a thread share one error queue. A stale error of another connection
        replaces WANT_READ (and close_notify), and looks like an error of this connection. So we
        call ``do_handshake``, which also fails if the error belongs to this connection. Otherwise
        the error was stale, and we repeat the call. The queue is then empty, because Python
        clears the queue whenever it raises an error. Clearing the queue before each call would cost
        1.5 microseconds, a tenth of the cost of a small message.
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
