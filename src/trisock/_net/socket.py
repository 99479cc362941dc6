"""Socket: the public interface of one connection.

The read methods are in ``receiving`` and ``message_receiving``, and the send methods are in
``sending``. The layers of a connection (TLS and the transport), and the changes of these layers,
are in ``connection``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, cast, overload

import trio

from .._address import Address
from .._arguments import Buffer, check_bool, quoted, seconds_or_inf
from .._errors import TLSError
from .._not_copyable import NotCopyable
from .._tls.info import TLSInfo
from .._tls.roles import TLSArgument, resolve_role
from .connection import Connection, Side
from .idle import IdleBlock
from .message_receiving import MessageReceiver
from .proxy_header import ProxyHeader
from .sending import Sender
from .syscalls import set_option

if TYPE_CHECKING:
    from .._server.server import Server


@dataclass(frozen=True)
class ConnectionInfo:
    """A snapshot of a connection's properties.

    Attributes:
      local: our own address.
      peer: the peer's address.
      side: our side of the connection, ``"client"`` or ``"server"``.
      isopen: the result of ``Socket.isopen()``.
      cansend: whether a send may still succeed. It is False once this side has closed the
        connection or called ``send_eof``, once the connection is broken, and after a send that was
        cut short. The peer may end the connection at any time, so ``True`` may already be out of
        date.
      istls: the result of ``Socket.istls()``.
      tls: the value of ``Socket.tls``.
      buffered: the number of unread bytes in the receive buffer, including pushed-back ones.
      proxy_header: the value of ``Socket.proxy_header``.
    """

    local: Address
    peer: Address
    side: Side
    isopen: bool
    cansend: bool
    istls: bool
    tls: TLSInfo | None
    buffered: int
    proxy_header: ProxyHeader | None = None


class Socket(NotCopyable, MessageReceiver, Sender, trio.abc.HalfCloseableStream):
    """A connection that can start TLS, and can later return to plain text.

    ``connect``, ``Listener`` and ``Server`` create Sockets. The constructor wraps a
    ``trio.SocketStream``, which only the Socket may use afterwards. The stream keeps its socket
    options. Unlike ``connect`` and ``Listener``, the constructor does not turn TCP keepalive on.

    Args:
      stream: the connection.
      side: our side of the connection, ``"client"`` or ``"server"``.

    Raises:
      TypeError: ``stream`` is not a ``trio.SocketStream``.
      ValueError: ``side`` is neither ``"client"`` nor ``"server"``.
      OSError: the connection is already dead (``ENOTCONN``).

    One task may read while another one sends. A second reader or sender gets
    ``trio.BusyResourceError``. Every async method is a cancel point. A cancelled read loses no
    bytes. For the effect of a cancelled ``send``, ``starttls`` or ``close``, see that method.

    After ``close``, every method raises ``trio.ClosedResourceError``, except ``close``, ``abort``
    and the methods that only return information (addresses, ``tls``, ``isopen``, ``info``).

    A Socket cannot be copied or pickled (``TypeError``).
    """

    __slots__ = ()

    def __init__(self, stream: trio.SocketStream, *, side: Side = "client") -> None:
        if not isinstance(stream, trio.SocketStream):
            raise TypeError(f"a Socket needs a trio.SocketStream, not {quoted(stream)}")
        if side not in ("client", "server"):
            raise ValueError(f"side must be 'client' or 'server', not {quoted(side)}")
        self._set_up(Connection(stream, side))

    def __repr__(self) -> str:
        connection = self._connection
        if connection.transport.closing:
            state = "closed"
        else:
            state = "open" if connection.is_open() else "ended"
        layer = connection.tls_info.version if connection.tls_info else "plain"
        ends = f"{connection.local} <-> {connection.peer}"
        return f"<trisock.Socket {connection.side} {ends} {layer} {state}>"

    # ---- TLS ----

    async def starttls(
        self,
        tls: TLSArgument,
        *,
        server_hostname: str | None = None,
        https_compatible: bool = False,
        handshake_timeout: float | None = 60,
    ) -> TLSInfo:
        """Start TLS on the connection.

        Args:
          tls: the TLS role. To be the TLS client, pass a server name or a ``ClientTLS``. To be the
            TLS server, pass one or more ``Certificate`` objects or a ``ServerTLS``. An
            ``ssl.SSLContext`` is accepted for both roles. The TLS role may differ from the side of
            the connection (RFC 4217, section 7).
          server_hostname: the host name that the server's certificate must match. The default is
            the name in ``tls`` or, if there is none, the host that was passed to ``connect``.
          https_compatible: whether to accept EOF without ``close_notify`` as the end of the stream,
            and to send no ``close_notify``. This is for protocols that mark the end of a message
            themselves.
          handshake_timeout: how many seconds the handshake may take, or ``None`` for no limit.

        Returns: the negotiated parameters (also in ``Socket.tls``).

        Raises:
          TLSError: the handshake failed or timed out. The socket is closed. If TLS has an alert for
            the failure, that alert was sent to the peer. ``starttls`` never falls back to plain
            text.
          trio.BrokenResourceError: an earlier send was cut short. The socket is closed.
          trio.ClosedResourceError: ``send_eof`` was called. Nothing has changed.
          RuntimeError: the connection already uses TLS. Nothing has changed.
          TypeError, ValueError: an argument is invalid. Nothing has changed.
          trio.BusyResourceError: another task is using the connection. Nothing has changed.

        If cancelled, the socket is closed immediately.

        **Unread bytes become part of TLS.** Unread bytes (buffered, peeked at or pushed back)
        become the start of the peer's handshake. So plain text that an attacker injects after the
        STARTTLS command makes the handshake fail (CVE-2011-0411). You can also peek at a
        ClientHello before you call ``starttls``.

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
        try:
            return await connection.starttls(
                role, https_compatible=https_compatible, timeout=timeout
            )
        except TLSError:
            if connection.server_state is not None:
                connection.server_state.counts["failed_handshakes"] += 1
            raise

    async def stoptls(self) -> None:
        """End TLS cleanly and continue in plain text.

        Sends ``close_notify`` and waits for the peer's ``close_notify``. So the peer must also end
        TLS.

        Raises:
          RuntimeError: the connection does not use TLS, or decrypted bytes are unread. (Decrypted
            bytes must never be mistaken for plain text.) Nothing has changed.
          TLSError: the peer was still sending encrypted data, or ended the connection without
            ``close_notify``. Also raised if an earlier send was cut short, or if an earlier
            ``send_file`` sent only part of its file. The socket is closed.
          trio.BusyResourceError: another task is using the connection. Nothing has changed.

        If cancelled, the socket is closed immediately.
        """
        await self._connection.stoptls()

    # ---- serving ----

    @property
    def server(self) -> Server | None:
        """The ``Server`` that accepted this connection, or ``None``."""
        state = self._connection.server_state
        return None if state is None else cast("Server | None", state.server())

    def idle(self, timeout: float | None = None) -> IdleBlock:
        """Return a context manager to enter while a handler waits for the next request.

        A stopping server does not have to wait for a handler in this block::

            while True:
                with sock.idle(timeout=300):
                    line = await sock.recv_line()
                await do(line)

        When the server begins to stop, a read of this socket that is waiting in the block checks
        once more whether data has arrived. If not, the read raises ``ServerClosing``, which
        ``bind`` treats as a normal end of the handler. In a block that is entered later, the first
        read that has to wait raises ``ServerClosing``. Only reads of this socket are interrupted.

        A request that has begun is not interrupted: while data is unread, or once a read in the
        block has received data, reads continue until the server's grace ends. Under TLS, only
        decrypted bytes count. A new connection that has sent nothing has 5 seconds for its first
        request, but at most until shortly before the grace ends. ``lines(idle=True)`` and
        ``frames(idle=True)`` apply all of this to each of their waits.

        Keep all reads of one request in the same block (for example, SMTP's ``DATA`` and its text).
        The timeout then applies to each read, and a stop does not interrupt the request.

        Without a server, only the timeout has an effect. So a handler can be tested on its own.

        Args:
          timeout: how many seconds a read may wait for a byte from the peer, or ``None`` for no
            limit. In nested blocks, the shortest timeout applies.

        Raises in the reads of the block:
          ServerClosing: the server is stopping. No data is lost, and the socket is still open.
          IdleTimeoutError: the peer sent nothing for ``timeout`` seconds. No data is lost.

        Raises ``ValueError`` or ``TypeError`` if the timeout is invalid.
        """
        return IdleBlock(self._connection, seconds_or_inf("timeout", timeout))

    # ---- closing ----

    async def close(self) -> None:
        """Close gracefully: within limits (2 seconds, 64 MiB), data that was sent is not lost.

        ``aclose`` does the same. Under TLS, ``close`` first sends ``close_notify``. Then it sends
        FIN. It reads and discards at most 64 MiB of the peer's data, for at most 2 seconds: if a
        socket is closed while input is unread, the kernel destroys data in flight. If no input is
        unread and the peer has acknowledged all data, ``close`` does not wait. After the close, the
        kernel still sends queued data, but discards that data as soon as the peer sends another
        byte.

        The connection also ends for other processes that hold the descriptor, such as a forked
        child. ``SO_LINGER`` has no effect.

        If ``async with sock`` exits with an exception, the socket closes in the same way but sends
        no ``close_notify``, because ``close_notify`` would claim that the data is complete.

        Tasks that wait on the socket are woken with ``trio.ClosedResourceError``. A second call
        changes nothing. If cancelled, ``close`` closes immediately and raises ``Cancelled``.
        Source: Pluto's ``socket.close``.
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
        """Close gracefully. This does the same as ``close``, also if cancelled."""
        await self.close()

    def abort(self) -> None:
        """Close immediately, without waiting: the peer sees a reset.

        The connection is also reset for other processes that hold the descriptor, such as a forked
        child. On a Unix socket, and on a system that cannot reset a shared connection, the peer
        sees EOF instead of a reset. Data that has not reached the peer yet may be lost. Tasks that
        wait on the socket are woken with ``trio.ClosedResourceError``. While no task uses the
        socket, ``abort`` may be called outside Trio.
        """
        self._connection.abort()

    # ---- information ----

    @property
    def stream(self) -> trio.SocketStream:
        """The underlying ``trio.SocketStream``.

        Reading from it or writing to it breaks the Socket.
        """
        return self._connection.transport.stream

    @property
    def socket(self) -> trio.socket.SocketType:
        """The underlying ``trio.socket.SocketType``, for libraries that ask for addresses.

        Reading from it or writing to it breaks the Socket.
        """
        return self._connection.socket

    @property
    def connected_host(self) -> str | None:
        """The host that was passed to ``connect``, or ``None`` if there was none."""
        return self._connection.connected_host

    @property
    def tls(self) -> TLSInfo | None:
        """The negotiated TLS parameters, or ``None`` while the connection is plain text."""
        return self._connection.tls_info

    @property
    def proxy_header(self) -> ProxyHeader | None:
        """The PROXY header that was received, or ``None``. See ``bind(trusted_proxies=...)``."""
        return self._connection.proxy_header

    def getpeer(self) -> Address:
        """Return the peer's address, even after ``close``. Source: Pluto's ``socket.getpeer``.

        Behind a trusted proxy, this is the client's address (the source in the PROXY header).

        The address of a Unix socket is ``(path, 0)``. The peer chooses this path, and the path may
        look like an IP address. Port 0 identifies a Unix socket, because a TCP port is never 0.
        """
        return self._connection.peer

    def getlocal(self) -> Address:
        """Return our own address, even after ``close``.

        Behind a trusted proxy, this is the address to which the client has connected (the
        destination in the PROXY header).
        """
        return self._connection.local

    def getside(self) -> Side:
        """Return our side, ``"client"`` or ``"server"``. Source: Pluto's ``socket.getside``."""
        return self._connection.side

    def istls(self) -> bool:
        """Return whether the connection is encrypted. Source: Pluto's ``socket.istls``."""
        return self._connection.tls_info is not None

    def isopen(self) -> bool:
        """Return whether the connection is open. Does not wait or consume anything.

        Returns False if the socket is closed or broken, or if the stream has ended and no data is
        unread. Under TLS, the result may still be True after the stream has ended, until the next
        read. Source: Pluto's ``socket.isopen``.
        """
        return self._connection.is_open()

    def info(self) -> ConnectionInfo:
        """Return a snapshot of the connection's properties."""
        return ConnectionInfo(
            local=self.getlocal(),
            peer=self.getpeer(),
            side=self._connection.side,
            isopen=self.isopen(),
            cansend=self._connection.can_send(),
            istls=self.istls(),
            tls=self._connection.tls_info,
            buffered=len(self._connection.buffer),
            proxy_header=self._connection.proxy_header,
        )

    def fileno(self) -> int:
        """Return the file descriptor, or -1 once it is closed."""
        return self._connection.socket.fileno()

    @overload
    def setsockopt(self, level: int, option: int, value: int | Buffer) -> None: ...

    @overload
    def setsockopt(self, level: int, option: int, value: None, length: int) -> None: ...

    def setsockopt(
        self, level: int, option: int, value: int | Buffer | None, length: int | None = None
    ) -> None:
        """Set a socket option; see ``socket.socket.setsockopt``."""
        self._connection.check_open()
        set_option(self._connection.socket, level, option, value, length)

    @overload
    def getsockopt(self, level: int, option: int) -> int: ...

    @overload
    def getsockopt(self, level: int, option: int, buffersize: int) -> bytes: ...

    def getsockopt(self, level: int, option: int, buffersize: int = 0) -> int | bytes:
        """Return a socket option; see ``socket.socket.getsockopt``."""
        self._connection.check_open()
        return self._connection.socket.getsockopt(level, option, buffersize)


def new_socket(connection: Connection) -> Socket:
    """Return a Socket for a ``Connection`` that the library has created."""
    sock = object.__new__(Socket)
    sock._set_up(connection)
    return sock


def connection_of(sock: Socket) -> Connection:
    """Return the ``Connection`` of a Socket."""
    return sock._connection
