"""Destinations and Sources: convert between packet info and the local addresses of users."""

from __future__ import annotations

from .._address import Address
from .._arguments import quoted
from .addresses import check_address, pack_for
from .packet_info import AncillaryItem, destination_host, source_item

# Both classes cache their conversions, because most programs use few addresses. The size of the
# cache is limited, because senders choose the destinations.
_MAX_REMEMBERED = 256


class Destinations:
    """The addresses that datagrams were sent to.

    Args:
      port: the port of the socket.
    """

    __slots__ = ("_known", "_port")

    def __init__(self, port: int) -> None:
        self._port = port
        self._known: dict[bytes, Address] = {}

    def find(self, ancillary: list[AncillaryItem]) -> Address | None:
        """Return the destination of a datagram, or ``None`` if its ancillary data lacks it."""
        if len(ancillary) != 1:  # the program has requested other data
            host = destination_host(ancillary)
            return None if host is None else Address(host, self._port)
        key = ancillary[0][2]
        known = self._known.get(key)
        if known is not None:  # hot path
            return known
        host = destination_host(ancillary)
        if host is None:
            return None
        if len(self._known) >= _MAX_REMEMBERED:
            self._known.clear()
        self._known[key] = destination = Address(host, self._port)
        return destination


class Sources:
    """The addresses that a socket sends from.

    Args:
      family: the family of the socket.
      local: the socket's own address.
    """

    __slots__ = ("_family", "_known", "_local")

    def __init__(self, family: int, local: Address) -> None:
        self._family = family
        self._local = local
        self._known: dict[tuple[str, int], AncillaryItem | None] = {local: None}

    def find(self, source: tuple[str, int]) -> AncillaryItem | None:
        """Return the ancillary data for a source, or ``None`` for the socket's own address.

        Raises ``TypeError``, ``ValueError`` or ``OSError``.
        """
        if type(source) is Address and source in self._known:  # hot path
            return self._known[source]
        host, port = check_address("source", source)
        if port != self._local.port:
            raise ValueError(
                f"a source must have the socket's port, {self._local.port}, not {quoted(port)}"
            )
        found = pack_for(self._family, host)
        if found is None:
            raise ValueError(f"a source must be an address, not a name: {quoted(host)}")
        if len(self._known) >= _MAX_REMEMBERED:
            self._known = {self._local: None}
        item = None if host == self._local.host else source_item(self._family, *found)
        self._known[Address(host, port)] = item
        return item
