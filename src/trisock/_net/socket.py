"""Socket: what users see of one connection.

Reading is in ``receiving``, what a connection is and how it changes in ``connection``.
"""

from __future__ import annotations

import io
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import BinaryIO, overload

import trio

from .._address import Address
from .._arguments import Buffer, bytes_view, check_bool, quoted, seconds_or_inf
from .._errors import TLSError
from .._tls.info import TLSInfo
from .._tls.roles import TLSArgument, resolve_role
from .._uncopied import Uncopied
from .connection import Connection, Side
from .receiving import BufferedReceiver
from .send_file import open_source, send_file


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


class Socket(Uncopied, BufferedReceiver, trio.abc.HalfCloseableStream):
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

    __slots__ = ()

    def __init__(self, stream: trio.SocketStream, *, side: Side = "client") -> None:
        if not isinstance(stream, trio.SocketStream):
            raise TypeError(f"a Socket needs a trio.SocketStream, not {quoted(stream)}")
        if side not in ("client", "server"):
            raise ValueError(f"the side is 'client' or 'server', not {quoted(side)}")
        self._set_up(Connection(stream, side))

    def _set_up(self, connection: Connection) -> None:
        self._connection = connection
        self._reads_since_checkpoint = 0

    def __repr__(self) -> str:
        connection = self._connection
        if connection.transport.closing:
            state = "closed"
        else:
            state = "open" if connection.is_open() else "ended"
        layer = connection.tls_info.version if connection.tls_info else "clear"
        ends = f"{connection.local} <-> {connection.peer}"
        return f"<trisock.Socket {connection.side} {ends} {layer} {state}>"

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
            views = tuple(map(bytes_view, buffers))
        connection = self._connection
        lock = connection.sending
        if lock.in_use:
            lock.check()
        lock.in_use = True
        try:
            if lock.locked:
                await lock.acquire()
            else:
                lock.locked = True
            try:
                await connection.layer.send(views)
            except trio.BrokenResourceError:
                connection.raise_pending_alert()
                raise
            finally:
                if lock.waiters:
                    lock.release()
                else:
                    lock.locked = False
        finally:
            lock.in_use = False

    async def send_all(self, data: Buffer) -> None:
        """Do the same as ``send(data)``, as ``trio.abc.SendStream`` has it."""
        await self.send(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until a send might start at once. See ``trio.abc.SendStream``."""
        async with self._connection.sending:
            self._connection.check_open()
            await self._connection.layer.wait_writable()

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
        self._connection.check_open()
        sent = 0

        def on_sent(size: int) -> None:
            nonlocal sent
            sent += size
            if progress is not None:
                progress(sent)

        with self._connection.sending:
            # At the call: while we wait, the number of the descriptor may become another file's.
            source = open_source(file)
            try:
                await source.begin()
                await self._connection.sending.acquire()
                try:
                    self._connection.check_open()
                    with trio.CancelScope() as scope:
                        self._connection.sending_file = scope
                        await send_file(
                            source,
                            self._connection.transport,
                            self._connection.tls,
                            offset,
                            count,
                            on_sent,
                        )
                finally:
                    self._connection.sending_file = None
                    self._connection.sending.release()
                if scope.cancelled_caught:
                    self._connection.check_open()
            except trio.BrokenResourceError as exc:
                raise self._connection.transport.note(self._file_failure(exc, sent)) from exc
            finally:
                await source.close()
        if count is not None and sent < count:
            raise EOFError(f"the file ended after {sent} of {count} bytes, which were sent")
        return sent

    def _file_failure(self, exc: trio.BrokenResourceError, sent: int) -> trio.BrokenResourceError:
        try:
            self._connection.raise_pending_alert()
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
        async with self._connection.sending:
            self._connection.check_open()
            if self._connection.tls is not None:
                raise NotImplementedError("there is no half-closed state under TLS")
            await self._connection.transport.send_eof()

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
        timeout = seconds_or_inf("handshake_timeout", handshake_timeout)
        check_bool("https_compatible", https_compatible)
        connection = self._connection
        connection.check_open()
        connection.check_plain()
        role = resolve_role(
            tls,
            server_hostname=server_hostname,
            connected_host=connection.connected_host,
            side=connection.side,
        )
        return await connection.starttls(role, https_compatible=https_compatible, timeout=timeout)

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
        await self._connection.stoptls()

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
        await self._connection.close()

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc_value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._connection.close(complete=exc_type is None)

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
        self._connection.abort()

    # ---- what is known ----

    @property
    def stream(self) -> trio.SocketStream:
        """The ``trio.SocketStream`` below. Reading it or writing to it breaks the Socket."""
        return self._connection.transport.stream

    @property
    def socket(self) -> trio.socket.SocketType:
        """The socket below, as ``trio.SocketStream.socket``: for libraries that ask for addresses.

        Reading it or writing to it breaks the Socket.
        """
        return self._connection.transport.stream.socket

    @property
    def tls(self) -> TLSInfo | None:
        """What TLS agreed on, or ``None`` while the connection is in the clear."""
        return self._connection.tls_info

    def getpeer(self) -> Address:
        """Return the other end's address, also after ``close``. Source: Pluto's ``getpeer``.

        A Unix socket's is ``(path, 0)``. The peer chooses its path, which may look like an IP
        address; the port, never 0 for TCP, tells them apart.
        """
        return self._connection.peer

    def getlocal(self) -> Address:
        """Return our end's address, also after ``close``."""
        return self._connection.local

    def getside(self) -> Side:
        """Return ``"client"`` or ``"server"``. Source: Pluto's ``socket.getside``."""
        return self._connection.side

    def istls(self) -> bool:
        """Return whether the connection is encrypted. Source: Pluto's ``socket.istls``."""
        return self._connection.tls_info is not None

    def isopen(self) -> bool:
        """Return whether the connection is open, without waiting and without consuming anything.

        False once it is closed here or broken, or when the peer has ended its side and nothing is
        left to read. Under TLS a True may be out of date until the next read. Source: Pluto's
        ``socket.isopen``.
        """
        return self._connection.is_open()

    def info(self) -> ConnectionInfo:
        """Return all that is known about the connection."""
        return ConnectionInfo(
            local=self.getlocal(),
            peer=self.getpeer(),
            side=self._connection.side,
            isopen=self.isopen(),
            istls=self.istls(),
            tls=self._connection.tls_info,
            buffered=len(self._connection.buffer),
        )

    def fileno(self) -> int:
        """Return the file descriptor, -1 once it is closed."""
        return self._connection.fileno()

    @overload
    def setsockopt(self, level: int, option: int, value: int | Buffer) -> None: ...

    @overload
    def setsockopt(self, level: int, option: int, value: None, length: int) -> None: ...

    def setsockopt(
        self, level: int, option: int, value: int | Buffer | None, length: int | None = None
    ) -> None:
        """Set an option of the socket; see ``socket.socket.setsockopt``."""
        self._connection.check_open()
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
        self._connection.check_open()
        return self.stream.getsockopt(level, option, buffersize)


def new_socket(connection: Connection) -> Socket:
    """Return a Socket for a connection of the library's own making."""
    sock = object.__new__(Socket)
    sock._set_up(connection)
    return sock
