"""connect and connect_unix: open a client connection."""

from __future__ import annotations

import errno
import os
import socket
import ssl
from collections.abc import Sequence
from typing import Literal, overload

import trio

from . import _guard
from ._address import (
    check_port,
    format_host_port,
    format_unix_path,
    same_errno,
    to_ascii_host,
    with_message,
)
from ._arguments import check_bool, quoted, type_name
from ._net.connection import Connection
from ._net.keepalive import enable_keepalive
from ._net.proxy_header import ProxyHeader
from ._net.socket import Socket, new_socket
from ._net.syscalls import LINGER_AND_RESET
from ._net.unix_path import CANNOT_CONNECT, unix_path, unix_socket
from ._tls.roles import ClientTLS, TLSArgument, resolve_role
from .starttls import PROTOCOLS, upgrade
from .starttls.driver import check_protocol

# If the backlog of a Unix listener is full, a non-blocking connect fails with EAGAIN, and no event
# reports when there is room again. So retry: first after the minimum interval (seconds), then
# double the interval each time, up to the maximum.
_MIN_RETRY_INTERVAL = 0.001
_MAX_RETRY_INTERVAL = 0.1

# When a client connects to a local port where nothing listens, the kernel may choose the same port
# as the source port. The socket is then connected to itself, and ``connect`` retries. This is the
# maximum number of attempts. A self-connection is rare, unless the range of ephemeral ports is
# tiny.
_SELF_CONNECT_TRIES = 16

# If attempts fail for different reasons, the message lists at most this many reasons.
_MAX_ERRORS = 3


@overload
async def connect(
    host: str,
    port: int,
    *,
    tls: TLSArgument | Literal[True] | None = None,
    https_compatible: bool = False,
    local_address: str | None = None,
    proxy_header: ProxyHeader | None = None,
    starttls: str | None = None,
) -> Socket: ...


@overload
async def connect(
    host: str,
    port: int | None = None,
    *,
    tls: TLSArgument | Literal[True] | None = None,
    local_address: str | None = None,
    proxy_header: ProxyHeader | None = None,
    starttls: str,
) -> Socket: ...


async def connect(
    host: str,
    port: int | None = None,
    *,
    tls: TLSArgument | Literal[True] | None = None,
    https_compatible: bool = False,
    local_address: str | None = None,
    proxy_header: ProxyHeader | None = None,
    starttls: str | None = None,
) -> Socket:
    """Connect over TCP to a host name, an IPv4 address or an IPv6 address.

    If the name has several addresses, they are tried in order. Each attempt gets a head start of
    250 ms over the next (happy eyeballs, RFC 8305). The first attempt that succeeds is used.

    Args:
      host: a name, which may be internationalized, or an address.
      port: 0 to 65535. With ``starttls``, the default is the protocol's first port in
        ``PROTOCOLS``.
      tls: ``True`` starts TLS immediately: the server's certificate must match ``host`` and chain
        to the system's trust store. ``None`` means plain text. Any other value is passed to
        ``Socket.starttls``, and must be for a TLS client.
      https_compatible: as in ``Socket.starttls``. ``True`` is allowed only with ``tls``.
      local_address: the local address to connect from.
      proxy_header: a PROXY header, which is sent first, before TLS. The server must expect the
        header.
      starttls: a protocol of ``trisock.starttls.PROTOCOLS``, such as ``"imap"``. The connection
        begins in plain text, and upgrades to TLS by the protocol's rules
        (``trisock.starttls.upgrade``). ``tls=None`` then means the same as ``tls=True``. The
        negotiation and the handshake may take 60 seconds in total. There is no fallback to plain
        text.

    Returns: a ``Socket`` whose side is ``"client"``.

    Raises:
      OSError: all attempts failed. The message contains the address, and the cause is the group of
        the individual errors. If these errors share one errno, the ``OSError`` has this errno
        and the matching subclass (such as ``ConnectionRefusedError``). If the errnos differ, the
        message lists the first three distinct errors. An unknown host raises ``socket.gaierror``.
        If nothing listens on a local port, the kernel can connect a socket to itself. ``connect``
        never returns such a connection: it retries, and finally raises ``ConnectionRefusedError``.
      TLSError: TLS failed (see ``Socket.starttls``).
      StartTLSError: with ``starttls``, the negotiation failed (for example, the server did not
        offer TLS).
      trio.BrokenResourceError: the server closed the connection before ``proxy_header`` was sent.
      TypeError, ValueError: an argument is invalid; no connection was made.

    TCP keepalive is on: after 15 seconds without data the kernel sends a probe, and then one every
    15 seconds. After 9 unanswered probes the connection breaks with ``ETIMEDOUT``. To turn
    keepalive off, call ``sock.setsockopt(SOL_SOCKET, SO_KEEPALIVE, 0)``.

    A cancelled call leaves nothing open. Source: Pluto's ``socket.connect``.
    """
    ascii_host = to_ascii_host(host)
    if starttls is not None:
        port = _starttls_port(starttls, port)
    elif port is None:
        raise TypeError("connect needs a port, unless starttls names a protocol")
    check_port(port, host)
    if local_address is not None:
        if not isinstance(local_address, str):
            raise TypeError(f"local_address must be a str or None, not {quoted(local_address)}")
        local_address = to_ascii_host(local_address)
    check_bool("https_compatible", https_compatible)
    _check_proxy_header(proxy_header)
    if https_compatible and starttls is not None:
        raise ValueError("https_compatible is for TLS from the start, not for starttls")
    if tls is True or (tls is None and starttls is not None):
        tls = ClientTLS()
    if tls is not None:
        _check_client_role(tls, host, starttls is not None)
    elif https_compatible:
        raise ValueError("https_compatible is for TLS: pass tls as well")
    where = format_host_port(host, port)
    for _ in range(_SELF_CONNECT_TRIES):
        raw = await _open_tcp(ascii_host, port, local_address, where)
        if not _reset_if_self_connected(raw):
            return await _start(raw, host, tls, where, https_compatible, proxy_header, starttls)
    text = f"cannot connect to {where}: {os.strerror(errno.ECONNREFUSED)}"
    raise ConnectionRefusedError(errno.ECONNREFUSED, text)


def _starttls_port(protocol: str, port: int | None) -> int:
    check_protocol(protocol, PROTOCOLS)
    return PROTOCOLS[protocol][0] if port is None else port


async def _open_tcp(
    ascii_host: str, port: int, local_address: str | None, where: str
) -> socket.socket:
    if local_address is not None:
        where += f" from {quoted(local_address)}"
    try:
        with _guard.bare():
            stream = await trio.open_tcp_stream(
                ascii_host.encode(), port, local_address=local_address
            )
    except OSError as exc:
        attempts = exc.__cause__
        errors = getattr(attempts, "exceptions", (exc,))
        number = same_errno(errors)
        if attempts is None:
            raise with_message(exc, f"cannot connect to {where}") from None
        if number is None:
            raise OSError(f"cannot connect to {where}: {_listed(errors)}") from attempts
        raise OSError(number, f"cannot connect to {where}: {os.strerror(number)}") from attempts
    # Move the descriptor to our own ``socket.socket``, whose methods are cheaper than Trio's.
    family, kind, protocol = stream.socket.family, stream.socket.type, stream.socket.proto
    raw = socket.socket(family, kind, protocol, stream.socket.detach())
    enable_keepalive(raw)
    return raw


def _listed(errors: Sequence[Exception]) -> str:
    """Join the distinct errors of a connect. Each address of the name may cause one error."""
    texts = list(dict.fromkeys(map(_reason, errors)))
    more = f"; and {len(texts) - _MAX_ERRORS} more" if len(texts) > _MAX_ERRORS else ""
    return "; ".join(texts[:_MAX_ERRORS]) + more


def _reason(error: Exception) -> str:
    # Trio's error about the local address has no errno. The error's message quotes the address,
    # which may be a key that was passed by mistake.
    if isinstance(error, OSError) and error.errno is None:
        return "local_address cannot be used for this host"
    return _guard.text(error)


def _reset_if_self_connected(raw: socket.socket) -> bool:
    """If the socket is connected to itself, close it and return True. Otherwise return False.

    A socket connects to itself by simultaneous open (RFC 9293, section 3.5). We close it with a
    reset, because TIME_WAIT would block the port for the server that should listen there.
    """
    try:
        if raw.getsockname() != raw.getpeername():
            return False
    except OSError:  # ENOTCONN, if the connection was already reset
        return False
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_AND_RESET)
    raw.close()
    return True


async def connect_unix(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    tls: TLSArgument | None = None,
    proxy_header: ProxyHeader | None = None,
) -> Socket:
    r"""Connect to a Unix socket.

    Args:
      path: the path; on Linux also an abstract name (``"\0name"``).
      tls: as in ``Socket.starttls``. To verify the server, a client must pass the server's name.
      proxy_header: as in ``connect``.

    Returns: a ``Socket`` whose side is ``"client"``.

    Raises:
      OSError: nothing listens on the path (``FileNotFoundError``, ``ConnectionRefusedError``, ...).
        The path is the error's ``filename``. Also raised if the platform has no Unix sockets.
      TLSError, trio.BrokenResourceError: as in ``connect``.
      TypeError, ValueError: an argument is invalid.

    If the listener's backlog is full, the call waits. A cancelled call leaves nothing open.
    """
    name = unix_path(path)
    _check_proxy_header(proxy_header)
    if tls is not None:
        _check_client_role(tls, None)
    sock = unix_socket(name)
    try:
        sock.setblocking(False)
        await trio.lowlevel.checkpoint()
        retry = _MIN_RETRY_INTERVAL
        while True:
            try:
                sock.connect(name)
                break
            except BlockingIOError:
                await trio.sleep(retry)
                retry = min(2 * retry, _MAX_RETRY_INTERVAL)
            except OSError as exc:
                message = f"{CANNOT_CONNECT}{exc.strerror}"
                raise OSError(exc.errno, message, os.fsdecode(name)) from exc
    except BaseException:
        sock.close()
        raise
    return await _start(sock, None, tls, format_unix_path(name), False, proxy_header)


def _check_proxy_header(header: object) -> None:
    if header is not None and not isinstance(header, ProxyHeader):
        raise TypeError(f"proxy_header must be a ProxyHeader or None, not {quoted(header)}")


def _check_client_role(tls: TLSArgument, host: str | None, upgrades: bool = False) -> None:
    """Check ``tls`` before connecting.

    Raises ``TypeError`` for the role of a TLS server. A bare ``SSLContext`` may have either role,
    unless the connection begins with STARTTLS (``upgrades``).
    """
    role = resolve_role(tls, server_hostname=None, connected_host=host, side="client")
    if role.server_side and (upgrades or not isinstance(tls, ssl.SSLContext)):
        raise TypeError(
            f"tls must be a TLS client's role, not {type_name(tls)}: "
            "to be the TLS server on this connection, call starttls"
        )


async def _start(
    raw: socket.socket,
    host: str | None,
    tls: TLSArgument | None,
    where: str,
    https_compatible: bool,
    proxy_header: ProxyHeader | None,
    protocol: str | None = None,
) -> Socket:
    try:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
        connection = Connection(stream, "client", raw)
    except OSError as exc:
        raw.close()
        if exc.errno == errno.ENOTCONN:  # the connection was reset before getpeername()
            exc = ConnectionResetError(errno.ECONNRESET, "reset")
        raise with_message(exc, f"cannot connect to {where}") from exc
    connection.connected_host = host
    sock = new_socket(connection)
    try:
        if proxy_header is not None:
            await sock.send(proxy_header.to_bytes())
        if protocol is not None:
            await upgrade(sock, protocol, tls)
        elif tls is not None:
            await sock.starttls(tls, https_compatible=https_compatible)
    except BaseException:  # the caller's own SSLContext may raise anything
        sock.abort()
        raise
    return sock


def connect_unix_nowait(path: str) -> Socket:
    """Connect to a Unix socket without waiting.

    Raises ``BlockingIOError`` if the backlog is full, another ``OSError`` if the connect fails, and
    ``ValueError`` if the path is invalid. This function is for ``trisock.hammerspoon``, whose
    ``connect`` is synchronous.
    """
    name = unix_path(path)
    raw = unix_socket(name)
    try:
        raw.setblocking(False)
        raw.connect(name)
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
        return new_socket(Connection(stream, "client", raw))
    except BaseException:
        raw.close()
        raise
