"""TrustedProxies: receive PROXY headers, but only from the proxies that a server trusts."""

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

# The IPv4-mapped IPv6 addresses (RFC 4291, section 2.5.5.2). We show them as IPv4.
_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")

# An error may quote text that looks like a network, because such text is not a secret.
_NETWORK = re.compile(r"[0-9A-Fa-f:.]{1,39}/[0-9.]{0,15}")


class ProxyHeaderError(Exception):
    """The server refuses a connection because of its PROXY header.

    Attributes:
      counter: the attribute of ``ServerStats`` that counts the connection.
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
        """Receive a PROXY header, and give the connection the addresses in this header.

        Call this before any other read. This receives at most ``MAX_HEADER`` bytes. Bytes after the
        header stay unread.

        Raises:
          ProxyHeaderError: the peer is not trusted, or it sent no valid header. The caller must
            reset the connection.

        If cancelled, the connection is unusable.
        """
        if not self._trusts(connection.peer):
            raise ProxyHeaderError("untrusted_proxies", "the peer is not in trusted_proxies")
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
    """Explain a common mistake: the address is inside the network, but not its first address."""
    try:
        return f": did you mean {str(ipaddress.ip_network(text, strict=False))!r}?"
    except ValueError:
        return ""
