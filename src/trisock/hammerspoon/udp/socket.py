"""hs.socket.udp's objects: ``UDPSockets`` and ``UDPSocket``."""

from __future__ import annotations

import logging
import math
import socket as stdlib_socket
from typing import overload

import trio

import trisock

from ..._guard import log
from ..._not_copyable import NotCopyable
from ..._text import printable
from ..arguments import check_callback, check_flag, check_timeout, is_int, parse_send, to_bytes
from ..callbacks import Callback, CallbackQueue
from ..queues import logger
from ..sockaddr import ParsedAddress, parse_sockaddr
from .endpoint import Endpoint, Send
from .info import UDPInfo, info_of, peer_of
from .receiving import Mode
from .settings import VERSIONS, Settings


class UDPSockets(NotCopyable):
    """Hammerspoon's ``hs.socket.udp``: the attribute ``udp`` of ``Sockets``.

    Attributes:
      timeout: the timeout (seconds) for the sends of new objects. Negative means no limit.
    """

    def __init__(self, nursery: trio.Nursery) -> None:
        self.timeout: float = -1
        self._nursery = nursery

    def new(self, fn: Callback | None = None) -> UDPSocket:
        """Create a closed object with the read callback ``fn``. Source: ``hs.socket.udp.new``."""
        return UDPSocket(self._nursery, self.timeout, fn)

    def server(self, port: int, fn: Callback | None = None) -> UDPSocket:
        """Create an object and make it listen. It receives nothing until ``receive`` is called.

        Returns the object even if it cannot listen. Source: ``hs.socket.udp.server``.
        """
        created = self.new(fn)
        created.listen(port)
        return created

    @staticmethod
    def parseAddress(sockaddr: bytes) -> ParsedAddress | None:  # noqa: N802
        """Parse a binary sockaddr: the same as ``Sockets.parseAddress``."""
        return parse_sockaddr(sockaddr) if isinstance(sockaddr, bytes) else None


class UDPSocket(NotCopyable):
    """Hammerspoon's ``hs.socket.udp object``: closed, open, listening or connected.

    ``UDPSockets.new`` and ``UDPSockets.server`` make it. Its methods are synchronous and do not
    wait.
    """

    def __init__(self, nursery: trio.Nursery, timeout: float, fn: Callback | None) -> None:
        self._nursery = nursery
        self._settings = Settings(check_timeout(timeout), check_callback(fn))
        self._latest: Endpoint | None = None  # may be closed already
        self._callbacks = CallbackQueue(self, nursery, logger)

    def __repr__(self) -> str:
        info = self.info()
        name = f"{info['connectedHost']}:{info['connectedPort']}"
        if info["userData"] == "SERVER":
            name = f"{info['localHost']}:{info['localPort']}"
        return f"hs.socket.udp: {printable(name)} ({id(self):#x})"

    # ---- connecting, listening, closing ----

    def connect(self, host: str, port: int, fn: Callback | None = None) -> UDPSocket | None:
        """Set the peer. From then on, datagrams are sent to and received from this peer only.

        ICMP errors of the peer are logged, and the object stays connected. If datagrams were sent
        before, the object gets a new local port.

        Args:
          host: a host name or an address.
          port: 1 to 65535. With port 0 or above 65535, the connect fails.
          fn: called once, without arguments, when connected.

        Returns: self, or ``None`` (logged) if the object is already connected or listening, or if
        IPv4 and IPv6 are both disabled. The connect to an address or to ``localhost`` completes
        immediately, unless earlier sends are still queued. If the connect fails, this is logged,
        and the object is in the same state as before.
        Source: ``hs.socket.udp:connect``.
        """
        check_callback(fn)
        if not isinstance(host, str) or not is_int(port):
            kinds = f"{type(host).__name__}, {type(port).__name__}"
            raise TypeError(f"expected a host and a port, not {kinds}")
        if self._has_ended("connect"):
            return None
        endpoint = self._endpoint
        if endpoint is not None and (endpoint.has_peer or endpoint.is_server):
            self._fail("cannot connect: it is already connected or listening (close first)")
            return None
        if not self._settings.enabled:
            self._fail("cannot connect: IPv4 and IPv6 are both disabled")
            return None
        if endpoint is None:
            endpoint = self._start(None)
        endpoint.connect(host, port, fn)
        return self

    def listen(self, port: int) -> UDPSocket | None:
        """Bind to a port on all addresses of the enabled IP versions. 0 means any free port.

        Returns: self. If the port is taken, or the object is not closed, this is logged and
        ``None`` is returned.
        Source: ``hs.socket.udp:listen``.
        """
        if self._has_ended("listen") or self._is_open("listen"):
            return None
        sock = self._open(port, reuse_port=self._settings.reuse_port)
        if sock is None:
            return None
        self._start(sock, is_server=True)
        return self

    def close(self) -> UDPSocket:
        """Close, and drop queued sends and callbacks. The object can be used again immediately.

        The read callback and the settings stay. Source: ``hs.socket.udp:close``.
        """
        self._callbacks.clear()
        if self._latest is not None:
            self._latest.close()
        return self

    def _open(self, port: int, *, reuse_port: bool = False) -> trisock.UDPSocket | None:
        try:
            return trisock.open_udp_nowait(
                port,
                host=self._settings.host_to_bind(),
                reuse_port=reuse_port,
                broadcast=self._settings.broadcast,
            )
        except (OSError, ValueError) as exc:
            self._fail(str(exc))
            return None

    def _start(self, sock: trisock.UDPSocket | None, *, is_server: bool = False) -> Endpoint:
        endpoint = self._latest = Endpoint(
            self, self._settings, self._callbacks.pending, sock, is_server=is_server
        )
        self._nursery.start_soon(endpoint.run)
        return endpoint

    @property
    def _endpoint(self) -> Endpoint | None:
        return None if self._latest is None or self._latest.is_over else self._latest

    def _has_ended(self, action: str) -> bool:
        if not self._nursery.cancel_scope.cancel_called:
            return False
        self._fail(f"cannot {action}: its open_sockets() block has ended")
        return True

    def _is_open(self, action: str) -> bool:
        if self._endpoint is None:
            return False
        self._fail(f"cannot {action}: it is not closed (close first)")
        return True

    def _fail(self, error: str) -> None:
        log(logger, logging.ERROR, "%r: %s", self, printable(error))

    # ---- receiving ----

    def receive(self, fn: Callback | None = None) -> UDPSocket | None:
        """Call the read callback for every datagram from now on: ``fn(data, sockaddr)``.

        Args:
          fn: replaces the read callback.

        Returns: self. If there is no callback, or the object is closed, this is logged and ``None``
        is returned.

        The next datagram is received when the callback of the previous one has ended. Further
        datagrams stay in the kernel's buffer. When this buffer is full, the kernel drops datagrams.
        Source: ``hs.socket.udp:receive``.
        """
        return self._receive(Mode.CONTINUOUS, fn)

    def receiveOne(self, fn: Callback | None = None) -> UDPSocket | None:  # noqa: N802
        """Call the read callback for one datagram.

        The latest call of ``receive`` or ``receiveOne`` counts. The arguments and the result are
        those of ``receive``. Source: ``hs.socket.udp:receiveOne``.
        """
        return self._receive(Mode.ONE, fn)

    read = receive
    readOne = receiveOne  # noqa: N815

    def pause(self) -> UDPSocket:
        """Suspend reading. ``receive`` or ``receiveOne`` resumes reading.

        Datagrams that arrive meanwhile stay in the kernel's buffer.
        Source: ``hs.socket.udp:pause``.
        """
        if self._endpoint is not None:
            self._endpoint.receiving.set_mode(Mode.PAUSED)
        return self

    def setCallback(self, fn: Callback | None = None) -> UDPSocket:  # noqa: N802
        """Set (or, with ``None``, clear) the read callback: ``fn(data, sockaddr)``.

        ``parseAddress(sockaddr)`` returns the sender. Without a callback, reading is suspended.
        Source: ``hs.socket.udp:setCallback``.
        """
        self._settings.callback = check_callback(fn)
        self._restart_receiving()
        return self

    def setBufferSize(self, size: int, version: int | None = None) -> UDPSocket:  # noqa: N802
        """Set how many bytes of each datagram are received. Further bytes are dropped.

        Args:
          size: a number of bytes. 0 drops datagrams as a whole. The maximum is 65535 for IPv4 and
            4294967295 for IPv6; larger and negative values mean the maximum.
          version: 4 or 6. Anything else sets both.

        Source: ``hs.socket.udp:setBufferSize``.
        """
        if not is_int(size):
            raise TypeError(f"a size must be a number of bytes, not {type(size).__name__}")
        self._settings.set_buffer_size(size, version)
        self._restart_receiving()
        return self

    def _receive(self, mode: Mode, fn: Callback | None) -> UDPSocket | None:
        if fn is not None:
            self.setCallback(fn)
        if self._settings.callback is None:
            self._fail("cannot receive: there is no callback")
            return None
        if self._endpoint is None:
            self._fail("cannot receive: it is closed (listen, connect or send first)")
            return None
        self._endpoint.receiving.set_mode(mode)
        return self

    def _restart_receiving(self) -> None:
        if self._endpoint is not None:
            self._endpoint.receiving.restart()

    # ---- sending ----

    @overload
    def send(
        self, message: str | bytes, tag: int | None = None, fn: Callback | None = None
    ) -> UDPSocket: ...

    @overload
    def send(self, message: str | bytes, tag: Callback) -> UDPSocket: ...

    @overload
    def send(
        self,
        message: str | bytes,
        host: str,
        port: int,
        tag: int | None = None,
        fn: Callback | None = None,
    ) -> UDPSocket: ...

    @overload
    def send(self, message: str | bytes, host: str, port: int, tag: Callback) -> UDPSocket: ...

    def send(self, message: str | bytes, *arguments: object, **named: object) -> UDPSocket:
        """Queue a datagram: ``send(message[, host, port][, tag][, fn])``. Sends keep their order.

        Args:
          message: the data.
          host: a host name or an address. A connected object takes no host and port.
          port: 1 to 65535.
          tag: passed to ``fn``; ``None`` becomes -1.
          fn: called once as ``fn(tag)`` when the datagram was sent. If the send fails, this is
            logged, and ``fn`` is not called.

        A closed object is opened, with a free port. If more than 16 MiB are queued, the datagram is
        dropped, and this is logged.

        Returns: self. Raises ``TypeError`` if an argument is invalid, if the host or the port is
        missing, or if a connected object gets a host or a port. Source: ``hs.socket.udp:send``.
        """
        endpoint = self._endpoint
        has_peer = endpoint is not None and endpoint.has_peer
        host, port, tag, fn = parse_send(has_peer, arguments, named)
        data = to_bytes(message)
        if self._has_ended("send"):
            return self
        if endpoint is None:
            sock = self._open(0)
            if sock is None:
                return self
            endpoint = self._start(sock)
        endpoint.send(Send(data, host, port, tag, fn, self._limit))
        return self

    write = send

    def broadcast(self, flag: bool = True) -> UDPSocket | None:
        """Allow or forbid sending to broadcast addresses. By default, it is forbidden.

        Returns: self, or ``None`` (logged) if the system refuses. Source:
        ``hs.socket.udp:broadcast``.
        """
        check_flag(flag)
        endpoint = self._endpoint
        if endpoint is not None and endpoint.sock is not None:
            try:
                endpoint.sock.setsockopt(
                    stdlib_socket.SOL_SOCKET, stdlib_socket.SO_BROADCAST, int(flag)
                )
            except OSError as exc:
                self._fail(f"cannot change broadcast: {exc}")
                return None
        self._settings.broadcast = flag
        return self

    def setTimeout(self, timeout: float) -> UDPSocket:  # noqa: N802
        """Set the timeout (seconds) of sends queued from now on. Negative means no limit.

        The timeout limits how long a send waits for a lookup, or for room in the kernel's buffer.
        The timeout starts when the send reaches the front of the queue. With 0, a send does not
        wait. When the timeout expires, the datagram is dropped, and this is logged.
        Source: ``hs.socket.udp:setTimeout``.
        """
        self._settings.timeout = check_timeout(timeout)
        return self

    @property
    def _limit(self) -> float:
        timeout = self._settings.timeout
        return math.inf if timeout < 0 else timeout

    # ---- settings and information ----

    def reusePort(self, flag: bool = True) -> UDPSocket | None:  # noqa: N802
        """Share the port of ``listen`` with other objects and programs of this user, or do not.

        All these objects and programs must share the port. A broadcast reaches all of them. Any
        other datagram reaches only one of them.

        Returns: self, or ``None`` (logged) if the object is not closed.
        Source: ``hs.socket.udp:reusePort``.
        """
        check_flag(flag)
        if self._is_open("change reusePort"):
            return None
        self._settings.reuse_port = flag
        return self

    def enableIPv(self, version: int, flag: bool = True) -> UDPSocket | None:  # noqa: N802
        """Enable or disable IPv4 or IPv6. Both are enabled at first.

        Returns: self, or ``None`` (logged) if ``version`` is not 4 or 6, or the object is not
        closed.
        Source: ``hs.socket.udp:enableIPv``.
        """
        check_flag(flag)
        if not is_int(version) or version not in VERSIONS:
            self._fail("enableIPv: the version must be 4 or 6")
            return None
        if self._is_open("change the IP versions"):
            return None
        change = self._settings.enabled.add if flag else self._settings.enabled.discard
        change(version)
        return self

    def preferIPv(self, version: int | None = None) -> UDPSocket:  # noqa: N802
        """Prefer an IP version, 4 or 6, for hosts that have both. Anything else means neutral.

        Neutral, which is the default, uses the first address of the lookup.
        Source: ``hs.socket.udp:preferIPv``.
        """
        is_version = is_int(version) and version in VERSIONS
        self._settings.preferred = version if is_version else None
        return self

    def connected(self) -> bool:
        """Return whether ``connect`` has succeeded, and the object has not been closed since.

        Source: ``hs.socket.udp:connected``.
        """
        return peer_of(self._endpoint) is not None

    def closed(self) -> bool:
        """Return whether the object is closed. A send, ``connect`` or ``listen`` opens the object.

        Source: ``hs.socket.udp:closed``.
        """
        return self._endpoint is None

    def info(self) -> UDPInfo:
        """Return the object's state as a dict with the 25 keys of hs.socket.udp's page.

        Source: ``hs.socket.udp:info``.
        """
        return info_of(self._endpoint, self._settings)
