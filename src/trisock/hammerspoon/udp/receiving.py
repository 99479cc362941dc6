"""Receiving: which datagrams the read callback of an hs.socket.udp object gets, and when."""

from __future__ import annotations

import enum
import inspect
import logging
from collections.abc import Callable

import trio

import trisock

from ..._guard import log
from ..callbacks import PendingCallbacks
from ..queues import logger
from ..sockaddr import pack_sockaddr
from .settings import Settings, version_of


class Mode(enum.Enum):
    """How many datagrams the callback gets."""

    PAUSED = enum.auto()
    ONE = enum.auto()  # one datagram, and then PAUSED
    CONTINUOUS = enum.auto()


class Receiving:
    """Receives datagrams, one at a time, and calls the read callback with each.

    The next datagram is received when the callback of the previous one has ended. Further datagrams
    stay in the kernel's buffer, which is bounded. So a change of the mode or the callback also
    applies to datagrams that have already arrived.

    Args:
      owner: the object, for the log.
      sock: the socket, or ``None`` while there is none.
      settings: the object's settings.
      callbacks: the object's queued callbacks.
      report: called with an error of the socket.

    Invariant: ``_received`` is a datagram whose callback has not begun.
    """

    def __init__(
        self,
        owner: object,
        sock: trisock.UDPSocket | None,
        settings: Settings,
        callbacks: PendingCallbacks,
        report: Callable[[Exception], None],
    ) -> None:
        self._owner = owner
        self._sock = sock
        self._settings = settings
        self._callbacks = callbacks
        self._report = report
        self._mode = Mode.PAUSED
        self._received: tuple[bytes, bytes] | None = None
        self._changed = trio.lowlevel.ParkingLot()
        self._wait = trio.CancelScope()

    # ---- synchronous calls ----

    def set_mode(self, mode: Mode) -> None:
        """Replace the mode."""
        self._mode = mode
        self.restart()

    def restart(self) -> None:
        """Check the mode, the settings and the socket again, because one of them has changed."""
        self._wait.cancel()
        self._changed.unpark_all()

    def replace_socket(self, sock: trisock.UDPSocket) -> None:
        """Receive from another socket. Drop a datagram whose callback has not begun."""
        self._sock = sock
        self._received = None  # the sender may not be the new socket's peer
        self.restart()

    # ---- in the background ----

    async def run(self) -> None:
        """Receive until cancelled."""
        while True:
            if self._sock is None or not self._is_wanted():
                await self._changed.park()
            elif self._received is not None:
                await self._call_back()
            else:
                await self._receive(self._sock)

    def _is_wanted(self) -> bool:
        return self._mode is not Mode.PAUSED and self._settings.callback is not None

    async def _receive(self, sock: trisock.UDPSocket) -> None:
        """Wait for a datagram, or for ``restart``."""
        sizes = self._settings.buffer_size
        with trio.CancelScope() as self._wait:
            try:
                # The next datagram's IP version is not known yet, so truncate the data afterwards.
                datagram = await sock.recv(max(1, *sizes.values()))
            except (OSError, trio.ClosedResourceError) as exc:
                # Either this is an ICMP error about an earlier send, and the socket stays usable.
                # Or ``connect`` has replaced the socket.
                if isinstance(exc, OSError):
                    self._report(exc)
                await trio.lowlevel.checkpoint()
            else:
                size = sizes[version_of(datagram.address.host)]
                if size:  # with a size of 0, hs.socket.udp drops the datagram
                    log(logger, logging.DEBUG, "%r: data read", self._owner)
                    self._received = datagram.data[:size], pack_sockaddr(datagram.address)

    async def _call_back(self) -> None:
        """Queue the read callback behind the other callbacks, and wait until it has ended."""
        ended = trio.Event()

        async def call() -> None:
            try:
                # Queued callbacks may have changed the mode or cleared the callback.
                if self._received is not None and self._is_wanted():
                    awaitable = self._deliver(*self._received)
                    if inspect.isawaitable(awaitable):
                        await awaitable
            finally:
                ended.set()

        self._callbacks.put(call)
        await ended.wait()

    def _deliver(self, data: bytes, sockaddr: bytes) -> object:
        assert self._settings.callback is not None
        self._received = None
        if self._mode is Mode.ONE:
            self._mode = Mode.PAUSED
        return self._settings.callback(data, sockaddr)
