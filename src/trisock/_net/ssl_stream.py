"""What we give ``trio.SSLStream``: a transport and a context of our own, to observe it.

``SSLStream`` runs the handshake and the shutdown.
"""

from __future__ import annotations

import contextlib
import ssl
from typing import Any

import trio

from .. import _fork
from .._tls.client_hello import ClientHelloReader, TooLongError
from .._tls.error_queue import clear_error_queue
from .._tls.roles import TLSRole
from .ciphertext import IncomingCiphertext
from .transport import Transport

FORKED = "TLS stays with the process that began it, and this one was forked from it: fork first"


class EndOfTransport(Exception):
    """The connection ended; whether the encrypted stream had is for the reader to say."""


class CiphertextStream(trio.abc.Stream):
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
        self._forks = _fork.count
        self.arrived = IncomingCiphertext()
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
                raise EndOfTransport
            arrived.write(data)
        return bytes(arrived.take_many()[0])

    def check_process(self) -> None:
        if self._forks != _fork.count:
            raise self._transport.broken(FORKED)

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


class SSLObjectTap:
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

    def __init__(self, role: TLSRole, carrier: CiphertextStream) -> None:
        self._role = role
        self._carrier = carrier
        self._hello = ClientHelloReader() if role.server_side else None
        self.requested_name: str | None = None  # what a client has asked a server for

    def wrap_bio(
        self, incoming: ssl.MemoryBIO, outgoing: ssl.MemoryBIO, **_: object
    ) -> SSLObjectTap:
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
        clear_error_queue()
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
        clear_error_queue()
        self.ssl_object.unwrap()
        with contextlib.suppress(ssl.SSLZeroReturnError):
            self.ssl_object.read(1)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.ssl_object, name)
