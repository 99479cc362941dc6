"""What hs.socket's ``info`` tells."""

from __future__ import annotations

from typing import TypedDict

import trisock

from .endpoints import QueuedClient, QueuedServer
from .sockaddr import pack_sockaddr


class Info(TypedDict):
    """What ``info`` returns: empty (``b""``, ``""``, 0) where there is nothing to tell."""

    connectedAddress: bytes
    connectedHost: str
    connectedPort: int
    connectedURL: str
    connections: int
    isConnected: bool
    isDisconnected: bool
    isIPv4: bool
    isIPv4Enabled: bool
    isIPv4PreferredOverIPv6: bool
    isIPv6: bool
    isIPv6Enabled: bool
    isSecure: bool
    localAddress: bytes
    localHost: str
    localPort: int
    timeout: float
    unixSocketPath: str
    userData: str


def connections_of(role: QueuedClient | QueuedServer | None) -> int:
    """Return how many connections an object has, whatever it is."""
    connections = () if role is None else role.connections
    return sum(connection.sock is not None for connection in connections)


def info_of(role: QueuedClient | QueuedServer | None, timeout: float) -> Info:
    """Return what is known about an object: a client, a server, or neither."""
    path = "" if role is None else role.path
    sock = role.connections[0].sock if isinstance(role, QueuedClient) else None
    peer = trisock.Address("", 0)
    addresses = role.addresses if isinstance(role, QueuedServer) else [peer]
    if sock is not None:
        addresses, peer = [sock.getlocal()], sock.getpeer()
    if path:  # of a Unix socket, which has nothing else
        addresses = [peer := trisock.Address("", 0)]
    hosts = [address.host for address in addresses]
    return {
        "connectedAddress": pack_sockaddr(peer),
        "connectedHost": peer.host,
        "connectedPort": peer.port,
        "connectedURL": path if sock is not None else "",
        "connections": connections_of(role),
        "isConnected": sock is not None,
        "isDisconnected": role is None,
        "isIPv4": any(host and ":" not in host for host in hosts),
        "isIPv4Enabled": True,
        "isIPv4PreferredOverIPv6": False,
        "isIPv6": any(":" in host for host in hosts),
        "isIPv6Enabled": True,
        "isSecure": sock is not None and sock.istls(),
        "localAddress": pack_sockaddr(addresses[0]),
        "localHost": hosts[0],
        "localPort": addresses[0].port,
        "timeout": timeout,
        "unixSocketPath": path,
        "userData": "SERVER" if isinstance(role, QueuedServer) else "DEFAULT" if sock else "",
    }
