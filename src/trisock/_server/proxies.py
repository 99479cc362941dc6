"""TrustedProxies: whose PROXY headers a server believes, and receiving such a header."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable
from typing import TypeAlias

import trio

from .._address import Address, is_unix_address
from .._arguments import quoted
from .._net.connection import Connection
from .._net.proxy_header import MAX_HEADER
from .._net.proxy_parser import parse_proxy_header
from .._text import message_without_peer

_Network: TypeAlias = "ipaddress.IPv4Network | ipaddress.IPv6Network"

# The IPv6 addresses to which IPv4 addresses are mapped. We show a mapped address as IPv4.
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

# What looks like a network, and is thus no secret.
_NETWORK = re.compile(r"[0-9A-Fa-f:.]{1,39}/[0-9.]{0,15}")


class ProxyHeaderError(Exception):
    """A connection is refused, because of its PROXY header.

    Attributes:
      counter: the counter in ``ServerStats`` for such connections.
    """

    def __init__(self, counter: str, reason: str) -> None:
        super().__init__(reason)
        self.counter = counter


class TrustedProxies:
    """The proxies that may send PROXY headers to a server.

    Args:
      proxies: networks (``"10.0.0.0/8"``), addresses (``"::1"``), and ``"unix"`` for all clients of
        a Unix socket.

    Raises TypeError or ValueError if ``proxies`` is invalid or empty.
    """

    def __init__(self, proxies: Iterable[str]) -> None:
        if isinstance(proxies, str) or not isinstance(proxies, Iterable):
            found = quoted(proxies)
            raise TypeError(f"trusted_proxies must be a list of networks, not {found}")
        given = list(proxies)
        if not given:
            raise ValueError("trusted_proxies is empty, so every connection would be refused")
        self._unix = "unix" in given
        self._networks = [_network(each) for each in given if each != "unix"]

    async def receive_header(self, connection: Connection) -> None:
        """Receive a PROXY header, whose addresses become those of the connection.

        Call this before any other read. Bytes after the header stay unread. With these bytes, the
        header has at most ``MAX_HEADER`` bytes.

        Raises:
          ProxyHeaderError: the peer is not trusted, or has sent no valid header. The caller must
            reset the connection.

        If cancelled, the connection is unusable.
        """
        if not self._trusts(connection.peer):
            raise ProxyHeaderError("untrusted_proxies", "it is not in trusted_proxies")
        try:
            await _receive_header(connection)
        except (ValueError, trio.BrokenResourceError) as exc:
            why = message_without_peer(exc) or str(exc)
            raise ProxyHeaderError("bad_proxy_headers", why) from None
        except trio.ClosedResourceError:  # the time limit has aborted the connection
            why = "its PROXY header has not arrived in time"
            raise ProxyHeaderError("bad_proxy_headers", why) from None

    def _trusts(self, peer: Address) -> bool:
        if is_unix_address(peer):
            return self._unix
        ip = ipaddress.ip_address(peer.host)
        return any(ip in network for network in self._networks)


async def _receive_header(connection: Connection) -> None:
    received = b""
    parsed = None
    while parsed is None:
        chunk = await connection.transport.wait_and_receive(MAX_HEADER - len(received))
        if not chunk:
            raise ValueError(f"it ended {'inside' if received else 'before'} its PROXY header")
        received += chunk
        parsed = parse_proxy_header(received)
    header, size = parsed
    if size < len(received):
        connection.buffer.append(received[size:])
    connection.set_proxy_header(header)


def _network(text: object) -> _Network:
    if not isinstance(text, str):
        raise TypeError(f"a trusted proxy must be a str, not {quoted(text)}")
    try:
        if "%" in text:  # ipaddress would ignore the zone
            raise ValueError
        network = ipaddress.ip_network(text)
    except ValueError:
        found = repr(text) if _NETWORK.fullmatch(text) else quoted(text)
        raise ValueError(
            f"a trusted proxy must be a network, an address or 'unix', not {found}{_hint(text)}"
        ) from None
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(_MAPPED):
        packed = network.network_address.packed[12:]
        return ipaddress.IPv4Network((packed, network.prefixlen - 96))
    return network


def _hint(text: str) -> str:
    """Explain the common mistake: an address inside the network instead of its first address."""
    try:
        return f": did you mean {str(ipaddress.ip_network(text, strict=False))!r}?"
    except ValueError:
        return ""
