"""Sockets that connect to themselves, and names that resolve to addresses of other machines."""

from __future__ import annotations

import socket
import struct
import sys
from typing import Any

import pytest
import trio
import trio.testing

import trisock
from helpers.pairs import closing
from helpers.resolver import Resolver
from helpers.server import echo
from trisock.testing import serving

IP_LOCAL_PORT_RANGE = 51  # added in Linux 6.3; Python has no constant for it yet


def _port_range(port: int) -> bytes:
    return struct.pack("=I", port << 16 | port)


class OnePort(trio.abc.SocketFactory):
    """Makes sockets whose only possible local port is ``port``."""

    def __init__(self, port: int, uses: int | None = None) -> None:
        self.port = port
        self.uses = uses
        self.made: list[trio.socket.SocketType] = []

    def socket(self, family: Any = None, type: Any = None, proto: Any = None) -> Any:
        sock = socket.socket(family, type, proto)
        if self.uses is None or len(self.made) < self.uses:
            try:
                sock.setsockopt(socket.IPPROTO_IP, IP_LOCAL_PORT_RANGE, _port_range(self.port))
            except OSError:
                sock.close()
                pytest.skip("the kernel has no IP_LOCAL_PORT_RANGE")
        self.made.append(trio.socket.from_stdlib_socket(sock))
        return self.made[-1]


@pytest.fixture
def own_port() -> int:
    if sys.platform != "linux":
        pytest.skip("IP_LOCAL_PORT_RANGE needs Linux")
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@pytest.mark.parametrize("options", [{}, {"local_address": "127.0.0.1"}, {"tls": True}])
async def test_a_socket_connected_to_itself_is_refused(
    own_port: int, options: dict[str, Any]
) -> None:
    factory = OnePort(own_port)
    trio.socket.set_custom_socket_factory(factory)
    with pytest.raises(ConnectionRefusedError, match=f"127.0.0.1:{own_port}"):
        await trisock.connect("127.0.0.1", own_port, **options)
    assert len(factory.made) < 50
    # The refused connection leaves nothing, not even TIME_WAIT: a server can bind the port.
    with socket.socket() as server:
        server.bind(("127.0.0.1", own_port))


async def test_connect_finds_a_server_that_starts_between_attempts(own_port: int) -> None:
    factory = OnePort(own_port, uses=3)
    trio.socket.set_custom_socket_factory(factory)
    real = OnePort.socket

    def socket_and_server(self: OnePort, *args: Any) -> Any:
        if len(self.made) == 3:
            servers.append(trisock.listen_nowait(own_port, host="127.0.0.1"))
        return real(self, *args)

    servers: list[trisock.Listener] = []
    factory.socket = socket_and_server.__get__(factory)  # type: ignore[method-assign]
    sock = await trisock.connect("127.0.0.1", own_port)
    async with closing(sock):
        assert sock.getlocal() != sock.getpeer()
        (server,) = servers
        async with server:
            (await server.accept()).abort()


@pytest.mark.parametrize("addresses", [["192.0.2.1", "127.0.0.1"], ["127.0.0.1", "2001:db8::1"]])
@pytest.mark.parametrize("fixed", [False, True])
async def test_listen_skips_the_non_local_addresses_of_a_name(
    addresses: list[str], fixed: bool, own_port: int
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(**{"both.example": addresses}))
    async with await trisock.listen(own_port if fixed else 0, host="both.example") as listener:
        assert [address.host for address in listener.addresses] == ["127.0.0.1"]
        client = await trisock.connect("127.0.0.1", listener.port)
        async with closing(client, await listener.accept()):
            pass


async def test_bind_skips_the_non_local_addresses_of_a_name() -> None:
    names = {"both.example": ["192.0.2.1", "127.0.0.1"]}
    trio.socket.set_custom_hostname_resolver(Resolver(**names))
    async with serving(echo, host="both.example") as s:
        assert [address.host for address in s.server.addresses] == ["127.0.0.1"]


@pytest.mark.parametrize("addresses", [["192.0.2.1"], ["192.0.2.1", "2001:db8::1"]])
async def test_listening_on_a_name_without_local_addresses_raises_an_oserror(
    addresses: list[str],
) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(**{"none.example": addresses}))
    with pytest.raises(
        OSError,
        match=r"cannot listen on none\.example:0: .* \(it is not an address of this machine\)$",
    ):
        await trisock.listen(0, host="none.example")


async def test_listening_on_another_machines_address_raises_an_oserror() -> None:
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0: Cannot assign"):
        await trisock.listen(0, host="192.0.2.1")
    with pytest.raises(OSError, match=r"192\.0\.2\.1:0: Cannot assign"):
        trisock.listen_nowait(0, host="192.0.2.1")


async def test_a_port_in_use_on_one_address_raises_an_oserror() -> None:
    names = {"both.example": ["127.0.0.1", "127.0.0.2"]}
    trio.socket.set_custom_hostname_resolver(Resolver(**names))
    async with await trisock.listen(0, host="127.0.0.2") as other:
        with pytest.raises(OSError, match="in use"):
            await trisock.listen(other.port, host="both.example")


async def test_the_ipv6_wildcard_address_is_ipv6_only() -> None:
    async with await trisock.listen(0, host="::") as listener:
        with pytest.raises(ConnectionRefusedError):
            await trisock.connect("127.0.0.1", listener.port)
    assert '"::"`` is IPv6 only' in (trisock.listen.__doc__ or "")
