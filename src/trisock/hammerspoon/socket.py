"""hs.socket's objects: ``Sockets`` and ``Socket``. The package's docstring says how to use them."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio

import trisock

from .._connect import connect_unix_nowait
from .._guard import log
from .._not_copyable import NotCopyable
from .._text import printable
from .arguments import (
    check_callback,
    check_tag,
    check_timeout,
    describe_target,
    is_int,
    parse_delimiter,
    to_bytes,
)
from .callbacks import Callback, CallbackQueue
from .endpoints import QueuedClient, QueuedServer
from .info import Info, connections_of, info_of
from .operations import Delivery, Read
from .queues import logger
from .sockaddr import ParsedAddress, parse_sockaddr
from .udp.socket import UDPSockets

__all__ = ["Callback", "Info", "ParsedAddress", "Socket", "Sockets", "open_sockets"]

# The levels of hs.logger, numbered from 0, and Python's level for each. Python has no level below
# DEBUG, so "debug" and "verbose" are the same.
_LEVELS = ["nothing", "error", "warning", "info", "debug", "verbose"]
_PYTHON_LEVELS = [logging.CRITICAL + 1, *range(logging.ERROR, 0, -10), logging.DEBUG]


@asynccontextmanager
async def open_sockets() -> AsyncIterator[Sockets]:
    """Provide a ``Sockets`` object for a block: ``async with open_sockets() as hs:``.

    After the block, even if it was cancelled, all sockets are closed and all background work has
    ended. An exception raised in the block is not wrapped in a group.
    """
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield Sockets(nursery)
        except BaseException as exc:  # raised below, so that the nursery does not wrap it
            error = exc
        nursery.cancel_scope.cancel()
        nursery.cancel_scope.shield = True  # a Cancelled from outside must not replace the error
    if error is not None:
        try:
            raise error
        finally:
            del error  # its traceback refers to this frame


class Sockets(NotCopyable):
    """Hammerspoon's ``hs.socket``, made by ``open_sockets``.

    Attributes:
      timeout: the timeout (seconds) for the operations of new objects. Negative means no limit.
      udp: Hammerspoon's ``hs.socket.udp``.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.timeout: float = -1
        self.udp: UDPSockets = UDPSockets(nursery)
        self._nursery = nursery

    def new(self, fn: Callback | None = None) -> Socket:
        """Create an unconnected object with the read callback ``fn``. Source: ``hs.socket.new``."""
        return Socket(self._nursery, self.timeout, fn)

    def server(self, port_or_path: int | str, fn: Callback | None = None) -> Socket:
        """Create an object and make it listen.

        Returns the object even if it cannot listen. Source: ``hs.socket.server``.
        """
        created = self.new(fn)
        created.listen(port_or_path)
        return created

    @staticmethod
    def parseAddress(sockaddr: bytes) -> ParsedAddress | None:  # noqa: N802
        """Parse a binary IPv4 or IPv6 sockaddr (see ``info``), in the layout of BSD or Linux.

        Returns ``{"host": ..., "port": ..., "addressFamily": ...}``, or ``None`` for other data.
        Source: ``hs.socket.parseAddress``.
        """
        return parse_sockaddr(sockaddr) if isinstance(sockaddr, bytes) else None

    @staticmethod
    def setLogLevel(level: str | int) -> None:  # noqa: N802
        """Set the log level for the whole process: a level of hs.logger, or its number.

        The levels, from 0 to 5: ``"nothing"``, ``"error"``, ``"warning"``, ``"info"``, ``"debug"``,
        ``"verbose"``. Source: ``hs.socket.setLogLevel``.
        """
        number = _LEVELS.index(level) if level in _LEVELS else level
        if type(number) is not int or not 0 <= number < len(_LEVELS):
            levels = ", ".join(_LEVELS)
            raise ValueError(f"a log level must be one of {levels} or its number")
        logger.setLevel(_PYTHON_LEVELS[number])


class Socket(NotCopyable):
    """Hammerspoon's ``hs.socket object``: a client, a server, or neither yet.

    ``Sockets.new`` and ``Sockets.server`` make it. Its methods are synchronous and do not wait.
    """

    def __init__(self, nursery: trio.Nursery, timeout: float, fn: Callback | None) -> None:
        self._nursery = nursery
        self._timeout = check_timeout(timeout)
        self._callback = check_callback(fn)
        self._endpoint: QueuedClient | QueuedServer | None = None
        self._callbacks = CallbackQueue(self, nursery, logger)

    def __repr__(self) -> str:
        info = self.info()
        kind, name = "hs.socket", f"{info['connectedHost']}:{info['connectedPort']}"
        if info["userData"] == "SERVER":
            kind, name = "hs.socket(server)", f"{info['localHost']}:{info['localPort']}"
        if info["unixSocketPath"]:
            name = describe_target(info["unixSocketPath"], None)
        return f"{kind}: {printable(name)} ({id(self):#x})"

    # ---- connecting, listening ----

    def connect(
        self, host_or_path: str, port: int | Callback | None = None, fn: Callback | None = None
    ) -> Socket | None:
        """Connect: ``connect(host, port[, fn])``, or ``connect(path[, fn])`` to a Unix socket.

        Args:
          host_or_path: a host name or an address or, without a port, the path of a Unix socket.
          port: 1 to 65535.
          fn: called once, without arguments, when connected. If the server is in the same program,
            it has usually accepted the connection by then.

        Returns: self, or ``None`` if the object is already in use. A connect to a path succeeds
        immediately if the server's backlog has room. A failure to connect is logged later, and the
        object is then unconnected again.
        Source: ``hs.socket:connect``.
        """
        if callable(port):
            port, fn = None, port
        check_callback(fn)
        if not isinstance(host_or_path, str) or not (port is None or is_int(port)):
            kinds = f"{type(host_or_path).__name__}, {type(port).__name__}"
            raise TypeError(f"expected a host and a port, or a path, not {kinds}")
        path = os.path.expanduser(host_or_path) if port is None else ""
        if self._in_use("connect"):
            return None
        sock = None
        if port is None:
            connect = partial(trisock.connect_unix, path)
            with contextlib.suppress(OSError, ValueError):  # connect_unix will report the error
                sock = connect_unix_nowait(path)
        else:
            connect = partial(trisock.connect, host_or_path, port)
        client = QueuedClient(
            connect,
            fn,
            self._callbacks.pending,
            self._limit,
            name=describe_target(path or host_or_path, port),
            path=path,
            sock=sock,
        )
        return self._start(client)

    def listen(self, port_or_path: int | str) -> Socket | None:
        """Listen on a port (0 for any free port), or on the path of a Unix socket.

        Returns: self. If listening fails, or the object is already in use, this is logged and
        ``None`` is returned.
        Source: ``hs.socket:listen``.
        """
        if self._in_use("listen"):
            return None
        path = ""
        try:
            if isinstance(port_or_path, str):
                path = os.path.expanduser(port_or_path)
                listener = trisock.listen_unix_nowait(path)
            else:
                listener = trisock.listen_nowait(port_or_path)
        except (OSError, ValueError) as exc:
            why = str(exc)
            self._log(why if "cannot listen" in why else f"cannot listen: {why}")
            return None
        return self._start(QueuedServer(listener, self._callbacks.pending, path))

    def disconnect(self) -> Socket:
        """Disconnect, and drop queued operations. The object can be used again immediately.

        A server disconnects its clients, and removes its Unix path. Data that was already sent is
        not lost. Source: ``hs.socket:disconnect``.
        """
        endpoint, self._endpoint = self._endpoint, None
        self._callbacks.clear()
        if endpoint is not None:
            endpoint.disconnect()
        return self

    def _in_use(self, action: str) -> bool:
        if self._nursery.cancel_scope.cancel_called:
            self._log(f"cannot {action}: its open_sockets() block has ended")
        elif self._endpoint is not None:
            self._log(f"cannot {action}: it is already connected or listening (disconnect first)")
        else:
            return False
        return True

    def _start(self, endpoint: QueuedClient | QueuedServer) -> Socket:
        self._endpoint = endpoint
        self._nursery.start_soon(endpoint.run, self._finish)
        return self

    def _finish(self, endpoint: object) -> None:
        if self._endpoint is endpoint:
            self._endpoint = None

    def _log(self, error: str) -> None:
        log(logger, logging.ERROR, "%r: %s", self, printable(error))

    @property
    def _limit(self) -> float:
        return math.inf if self._timeout < 0 else self._timeout

    # ---- reading, writing, TLS ----

    def read(self, delimiter: int | str | bytes, tag: int | None = None) -> Socket | None:
        """Queue a read. The callback gets the data: ``fn(data, tag)``.

        A server reads from each client that is connected now.

        Args:
          delimiter: the number of bytes to read (0 is ignored, as in hs.socket), or a delimiter to
            read up to. The data includes the delimiter.
          tag: passed to the callback; ``None`` becomes -1.

        Returns: self. If there is no callback or no connection, this is logged and ``None`` is
        returned.
        Source: ``hs.socket:read``.
        """
        until, tag = parse_delimiter(delimiter), check_tag(tag)
        if self._callback is None:
            self._log("cannot read: there is no callback")
            return None
        if self._endpoint is None:
            self._log("cannot read: it is not connected")
            return None
        if until == 0:
            return self
        deliver = partial(self._callbacks.put, self._deliver, tag)
        read = Read(until, self._limit, deliver, tag)
        for connection in self._endpoint.connections:
            connection.read(read)
        return self

    receive = read

    def write(
        self, message: str | bytes, tag: int | Callback | None = None, fn: Callback | None = None
    ) -> Socket:
        """Queue a write: ``write(message[, tag][, fn])``. A server writes to each of its clients.

        Args:
          message: the data.
          tag: passed to ``fn``; ``None`` becomes -1.
          fn: called once as ``fn(tag)`` when the data is written. For a server, this is when the
            data is written to all clients that are still connected. If no client gets the data,
            ``fn`` is not called.

        Returns: self. If there is no connection, this is only logged.
        Source: ``hs.socket:write``.
        """
        if fn is None and callable(tag):
            fn, tag = tag, None
        check_callback(fn)
        tag, data, put = check_tag(tag), to_bytes(message), self._callbacks.put
        if self._endpoint is None:
            self._log("cannot write: it is not connected")
            return self
        connections = list(self._endpoint.connections)
        # Compare fn with None, and do not use bool(fn): a callable object may define __bool__.
        delivery = Delivery(len(connections), None if fn is None else partial(put, fn, tag))
        for connection in connections:
            connection.write(data, self._limit, delivery)
        return self

    send = write

    def startTLS(  # noqa: N802
        self,
        verify: bool | str | trisock.ClientTLS | trisock.ServerTLS | ssl.SSLContext | None = True,
        peerName: str | None = None,  # noqa: N803
    ) -> Socket:
        """Upgrade to TLS, after the reads and writes that are already queued.

        Any failure disconnects: later data is never sent in plain text.

        Args:
          verify: ``True`` verifies the server's certificate. ``False`` accepts any certificate,
            unless ``peerName`` is given. A ``str`` is the same as ``peerName``. To use certificates
            or your own authorities, pass a ``trisock.ClientTLS``, a ``ServerTLS`` or an
            ``ssl.SSLContext``.
          peerName: the name that the certificate must match. The default is the host given to
            ``connect``. (By default, hs.socket verifies no name.)

        Returns: self. Raises ``ValueError`` or ``TypeError``, and disconnects, if an argument is
        invalid, or if two names are given.
        Source: ``hs.socket:startTLS``.
        """
        if self._endpoint is None:
            self._log("cannot start TLS: it is not connected")
            return self
        name = verify if isinstance(verify, str) else peerName
        try:
            own = verify.server_hostname if isinstance(verify, trisock.ClientTLS) else None
            if peerName is not None and (isinstance(verify, str) or own not in (None, peerName)):
                raise TypeError("startTLS needs one name, but two were given")
            if peerName is not None and isinstance(verify, trisock.ServerTLS):
                raise TypeError("startTLS takes no name for a server's role")
            if verify is None or isinstance(verify, (bool, str)):
                verify = trisock.ClientTLS(name, verify=verify is not False or name is not None)
            elif not isinstance(verify, (trisock.ClientTLS, trisock.ServerTLS, ssl.SSLContext)):
                raise TypeError(
                    "verify must be a bool, a name, a ClientTLS, a ServerTLS or an ssl.SSLContext, "
                    f"not a {type(verify).__name__}"
                )
        except BaseException:
            self.disconnect()
            raise
        for connection in self._endpoint.connections:
            connection.start_tls(verify, name, self._limit)
        return self

    def _deliver(self, tag: int, data: bytes) -> object:
        return None if self._callback is None else self._callback(data, tag)

    # ---- settings and information ----

    def setCallback(self, fn: Callback | None = None) -> Socket:  # noqa: N802
        """Set (or, with ``None``, clear) the read callback: ``fn(data, tag)``.

        Source: ``hs.socket:setCallback``.
        """
        self._callback = check_callback(fn)
        return self

    def setTimeout(self, timeout: float) -> Socket:  # noqa: N802
        """Set the timeout (seconds) of operations queued from now on. Negative means no limit.

        The time starts when the operation has reached the front of its queue. A timeout
        disconnects.
        Source: ``hs.socket:setTimeout``.
        """
        self._timeout = check_timeout(timeout)
        return self

    def connected(self) -> bool:
        """Return whether a client is connected or, for a server, whether it has any client.

        Source: ``hs.socket:connected``.
        """
        return self.connections() > 0

    def connections(self) -> int:
        """Return the number of connections. Only a server can have more than one connection.

        Source: ``hs.socket:connections``.
        """
        return connections_of(self._endpoint)

    def info(self) -> Info:
        """Return the object's state as a dict with the 19 keys of hs.socket's page.

        Source: ``hs.socket:info``.
        """
        return info_of(self._endpoint, self._timeout)
