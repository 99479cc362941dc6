"""Socket: one connection, in the clear or encrypted, with a buffer that can be pushed back to."""

from __future__ import annotations

import io
import math
import operator
import socket as stdlib_socket
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, Literal, TypeVar, overload

import trio

from ._address import Address, address_from_sockaddr, quoted
from ._buffer import ReceiveBuffer
from ._errors import IncompleteReadError, LimitExceededError, TLSError
from ._send_file import open_source, send_file
from ._tls import TLSArgument, TLSInfo, check_flag, resolve
from ._tls_connection import TLSConnection
from ._transport import RECEIVE_SIZE, Transport
from ._turns import Exclusive, SendTurn
from ._uncopied import Uncopied

# After so many reads in a row that were served from the receive buffer, the next one lets other
# tasks run. A number small enough that nobody waits long (each such read takes microseconds)
# and large enough that the pass through the scheduler does not show.
READS_PER_PASS = 64

# After how many records a failed send stops looking for an alert: it lets no other task run.
_MOST_CHUNKS_BEFORE_AN_ALERT = 1024

Buffer = bytes | bytearray | memoryview
Side = Literal["client", "server"]

ResultT = TypeVar("ResultT")


class _UnreadError(RuntimeError):
    """A RuntimeError that can be referred to weakly, so that ``Transport.note`` can mark it."""


_UNREAD = "decrypted bytes are waiting to be read: read them first"


@dataclass(frozen=True)
class ConnectionInfo:
    """What is known about a connection, at one moment.

    Attributes:
      local: our address.
      peer: the other end's address.
      side: which side of the connection this is.
      isopen: as ``Socket.isopen()``.
      istls: as ``Socket.istls()``.
      tls: as ``Socket.tls``.
      buffered: how many bytes have arrived here (or were pushed back) and were not consumed.
    """

    local: Address
    peer: Address
    side: Side
    isopen: bool
    istls: bool
    tls: TLSInfo | None
    buffered: int


class Socket(Uncopied, trio.abc.HalfCloseableStream):
    """A connection that can turn to TLS, and back, in mid-conversation.

    Made by ``connect``, by a ``Listener`` or a ``Server``, or from a ``trio.SocketStream``, which
    it takes over.

    Args:
      stream: the connection.
      side: which side of it this is, ``"client"`` or ``"server"``.

    Raises:
      TypeError, ValueError: the stream is no ``trio.SocketStream``, or the side neither.
      OSError: the connection is dead already (``ENOTCONN``).

    One task may read and one may write at the same time; a second of either gets
    ``trio.BusyResourceError``. Every async method is a cancel point. After a cancelled read no
    byte is lost; what a cancelled send, ``starttls`` or ``close`` leaves behind is said there.

    After ``close`` every method raises ``trio.ClosedResourceError``, but for ``close`` and what
    only tells (addresses, ``tls``, ``isopen``, ``info``).

    It cannot be copied or pickled (``TypeError``).
    """

    __slots__ = (
        "_aborted",
        "_buffer",
        "_changing",
        "_closed",
        "_connected_host",
        "_generation",
        "_layer",
        "_local",
        "_peer",
        "_reading",
        "_reads_since_pass",
        "_sending",
        "_sending_file",
        "_side",
        "_tls",
        "_tls_info",
        "_transport",
    )

    def __init__(
        self,
        stream: trio.SocketStream,
        *,
        side: Side = "client",
        _raw: stdlib_socket.socket | None = None,
    ) -> None:
        if not isinstance(stream, trio.SocketStream):
            raise TypeError(f"a Socket needs a trio.SocketStream, not {quoted(stream)}")
        if side not in ("client", "server"):
            raise ValueError(f"the side is 'client' or 'server', not {quoted(side)}")
        # As the system gives them: who asks for them gets an Address.
        self._peer = stream.socket.getpeername()
        self._local = stream.socket.getsockname()
        self._side: Side = side
        self._transport = Transport(stream, _raw)
        self._tls: TLSConnection | None = None
        self._tls_info: TLSInfo | None = None
        # Where the next byte comes from and goes to: the TLS connection, if there is one.
        self._layer: Transport | TLSConnection = self._transport
        self._connected_host: str | None = None
        # Bytes of one kind only: clear ones before starttls and after stoptls, decrypted ones
        # between them. starttls hands what is here to TLS, stoptls insists that it is empty.
        self._buffer = ReceiveBuffer()
        self._reads_since_pass = 0
        self._reading = Exclusive("another task is reading from this socket")
        self._sending = SendTurn("another task is sending on this socket")
        # What send_file waits in: for a file, which does not notice that the socket is closed.
        self._sending_file: trio.CancelScope | None = None
        self._changing = False
        # Incremented by each starttls and stoptls when it begins. What was decided before a wait,
        # such as to send encrypted, holds only while this is the same; ``_changing`` can come back.
        self._generation = 0
        self._aborted = False
        self._closed: trio.Event | None = None  # made by the first who waits for it

    def __repr__(self) -> str:
        state = "closed" if self._transport.closing else "open" if self.isopen() else "ended"
        layer = self._tls_info.version if self._tls_info else "clear"
        ends = f"{self.getlocal()} <-> {self.getpeer()}"
        return f"<trisock.Socket {self._side} {ends} {layer} {state}>"

    # ---- reading ----

    async def recv(self, max_bytes: int | None = None) -> bytes:
        """Return the oldest chunk of received data; ``b""`` at the end of the stream.

        A chunk is what one read of the connection gave or, under TLS, one record; pushed-back
        data is a chunk as well. Small chunks are joined when more than 256 are unread.

        Args:
          max_bytes: return at most so many bytes of the chunk; the rest stays the oldest.

        Raises:
          trio.BrokenResourceError: the connection broke (also ``TLSError``).
          ValueError, TypeError: ``max_bytes`` is not a positive int.

        Cancelled, it has consumed nothing. Source: Pluto's ``socket.recv``.
        """
        if max_bytes is not None:
            max_bytes = _positive("max_bytes", max_bytes)
        reading = self._reading
        if reading.held:
            reading.check()
        reading.held = True
        try:
            if not self._buffer.size:  # the hot path: what arrives is not even put into the buffer
                chunk = await self._layer.receive()
                if max_bytes is None and (self._tls is None or not self._tls.arrived.pending):
                    return chunk
                self._arrived(chunk)
            elif self._buffer:
                self._check_open()
                await self._buffered_read()
            else:
                await self._receive()
            return self._buffer.take_chunk(max_bytes)
        finally:
            reading.held = False

    async def peek(self) -> bytes | None:
        """Return the chunk that ``recv`` would return next, without consuming it or waiting for it.

        Looks at what has arrived in the kernel, and decrypts it, too. Returns ``None`` if nothing
        has arrived and ``b""`` at the end of the stream. An error of the peer's is
        not raised (``None``); the next ``recv`` raises it.

        Cancelled, it has consumed nothing. Source: Pluto's ``socket.peek``.
        """
        with self._reading:
            self._check_open()
            if self._buffer:
                await self._buffered_read()
                return self._buffer.peek_chunk()
            await trio.lowlevel.checkpoint()
            self._check_open()
            chunk = self._receive_nowait()
            if chunk:
                self._buffer.append(chunk)
            return chunk

    def unrecv(self, data: Buffer) -> None:
        """Push data to the front of the receive buffer: the last pushed is the first received.

        Empty data changes nothing. After the end of the stream pushed-back data is read first,
        then comes the end again. If ``starttls`` follows, the data is taken as the peer's TLS.

        Args:
          data: bytes; copied if it can change.

        Raises:
          TypeError: it is not bytes.
          trio.BusyResourceError: another task is reading: where its read ends is not known.

        Source: Pluto's ``socket.unrecv``.
        """
        view = _bytes_view(data)
        self._check_open()
        self._reading.check()
        self._buffer.push_front(bytes(view))

    async def recv_exactly(self, n: int) -> bytes:
        """Return exactly ``n`` bytes.

        Raises:
          IncompleteReadError: the stream ended before; the bytes that came stay to be read.
          trio.BrokenResourceError: the connection broke.
          ValueError, TypeError: ``n`` is not an int of 0 or more.

        Cancelled, it has consumed nothing: the next read starts where it did.
        """
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"n must be 0 or more, not {quoted(n)}")
        with self._reading:
            self._check_open()
            if len(self._buffer) >= n:
                await self._buffered_read()
            while len(self._buffer) < n:
                if not await self._receive():
                    raise self._incomplete(n)
            return self._buffer.take(n)

    async def recv_until(self, delimiter: Buffer, *, max_bytes: int = 65536) -> bytes:
        """Return everything up to and including the first delimiter.

        Args:
          delimiter: what to look for; at least one byte.
          max_bytes: how many bytes are looked at, delimiter included. What is held is at most this
            and one read more (128 KiB; under TLS all records in it).

        Raises:
          LimitExceededError: the delimiter did not come within ``max_bytes``.
          IncompleteReadError: the stream ended before; ``expected`` is ``None``.
          trio.BrokenResourceError: the connection broke.

        After each of them, and cancelled, it has consumed nothing.
        """
        wanted = _delimiter(delimiter)
        limit = _positive("max_bytes", max_bytes)
        with self._reading:
            return self._buffer.take(await self._find(wanted, limit))

    async def _find(self, delimiter: bytes, max_bytes: int) -> int:
        """Wait until a delimiter has come and return where it ends. Takes nothing."""
        self._check_open()
        buffer = self._buffer
        waited = False
        while (end := buffer.find(delimiter, max_bytes)) is None and buffer.size < max_bytes:
            waited = True
            if not await self._receive():
                raise self._incomplete(None)
        if not waited:
            await self._buffered_read()
        if end is None:
            raise self._transport.note(LimitExceededError(max_bytes))
        return end

    def lines(
        self, *, delimiter: Buffer = b"\n", keep_ends: bool = False, max_bytes: int = 65536
    ) -> Lines:
        r"""Iterate over lines: ``async for line in sock.lines():``.

        It holds no bytes itself: leave the loop whenever you like, the next read goes on there.

        Args:
          delimiter: what ends a line, such as ``b"\r\n"``.
          keep_ends: whether lines are given with their delimiter.
          max_bytes: the most that a line may have, delimiter included. What is held is at most
            this and one read more, as in ``recv_until``.

        Raises:
          IncompleteReadError: the stream ended in the middle of a line. A command
            that was cut off must not be taken for a whole one; its bytes stay to be read.
          LimitExceededError: a line is longer than ``max_bytes``.
        """
        return Lines(self, _delimiter(delimiter), keep_ends, _positive("max_bytes", max_bytes))

    async def _next_lines(
        self, delimiter: bytes, keep_ends: bool, max_bytes: int
    ) -> tuple[bytes, Iterator[bytes]]:
        """Return the next line, and those that can be taken after it without waiting."""
        with self._reading:
            try:
                end = await self._find(delimiter, max_bytes)
            except IncompleteReadError:
                if self._buffer.size:
                    raise
                raise StopAsyncIteration from None
            batch = self._buffer.take_lines(delimiter, keep_ends, max_bytes)
            self._reads_since_pass += operator.length_hint(batch)
            for line in batch:
                return line, batch
            line = self._buffer.take(end)  # its end is in another chunk
            return line if keep_ends else line[: -len(delimiter)], batch

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Do the same as ``recv``, for ``trio.abc.ReceiveStream``: always a full checkpoint."""
        max_bytes = _positive("max_bytes", max_bytes)
        with self._reading:
            self._check_open()
            if self._buffer:
                await trio.lowlevel.checkpoint()
                self._check_open()
            else:
                await self._receive()
            return self._buffer.take_chunk(max_bytes)

    async def __anext__(self) -> bytes:
        chunk = await self.receive_some()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def _incomplete(self, expected: int | None) -> IncompleteReadError:
        entries = self._buffer.entries()
        return self._transport.note(
            IncompleteReadError._in_pieces(entries, self._buffer.size, expected)
        )

    async def _buffered_read(self) -> None:
        """Be the checkpoint of a read that need not wait, before it takes anything."""
        self._reads_since_pass += 1
        if self._reads_since_pass < READS_PER_PASS:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        self._reads_since_pass = 0
        await trio.lowlevel.checkpoint()
        self._check_open()

    async def _receive(self) -> bool:
        """Wait for one more chunk and add it to the buffer; False at the end of the stream."""
        chunk = await self._layer.receive()
        self._arrived(chunk)
        return bool(chunk)

    def _arrived(self, chunk: bytes) -> None:
        """Put what has arrived into the buffer: all of it that can be decrypted without waiting."""
        self._buffer.append(chunk)
        if self._tls is not None and chunk:
            for record in self._tls.receive_arrived():
                self._buffer.append(record)

    def _receive_nowait(self) -> bytes | None:
        """Return the next chunk if it has arrived, ``b""`` at the end; raise nothing."""
        if self._tls is not None:
            return self._tls.receive_nowait()
        try:
            return self._transport.receive_nowait()
        except (BlockingIOError, trio.BrokenResourceError):
            return None

    # ---- sending ----

    async def send(self, *buffers: Buffer) -> None:
        """Send all bytes of all buffers, in order, in as few system calls as possible.

        On a plain connection nothing is copied: do not change a buffer before it returns.

        Raises:
          trio.BrokenResourceError: the connection broke (also ``TLSError``). What the peer
            said before can still be read.
          TypeError: a buffer is not bytes; nothing was sent.

        Cancelled before the first byte went out it changes nothing. Later, an unknown part is
        sent and sending is over (``BrokenResourceError``); under TLS reading is as well.
        Source: Pluto's ``socket.send``.
        """
        views: tuple[bytes | memoryview, ...]
        if len(buffers) == 1 and type(buffers[0]) is bytes:
            views = (buffers[0],)
        else:
            views = tuple(map(_bytes_view, buffers))
        turn = self._sending
        if turn.held:
            turn.check()
        turn.held = True
        try:
            if turn.taken:
                await turn.take()
            else:
                turn.taken = True
            try:
                await self._layer.send(views)
            except trio.BrokenResourceError:
                self._look_for_an_alert()
                raise
            finally:
                if turn.queue:
                    turn.give()
                else:
                    turn.taken = False
        finally:
            turn.held = False

    async def send_all(self, data: Buffer) -> None:
        """Do the same as ``send(data)``, as ``trio.abc.SendStream`` has it."""
        await self.send(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until a send might start at once. See ``trio.abc.SendStream``."""
        async with self._sending:
            self._check_open()
            await self._layer.wait_writable()

    async def send_file(
        self,
        file: BinaryIO | io.IOBase,
        offset: int = 0,
        count: int | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Send a file, or a part of it.

        A regular file on a plain connection goes from the kernel to the kernel (``os.sendfile``);
        elsewhere it is read by offset in worker threads. Both send the same bytes, whoever else
        reads or moves in the file, or closes it. A pipe, a terminal or a socket is read when
        something has come. Any other file object is asked to seek and to read in one step: several
        sends may share it, but nobody else may use it meanwhile.

        Args:
          file: a binary file object, open for reading (also one of ``trio.open_file``). Its
            position does not matter, and may be another one afterwards.
          offset: where to start, in bytes.
          count: how many bytes to send; ``None`` for all. All is what a regular file or an
            ``io.BytesIO`` holds at the call, and what comes until the end of anything else.
          progress: called with the number of bytes sent so far, after each piece.

        Returns: the number of bytes sent. Less than a regular file had, if it has shrunk meanwhile.

        Raises:
          EOFError: the file ended before ``count`` bytes; the text says how many were sent. They
            arrive, but under TLS no ``close_notify`` will follow them: it would vouch for the rest.
          trio.BrokenResourceError: the connection broke; the text says how many bytes were sent
            (where they are read in worker threads: in whole pieces of 256 KiB).
          OSError: the file cannot be read; if a part of it was sent, sending is over.
          ValueError, TypeError: it is not a binary file that can be read, or a number is negative.

        Cancellation as in ``send``. What was taken from a pipe counts as sent; nothing is taken
        before there is room to send it. A silent pipe can be given up at any time. A ``read`` of a
        file object of the program's own (``gzip.GzipFile``, too) runs in a thread to its end.

        Where SIGPIPE has its default action, ``os.sendfile`` is not used: a peer that leaves would
        end the process.
        """
        file = getattr(file, "wrapped", file)  # what trio.open_file returns
        if isinstance(file, io.TextIOBase) or not hasattr(file, "read"):
            raise TypeError(f"send_file needs a binary file object, not {type(file).__name__}")
        if not getattr(file, "readable", lambda: True)():
            raise ValueError("send_file needs a file that is open for reading")
        offset = operator.index(offset)
        for number in (offset, operator.index(count or 0)):
            if not 0 <= number < 2**63:
                raise ValueError("offset and count must be 0 or more, and less than 2**63")
        if progress is not None and not callable(progress):
            raise TypeError(f"progress is a function, not {quoted(progress)}")
        self._check_open()
        sent = 0

        def on_sent(size: int) -> None:
            nonlocal sent
            sent += size
            if progress is not None:
                progress(sent)

        with self._sending:
            # At the call: while we wait, the number of the descriptor may become another file's.
            source = open_source(file)
            try:
                await source.begin()
                await self._sending.take()
                try:
                    self._check_open()
                    with trio.CancelScope() as scope:
                        self._sending_file = scope
                        await send_file(source, self._transport, self._tls, offset, count, on_sent)
                finally:
                    self._sending_file = None
                    self._sending.give()
                if scope.cancelled_caught:
                    self._check_open()
            except trio.BrokenResourceError as exc:
                raise self._transport.note(self._file_failure(exc, sent)) from exc
            finally:
                await source.close()
        if count is not None and sent < count:
            raise EOFError(f"the file ended after {sent} of {count} bytes, which were sent")
        return sent

    def _file_failure(self, exc: trio.BrokenResourceError, sent: int) -> trio.BrokenResourceError:
        try:
            self._look_for_an_alert()
        except TLSError as alert:
            exc = alert
        text = f"{exc}, after {sent} bytes of the file"
        if isinstance(exc, TLSError):
            return TLSError(text, reason=exc.reason, verify_code=exc.verify_code)
        return trio.BrokenResourceError(text)

    async def send_eof(self) -> None:
        """End the sending half; reading goes on. Once more changes nothing.

        Raises:
          NotImplementedError: under TLS, where ``trio.SSLStream`` has no half-closed state.
          trio.BrokenResourceError: the connection broke.
        """
        async with self._sending:
            self._check_open()
            if self._tls is not None:
                raise NotImplementedError("there is no half-closed state under TLS")
            await self._transport.send_eof()

    async def _send(self, buffers: Sequence[bytes | memoryview]) -> None:
        try:
            await self._layer.send(buffers)
        except trio.BrokenResourceError:
            self._look_for_an_alert()
            raise

    def _look_for_an_alert(self) -> None:
        """Raise the peer's alert, if that is why it does not take what we send.

        In TLS 1.3 a server refuses a client's certificate after the client's handshake is done.
        What was said before the alert goes into the buffer; nothing is lost.
        """
        tls = self._tls
        if tls is None or self._reading.held:
            return  # the task that is reading will get it
        for _ in range(_MOST_CHUNKS_BEFORE_AN_ALERT):
            if len(self._buffer) >= RECEIVE_SIZE:
                break
            chunk = tls.receive_nowait()
            if not chunk:
                break
            self._buffer.append(chunk)
        if isinstance(tls.failure, TLSError):
            raise tls.failure from None

    async def _send_for_broadcast(self, data: bytes, generation: int, timeout: float) -> bool:
        """Send for a server's broadcast: after what the connection's own task is sending.

        Waits at most ``timeout`` seconds for its turn, and then sends nothing: the connection's own
        task may wait for something else than the peer. Once it has its turn, a peer that does not
        take the data within ``timeout`` seconds is aborted (``trio.TooSlowError``).

        The data is meant for what the connection was at ``generation``. If ``starttls`` or
        ``stoptls`` has begun since then, nothing is sent and nothing is aborted.

        Returns: whether all of it was sent.
        """
        if generation != self._generation:
            return False
        turn = self._sending
        with trio.move_on_after(timeout) as waiting:
            await turn.take()
        if waiting.cancelled_caught:
            return False
        try:
            if generation != self._generation:
                return False
            with trio.move_on_after(timeout):
                await self._send([memoryview(data)])
                return True
            # If an upgrade waits behind us, it goes on, or fails because our send was cut short.
            if generation != self._generation:
                return False
            self.abort()
            raise trio.TooSlowError
        finally:
            turn.give()

    # ---- TLS ----

    async def starttls(
        self,
        tls: TLSArgument,
        *,
        server_hostname: str | None = None,
        https_compatible: bool = False,
        handshake_timeout: float | None = 60,
    ) -> TLSInfo:
        """Turn the connection to TLS.

        Args:
          tls: the role to take. A server's name or a ``ClientTLS`` for the client's, one
            or more ``Certificate`` or a ``ServerTLS`` for the server's, or an ``ssl.SSLContext``.
            It is the TLS role, and need not be the side (RFC 4217, section 7).
          server_hostname: the name to verify; by default the one in ``tls``, then the host
            given to ``connect``.
          https_compatible: take the end of the connection for the end of the stream, and send no
            ``close_notify``. For protocols that say themselves where a message ends.
          handshake_timeout: seconds until a peer that does not go on is given up; ``None``: never.

        Returns: what was agreed on (also ``Socket.tls``).

        Raises:
          TLSError: the handshake failed or took too long. The socket is closed, the peer was sent
            the alert that says why, and nothing was or will be sent in the clear.
          RuntimeError: the connection is TLS already. Nothing has happened.
          TypeError, ValueError: an argument cannot be used. Nothing has happened.
          trio.BusyResourceError: another task is using the connection. Nothing has happened.

        Cancelled, the socket is closed, hard.

        **Bytes received but not consumed belong to TLS**: what was pushed back, peeked at or read
        too far is taken as the peer's part of the handshake. So it fails on clear text that
        somebody slipped in behind the command that announced TLS (CVE-2011-0411), and it
        works after a look at the first bytes of a ClientHello.

        Source: Pluto's ``socket.starttls``.
        """
        timeout = _timeout("handshake_timeout", handshake_timeout)
        check_flag("https_compatible", https_compatible)
        self._check_open()
        self._check_idle()
        if self._tls is not None:
            raise RuntimeError("this connection is using TLS already")
        role = resolve(
            tls,
            server_hostname=server_hostname,
            connected_host=self._connected_host,
            side=self._side,
        )
        deadline = trio.current_time() + timeout
        if not await self._take_both_directions(deadline):
            raise self._transport.note(
                TLSError(
                    f"TLS handshake with {role.named(self.getpeer())} failed: "
                    "a broadcast was in its way"
                )
            )
        try:
            self._transport.check_sending()
            connection = TLSConnection(
                self._transport,
                role,
                early=self._buffer.peek_all(),
                https_compatible=https_compatible,
                peer=self.getpeer(),
            )
            self._buffer = ReceiveBuffer()  # what was in it is TLS's now
            self._tls = self._layer = connection
            self._tls_info = await self._or_close(connection.handshake(deadline, timeout))
            for record in connection.receive_arrived():  # data that came with the handshake
                self._buffer.append(record)
            return self._tls_info
        finally:
            self._give_both_directions()

    async def stoptls(self) -> None:
        """End TLS cleanly and go on in the clear.

        Sends ``close_notify`` and waits for the peer's, so the peer must do the same.

        Raises:
          RuntimeError: the connection is not TLS, or decrypted bytes are waiting to be read:
            they must never be taken for clear ones. Nothing has happened.
          TLSError: the peer was still sending encrypted data, or ended without
            ``close_notify``; or a file that was too short was sent before. The socket is closed.
          trio.BusyResourceError: another task is using the connection. Nothing has happened.

        Cancelled, the socket is closed, hard.
        """
        self._check_open()
        self._check_idle()
        if self._tls is None:
            raise RuntimeError("this connection is not using TLS")
        await self._take_both_directions()
        try:
            if self._tls.can_decrypt and not self._buffer:
                await self._or_close(self._decrypt_all_arrived(self._tls))
            if self._buffer:
                # A peer that does not wait for the answer causes this alone.
                raise self._transport.note(_UnreadError(_UNREAD))
            trailing = await self._or_close(self._tls.stop())
            self._tls = self._tls_info = None
            self._layer = self._transport
            self._buffer.append(trailing)
        finally:
            self._give_both_directions()

    async def _decrypt_all_arrived(self, tls: TLSConnection) -> None:
        """Decrypt what was read from the kernel until there is data, and let other tasks run."""
        while True:
            for record in tls.receive_arrived():
                self._buffer.append(record)
            if self._buffer or not tls.can_decrypt:
                return
            await trio.lowlevel.checkpoint()

    def _check_idle(self) -> None:
        self._reading.check()
        self._sending.check()

    async def _take_both_directions(self, deadline: float = math.inf) -> bool:
        """Keep every other task off the connection while what it carries is changing.

        That waits for nothing but a broadcast that has begun; False if it took too long. Then, and
        cancelled while waiting, the socket is closed: the peer expects something else to come.
        """
        self._reading.held = self._sending.held = True
        self._changing = True  # broadcasts that have not begun yet are left out
        self._generation += 1
        self._buffer.settle()  # no iterator gives out lines that it has split already
        if not self._sending.taken:
            self._sending.taken = True
            return True
        try:
            with trio.CancelScope(deadline=deadline):
                try:
                    await self._sending.take()
                except trio.Cancelled:
                    self._close_hard()
                    raise
                if self._transport.closing:
                    self._sending.give()
                    self._check_open()
                return True
        except BaseException:
            self._let_both_directions_go()
            raise
        self._let_both_directions_go()
        return False

    def _give_both_directions(self) -> None:
        self._sending.give()
        self._let_both_directions_go()

    def _let_both_directions_go(self) -> None:
        self._reading.held = self._sending.held = self._changing = False

    async def _or_close(self, changing: Awaitable[ResultT]) -> ResultT:
        """Wait for what changes the connection, and close that if it fails."""
        try:
            return await changing
        except trio.BrokenResourceError:
            await self._close(self._tls)
            raise
        except trio.ClosedResourceError:  # by another task, in the meantime
            raise
        except BaseException:
            self._close_hard()
            raise

    # ---- closing ----

    async def close(self) -> None:
        """Close gracefully, and lose nothing that was sent, as far as 2 seconds and 64 MiB go.

        The same as ``aclose``. Sends ``close_notify`` under TLS, then FIN, and reads (and drops)
        what the peer still sends for at most 2 seconds and 64 MiB, because closing with unread
        input would make the kernel destroy what is on its way. Where nothing is unread and
        everything is acknowledged, it closes at once. What the peer has not taken after that is
        the kernel's: it goes on trying, but a byte more from the peer makes it give up.

        The connection ends also for others that hold the descriptor, such as a forked child.
        ``SO_LINGER`` changes nothing.

        Leaving ``async with sock`` by an exception closes it in the same way, but without
        ``close_notify``: that would say that all was sent.

        Tasks that wait on the socket are woken with ``trio.ClosedResourceError``. Closing again
        changes nothing. Cancelled, it closes immediately, and raises ``Cancelled``. Source: Pluto's
        ``socket.close``.
        """
        await self._close_gracefully(whole=True)

    async def _close_gracefully(self, *, whole: bool) -> None:
        """Close; under TLS, say with ``close_notify`` that all was sent only if it is ``whole``."""
        if self._transport.closing:  # done, or another task is at it
            try:
                await trio.lowlevel.checkpoint()
                if self.fileno() >= 0:
                    if self._closed is None:
                        self._closed = trio.Event()
                    await self._closed.wait()
            except BaseException:
                self._close_hard()
                raise
            return
        await self._close(self._tls, whole=whole)

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._close_gracefully(whole=exc_type is None)

    async def aclose(self) -> None:
        """Close gracefully. The same as ``close``."""
        await self.close()

    def abort(self) -> None:
        """Close immediately, without waiting: the peer sees a reset.

        Also if others hold the descriptor, such as a forked child. (Where the system cannot do
        that, and over a Unix path, the peer sees an end.) What was sent and has not reached the
        peer may be lost. Tasks that wait on the socket are woken with
        ``trio.ClosedResourceError``. While no task uses it, this may be called outside Trio.
        """
        self._aborted = True
        if not self._is_another_process():
            self._transport.abort()
        else:
            self._transport.release()
        self._has_closed()

    async def _close(self, tls: TLSConnection | None, *, whole: bool = True) -> None:
        if self._is_another_process():
            self._close_hard()
            await trio.lowlevel.checkpoint()
            return
        self._transport.wake()
        self._let_go()
        try:
            # Those who were woken end: what they leave unsent decides what is due.
            await trio.lowlevel.checkpoint()
            due = b""
            if tls is not None and (whole or tls.failure is not None):  # an alert may be said
                due = tls.last_bytes()
        except BaseException:
            self._close_hard()
            raise
        try:
            await self._transport.close(due)
        finally:
            self._has_closed()

    def _close_at_once(self) -> bool:
        """Close gracefully if that need not wait for anything; False, and nothing done, if it must.

        Under TLS it always must: the peer has to get ``close_notify``.
        """
        if self._transport.closing:
            return self.fileno() < 0
        if self._tls is not None or self._reading.held or self._sending.taken:
            return False
        if not self._transport.close_at_once():
            return False
        self._has_closed()
        return True

    def _close_hard(self) -> None:
        """Do what a cancelled close does: like ``abort``, but leave what was sent to the kernel."""
        if not self._is_another_process():
            self._transport.close_hard()
        else:
            self._transport.release()
        self._has_closed()

    def _is_another_process(self) -> bool:
        """Whether the connection is another process's, which has the keys of its TLS.

        Then closing gives up our descriptor and leaves the connection alone.
        """
        return self._tls is not None and self._tls.forked

    def _let_go(self) -> None:
        """Let every read and send from now on meet the transport, which is closed."""
        self._layer = self._transport
        self._buffer.settle()  # ends the batches of lines
        self._reading.closed = self._sending.closed = True
        if self._sending_file is not None:
            self._sending_file.cancel()

    def _has_closed(self) -> None:
        self._let_go()
        if self._closed is not None:
            self._closed.set()

    def _is_own_failure(self, exc: BaseException) -> bool:
        """Whether an error is about this very connection: it broke, ended early or was aborted."""
        if type(exc) is trio.ClosedResourceError:  # isinstance would ask a class of the program's
            return self._aborted
        return self._transport.has_failed_by(exc)

    def _check_open(self) -> None:
        if self._transport.closing:
            raise trio.ClosedResourceError("this socket was already closed")

    # ---- what is known ----

    @property
    def stream(self) -> trio.SocketStream:
        """The ``trio.SocketStream`` below. Reading it or writing to it breaks the Socket."""
        return self._transport.stream

    @property
    def socket(self) -> trio.socket.SocketType:
        """The socket below, as ``trio.SocketStream.socket``: for libraries that ask for addresses.

        Reading it or writing to it breaks the Socket.
        """
        return self._transport.stream.socket

    @property
    def tls(self) -> TLSInfo | None:
        """What TLS agreed on, or ``None`` while the connection is in the clear."""
        return self._tls_info

    def getpeer(self) -> Address:
        """Return the other end's address, also after ``close``. Source: Pluto's ``getpeer``.

        A Unix socket's is ``(path, 0)``. The peer chooses its path, which may look like an IP
        address; the port, never 0 for TCP, tells them apart.
        """
        return address_from_sockaddr(self.stream.socket.family, self._peer)

    def getlocal(self) -> Address:
        """Return our end's address, also after ``close``."""
        return address_from_sockaddr(self.stream.socket.family, self._local)

    def getside(self) -> Side:
        """Return ``"client"`` or ``"server"``. Source: Pluto's ``socket.getside``."""
        return self._side

    def istls(self) -> bool:
        """Return whether the connection is encrypted. Source: Pluto's ``socket.istls``."""
        return self._tls_info is not None

    def isopen(self) -> bool:
        """Return whether the connection is open, without waiting and without consuming anything.

        False once it is closed here or broken, or when the peer has ended its side and nothing is
        left to read. Under TLS a True may be out of date until the next read. Source: Pluto's
        ``socket.isopen``.
        """
        if self._transport.closing:
            return False
        if self._buffer:
            return True
        return not self._layer.at_end()

    def info(self) -> ConnectionInfo:
        """Return all that is known about the connection."""
        return ConnectionInfo(
            local=self.getlocal(),
            peer=self.getpeer(),
            side=self._side,
            isopen=self.isopen(),
            istls=self.istls(),
            tls=self._tls_info,
            buffered=len(self._buffer),
        )

    def fileno(self) -> int:
        """Return the file descriptor, -1 once it is closed."""
        return self.stream.socket.fileno()

    @overload
    def setsockopt(self, level: int, option: int, value: int | Buffer) -> None: ...

    @overload
    def setsockopt(self, level: int, option: int, value: None, length: int) -> None: ...

    def setsockopt(
        self, level: int, option: int, value: int | Buffer | None, length: int | None = None
    ) -> None:
        """Set an option of the socket; see ``socket.socket.setsockopt``."""
        self._check_open()
        if value is None and length is not None:
            self.stream.setsockopt(level, option, None, length)
        elif value is not None and length is None:
            self.stream.setsockopt(level, option, value)
        else:
            raise TypeError("setsockopt takes a value, or None and a length")

    @overload
    def getsockopt(self, level: int, option: int) -> int: ...

    @overload
    def getsockopt(self, level: int, option: int, buffersize: int) -> bytes: ...

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Return an option of the socket; see ``socket.socket.getsockopt``."""
        self._check_open()
        return self.stream.getsockopt(level, option, buffersize)


class Lines(Uncopied):
    """The async iterator that ``Socket.lines`` returns.

    A class and not an async generator: those are not closed when their loop is left early.

    Invariant: ``_batch`` gives lines that are still in the socket's buffer, and is empty as soon as
    anything else is done to that. So a line is taken when it is returned, and not before. Each
    step asks first whether another task is reading, also for a line that is split already:
    while ``starttls`` waits, what is in the buffer belongs to TLS.
    """

    __slots__ = ("_batch", "_delimiter", "_keep_ends", "_max_bytes", "_reading", "_sock")

    def __init__(self, sock: Socket, delimiter: bytes, keep_ends: bool, max_bytes: int) -> None:
        self._sock = sock
        self._reading = sock._reading
        self._delimiter = delimiter
        self._keep_ends = keep_ends
        self._max_bytes = max_bytes
        self._batch: Iterator[bytes] = iter(())

    def __aiter__(self) -> Lines:
        return self

    async def __anext__(self) -> bytes:
        if self._reading.held:  # the hot path (row lines); the test is 3 % of it
            self._reading.check()
        for line in self._batch:
            return line
        line, self._batch = await self._sock._next_lines(
            self._delimiter, self._keep_ends, self._max_bytes
        )
        return line


def _bytes_view(data: object) -> memoryview:
    """Return a flat view of bytes-like data; TypeError for anything else, such as str."""
    if not isinstance(data, (bytes, bytearray, memoryview)):
        raise TypeError(f"bytes are needed, not {type(data).__name__}")
    view = memoryview(data)
    return view if view.format == "B" and view.ndim == 1 and view.contiguous else _flat(view)


def _delimiter(data: Buffer) -> bytes:
    delimiter = bytes(_bytes_view(data))
    if not delimiter:
        raise ValueError("a delimiter has at least one byte")
    return delimiter


def _flat(view: memoryview) -> memoryview:
    return view.cast("B") if view.c_contiguous else memoryview(bytes(view))


@overload
def _positive(name: str, value: int) -> int: ...


@overload
def _positive(name: str, value: int | None) -> int | None: ...


def _positive(name: str, value: int | None) -> int | None:
    if value is None:
        return None
    value = operator.index(value)
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, not {quoted(value)}")
    return value


def _timeout(name: str, seconds: float | None) -> float:
    if seconds is None:
        return math.inf
    if isinstance(seconds, bool) or not isinstance(seconds, (int, float)):
        raise TypeError(f"{name} is a number of seconds or None, not {quoted(seconds)}")
    if not seconds >= 0:
        raise ValueError(f"{name} must be 0 or more, not {quoted(seconds)}")
    try:
        return float(seconds)
    except OverflowError:
        raise ValueError(f"{name} is too long: {quoted(seconds)}") from None
