"""The methods of Pluto's ``socket`` over TCP, with or without TLS, built on ``trisock.Socket``."""

from __future__ import annotations

import contextlib
import weakref
from typing import Literal

import trio

import trisock

from .blocking import close_descriptor, log_reason
from .intent import Intent
from .starttls import TLS, TLSOptions, TLSResult, parse_upgrade

# These exceptions mean that the connection is over. Pluto reports this without an exception.
_OVER = (trio.BrokenResourceError, trio.ClosedResourceError)


class TCPTransport:
    """A TCP connection, maybe with TLS. Its methods report the connection's end as Pluto does."""

    is_udp = False

    def __init__(self, sock: trisock.Socket, *, owned: bool = True) -> None:
        self.sock = sock
        self._to_push_back = b""  # data that could not be pushed back yet
        self.upgrade, self.closing = Intent(sock.abort), Intent(sock.abort)
        if owned:  # a Server owns all other sockets, and would crash if we closed their descriptors
            weakref.finalize(self, close_descriptor, sock.stream.socket)

    def __repr__(self) -> str:
        return repr(self.sock)

    async def send(self, data: bytes) -> bool:
        """Send all of the data. Return False if the connection is over."""
        try:
            self._check()
            await self.sock.send(data)
        except _OVER as exc:
            log_reason(exc)
            return False
        return True

    async def recv(self) -> bytes | None:
        """Return the oldest unread chunk, or ``None`` if the connection is over."""
        try:
            self._push_back()
            return await self.sock.recv() or None
        except _OVER as exc:
            log_reason(exc)
            return None

    async def peek(self) -> bytes | None:
        """Return the chunk that ``recv`` would return, or ``None`` if none has arrived."""
        try:
            self._push_back()
            return await self.sock.peek() or None
        except _OVER as exc:
            log_reason(exc)
            return None

    def unrecv(self, data: bytes) -> None:
        """Push data to the front of the receive buffer."""
        try:
            self._push_back(data)
        except _OVER as exc:
            log_reason(exc)

    def undo_recv(self, data: bytes | None) -> None:
        """Push back the data that an interrupted ``recv`` has received."""
        self._to_push_back += data or b""
        # If another thread is already reading, the next call pushes the data back.
        with contextlib.suppress(trio.BusyResourceError):
            self._push_back()

    def _push_back(self, more: bytes = b"") -> None:
        self._check()
        if self._to_push_back:
            with contextlib.suppress(*_OVER):  # closed: the data is dropped
                self.sock.unrecv(self._to_push_back)
            self._to_push_back = b""
        if more != b"":
            self.sock.unrecv(more)

    async def starttls(self, tls: TLS, options: TLSOptions | None) -> TLSResult:
        """Upgrade to TLS. If the upgrade fails, close the connection and return False."""
        with self.upgrade.work():
            if self.sock.istls():
                return None
            upgrade = parse_upgrade(tls, options)
            try:
                self._push_back()
                info = await self.sock.starttls(upgrade.tls)
                if upgrade.early_data:
                    await self._send_early_data(upgrade.early_data)
            except _OVER as exc:
                await self.sock.close()  # needed if the connection was broken before TLS began
                log_reason(exc)
                return False
            return (True, info.alpn_protocol) if upgrade.returns_protocol else True

    async def _send_early_data(self, data: bytes) -> None:
        """Send the early data. If this fails or is cancelled, abort the connection."""
        try:
            await self.sock.send(data)
        except BaseException:
            self.sock.abort()
            raise

    def undo_starttls(self) -> None:
        """Abort the connection after an interrupted ``starttls``."""
        self.sock.abort()

    async def close(self) -> None:
        """Close the connection, without losing what was sent."""
        with self.closing.work():
            await self.sock.close()

    def getpeer(self) -> tuple[str, int]:
        """Return the peer's address and port."""
        return self.sock.getpeer()

    def setpeer(self, ip: str, port: int) -> None:
        """Raise ``TypeError``: the peer of a connection cannot change."""
        raise TypeError("setpeer is for UDP sockets: the peer of a TCP connection cannot change")

    def getside(self) -> Literal["client", "server"]:
        """Return which side of the connection this is."""
        return self.sock.getside()

    @property
    def port(self) -> int:
        """The local port."""
        return self.sock.getlocal().port

    def istls(self) -> bool:
        """Return whether the connection uses TLS."""
        return self.sock.istls()

    def isopen(self) -> bool:
        """Return whether the connection is open, or has unread data."""
        return self._check() and (bool(self._to_push_back) or self.sock.isopen())

    def _check(self) -> bool:
        return self.upgrade.check() and self.closing.check()
