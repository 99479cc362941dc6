"""hs.socket.udp's ``info``."""

from __future__ import annotations

from typing import TypedDict

import trisock

from ..sockaddr import pack_sockaddr
from .endpoint import Endpoint
from .settings import Settings

_NOWHERE = trisock.Address("", 0)


class UDPInfo(TypedDict):
    """The result of ``info``. A value that does not apply is empty (``b""``, ``""``, 0)."""

    connectedAddress: bytes
    connectedHost: str
    connectedPort: int
    isClosed: bool
    isConnected: bool
    isIPv4: bool
    isIPv4Enabled: bool
    isIPv4Preferred: bool
    isIPv6: bool
    isIPv6Enabled: bool
    isIPv6Preferred: bool
    isIPVersionNeutral: bool
    localAddress: bytes
    localAddress_IPv4: bytes
    localAddress_IPv6: bytes
    localHost: str
    localHost_IPv4: str
    localHost_IPv6: str
    localPort: int
    localPort_IPv4: int
    localPort_IPv6: int
    maxReceiveIPv4BufferSize: int
    maxReceiveIPv6BufferSize: int
    timeout: float
    userData: str


def peer_of(endpoint: Endpoint | None) -> trisock.Address | None:
    """Return the peer that an object is connected to, or ``None``."""
    return None if endpoint is None or endpoint.sock is None else endpoint.sock.getpeer()


def info_of(endpoint: Endpoint | None, settings: Settings) -> UDPInfo:
    """Return the object's information. The endpoint is ``None`` if the object is closed."""
    peer = peer_of(endpoint)
    there = peer or _NOWHERE
    versions = set() if endpoint is None else endpoint.versions
    ipv4, ipv6 = _local(endpoint, 4), _local(endpoint, 6)
    local = ipv4 if 4 in versions else ipv6  # IPv4 first, as in hs.socket.udp
    return {
        "connectedAddress": pack_sockaddr(there),
        "connectedHost": there.host,
        "connectedPort": there.port,
        "isClosed": endpoint is None,
        "isConnected": peer is not None,
        "isIPv4": 4 in versions,
        "isIPv4Enabled": 4 in settings.enabled,
        "isIPv4Preferred": settings.preferred == 4,
        "isIPv6": 6 in versions,
        "isIPv6Enabled": 6 in settings.enabled,
        "isIPv6Preferred": settings.preferred == 6,
        "isIPVersionNeutral": settings.preferred is None,
        "localAddress": pack_sockaddr(local),
        "localAddress_IPv4": pack_sockaddr(ipv4),
        "localAddress_IPv6": pack_sockaddr(ipv6),
        "localHost": local.host,
        "localHost_IPv4": ipv4.host,
        "localHost_IPv6": ipv6.host,
        "localPort": local.port,
        "localPort_IPv4": ipv4.port,
        "localPort_IPv6": ipv6.port,
        "maxReceiveIPv4BufferSize": settings.buffer_size[4],
        "maxReceiveIPv6BufferSize": settings.buffer_size[6],
        "timeout": settings.timeout,
        "userData": _user_data(endpoint),
    }


def _local(endpoint: Endpoint | None, version: int) -> trisock.Address:
    """Return the local address of one IP version."""
    if endpoint is None or endpoint.sock is None or version not in endpoint.versions:
        return _NOWHERE
    local = endpoint.sock.getlocal()
    if local.host == "::" and version == 4:  # one socket for IPv4 and IPv6
        return trisock.Address("0.0.0.0", local.port)  # noqa: S104
    return local


def _user_data(endpoint: Endpoint | None) -> str:
    if endpoint is not None and endpoint.is_server:
        return "SERVER"
    return "" if peer_of(endpoint) is None else "DEFAULT"
