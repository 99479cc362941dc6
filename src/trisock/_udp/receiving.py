"""Receiver: how a UDP socket receives."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TypeVar, cast

import trio

from .. import _fork
from .._address import with_message
from .._arguments import positive_int
from .addresses import address_from
from .datagram import Datagram
from .endpoint import Endpoint
from .syscalls import ANCILLARY_SIZE, MAX_DATAGRAM, MSG_TRUNC, Received

# The kernel charges each datagram in its buffer with more than this number of bytes. So the buffer
# holds fewer datagrams than SO_RCVBUF divided by this number.
_MIN_CHARGE = 512

# Datagram(...) costs twice as much.
_new_datagram = cast("Callable[[type[Datagram], object], Datagram]", tuple.__new__)

SelfT = TypeVar("SelfT", bound="Receiver")


class Receiver(Endpoint):
    """The receive methods of ``UDPSocket``."""

    async def recv(self, max_bytes: int = MAX_DATAGRAM) -> Datagram:
        """Wait for a datagram and return it.

        Args:
          max_bytes: return at most this many bytes. If the datagram is longer, its other bytes are
            lost, and ``truncated`` is True. The default is enough for any datagram.

        Raises:
          OSError: the socket has one peer, and an ICMP error of an earlier send has arrived, such
            as ``ConnectionRefusedError`` if nothing listens on the peer's port. (On Windows, this
            is ``ConnectionResetError``. Linux does not report errors that may be temporary, such as
            an unreachable host.) The socket stays usable.
          trio.ClosedResourceError: the socket is closed, or ``stop_receiving`` was called and no
            unread datagram remains.
          trio.BusyResourceError: another task is receiving.
          TypeError, ValueError: ``max_bytes`` is not a positive int.

        A cancelled call has received nothing, so no datagram is lost.
        """
        # This is the hot path (benchmark rows udp-echo64 and udp-echo1). It inlines the methods of
        # ConflictDetector.
        receiving = self._receiving
        if receiving.in_use:
            receiving.check()
        if max_bytes != MAX_DATAGRAM:
            max_bytes = min(positive_int("max_bytes", max_bytes), MAX_DATAGRAM)
        if self._rest is not None:
            with receiving:
                return await self._receive_rest(max_bytes)
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            received = self._receive(max_bytes, ANCILLARY_SIZE)
        except BlockingIOError:
            pass  # wait outside this block, so that later errors have no __context__
        except OSError as exc:
            with receiving:
                await self._count_call()
            raise self._receiving_failed(exc) from exc
        else:
            if self._calls_left:
                self._calls_left -= 1
            else:
                with receiving:
                    await self._schedule()
            return self._datagram(received)
        receiving.in_use = True
        try:
            return await self._wait_and_receive(max_bytes)
        finally:
            receiving.in_use = False

    def __aiter__(self: SelfT) -> SelfT:
        """Iterate over datagrams: ``async for datagram in udp``.

        The loop ends when the socket is closed. After ``stop_receiving``, it ends when no unread
        datagram remains. It raises the errors of ``recv``.
        """
        return self

    async def __anext__(self) -> Datagram:
        try:
            return await self.recv()
        except trio.ClosedResourceError:
            raise StopAsyncIteration from None

    def stop_receiving(self) -> None:
        """Receive only datagrams that have already arrived. Sending still works.

        ``recv`` returns the datagrams in the kernel's buffer, and then raises
        ``trio.ClosedResourceError``. An iteration then ends. So a server can finish its answers. If
        datagrams arrive faster than they are received, ``recv`` stops after as many datagrams as
        the kernel's buffer can hold. A second call changes nothing.
        """
        if self._rest is None and self.isopen():
            size = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            self._rest = size // _MIN_CHARGE + 1
            _fork.notify_closing(self._socket.fileno())  # wakes the task that receives

    async def _wait_and_receive(self, max_bytes: int) -> Datagram:
        # Make the next call a schedule point. That call is probably the send of our answer. While
        # other tasks run, the peer's next datagram may arrive, and we need not sleep: a sleep of
        # the process costs more than a schedule point (row udp-echo1).
        self._calls_left = 0
        while True:
            self._check_open()
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except trio.ClosedResourceError:  # Trio's message does not name the socket
                self._check_open()
                if self._rest is not None:
                    return await self._receive_rest(max_bytes)
            try:
                return self._datagram(self._receive(max_bytes, ANCILLARY_SIZE))
            except BlockingIOError:
                pass
            except OSError as exc:
                raise self._receiving_failed(exc) from exc

    async def _receive_rest(self, max_bytes: int) -> Datagram:
        """After ``stop_receiving``, return a datagram that has already arrived."""
        await trio.lowlevel.checkpoint()
        self._check_open()
        if self._rest:
            self._rest -= 1
            try:
                return self._datagram(self._receive(max_bytes, ANCILLARY_SIZE))
            except BlockingIOError:
                self._rest = 0
            except OSError as exc:
                raise self._receiving_failed(exc) from exc
        raise trio.ClosedResourceError(f"{self} receives no more: stop_receiving was called")

    def _datagram(self, received: Received) -> Datagram:
        data, ancillary, flags, sockaddr = received
        destination = self._destination or self._destinations.find(ancillary)
        truncated = flags & MSG_TRUNC != 0
        return _new_datagram(Datagram, (data, address_from(sockaddr), destination, truncated))

    def _receiving_failed(self, exc: OSError) -> Exception:
        if self._is_closed_error(exc):
            return self._closed_error()
        where = self._local if self._peer is None else self._peer
        return with_message(exc, f"cannot receive {'on' if self._peer is None else 'from'} {where}")
