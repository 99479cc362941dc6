"""A socket with one peer receives only the peer's datagrams. Its next call raises ICMP errors."""

from __future__ import annotations

import socket
from typing import Any

import pytest
import trio
import trio.testing

from helpers.resolver import Resolver
from trisock import Address, UDPSocket, connect_udp, connect_udp_nowait, open_udp


@pytest.fixture(params=["127.0.0.1", "::1"])
def host(request: pytest.FixtureRequest) -> str:
    host: str = request.param
    return host


async def closed_port(host: str) -> int:
    async with await open_udp(host=host) as udp:
        return udp.getlocal().port


async def test_only_datagrams_of_the_peer_are_received(client: UDPSocket, udp: UDPSocket) -> None:
    async with await open_udp(host="127.0.0.1") as stranger:
        await stranger.send(b"hello", client.getlocal())
        await udp.send(b"from the peer", client.getlocal())
        assert (await client.recv())[:2] == (b"from the peer", client.getpeer())


class PromptStranger(socket.socket):
    """A socket that receives a stranger's datagrams before it is connected to its peer."""

    def connect(self, sockaddr: Any) -> None:
        self.bind((sockaddr[0], 0))
        with socket.socket(self.family, socket.SOCK_DGRAM) as stranger:
            for _ in range(3):
                stranger.sendto(b"from a stranger", self.getsockname())
        super().connect(sockaddr)


async def test_datagrams_of_strangers_before_connecting_are_discarded(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with await open_udp(host=host) as udp:
        with monkeypatch.context() as patch:
            patch.setattr("trisock._udp.opening.socket.socket", PromptStranger)
            client = await connect_udp(host, udp.getlocal().port)
        async with client:
            await udp.send(b"from the peer", client.getlocal())
            assert (await client.recv())[:2] == (b"from the peer", udp.getlocal())


async def test_datagrams_of_strangers_do_not_end_a_wait(host: str) -> None:
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, 2) as raw:
        raw.bind((host, 0))
        async with await open_udp(host=host) as udp, await open_udp(host=host) as stranger:
            await stranger.send(b"from a stranger", raw.getsockname()[:2])
            raw.connect(udp.getlocal())
            async with UDPSocket(raw) as client, trio.open_nursery() as nursery:

                async def receive() -> None:
                    assert (await client.recv()).data == b"from the peer"

                nursery.start_soon(receive)
                await trio.testing.wait_all_tasks_blocked()
                await udp.send(b"from the peer", client.getlocal())


async def test_an_address_must_be_the_peers_address(client: UDPSocket, udp: UDPSocket) -> None:
    """The address is allowed, so that a function that answers datagrams works on every socket."""
    await client.send(b"x", client.getpeer())
    assert (await udp.recv()).data == b"x"
    with pytest.raises(
        ValueError, match=r"the UDP socket .* sends only to its peer, not to 127\.0\.0\.1:9$"
    ):
        await client.send(b"x", ("127.0.0.1", 9))
    with pytest.raises(TypeError, match=r"address must be \(host, port\), not '127\.0\.0\.1'"):
        await client.send(b"x", "127.0.0.1")  # type: ignore[arg-type]


async def test_the_next_recv_raises_the_error_of_a_closed_port(host: str) -> None:
    port = await closed_port(host)
    async with await connect_udp(host, port) as client:
        await client.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError) as caught:
            await client.recv()
        where = Address(host, port)
        assert str(caught.value) == f"[Errno 111] cannot receive from {where}: Connection refused"


async def test_the_next_send_raises_the_error_of_a_closed_port(host: str) -> None:
    port = await closed_port(host)
    async with await connect_udp(host, port) as client:
        await client.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError) as caught:
            await client.send(b"not sent")
        where = Address(host, port)
        assert str(caught.value) == f"[Errno 111] cannot send to {where}: Connection refused"
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, 2) as peer:
            peer.bind((host, port))
            await client.send(b"now you are there")  # the socket stays usable
            assert peer.recv(100) == b"now you are there"


async def test_an_icmp_error_ends_a_waiting_recv(host: str) -> None:
    async with await connect_udp(host, await closed_port(host)) as client:
        async with trio.open_nursery() as nursery:

            async def receive() -> None:
                with pytest.raises(ConnectionRefusedError, match="cannot receive from"):
                    await client.recv()

            nursery.start_soon(receive)
            await trio.testing.wait_all_tasks_blocked()
            await client.send(b"anyone?")


async def test_an_icmp_error_ends_the_loop_but_not_the_socket(host: str) -> None:
    port = await closed_port(host)
    async with await connect_udp(host, port) as client:
        await client.send(b"anyone?")
        with pytest.raises(ConnectionRefusedError):
            async for _ in client:
                raise AssertionError("nobody answers")
        async with await open_udp(port, host=host) as peer:
            await peer.send(b"here I am", client.getlocal())
            async for datagram in client:
                assert datagram.data == b"here I am"
                break


async def test_icmp_errors_do_not_reach_a_socket_without_a_peer(
    udp: UDPSocket, port: int, host: str
) -> None:
    """A client that is gone must not cause an error in a server."""
    for _ in range(3):
        await udp.send(b"anyone?", (host, await closed_port(host)))
    await udp.send(b"to myself", (host, port))
    assert (await udp.recv()).data == b"to myself"


async def test_both_addresses_are_known(host: str) -> None:
    async with await open_udp(host=host) as udp:
        client = await connect_udp(host, udp.getlocal().port)
        assert client.getpeer() == udp.getlocal()
        assert client.getlocal().host == host
        assert udp.getpeer() is None
        ends = f"{client.getlocal()} <-> {udp.getlocal()}"
        assert repr(client) == f"<trisock.UDPSocket {ends} open>"
        await client.close()
        assert repr(client) == f"<trisock.UDPSocket {ends} closed>"
        assert client.getpeer() == udp.getlocal()


async def test_connecting_to_a_name_tries_its_second_address(udp: UDPSocket, port: int) -> None:
    # The first address is a group with no interface, to which nothing can be connected.
    trio.socket.set_custom_hostname_resolver(Resolver(name=["ff02::1", "127.0.0.1"]))
    async with await connect_udp("name", port) as client:
        assert client.getpeer() == ("127.0.0.1", port)
    trio.socket.set_custom_hostname_resolver(Resolver(name=["ff02::1", "ff02::2"]))
    with pytest.raises(OSError, match=rf"cannot connect to name:{port}: Invalid argument"):
        await connect_udp("name", port)


async def test_wrong_arguments() -> None:
    with pytest.raises(socket.gaierror, match=r"cannot connect to no\.such\.invalid:9"):
        await connect_udp("no.such.invalid", 9)
    with pytest.raises(ValueError, match="a peer's port must be in 1-65535, not 0"):
        await connect_udp("127.0.0.1", 0)
    for host, port in (("a b", 9), ("", 9), ("127.0.0.1", 65536), ("127.0.0.1:9", 9)):
        with pytest.raises(ValueError, match=r"must be|is not a host name"):
            await connect_udp(host, port)
    for arguments in ((None, 9), ("127.0.0.1", "9"), (b"127.0.0.1", 9), ("127.0.0.1", None)):
        with pytest.raises(TypeError, match="must be"):
            await connect_udp(*arguments)  # type: ignore[arg-type]


async def test_a_socket_is_never_its_own_peer(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    port = await closed_port(host)
    connect = socket.socket.connect

    def connect_from_the_port(sock: socket.socket, address: tuple[str, int]) -> None:
        monkeypatch.undo()
        sock.bind(address)
        connect(sock, address)

    monkeypatch.setattr(socket.socket, "connect", connect_from_the_port)
    async with await connect_udp(host, port) as client:
        assert client.getpeer() == (host, port)
        assert client.getlocal().port != port


# ---- connect_udp_nowait ----


def test_connect_udp_nowait_takes_addresses_only() -> None:
    for wrong in ("name", "localhost", "no\nname"):
        with pytest.raises(ValueError, match=r"needs an address|not a host name"):
            connect_udp_nowait(wrong, 9)
    with pytest.raises(ValueError, match="1-65535"):
        connect_udp_nowait("127.0.0.1", 0)


def test_connect_udp_nowait_needs_permission_for_a_broadcast_address() -> None:
    with pytest.raises(
        PermissionError, match=r"cannot connect to 127\.255\.255\.255:9: .*enable broadcast"
    ):
        connect_udp_nowait("127.255.255.255", 9)
    connect_udp_nowait("127.255.255.255", 9, broadcast=True).abort()
