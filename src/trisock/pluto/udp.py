"""The methods of Pluto's ``socket`` over UDP, built on ``trisock.UDPSocket``."""

from __future__ import annotations

import collections
import ipaddress
import weakref
from typing import Literal, NamedTuple

import trio

import trisock

from .._address import check_port, to_ascii_host
from .._guard import bare
from .blocking import describe, log_reason
from .intent import Intent
from .starttls import TLS, TLSOptions, TLSResult, parse_upgrade

_IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

#: The peer of a server that has not received anything yet. Nobody has this address.
_NOBODY = trisock.Address("::", 0)

# If a datagram has already arrived, a receive returns it within this many passes of the scheduler:
# Trio starts the receive, asks the kernel, and resumes the receive.
_RECEIVE_PASSES = 3


class _Received(NamedTuple):
    """A datagram, or data from ``unrecv``, which has no address."""

    data: bytes
    address: trisock.Address | None = None
    destination: trisock.Address | None = None


class UDPTransport:
    """A UDP socket. It sends to its peer. A server's peer is the sender of the last datagram.

    A server receives from anybody. A client receives from the peers that it was given. If one of
    these is a multicast or broadcast address, the client receives from anybody, because the answers
    come from other addresses.

    Empty datagrams are dropped: in Python, they would end the loop ``while data := s.recv()``, and
    so anybody could end a server.

    Invariant: ``_buffer`` contains at most one datagram that ``peek`` has received, and the data
    that was pushed back.
    """

    is_udp = True

    def __init__(
        self,
        udp: trisock.UDPSocket,
        side: Literal["client", "server"],
        peer: trisock.Address = _NOBODY,
    ) -> None:
        self._udp = udp
        self._side: Literal["client", "server"] = side
        self._peer = peer
        # The local address that the peer's last datagram was sent to, if any: answers come from it.
        self._source: trisock.Address | None = None
        # The senders to receive from. None means anybody.
        self._senders: set[tuple[_IPAddress, int]] | None = None
        if side == "client":
            self._senders = set()
            self._receive_from(peer)
        self._buffer: collections.deque[_Received] = collections.deque()
        # What the last recv has returned, and the peer and the source before that recv.
        self._returned: tuple[_Received, trisock.Address, trisock.Address | None] | None = None
        self.upgrade, self.closing = Intent(udp.abort), Intent(udp.abort)
        weakref.finalize(self, udp.abort)

    def __repr__(self) -> str:
        return f"{self._side} {self._udp!r}"

    async def send(self, data: bytes) -> bool:
        """Send a datagram to the peer. Return False if the send fails."""
        self._check()
        try:
            if self._peer is _NOBODY:
                await trio.lowlevel.checkpoint()
                raise OSError(f"{self._udp} has no peer to send to: it has received nothing yet")
            await self._send(data)
        except (OSError, trio.ClosedResourceError) as exc:
            log_reason(exc)
            return False
        return True

    async def _send(self, data: bytes) -> None:
        peer = self._peer  # a recv in another task may change it meanwhile
        if self._source is not None:
            try:
                await self._udp.send(data, peer, source=self._source)
            except OSError:
                pass  # perhaps a multicast or broadcast address: send from another address
            else:
                return
        await self._udp.send(data, peer)

    async def recv(self) -> bytes | None:
        """Return the next datagram, or ``None`` if the socket is closed."""
        self._check()
        try:
            if self._buffer:
                await trio.lowlevel.checkpoint()
            while not self._buffer:
                await self._receive()
        except (OSError, trio.ClosedResourceError) as exc:
            log_reason(exc)
            return None
        received = self._buffer.popleft()
        self._returned = received, self._peer, self._source
        if self._side == "server" and received.address is not None:
            self._peer, self._source = received.address, received.destination
        return received.data

    def undo_recv(self, data: bytes | None) -> None:
        """Push back what an interrupted ``recv`` has received, and restore the earlier peer."""
        if data is None or self._returned is None or not self._udp.isopen():
            return
        received, peer, source = self._returned
        if received.data is not data:  # another thread has called recv since
            received = _Received(data)
        elif self._peer is received.address:
            self._peer, self._source = peer, source
        self._buffer.appendleft(received)

    async def _receive(self) -> None:
        """Wait for a datagram, and put it into the buffer."""
        while True:
            datagram = await self._udp.recv()
            if datagram.data and self._is_wanted(datagram.address):
                self._buffer.append(_Received(datagram.data, *datagram[1:3]))
                return

    async def peek(self) -> bytes | None:
        """Return the datagram that ``recv`` would return, or ``None`` if none has arrived."""
        self._check()
        failure: Exception | None = None
        try:
            if self._buffer:
                await trio.lowlevel.checkpoint()
            else:
                failure = await self._receive_nowait()
            if failure is not None:
                raise failure
        except (OSError, trio.ClosedResourceError) as exc:
            log_reason(exc)
        finally:
            del failure  # its traceback refers to this frame
        return self._buffer[0].data if self._buffer else None

    async def _receive_nowait(self) -> Exception | None:
        """If a datagram has already arrived, put it into the buffer.

        If the receive fails, return its exception. If it were raised here, the nursery would wrap
        it in a group.
        """
        failure = None

        async def limit() -> None:
            for _ in range(_RECEIVE_PASSES):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

        with bare():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(limit)
                try:
                    await self._receive()
                except Exception as exc:
                    failure = exc
                nursery.cancel_scope.cancel()
        return failure

    def unrecv(self, data: bytes) -> None:
        """Push data to the front of the buffer."""
        received = _Received(bytes(memoryview(data)))
        if self._check() and self._udp.isopen() and received.data:
            self._buffer.appendleft(received)

    async def starttls(self, tls: TLS, options: TLSOptions | None) -> TLSResult:
        """Close the socket and return False: there is no TLS over UDP."""
        with self.upgrade.work():
            parse_upgrade(tls, options)
            log_reason(OSError(f"{self._udp} cannot use TLS, which needs TCP"))
            await self._close()
            return False

    def undo_starttls(self) -> None:
        """Close the socket after an interrupted ``starttls``."""
        self._buffer.clear()
        self._udp.abort()

    async def close(self) -> None:
        """Close the socket."""
        with self.closing.work():
            await self._close()

    async def _close(self) -> None:
        self._buffer.clear()
        await self._udp.close()

    def getpeer(self) -> tuple[str, int]:
        """Return the address and port that ``send`` sends to."""
        return self._peer

    def setpeer(self, ip: str, port: int) -> None:
        """Send to another peer from now on."""
        self._peer, self._source = peer_address(ip, port), None
        self._receive_from(self._peer)

    def getside(self) -> Literal["client", "server"]:
        """Return which call made this socket: ``connect`` (client) or ``udpserver`` (server)."""
        return self._side

    @property
    def port(self) -> int:
        """The local port."""
        return self._udp.getlocal().port

    def istls(self) -> bool:
        """Return False: there is no TLS over UDP."""
        return False

    def isopen(self) -> bool:
        """Return whether the socket is open."""
        return self._check() and self._udp.isopen()

    def _check(self) -> bool:
        if self.upgrade.check() and self.closing.check():
            return True
        self._buffer.clear()  # the intent has closed the socket
        return False

    def _receive_from(self, peer: trisock.Address) -> None:
        if self._senders is not None:
            self._senders.add(_key(peer))
            if _others_answer_for(_key(peer)[0]):
                self._senders = None

    def _is_wanted(self, sender: trisock.Address) -> bool:
        return self._senders is None or _key(sender) in self._senders


async def connect_udp(host: str, port: int) -> UDPTransport:
    """Open a client's socket. Nothing is sent.

    Raises ``OSError`` if the name does not resolve, and ``TypeError`` or ``ValueError`` if an
    argument is invalid.
    """
    peer: trisock.Address | None
    try:
        peer = peer_address(host, port)
    except ValueError:  # a name, or invalid: then trisock.connect_udp raises a clear error
        async with await trisock.connect_udp(host, port) as resolved:
            peer = resolved.getpeer()
    else:
        await trio.lowlevel.checkpoint()
    assert peer is not None
    # Leave the socket unconnected: a connected socket could not change its peer.
    return UDPTransport(trisock.open_udp_nowait(broadcast=True), "client", peer)


def peer_address(ip: str, port: int) -> trisock.Address:
    """Return a peer's address. Raises ``TypeError`` or ``ValueError`` if an argument is invalid."""
    if not isinstance(ip, str):
        raise TypeError(f"an IP address must be a str, not {describe(ip)}")
    check_port(port, None)
    if port == 0:
        raise ValueError("a peer's port must be in 1-65535, not 0")
    try:
        ipaddress.ip_address(to_ascii_host(ip))  # to_ascii_host also checks the zone
    except ValueError:
        raise ValueError("a peer must be an IPv4 or IPv6 address, and not a name") from None
    return trisock.Address(ip, port)


def _key(address: trisock.Address) -> tuple[_IPAddress, int]:
    """Return an address in a form that can be compared: the IP as a number, without a zone."""
    ip = ipaddress.ip_address(address.host.partition("%")[0])
    return getattr(ip, "ipv4_mapped", None) or ip, address.port


def _others_answer_for(ip: _IPAddress) -> bool:
    """Return whether answers to a datagram for this address come from other addresses."""
    # We do not know the netmask, so each IPv4 address that ends in 255 may be a broadcast address.
    is_broadcast = ip.version == 4 and ip.packed[-1] == 255
    return ip.is_multicast or ip.is_unspecified or is_broadcast
