"""Datagram: what one ``recv`` of a UDP socket returns."""

from __future__ import annotations

from typing import NamedTuple

from .._address import Address


class Datagram(NamedTuple):
    """One datagram that was received.

    Attributes:
      data: the payload, which may be empty.
      address: the address of the sender, which anyone can forge. To answer, pass this address to
        ``UDPSocket.send``. If its port is 0, no answer is possible (RFC 768).
      destination: the local address that the datagram was sent to: an address of this machine, a
        group or a broadcast address. To answer from this address, pass it to ``UDPSocket.send`` as
        ``source``. ``None`` if the system does not report it (on Windows, unless the socket has one
        local address).
      truncated: whether the datagram was longer than ``max_bytes``. If so, its other bytes are
        lost.

    ``repr`` does not show the data, which may be a secret.
    """

    data: bytes
    address: Address
    destination: Address | None
    truncated: bool

    def __repr__(self) -> str:
        size = f"{len(self.data)} bytes{' (truncated)' if self.truncated else ''}"
        return f"<trisock.Datagram {size} from {self.address} to {self.destination}>"
