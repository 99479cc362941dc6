"""``info`` of hs.socket.udp: each documented key, in each state of an object. ``repr``."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio

from helpers.hammerspoon import LOCALHOST, Calls
from helpers.hammerspoon_udp import CLOSED, IPV6_LOCALHOST, WaitingResolver, port_of
from helpers.sockaddrs import native
from trisock.hammerspoon import UDPInfo, UDPSocket, UDPSockets


def info_of(sock: UDPSocket) -> UDPInfo:
    """Return ``sock.info()`` after a check of its keys and the types of its values."""
    info = sock.info()
    assert list(info) == list(CLOSED)
    assert len(info) == 25
    for key, value in info.items():
        types = (int, float) if key == "timeout" else (type(CLOSED[key]),)
        assert type(value) in types, key
    return info


def address(host: str, port: int) -> bytes:
    """Return a sockaddr in Linux's layout."""
    if ":" in host:
        packed = bytes(4) + socket.inet_pton(socket.AF_INET6, host) + bytes(4)
        return native(socket.AF_INET6) + port.to_bytes(2, "big") + packed
    packed = socket.inet_pton(socket.AF_INET, host) + bytes(8)
    return native(socket.AF_INET) + port.to_bytes(2, "big") + packed


def local_values(ipv4: str, ipv6: str, port: int) -> dict[str, object]:
    """Return the values about the local end. Without a socket, a version's host is ``""``."""
    values: dict[str, object] = {"isClosed": False, "isIPv4": bool(ipv4), "isIPv6": bool(ipv6)}
    for suffix, host in [("", ipv4 or ipv6), ("_IPv4", ipv4), ("_IPv6", ipv6)]:
        values[f"localAddress{suffix}"] = address(host, port) if host else b""
        values[f"localHost{suffix}"] = host
        values[f"localPort{suffix}"] = port if host else 0
    return values


async def test_info_of_a_new_udp_object_has_default_values(udp: UDPSockets) -> None:
    assert info_of(udp.new()) == CLOSED


async def test_info_of_a_listening_object_has_both_versions(udp: UDPSockets) -> None:
    server = udp.server(0)
    port = port_of(server)
    expected = {**CLOSED, **local_values("0.0.0.0", "::", port), "userData": "SERVER"}
    assert info_of(server) == expected


@pytest.mark.parametrize("version", [4, 6])
async def test_info_of_a_listening_object_with_one_version(udp: UDPSockets, version: int) -> None:
    server: Any = udp.new().enableIPv(10 - version, False)
    server.listen(0)
    hosts = ("0.0.0.0", "") if version == 4 else ("", "::")
    assert info_of(server) == {
        **CLOSED,
        **local_values(*hosts, port_of(server)),
        "isIPv4Enabled": version == 4,
        "isIPv6Enabled": version == 6,
        "userData": "SERVER",
    }


async def test_info_of_an_object_that_has_sent(udp: UDPSockets, calls: Calls) -> None:
    client = udp.new().send("x", LOCALHOST, 9)
    expected = {**CLOSED, **local_values("0.0.0.0", "::", port_of(client))}
    assert info_of(client) == expected
    client.send("x", IPV6_LOCALHOST, 9, calls)
    await calls.next()
    assert info_of(client) == expected


async def test_info_of_a_connected_object_has_both_ends(
    udp: UDPSockets, there: Any, host: str
) -> None:
    client: Any = udp.new().connect(host, there.getsockname()[1])
    hosts = ("", host) if ":" in host else (host, "")
    peer = there.getsockname()[:2]
    assert info_of(client) == {
        **CLOSED,
        **local_values(*hosts, port_of(client)),
        "connectedAddress": address(*peer),
        "connectedHost": peer[0],
        "connectedPort": peer[1],
        "isConnected": True,
        "userData": "DEFAULT",
    }
    client.send("x")
    assert (await there.recvfrom(10))[1][:2] == (host, port_of(client))


async def test_info_of_a_connecting_object_is_neither_closed_nor_connected(
    udp: UDPSockets,
) -> None:
    trio.socket.set_custom_hostname_resolver(WaitingResolver())
    client: Any = udp.new().connect("name", 9)
    assert info_of(client) == {**CLOSED, "isClosed": False}


async def test_info_has_the_settings(udp: UDPSockets) -> None:
    client: Any = udp.new().setTimeout(2.5).setBufferSize(1000, 4).setBufferSize(2000, 6)
    expected = {
        **CLOSED,
        "timeout": 2.5,
        "maxReceiveIPv4BufferSize": 1000,
        "maxReceiveIPv6BufferSize": 2000,
    }
    assert info_of(client) == expected
    for version in (4, 6, None):
        client.preferIPv(version)
        assert info_of(client) == {
            **expected,
            "isIPv4Preferred": version == 4,
            "isIPv6Preferred": version == 6,
            "isIPVersionNeutral": version is None,
        }
    client.enableIPv(4, False)
    assert info_of(client) == {**expected, "isIPv4Enabled": False}
    client.enableIPv(6, False).enableIPv(4)
    assert info_of(client) == {**expected, "isIPv6Enabled": False}


async def test_info_after_close_has_default_values(udp: UDPSockets) -> None:
    connected = udp.new().connect(LOCALHOST, 9)
    assert connected is not None
    for each in (connected, udp.server(0), udp.new().send("x", LOCALHOST, 9)):
        assert info_of(each.close()) == CLOSED


async def test_repr_shows_the_servers_or_the_connected_address(
    udp: UDPSockets, there: Any, host: str
) -> None:
    server = udp.server(0)
    assert repr(server) == f"hs.socket.udp: 0.0.0.0:{port_of(server)} ({id(server):#x})"
    port = there.getsockname()[1]
    client = udp.new()
    assert repr(client) == f"hs.socket.udp: :0 ({id(client):#x})"
    client.connect(host, port)
    assert repr(client) == f"hs.socket.udp: {host}:{port} ({id(client):#x})"
    client.close()
    assert repr(client) == f"hs.socket.udp: :0 ({id(client):#x})"
