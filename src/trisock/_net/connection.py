"""Connection: the layers of one connection, and their changes (starttls, stoptls, close).

Nothing here is public. Users see ``Socket``, with its base classes ``BufferedReceiver`` and
``Sender``. A ``Server`` keeps the ``Connection`` of each of its sockets.
"""

from __future__ import annotations

import math
import socket as stdlib_socket
from collections.abc import Awaitable, Sequence
from typing import TYPE_CHECKING, Literal, TypeVar

import trio

from .._address import Address, address_from_sockaddr
from .._errors import TLSError, unraised_copy
from .._text import format_seconds
from .._tls.info import TLSInfo
from .._tls.roles import TLSRole
from .conflicts import ConflictDetector, SendLock
from .connection_state import ConnectionState, UnreadError
from .proxy_header import ProxyHeader
from .receive_buffer import ReceiveBuffer
from .syscalls import RECEIVE_SIZE
from .tls_stream import TLSStream
from .transport import Transport

if TYPE_CHECKING:
    from .idle import IdleBlock
    from .server_state import ServerState

Side = Literal["client", "server"]

ResultT = TypeVar("ResultT")

# After a failed send, we look for an alert in at most this many records, because the search is not
# a checkpoint.
_MAX_RECORDS_BEFORE_ALERT = 1024


class Connection:
    """One connection: its descriptor, its TLS layer, its unread bytes and its locks.

    Args:
      connection: the connection, as Trio's stream or as Trio's socket.
      side: our side of the connection.
      raw: the ``socket.socket`` under ``connection``, if it is known.

    Raises OSError if the connection is already dead (``ENOTCONN``).

    Invariant: ``layer`` is the TLS stream while there is one, and otherwise the transport.
    ``buffer`` holds only unread bytes of ``layer``: decrypted bytes under TLS, otherwise plain
    text. Once the connection is closing, ``layer`` is the closed transport, and ``state`` is
    CLOSING, CLOSED or ABORTED. (Hot paths check ``transport.closing``: ``state`` would be slower.)

    Attributes:
      fresh_until: a connection from which nothing was read counts as idle only after this time.
      generation: incremented when a ``starttls``, ``stoptls`` or ``relay`` begins. After an await,
        an earlier decision (for example, to send encrypted data) is still valid only if
        ``generation`` has not changed.
      idle: the most recently entered idle block that is still active, or ``None``.
      in_idle_read: whether a read waits in an idle block.
      proxy_header: the PROXY header that was received, if any.
      send_credit: how many bytes may be sent before a send must be a schedule point. Every read
        sets it to 0, except a read of an item from a batch (of lines or frames). Instead, every
        send during a batch is a schedule point.
      sending_file: the cancel scope of a running ``send_file``. A close cancels this scope.
      server_state: what the server shares with the connection, if a server has accepted it.
    """

    __slots__ = (
        "_closed",
        "_local",
        "buffer",
        "connected_host",
        "fresh_until",
        "generation",
        "idle",
        "in_idle_read",
        "layer",
        "proxy_header",
        "reading",
        "send_credit",
        "sending",
        "sending_file",
        "server_state",
        "side",
        "state",
        "tls",
        "tls_info",
        "transport",
    )

    def __init__(
        self,
        connection: trio.SocketStream | trio.socket.SocketType,
        side: Side,
        raw: stdlib_socket.socket | None = None,
    ) -> None:
        self.transport = Transport(connection, raw)
        # A sockaddr, which is converted to Address lazily, or the Address of a PROXY header.
        self._local: object = (raw or self.socket).getsockname()
        self.proxy_header: ProxyHeader | None = None
        self.side: Side = side
        self.connected_host: str | None = None
        self.tls: TLSStream | None = None
        self.tls_info: TLSInfo | None = None
        self.layer: Transport | TLSStream = self.transport
        self.buffer = ReceiveBuffer()
        self.reading = ConflictDetector("reading from", self.transport)
        self.sending = SendLock("sending on", self.transport)
        self.send_credit = 0
        self.sending_file: trio.CancelScope | None = None
        self.server_state: ServerState | None = None
        self.idle: IdleBlock | None = None
        self.in_idle_read = False
        self.fresh_until = 0.0
        self.state = ConnectionState.PLAIN
        self.generation = 0
        self._closed: trio.Event | None = None  # created by the first task that waits for the close

    # ---- information ----

    @property
    def socket(self) -> trio.socket.SocketType:
        """The underlying Trio socket."""
        return self.transport.socket

    @property
    def peer(self) -> Address:
        """The peer's address. Behind a proxy: the client's address."""
        return self.transport.peer

    @property
    def local(self) -> Address:
        """Our own address. Behind a proxy: the address that the client has connected to."""
        if isinstance(self._local, Address):
            return self._local
        return address_from_sockaddr(self.socket.family, self._local)

    def is_open(self) -> bool:
        """Return whether data is unread or may still arrive."""
        if self.transport.closing:
            return False
        return bool(self.buffer) or not self.layer.at_end()

    def can_send(self) -> bool:
        """Return whether a send may still succeed."""
        return not self.transport.closing and self.layer.can_send()

    def caused(self, exc: BaseException) -> bool:
        """Return whether this connection caused the error, for example because it was aborted."""
        if type(exc) is trio.ClosedResourceError:  # isinstance may run the program's code
            return self.state is ConnectionState.ABORTED
        return self.transport.caused(exc)

    def check_open(self) -> None:
        """Raise ``ClosedResourceError`` if the connection is closed, or being closed."""
        if self.transport.closing:
            raise self.transport.closed_error()

    def check_plain(self) -> None:
        """Raise an error unless TLS can start: the connection must be idle and in plain text."""
        self.check_idle()
        if self.tls is not None:
            raise RuntimeError(f"{self.transport} is already using TLS")

    def set_proxy_header(self, header: ProxyHeader) -> None:
        """Record the PROXY header that was received. Its addresses become the connection's."""
        self.proxy_header = header
        if header.source is not None and header.destination is not None:
            self.transport.peer = header.source
            self._local = header.destination

    # ---- data ----

    def buffer_received(self, chunk: bytes) -> None:
        """Buffer a chunk, and under TLS also the records that can be decrypted without waiting."""
        self.buffer.append(chunk)
        if self.tls is not None and chunk:
            for record in self.tls.receive_pending():
                self.buffer.append(record)

    def receive_nowait(self) -> bytes | None:
        """Return the next chunk that has arrived, or ``b""`` at EOF.

        Returns ``None`` if no chunk has arrived, or after an error: the next read raises the error.
        The only error raised here is ``ClosedResourceError``, if other code has closed the stream.
        """
        if self.tls is not None:
            return self.tls.receive_nowait()
        try:
            return self.transport.receive_nowait()
        except (BlockingIOError, trio.BrokenResourceError):
            return None

    def interrupt_idle_read(self) -> None:
        """Wake a read that waits in an idle block, so that the read checks whether it must end."""
        if self.in_idle_read:
            self.transport.interrupt_read()

    async def send(self, buffers: Sequence[bytes | memoryview]) -> None:
        """Send all bytes of all buffers. The caller must hold the send lock. A full checkpoint."""
        try:
            await self.layer.send(buffers)
        except trio.BrokenResourceError:
            self.raise_pending_alert()
            raise

    def raise_pending_alert(self) -> None:
        """After a failed send, raise the peer's alert if one has arrived.

        In TLS 1.3, a server may reject a client's certificate after the handshake. The client's
        send then fails, and only the alert tells why. Data before the alert is buffered.
        """
        tls = self.tls
        if tls is None or self.reading.in_use:
            return  # a task that is reading gets the alert
        for _ in range(_MAX_RECORDS_BEFORE_ALERT):
            if len(self.buffer) >= RECEIVE_SIZE:
                break
            chunk = tls.receive_nowait()
            if not chunk:
                break
            self.buffer.append(chunk)
        if isinstance(tls.engine.failure, TLSError):
            raise self.transport.remember_failure(unraised_copy(tls.engine.failure)) from None

    # ---- TLS ----

    async def starttls(
        self, role: TLSRole, *, https_compatible: bool, timeout: float, close: bool = True
    ) -> TLSInfo:
        """Start TLS. Unread bytes become the start of the peer's handshake.

        ``close``: whether a failed handshake closes the connection. If not, the caller must do so.
        """
        deadline = trio.current_time() + timeout
        try:
            await self._acquire_both(deadline)
        except trio.TooSlowError:
            raise self.transport.remember_failure(
                role.failure(
                    "TLS handshake",
                    self.peer,
                    f"blocked by a broadcast for {format_seconds(timeout)}",
                )
            ) from None
        try:
            try:
                self.transport.check_sending()
            except trio.BrokenResourceError:
                self.close_immediately()  # the program must not continue in plain text
                raise
            tls = TLSStream(
                self.transport,
                role,
                early=self.buffer.peek_all() if self.buffer else b"",
                https_compatible=https_compatible,
            )
            self.buffer = ReceiveBuffer()
            self.tls = self.layer = tls
            handshake = tls.handshake(deadline, timeout)
            self.tls_info = await self._close_on_error(handshake, gracefully=close)
            for record in tls.receive_pending():  # data that arrived with the handshake
                self.buffer.append(record)
            return self.tls_info
        finally:
            self._release_both()

    def time_out_handshake(self, timeout: float) -> None:
        """Make the handshake in progress fail, because it has taken ``timeout`` seconds.

        If TLS has not begun, the PROXY header is still missing. Then the connection is reset.
        """
        if self.transport.closing:
            return
        if self.tls is None:
            self.abort()
        else:
            self.tls.time_out(timeout)

    async def stoptls(self) -> None:
        """End TLS and continue in plain text. Fails if decrypted bytes are unread."""
        self.check_open()
        self.check_idle()
        if self.tls is None:
            raise RuntimeError(f"{self.transport} is not using TLS: call starttls first")
        await self._acquire_both()
        try:
            if self.tls.engine.can_read and not self.buffer:
                await self._close_on_error(self._decrypt_pending(self.tls))
            if self.buffer:
                # The peer caused this error: it has sent data without waiting for our reply. So
                # ``caused`` must return True for the error.
                why = "cannot end TLS while decrypted bytes are unread: read them first"
                raise self.transport.remember_failure(UnreadError(f"{self.transport} {why}"))
            trailing = await self._close_on_error(self.tls.unwrap())
            self.tls.break_cycle()
            self.tls = self.tls_info = None
            self.layer = self.transport
            self.buffer.append(trailing)
        finally:
            self._release_both()

    async def _decrypt_pending(self, tls: TLSStream) -> None:
        """Decrypt pending ciphertext until the buffer has data, or no whole record is left.

        Other tasks can run after each batch of records.
        """
        while True:
            for record in tls.receive_pending():
                self.buffer.append(record)
            if self.buffer or not tls.engine.can_read:
                return
            await trio.lowlevel.checkpoint()

    def check_idle(self) -> None:
        """Raise ``BusyResourceError`` if a task is using the connection."""
        self.reading.check()
        self.sending.check()

    def reserve(self, state: ConnectionState) -> None:
        """Reserve both directions: reads and sends fail, and later broadcasts skip this connection.

        The caller must call ``check_idle`` first, with no await in between. A broadcast that has
        already begun may still hold the send lock.
        """
        self.reading.in_use = self.sending.in_use = True
        self.state = state
        self.generation += 1
        self.buffer.commit_batch()  # stop the iterators; items not yet returned stay unread

    def is_reserved(self) -> bool:
        """Return whether ``starttls``, ``stoptls`` or ``relay`` has reserved both directions."""
        return self.state in (ConnectionState.CHANGING, ConnectionState.RELAYED)

    async def _acquire_both(self, deadline: float = math.inf) -> None:
        """Acquire both directions, so that no other task uses the layers while they change.

        Waits only for a broadcast in progress. If the wait takes too long (``TooSlowError``) or is
        cancelled, the connection is closed, because the peer expects a TLS message next.
        """
        self.reserve(ConnectionState.CHANGING)
        if not self.sending.locked:
            self.sending.locked = True
            return
        try:
            with trio.fail_at(deadline):
                await self.sending.acquire()
        except BaseException:
            self.close_immediately()
            self._end_change()
            raise
        if self.transport.closing:
            self._release_both()
            self.check_open()

    def _release_both(self) -> None:
        self.sending.release()
        self._end_change()

    def _end_change(self) -> None:
        self.reading.in_use = self.sending.in_use = False
        if self.state is ConnectionState.CHANGING:
            self.state = ConnectionState.PLAIN if self.tls is None else ConnectionState.TLS

    async def _close_on_error(
        self, change: Awaitable[ResultT], *, gracefully: bool = True
    ) -> ResultT:
        """Await a change of the layers. If it fails, close the connection.

        ``gracefully``: whether to close gracefully after an error that the peer caused. A server
        passes False and closes later, because it must first release the connection's slot.
        """
        try:
            return await change
        except trio.BrokenResourceError:
            if gracefully:
                await self._close(complete=True)
            raise
        except trio.ClosedResourceError:  # another task has closed the connection
            raise
        except BaseException:
            self.close_immediately()
            raise

    # ---- closing ----

    async def close(self, *, complete: bool = True) -> None:
        """Close gracefully. A second close waits for the first one.

        ``complete``: whether the program has sent all its data. If False, no ``close_notify`` is
        sent.
        """
        if self.transport.closing:  # already closed, or being closed by another task
            try:
                await trio.lowlevel.checkpoint()
                if self.socket.fileno() >= 0:
                    if self._closed is None:
                        self._closed = trio.Event()
                    await self._closed.wait()
            except BaseException:
                self.close_immediately()
                raise
            return
        await self._close(complete=complete)

    async def _close(self, *, complete: bool) -> None:
        if self._is_forked():
            self.close_immediately()
            await trio.lowlevel.checkpoint()
            return
        tls = self.tls
        self.transport.begin_close()
        self._detach(ConnectionState.CLOSING)
        try:
            # Let woken tasks unwind first. If a woken task has sent only part of its data,
            # ``final_bytes`` returns no close_notify.
            await trio.lowlevel.checkpoint()
            final_bytes = b""  # may become close_notify, or the alert of an earlier failure
            if tls is not None and (complete or tls.engine.failure is not None):
                final_bytes = tls.final_bytes()
        except BaseException:
            self.close_immediately()
            raise
        try:
            await self.transport.close(final_bytes)
        finally:
            self._mark_closed()

    def close_if_drained(self) -> bool:
        """If no wait is needed, close gracefully and return True. Otherwise return False.

        Under TLS a graceful close sends ``close_notify``. So the close must wait, unless the peer
        has already ended its side (benchmark row tls-handshakes).
        """
        if self.transport.closing:
            return self.socket.fileno() < 0
        if self.reading.in_use or self.sending.locked:
            return False
        if self.tls is None:
            closed = self.transport.close_if_drained()
        else:
            closed = self.tls.close_if_ended()
        if not closed:
            return False
        self._mark_closed()
        return True

    def close_immediately(self) -> None:
        """Close without waiting. Unlike with ``abort``, the kernel still sends queued data."""
        if not self._is_forked():
            self.transport.close_immediately()
        else:
            self.transport.close_descriptor_only()
        self._mark_closed()

    def abort(self) -> None:
        """Reset the connection, without waiting."""
        if not self._is_forked():
            self.transport.abort()
        else:
            self.transport.close_descriptor_only()
        self._mark_closed(ConnectionState.ABORTED)

    def _is_forked(self) -> bool:
        """Return whether this process was forked after TLS began.

        If so, the connection belongs to the process that began TLS. A close in this process closes
        only our descriptor, and does not end the connection.
        """
        return self.tls is not None and self.tls.engine.forked

    def _detach(self, state: ConnectionState) -> None:
        """Make any later read or send go to the closed transport, where it fails."""
        if self.state is not ConnectionState.ABORTED:
            self.state = state
        self.layer = self.transport
        self.buffer.commit_batch()  # stop the iterators over lines and frames
        self.reading.closed = self.sending.closed = True
        if self.sending_file is not None:
            self.sending_file.cancel()

    def _mark_closed(self, state: ConnectionState = ConnectionState.CLOSED) -> None:
        self._detach(state)
        if self.tls is not None:
            self.tls.break_cycle()
        if self._closed is not None:
            self._closed.set()
