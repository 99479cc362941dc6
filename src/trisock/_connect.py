"""connect and connect_unix: the client's way to a Socket."""

from __future__ import annotations

import errno
import os
import socket
import struct
import sys
from typing import Literal

import trio

from ._address import (
    check_port,
    format_host_port,
    format_unix_path,
    oserror,
    same_errno,
    to_ascii_host,
)
from ._arguments import quoted
from ._net.connection import Connection
from ._net.socket import Socket, new_socket
from ._net.unix_path import unix_path, unix_socket
from ._tls.roles import ClientTLS, TLSArgument, resolve_role

# A Unix socket whose backlog is full refuses a non-blocking connect at once, and tells nobody
# when there is room again: look again after this long, doubling (seconds).
_FIRST_RETRY = 0.001
_LAST_RETRY = 0.1

# A connection attempt to a port of this machine can get that very port as its local one, and then
# connects to itself. Where nobody listens that is rare, but for ranges of a few ports.
_SELF_CONNECT_TRIES = 16

# SO_LINGER for a reset: on, 0 seconds.
_RESET = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)


async def connect(
    host: str,
    port: int,
    *,
    tls: TLSArgument | Literal[True] | None = None,
    local_address: str | None = None,
) -> Socket:
    """Connect over TCP, by name or address, IPv4 or IPv6.

    Several addresses are tried one after the other, each with a head start of 250 ms before the
    next (happy eyeballs, RFC 8305); the first to answer wins.

    Args:
      host: a name (also an international one) or an address.
      port: 0 to 65535.
      tls: ``True`` for TLS from the start, the server verified by ``host`` against the system's
        trust store; or what ``Socket.starttls`` takes.
      local_address: the local address to connect from.

    Returns: a ``Socket`` whose side is ``"client"``.

    Raises:
      OSError: nobody could be reached; the text has the address, and the cause is the group of
        what went wrong with each one. Where all attempts failed alike it is that subclass
        (``ConnectionRefusedError``). An unknown host is a ``socket.gaierror``. Where nobody
        listens on a port of this machine the kernel can connect a socket to itself: this is never
        returned, but tried again, and ``ConnectionRefusedError`` in the end.
      TLSError: as ``Socket.starttls``.
      TypeError, ValueError: an argument cannot be used; no connection was made.

    Cancelled, it leaves nothing open. Source: Pluto's ``socket.connect``.
    """
    ascii_host = to_ascii_host(host)
    check_port(port, host)
    if local_address is not None:
        if not isinstance(local_address, str):
            raise TypeError(f"local_address is a str or None, not {quoted(local_address)}")
        local_address = to_ascii_host(local_address)
    if tls is not None:
        tls = ClientTLS() if tls is True else tls
        # What cannot be used is an error before anything is done.
        resolve_role(tls, server_hostname=None, connected_host=host, side="client")
    where = format_host_port(host, port)
    for _ in range(_SELF_CONNECT_TRIES):
        raw = await _open_tcp(ascii_host, port, local_address, where)
        if not _reset_if_connected_to_itself(raw):
            return await _start(raw, host, tls, where)
    text = f"cannot connect to {where}: {os.strerror(errno.ECONNREFUSED)}"
    raise ConnectionRefusedError(errno.ECONNREFUSED, text)


async def _open_tcp(
    ascii_host: str, port: int, local_address: str | None, where: str
) -> socket.socket:
    try:
        stream = await trio.open_tcp_stream(ascii_host.encode(), port, local_address=local_address)
    except OSError as exc:
        attempts = exc.__cause__
        errors = getattr(attempts, "exceptions", (exc,))
        number = same_errno(errors)
        if attempts is None or number is None:
            raise oserror(exc, f"cannot connect to {where}") from attempts
        raise OSError(number, f"cannot connect to {where}: {os.strerror(number)}") from attempts
    # The same descriptor, in a socket that we can see: its calls are cheaper.
    family, kind, protocol = stream.socket.family, stream.socket.type, stream.socket.proto
    return socket.socket(family, kind, protocol, stream.socket.detach())


def _reset_if_connected_to_itself(raw: socket.socket) -> bool:
    """Whether both ends were one (RFC 9293, section 3.5: simultaneous open). Then it is closed.

    By a reset: TIME_WAIT would keep the port from the server that is awaited there.
    """
    try:
        if raw.getsockname() != raw.getpeername():
            return False
    except OSError:  # reset already
        return False
    raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    raw.close()
    return True


async def connect_unix(
    path: str | bytes | os.PathLike[str] | os.PathLike[bytes],
    *,
    tls: TLSArgument | None = None,
) -> Socket:
    r"""Connect to a Unix socket.

    Args:
      path: its path; on Linux also an abstract name (``"\0name"``).
      tls: what ``Socket.starttls`` takes; a verified client's must have a name.

    Returns: a ``Socket`` whose side is ``"client"``.

    Raises:
      OSError: nobody listens there (``FileNotFoundError``, ``ConnectionRefusedError``, ...), with
        the path as its file name; or there are no Unix sockets on this platform.
      TLSError: as ``Socket.starttls``.
      TypeError, ValueError: an argument cannot be used.

    Where the listener's backlog is full it waits. Cancelled, it leaves nothing open.
    """
    name = unix_path(path)
    if tls is not None:
        resolve_role(tls, server_hostname=None, connected_host=None, side="client")
    sock = unix_socket(name)
    try:
        sock.setblocking(False)
        await trio.lowlevel.checkpoint()
        retry = _FIRST_RETRY
        while True:
            try:
                sock.connect(name)
                break
            except BlockingIOError:
                await trio.sleep(retry)
                retry = min(2 * retry, _LAST_RETRY)
            except OSError as exc:
                raise OSError(exc.errno, exc.strerror, os.fsdecode(name)) from exc
    except BaseException:
        sock.close()
        raise
    return await _start(sock, None, tls, format_unix_path(name))


async def _start(
    raw: socket.socket, host: str | None, tls: TLSArgument | None, where: str
) -> Socket:
    try:
        stream = trio.SocketStream(trio.socket.from_stdlib_socket(raw))
        connection = Connection(stream, "client", raw)
    except OSError as exc:
        raw.close()
        if exc.errno == errno.ENOTCONN:  # it was reset before we could ask who it is with
            exc = ConnectionResetError(errno.ECONNRESET, "reset")
        raise oserror(exc, f"cannot connect to {where}") from exc
    connection.connected_host = host
    sock = new_socket(connection)
    if tls is not None:
        try:
            await sock.starttls(tls)
        except BaseException:  # a context of the user's may raise anything
            sock.abort()
            raise
    return sock


def connect_unix_nowait(path: str) -> Socket:
    """Connect to a Unix socket at once; ``BlockingIOError`` where the backlog is full.

    For ``trisock.hammerspoon``, whose ``connect`` is a plain call. Raises as ``connect_unix`` does.
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
