"""hs.socket's ``info``."""

from __future__ import annotations

from typing import TypedDict

import trisock

from .endpoints import QueuedClient, QueuedServer
from .sockaddr import pack_sockaddr


class Info(TypedDict):
    """The result of ``info``. A value that does not apply is empty (``b""``, ``""``, 0)."""

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


def connections_of(endpoint: QueuedClient | QueuedServer | None) -> int:
    """Return the number of connections. The endpoint is a client, a server, or ``None``."""
    connections = () if endpoint is None else endpoint.connections
    return sum(connection.sock is not None for connection in connections)


def info_of(endpoint: QueuedClient | QueuedServer | None, timeout: float) -> Info:
    """Return the object's information. The endpoint is a client, a server, or ``None``."""
    path = "" if endpoint is None else endpoint.path
    sock = endpoint.connections[0].sock if isinstance(endpoint, QueuedClient) else None
    peer = trisock.Address("", 0)
    addresses = endpoint.addresses if isinstance(endpoint, QueuedServer) else [peer]
    if sock is not None:
        addresses, peer = [sock.getlocal()], sock.getpeer()
    if path:  # a Unix socket has no host or port
        addresses = [peer := trisock.Address("", 0)]
    hosts = [address.host for address in addresses]
    return {
        "connectedAddress": pack_sockaddr(peer),
        "connectedHost": peer.host,
        "connectedPort": peer.port,
        "connectedURL": path if sock is not None else "",
        "connections": connections_of(endpoint),
        "isConnected": sock is not None,
        "isDisconnected": endpoint is None,
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
        "userData": "SERVER" if isinstance(endpoint, QueuedServer) else "DEFAULT" if sock else "",
    }
