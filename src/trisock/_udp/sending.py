"""Sender: how a UDP socket sends."""

from __future__ import annotations

import contextlib
import errno
import socket
from typing import cast

import trio

from .._address import format_host_port, to_ascii_host, with_message
from .._arguments import Buffer, bytes_view
from .addresses import ONLY_IPV4, SockAddr, advice_for_broadcast, check_address, sockaddr_for
from .endpoint import Endpoint
from .packet_info import AncillaryItem
from .syscalls import send_to


class Sender(Endpoint):
    """The send method of ``UDPSocket``."""

    async def send(
        self,
        data: Buffer,
        address: tuple[str, int] | None = None,
        *,
        source: tuple[str, int] | None = None,
    ) -> None:
        """Send a datagram.

        Args:
          data: the payload, at most 65,507 bytes over IPv4 (65,527 over IPv6). May be empty.
          address: the receiver, as ``(host, port)``. Optional if the socket has one peer. If the
            host is a name, each call looks up the name, and uses its first address.
          source: the local address to send from. To answer a datagram from the address that it was
            sent to, pass ``datagram.destination``. The port must be that of the socket. ``None``:
            the system chooses. A multicast or broadcast address cannot be a source: if
            ``datagram.destination`` is such an address, do not pass it.

        Raises:
          OSError: the system does not send the datagram. The message names the address. Some
            reasons: the datagram is too long (``EMSGSIZE``), the network is unreachable, a
            broadcast was not allowed, the port of the receiver is 0, the source is not an address
            of this machine, or the socket does not support this kind of address (``EAFNOSUPPORT``).
            ``socket.gaierror``: the host is unknown. If the socket has one peer, an ICMP error of
            an earlier send is also raised here, as in ``recv``. In all cases, this datagram was not
            sent.
          trio.ClosedResourceError: the socket is closed.
          TypeError, ValueError: an argument is invalid.

        A server should expect an ``OSError``: the address comes from the network, and an answer to
        it may be impossible.

        A datagram that was sent may be lost on its way, or arrive twice. If the call is cancelled,
        the datagram was not sent.
        """
        if type(data) is not bytes:
            data = bytes_view(data)
        if self._peer is None:
            check_address("address", address)
        elif address is not None:
            self._check_peer(address)
        await trio.lowlevel.checkpoint_if_cancelled()
        item = sockaddr = None
        try:
            if source is not None:
                item = self._sources.find(source)
            if self._peer is None and address is not None:
                sockaddr = sockaddr_for(self._family, *address)
                if sockaddr is None:
                    sockaddr = await self._look_up(*address)
            try:
                send_to(self._socket, data, item, sockaddr)
            except BlockingIOError:
                pass  # wait outside this block, so that later errors have no __context__
            else:
                if self._calls_left:
                    self._calls_left -= 1
                else:
                    await self._schedule()
                return
            await self._wait_and_send(data, item, sockaddr)
        except OSError as exc:
            await self._count_call()
            raise self._sending_failed(exc, len(data), address, source) from exc

    async def _wait_and_send(
        self, data: bytes | memoryview, item: AncillaryItem | None, sockaddr: SockAddr | None
    ) -> None:
        if self._send_lock is None:
            self._send_lock = trio.Lock()
        async with self._send_lock:  # Trio lets only one task at a time wait
            while True:
                self._check_open()
                try:
                    await trio.lowlevel.wait_writable(self._socket)
                except trio.ClosedResourceError:  # by close, or by stop_receiving
                    continue
                with contextlib.suppress(BlockingIOError):
                    send_to(self._socket, data, item, sockaddr)
                    return

    def _check_peer(self, address: tuple[str, int]) -> None:
        if check_address("address", address) != self._peer:
            raise ValueError(f"{self} sends only to its peer, not to {format_host_port(*address)}")

    async def _look_up(self, host: str, port: int) -> SockAddr:
        """Look up a name. Return the sockaddr of its first address that the socket supports."""
        name = to_ascii_host(host)
        family = self._family if self._is_single_family() else socket.AF_UNSPEC
        with trio.CancelScope() as scope:
            self._lookups.add(scope)
            try:
                found = await trio.socket.getaddrinfo(
                    name.encode(), port, family=family, type=socket.SOCK_DGRAM
                )
            finally:
                self._lookups.discard(scope)
            sockaddr = found[0][4]
            if len(sockaddr) == 2 and self._family == socket.AF_INET6:
                return f"::ffff:{sockaddr[0]}", port, 0, 0
            return cast("SockAddr", sockaddr)
        raise self._closed_error()

    def _is_single_family(self) -> bool:
        if self._family == socket.AF_INET:
            return True
        return bool(self.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))

    def _sending_failed(
        self,
        exc: OSError,
        size: int,
        address: tuple[str, int] | None,
        source: tuple[str, int] | None,
    ) -> Exception:
        if self._is_closed_error(exc):
            return self._closed_error()
        target = self._peer if address is None else address
        assert target is not None
        message = f"cannot send to {format_host_port(*target)}"
        if source is not None:
            message += f" from {format_host_port(*source)}"
        return with_message(exc, message, self._advice(exc, size))

    def _advice(self, exc: OSError, size: int) -> str:
        """Return advice for the error of a failed send, or ``""``."""
        if exc.errno == errno.EMSGSIZE:
            return f"{size} bytes"
        if exc.errno == errno.EAFNOSUPPORT and self._family == socket.AF_INET:
            return ONLY_IPV4
        return advice_for_broadcast(exc)
