"""Helpers for the tests of ``hs.udp``: peers, and a resolver that waits."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from typing import Any

import trio

from helpers.hammerspoon import LOCALHOST
from helpers.resolver import Resolver
from trisock.hammerspoon import Sockets, UDPInfo, UDPSocket

IPV6_LOCALHOST = "::1"
BROADCAST = "127.255.255.255"  # the broadcast address of the loopback interface

# The result of info() on an object that is closed and has all its default settings.
CLOSED: dict[str, object] = {
    "connectedAddress": b"",
    "connectedHost": "",
    "connectedPort": 0,
    "isClosed": True,
    "isConnected": False,
    "isIPv4": False,
    "isIPv4Enabled": True,
    "isIPv4Preferred": False,
    "isIPv6": False,
    "isIPv6Enabled": True,
    "isIPv6Preferred": False,
    "isIPVersionNeutral": True,
    "localAddress": b"",
    "localAddress_IPv4": b"",
    "localAddress_IPv6": b"",
    "localHost": "",
    "localHost_IPv4": "",
    "localHost_IPv6": "",
    "localPort": 0,
    "localPort_IPv4": 0,
    "localPort_IPv6": 0,
    "maxReceiveIPv4BufferSize": 9216,
    "maxReceiveIPv6BufferSize": 9216,
    "timeout": -1,
    "userData": "",
}


def port_of(sock: UDPSocket) -> int:
    """Return the local port of an object."""
    return sock.info()["localPort"]


def sender(sockaddr: object) -> tuple[str, int]:
    """Return the host and the port in a sockaddr that a read callback got."""
    assert isinstance(sockaddr, bytes)
    parsed = Sockets.parseAddress(sockaddr)
    assert parsed is not None
    return parsed["host"], parsed["port"]


def local(info: UDPInfo) -> tuple[str, int]:
    return info["localHost"], info["localPort"]


@contextlib.contextmanager
def raw_udp(host: str = LOCALHOST, port: int = 0) -> Iterator[Any]:
    """A UDP socket of Trio, bound to an address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, port))
        yield trio.socket.from_stdlib_socket(sock)


def free_port() -> int:
    """Return a UDP port that nobody uses."""
    with raw_udp() as sock:
        port: int = sock.getsockname()[1]
        return port


class WaitingResolver(Resolver):
    """A resolver that answers only after ``release`` is set."""

    def __init__(self, **names: list[str]) -> None:
        super().__init__(**names)
        self.release = trio.Event()

    async def getaddrinfo(self, host: bytes | None, *args: Any, **kwargs: Any) -> Any:
        self.asked.append(host)
        await self.release.wait()
        return await super().getaddrinfo(host, *args, **kwargs)
