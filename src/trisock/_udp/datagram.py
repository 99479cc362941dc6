"""Datagram: what one ``recv`` of a UDP socket returns."""

from __future__ import annotations

from typing import NamedTuple

from .._address import Address


class Datagram(NamedTuple):
    """One datagram that was received.

    Attributes:
      data: the payload, which may be empty.
      address: the address of the sender. To answer, pass it to ``UDPSocket.send``. Anyone can forge
        it. Its port may be 0, and then nobody can answer (RFC 768).
      destination: the local address that the datagram was sent to: an address of this machine, a
        group or a broadcast address. To answer from it, pass it to ``UDPSocket.send`` as
        ``source``. ``None`` where the system does not tell (Windows, unless the socket has one
        local address).
      truncated: whether the datagram was longer than ``max_bytes``. The rest of it is lost.

    ``repr`` does not show the data, which may be a secret.
    """

    data: bytes
    address: Address
    destination: Address | None
    truncated: bool

    def __repr__(self) -> str:
        size = f"{len(self.data)} bytes{' (truncated)' if self.truncated else ''}"
        return f"<trisock.Datagram {size} from {self.address} to {self.destination}>"
