"""Hammerspoon's ``hs.socket``: calls that return at once, queues, callbacks and tags.

For callback code, and ports of Hammerspoon programs::

    from trisock import hammerspoon

    async with hammerspoon.open_sockets() as hs:
        client = hs.new(print).connect("localhost", 8080)
        client.write("GET / HTTP/1.0\\r\\n\\r\\n")
        client.read("\\r\\n\\r\\n")
        await trio.sleep(1)

Reads and writes queue, and are done in order in the background, as is ``startTLS``, which waits for
those before it; the callbacks of one object come in order, too. A callback is a plain or an async
function; one that raises is logged and harms nothing else. Leaving ``open_sockets`` ends it all.

Data is ``bytes``; ``str`` is taken as UTF-8 where it goes out. What hs.socket logs is on the logger
``trisock.hammerspoon``. Source: Hammerspoon's documentation, page "hs.socket"; ``docs/dialects.md``
has what differs.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial

import trio

import trisock

from .._connect import connect_unix_nowait
from .._guard import log
from .._text import printable
from .arguments import check_callback, check_timeout, is_int, to_bytes, to_wanted, where
from .callbacks import CallbackQueue
from .endpoints import QueuedClient, QueuedServer
from .info import Info, connections_of, info_of
from .operations import Delivery, Read
from .queues import logger
from .sockaddr import ParsedAddress, parse_sockaddr

__all__ = ["Callback", "Info", "ParsedAddress", "Socket", "Sockets", "open_sockets"]

# The levels of hs.logger, from 0, and Python's: in this there is nothing below DEBUG.
_LEVELS = ["nothing", "error", "warning", "info", "debug", "verbose"]
_PYTHONS = [logging.CRITICAL + 1, *range(logging.ERROR, 0, -10), logging.DEBUG]

Callback = Callable[..., object]


@asynccontextmanager
async def open_sockets() -> AsyncIterator[Sockets]:
    """Give a block its sockets: ``async with open_sockets() as hs:``.

    When the block is left, all of them are closed and all that they do in the background has ended.
    What the block raises comes out as it is; cancelled, it leaves nothing behind.
    """
    error: BaseException | None = None
    async with trio.open_nursery() as nursery:
        try:
            yield Sockets(nursery)
        except BaseException as exc:  # goes on as it is, and not in the nursery's group
            error = exc
        nursery.cancel_scope.cancel()
        nursery.cancel_scope.shield = True  # no Cancelled from outside takes the error's place
    if error is not None:
        raise error


class Sockets:
    """Hammerspoon's ``hs.socket``, made by ``open_sockets``.

    Attributes:
      timeout: seconds that an operation may take, for objects made from now on; negative: no limit.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.timeout: float = -1
        self._nursery = nursery

    def new(self, fn: Callback | None = None) -> Socket:
        """Create an unconnected object; ``fn`` as in ``setCallback``. Source: ``hs.socket.new``."""
        return Socket(self._nursery, self.timeout, fn)

    def server(self, port_or_path: int | str, fn: Callback | None = None) -> Socket:
        """Do ``new(fn)`` and ``listen``; return it also if it cannot. Source: ``server``."""
        created = self.new(fn)
        created.listen(port_or_path)
        return created

    @staticmethod
    def parseAddress(sockaddr: bytes) -> ParsedAddress | None:  # noqa: N802
        """Parse a binary sockaddr, such as ``info()`` gives: of IPv4 or IPv6, BSD's or Linux's.

        Returns ``{"host": ..., "port": ..., "addressFamily": ...}``, or ``None`` for anything else.
        Source: ``hs.socket.parseAddress``.
        """
        return parse_sockaddr(sockaddr) if isinstance(sockaddr, bytes) else None

    @staticmethod
    def setLogLevel(level: str | int) -> None:  # noqa: N802
        """Set how much is logged, in the whole process: a level of hs.logger, or its number.

        ``"nothing"`` (0), ``"error"``, ``"warning"``, ``"info"``, ``"debug"``, ``"verbose"`` (5).
        Source: ``hs.socket.setLogLevel``.
        """
        number = _LEVELS.index(level) if level in _LEVELS else level
        if type(number) is not int or not 0 <= number < len(_LEVELS):
            raise ValueError(f"a log level is one of {_LEVELS} or its number")
        logger.setLevel(_PYTHONS[number])


class Socket:
    """Hammerspoon's ``hs.socket object``: a client, a server, or neither yet.

    Made by ``Sockets.new`` and ``Sockets.server``. Its methods are plain calls and return at once.
    """

    def __init__(self, nursery: trio.Nursery, timeout: float, fn: Callback | None) -> None:
        self._nursery = nursery
        self._timeout = check_timeout(timeout)
        self._callback = check_callback(fn)
        self._role: QueuedClient | QueuedServer | None = None
        self._callbacks = CallbackQueue(self, nursery, logger)

    def __repr__(self) -> str:
        info = self.info()
        kind, name = "hs.socket", f"{info['connectedHost']}:{info['connectedPort']}"
        if info["userData"] == "SERVER":
            kind, name = "hs.socket(server)", f"{info['localHost']}:{info['localPort']}"
        if info["unixSocketPath"]:
            name = where(info["unixSocketPath"], None)
        return f"{kind}: {printable(name)} ({id(self):#x})"

    # ---- connecting, listening ----

    def connect(
        self, host_or_path: str, port: int | Callback | None = None, fn: Callback | None = None
    ) -> Socket | None:
        """Connect: ``connect(host, port[, fn])``, or ``connect(path[, fn])`` to a Unix socket.

        Args:
          host_or_path: a name or an address; or, where no port is given, a path.
          port: 1 to 65535.
          fn: called once, without arguments, when it is connected. A server of the same program
            has the connection by then.

        Returns: self, or ``None`` if it is in use already. To a path, it is connected at once if
        the server's backlog has room. Where nobody can be reached, that is logged later, and the
        object is unconnected again.
        Source: ``hs.socket:connect``.
        """
        if callable(port):
            port, fn = None, port
        check_callback(fn)
        if not isinstance(host_or_path, str) or not (port is None or is_int(port)):
            kinds = f"{type(host_or_path).__name__}, {type(port).__name__}"
            raise TypeError(f"no host and port, and no path: {kinds}")
        path = os.path.expanduser(host_or_path) if port is None else ""
        if self._is_in_use():
            return None
        sock = None
        if port is None:
            connect = partial(trisock.connect_unix, path)
            with contextlib.suppress(OSError, ValueError):  # the other one says what is wrong
                sock = connect_unix_nowait(path)
        else:
            connect = partial(trisock.connect, host_or_path, port)
        client = QueuedClient(
            connect,
            fn,
            self._callbacks.line,
            self._limit,
            name=where(path or host_or_path, port),
            path=path,
            sock=sock,
        )
        return self._take_on(client)

    def listen(self, port_or_path: int | str) -> Socket | None:
        """Listen on a port (0 for any that is free), or on the path of a Unix socket.

        Returns: self, or ``None`` if it cannot, or is in use already: that is logged.
        Source: ``hs.socket:listen``.
        """
        if self._is_in_use():
            return None
        path = ""
        try:
            if isinstance(port_or_path, str):
                path = os.path.expanduser(port_or_path)
                listener = trisock.listen_unix_nowait(path)
            else:
                listener = trisock.listen_nowait(port_or_path)
        except (OSError, ValueError) as exc:
            self._log(f"cannot listen: {exc}")
            return None
        return self._take_on(QueuedServer(listener, self._callbacks.line, path))

    def disconnect(self) -> Socket:
        """Disconnect: drop what is queued, and be free at once for another connect or listen.

        A server disconnects its clients, and removes its Unix path. What was sent already is
        not lost. Source: ``hs.socket:disconnect``.
        """
        role, self._role = self._role, None
        self._callbacks.clear()
        if role is not None:
            role.disconnect()
        return self

    def _is_in_use(self) -> bool:
        if self._nursery.cancel_scope.cancel_called:
            self._log("its open_sockets() has ended")
        elif self._role is not None:
            self._log("it is connected or listening already")
        else:
            return False
        return True

    def _take_on(self, role: QueuedClient | QueuedServer) -> Socket:
        self._role = role
        self._nursery.start_soon(role.run, self._free)
        return self

    def _free(self, role: object) -> None:
        if self._role is role:
            self._role = None

    def _log(self, error: str) -> None:
        log(logger, logging.ERROR, "%r: %s", self, printable(error))

    @property
    def _limit(self) -> float:
        return math.inf if self._timeout < 0 else self._timeout

    # ---- reading, writing, TLS ----

    def read(self, delimiter: int | str | bytes, tag: int | None = None) -> Socket | None:
        """Read, and give what was read to the callback: ``fn(data, tag)``.

        A server reads from each of the clients that are connected now.

        Args:
          delimiter: how many bytes to read (0 is ignored, as in hs.socket); or what to read up
            to, and including it.
          tag: passed to the callback; -1 without one.

        Returns: self, or ``None`` if there is no callback or no connection: that is logged.
        Source: ``hs.socket:read``.
        """
        wanted = to_wanted(delimiter)
        if self._callback is None:
            self._log("cannot read: there is no callback")
            return None
        if self._role is None:
            self._log("cannot read: it is not connected")
            return None
        if wanted == 0:
            return self
        tag = -1 if tag is None else tag
        give = partial(self._callbacks.put, self._give, tag)
        read = Read(wanted, self._limit, give, tag)
        for connection in self._role.connections:
            connection.read(read)
        return self

    receive = read

    def write(
        self, message: str | bytes, tag: int | Callback | None = None, fn: Callback | None = None
    ) -> Socket:
        """Write: ``write(message[, tag][, fn])``. A server writes to each of its clients.

        Args:
          message: what to write.
          tag: passed to ``fn``; -1 without one.
          fn: called once, ``fn(tag)``, when it is written: by a server when all its clients have it
            (those that were lost meanwhile do not count; if none has it, it is not called).

        Returns: self, also where there is no connection, which is logged.
        Source: ``hs.socket:write``.
        """
        if callable(tag):
            fn, tag = tag, None
        check_callback(fn)
        if self._role is None:
            self._log("cannot write: it is not connected")
            return self
        data, put, tag = to_bytes(message), self._callbacks.put, -1 if tag is None else tag
        connections = list(self._role.connections)
        # Not the truth of fn: a callable object may have a __bool__.
        delivery = Delivery(len(connections), None if fn is None else partial(put, fn, tag))
        for connection in connections:
            connection.write(data, self._limit, delivery)
        return self

    send = write

    def startTLS(  # noqa: N802
        self,
        verify: bool | str | trisock.ClientTLS | trisock.ServerTLS | None = True,
        peerName: str | None = None,  # noqa: N803
    ) -> Socket:
        """Secure the connection, when the reads and writes before it are done.

        Whatever fails in it disconnects: nothing that comes after is ever sent in the clear.

        Args:
          verify: ``startTLS(False)``, and nothing else, takes any certificate from anybody.
            Or the name; or TLS as ``trisock`` has it: certificates, one's own authorities.
          peerName: the name that the certificate must be for; without one, the host given to
            ``connect``. (hs.socket would verify no name then.)

        Returns: self. Raises ``ValueError`` or ``TypeError`` for a name that cannot be one, and for
        two names. Source: ``hs.socket:startTLS``.
        """
        if self._role is None:
            self._log("cannot start TLS: it is not connected")
            return self
        name = verify if isinstance(verify, str) else peerName
        try:
            if isinstance(verify, str) and peerName is not None:
                raise TypeError("startTLS takes one name, and two were given")
            if verify is None or isinstance(verify, (bool, str)):
                verify = trisock.ClientTLS(name, verify=verify is not False or name is not None)
        except BaseException:
            self.disconnect()
            raise
        for connection in self._role.connections:
            connection.start_tls(verify, name, self._limit)
        return self

    def _give(self, tag: int, data: bytes) -> object:
        return None if self._callback is None else self._callback(data, tag)

    # ---- settings, and what is known ----

    def setCallback(self, fn: Callback | None = None) -> Socket:  # noqa: N802
        """Set (or, with ``None``, clear) the read callback: ``fn(data, tag)``.

        Source: ``hs.socket:setCallback``.
        """
        self._callback = check_callback(fn)
        return self

    def setTimeout(self, timeout: float) -> Socket:  # noqa: N802
        """Set how many seconds the operations queued from now on may take; negative: no limit.

        Each is timed from when its turn comes. One that takes longer disconnects.
        Source: ``hs.socket:setTimeout``.
        """
        self._timeout = check_timeout(timeout)
        return self

    def connected(self) -> bool:
        """Return whether it, or any of a server's clients, is connected. Source: ``connected``."""
        return self.connections() > 0

    def connections(self) -> int:
        """Return how many connections it has; at most 1, unless it is a server.

        Source: ``hs.socket:connections``.
        """
        return connections_of(self._role)

    def info(self) -> Info:
        """Return what is known about it, under the 19 keys of hs.socket's page.

        Source: ``hs.socket:info``.
        """
        return info_of(self._role, self._timeout)
