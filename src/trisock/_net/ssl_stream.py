"""The transport and the context that we pass to ``trio.SSLStream``, to observe it.

``SSLStream`` runs the handshake and the shutdown.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import trio

from .. import _fork
from .._errors import fresh
from .._tls.client_hello import ClientHelloReader, TooLongError
from .._tls.error_queue import clear_error_queue
from .._tls.roles import TLSRole
from .ciphertext import IncomingCiphertext
from .transport import Transport

FORKED = "TLS stays with the process that began it, and this one was forked from it: fork first"


class EndOfTransport(Exception):
    """The connection ended. The reader decides whether the encrypted stream had ended too."""


class CiphertextStream(trio.abc.Stream):
    """The transport of ``SSLStream``.

    A call is a checkpoint only if it has to wait: ``SSLStream`` acquires a lock before each call,
    and that is a checkpoint.

    ``unsent`` goes out before the next data. After the handshake it holds the session tickets of a
    TLS 1.3 server. If they were sent right away, a client that closes without reading them would
    destroy the data it has sent (``trio.SSLStream`` has the story).

    Invariant: ``cut_short`` is set from before the first byte of a piece of ciphertext goes out
    until the last one has, and for good if a message ends before its last piece. Meanwhile nothing
    else may go out: the peer could not decrypt it, or it would vouch for half a message.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._forks = _fork.count
        self.incoming = IncomingCiphertext()
        self.cut_short = False
        self.unsent: bytes | memoryview = b""
        self.send_failure: trio.BrokenResourceError | None = None
        self._writable_lock = trio.Lock()  # a descriptor takes one waiter, and there may be two

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Return a few whole records, or a part of one. If cancelled, it consumes nothing."""
        incoming = self.incoming
        if not incoming.pending:
            self.check_process()
            try:
                data = self._transport.receive_nowait()
            except BlockingIOError:
                data = await self._transport.receive()
            if not data:
                raise EndOfTransport
            incoming.write(data)
        return bytes(incoming.take_many()[0])

    def check_process(self) -> None:
        if self._forks != _fork.count:
            raise self._transport.broken(FORKED)

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        # What is encrypted must be sent, so there is no cancel point before the first attempt.
        with contextlib.suppress(trio.BrokenResourceError):
            rest = self.send_nowait(bytes(data))
            if rest is not None:
                await self.send_rest(rest)

    def send_nowait(self, data: bytes) -> memoryview | None:
        """Send ciphertext. Returns the unsent rest, for ``send_rest``, or ``None``."""
        if self.unsent:
            data, self.unsent = bytes(self.unsent) + data, b""
        try:
            sent = self._transport.send_nowait(data)
        except trio.BrokenResourceError as exc:
            self.cut_short = True
            self.send_failure = fresh(exc)
            raise
        if sent == len(data):
            self.cut_short = False
            return None
        self.cut_short = True
        return memoryview(data)[sent:]

    async def send_rest(self, rest: memoryview) -> None:
        """Send what ``send_nowait`` left unsent, before anything else goes out."""
        try:
            while len(rest):
                await self.wait_writable()
                self.check_process()
                rest = rest[self._transport.send_nowait(rest) :]
        except trio.BrokenResourceError as exc:
            self.send_failure = fresh(exc)
            raise
        self.cut_short = False

    async def wait_writable(self) -> None:
        try:  # rarely contended, and Lock.acquire would be another checkpoint
            self._writable_lock.acquire_nowait()
        except trio.WouldBlock:
            await self._writable_lock.acquire()
        try:
            await self._transport.wait_writable()
        finally:
            self._writable_lock.release()

    async def wait_send_all_might_not_block(self) -> None:
        """Do nothing: the Socket asks the Transport itself."""

    async def aclose(self) -> None:
        """Leave closing to the Socket, which does more than ``SSLStream`` can."""


class SSLObjectTap:
    """The context of ``SSLStream``, and the ``SSLObject`` that it gets from it.

    As the latter it forwards to the real ``SSLObject``, with two exceptions. It keeps the tickets
    of a TLS 1.3 server for us, because ``SSLStream`` would keep them and lose them when it fails.
    And it tells an alert from a close_notify when TLS ends.

    A server's ``SSLObject`` is created once the ClientHello is complete, because that selects the
    context. (The user's own context leaves no choice, but we still need the requested name.)
    """

    ssl_object: ssl.SSLObject
    incoming_bio: ssl.MemoryBIO
    outgoing_bio: ssl.MemoryBIO

    def __init__(self, role: TLSRole, ciphertext_stream: CiphertextStream) -> None:
        self._role = role
        self._ciphertext_stream = ciphertext_stream
        self._hello = ClientHelloReader() if role.server_side else None
        self.requested_name: str | None = None  # the name that the client requested (SNI)

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **_: object
    ) -> SSLObjectTap:
        self.incoming_bio, self.outgoing_bio = incoming, outgoing
        if self._role.contexts is None:
            self._create_ssl_object(self._role.context)
        return self

    def _create_ssl_object(self, context: ssl.SSLContext) -> None:
        self.ssl_object = context.wrap_bio(
            self.incoming_bio,
            self.outgoing_bio,
            server_side=self._role.server_side,
            server_hostname=self._role.server_hostname,
        )

    def do_handshake(self) -> None:
        self._ciphertext_stream.check_process()
        if self._hello is not None:
            self._read_hello(self._hello)
        try:
            self.ssl_object.do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLZeroReturnError):
            raise
        except ssl.SSLError as exc:
            # An unusable certificate in a good chain leaves an error that hides WANT_READ. A failed
            # handshake fails again.
            try:
                self.ssl_object.do_handshake()
            except ssl.SSLWantReadError:
                raise
            except ssl.SSLError:
                raise exc from None
        # The peer's certificates may have left an error although the handshake succeeded.
        clear_error_queue()
        if self._role.server_side and self.ssl_object.version() == "TLSv1.3":
            self._ciphertext_stream.unsent = self.outgoing_bio.read()

    def _read_hello(self, reader: ClientHelloReader) -> None:
        try:
            hello = reader.feed(self.incoming_bio.read())
        except TooLongError as exc:
            raise trio.BrokenResourceError(str(exc)) from None
        if hello is None:
            raise ssl.SSLWantReadError
        # OpenSSL reads the hello from its start, by the record like everything else.
        incoming = self._ciphertext_stream.incoming
        incoming.restart(reader.wire())
        self.incoming_bio.write(incoming.take())
        self._hello = None
        self.requested_name = hello.host_name
        if self._role.contexts is not None:
            self._create_ssl_object(self._role.contexts.choose(hello))

    def unwrap(self) -> None:
        """End TLS. OpenSSL takes an alert for the peer's close_notify. The read tells which it was.

        The read also removes the alert's error, which OpenSSL leaves in the thread's queue: the
        next connection would find it there and fail.
        """
        self._ciphertext_stream.check_process()
        clear_error_queue()
        self.ssl_object.unwrap()
        with contextlib.suppress(ssl.SSLZeroReturnError):
            self.ssl_object.read(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ssl_object, name)
