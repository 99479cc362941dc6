"""``info``: each key that hs.socket documents, in each state of an object."""

from __future__ import annotations

import socket

import pytest

import trisock
from helpers.hammerspoon import (
    LOCALHOST,
    UNCONNECTED,
    clients_of,
    connect_to,
    connected,
    full_backlog,
    unix_client,
    until,
)
from trisock import ServerTLS
from trisock.hammerspoon import Info, Socket, Sockets


def info_of(sock: Socket) -> Info:
    """Return ``sock.info()`` after a check of its keys and the types of its values."""
    info = sock.info()
    assert list(info) == list(UNCONNECTED)
    assert len(info) == 19
    for key, value in info.items():
        types = (int, float) if key == "timeout" else (type(UNCONNECTED[key]),)
        assert type(value) in types, key
    return info


def address(info: Info, key: str) -> tuple[object, ...]:
    parsed = Sockets.parseAddress(info[key])  # type: ignore[literal-required]
    assert parsed is not None
    return parsed["host"], parsed["port"], parsed["addressFamily"]


async def test_info_has_default_values_before_a_connect(hs: Sockets) -> None:
    assert info_of(hs.new()) == UNCONNECTED


async def test_info_reports_neither_connected_nor_disconnected_while_connecting(
    hs: Sockets, path: str
) -> None:
    tcp = connect_to(hs.server(0), hs.new())
    assert info_of(tcp) == {**UNCONNECTED, "isDisconnected": False}
    async with full_backlog(path):
        unix = hs.new().connect(path)
        assert unix is not None
        assert info_of(unix) == {**UNCONNECTED, "isDisconnected": False, "unixSocketPath": path}


@pytest.mark.parametrize(
    ("host", "family"), [(LOCALHOST, socket.AF_INET), ("::1", socket.AF_INET6)]
)
async def test_info_reports_both_addresses_of_a_connection(
    hs: Sockets, host: str, family: int
) -> None:
    async with connected(hs, host=host) as (client, peer):
        info = info_of(client)
        here, there = peer.getpeer(), peer.getlocal()
        assert address(info, "connectedAddress") == (*there, family)
        assert address(info, "localAddress") == (*here, family)
        assert info == {
            **UNCONNECTED,
            "connectedAddress": info["connectedAddress"],
            "connectedHost": host,
            "connectedPort": there.port,
            "connections": 1,
            "isConnected": True,
            "isDisconnected": False,
            "isIPv4": family == socket.AF_INET,
            "isIPv6": family == socket.AF_INET6,
            "localAddress": info["localAddress"],
            "localHost": host,
            "localPort": here.port,
            "userData": "DEFAULT",
        }


@unix_client
async def test_info_reports_the_path_of_a_unix_connection(client: Socket, path: str) -> None:
    assert info_of(client) == {
        **UNCONNECTED,
        "connectedURL": path,
        "connections": 1,
        "isConnected": True,
        "isDisconnected": False,
        "unixSocketPath": path,
        "userData": "DEFAULT",
    }


async def test_info_reports_whether_the_connection_is_secure(
    client: Socket, peer: trisock.Socket, server_tls: ServerTLS
) -> None:
    client.startTLS(False)
    assert info_of(client)["isSecure"] is False
    await peer.starttls(server_tls)
    await until(lambda: client.info()["isSecure"])
    assert info_of(client)["isConnected"] is True


async def test_info_reports_a_servers_port_and_both_families(hs: Sockets) -> None:
    server = hs.server(0)
    info = info_of(server)
    assert address(info, "localAddress") == ("0.0.0.0", info["localPort"], socket.AF_INET)
    assert info["localPort"] > 0
    listening = {
        **UNCONNECTED,
        "isDisconnected": False,
        "isIPv4": True,
        "isIPv6": True,
        "localAddress": info["localAddress"],
        "localHost": "0.0.0.0",
        "localPort": info["localPort"],
        "userData": "SERVER",
    }
    assert info == listening
    async with clients_of(server, 2):
        assert info_of(server) == {**listening, "connections": 2}


async def test_info_reports_the_path_of_a_unix_server(hs: Sockets, path: str) -> None:
    listening = {
        **UNCONNECTED,
        "isDisconnected": False,
        "unixSocketPath": path,
        "userData": "SERVER",
    }
    server = hs.server(path)
    assert info_of(server) == listening
    async with clients_of(server, 2):
        assert info_of(server) == {**listening, "connections": 2}


async def test_info_has_default_values_after_a_disconnect(hs: Sockets, path: str) -> None:
    for port_or_path in (0, path):
        server = hs.server(port_or_path)
        assert info_of(server.disconnect()) == UNCONNECTED
    async with connected(hs) as (client, _peer):
        assert info_of(client.disconnect()) == UNCONNECTED
    async with connected(hs) as (client, peer):
        await peer.close()
        await until(lambda: not client.connected())
        assert info_of(client) == UNCONNECTED


async def test_repr_shows_an_objects_kind_and_address(hs: Sockets, path: str) -> None:
    server = hs.server(0)
    port = server.info()["localPort"]
    assert repr(server) == f"hs.socket(server): 0.0.0.0:{port} ({id(server):#x})"
    unix = hs.server(path)
    assert repr(unix) == f"hs.socket(server): {path} ({id(unix):#x})"
    async with connected(hs) as (client, peer):
        assert repr(client) == f"hs.socket: {peer.getlocal()} ({id(client):#x})"
        client.disconnect()
        assert repr(client) == f"hs.socket: :0 ({id(client):#x})"
    client.connect(path)
    assert repr(client) == f"hs.socket: {path} ({id(client):#x})"
