"""Datagrams between two hosts, which are network namespaces with a cable between them."""

from __future__ import annotations

import errno
import socket
from collections.abc import AsyncIterator, Iterator

import pytest
import trio
import trio.testing

from helpers.namespaces import Namespace, new_namespace, two_hosts
from trisock import UDPSocket, connect_udp, open_udp_nowait

pytestmark = pytest.mark.needs("ip")


@pytest.fixture
def hosts() -> Iterator[tuple[Namespace, Namespace]]:
    with two_hosts() as hosts:
        yield hosts


@pytest.fixture
async def left(hosts: tuple[Namespace, Namespace]) -> AsyncIterator[UDPSocket]:
    """A socket on all addresses of the first host."""
    with hosts[0].entered():
        left = open_udp_nowait(broadcast=True)
    async with left:
        yield left


@pytest.fixture
async def right(hosts: tuple[Namespace, Namespace]) -> AsyncIterator[UDPSocket]:
    """A socket on all addresses of the second host."""
    with hosts[1].entered():
        right = open_udp_nowait()
    async with right:
        yield right


@pytest.mark.parametrize("there", ["10.0.0.2", "fd00::2", "fe80::2%left"])
async def test_each_host_sees_the_other(
    hosts: tuple[Namespace, Namespace], left: UDPSocket, right: UDPSocket, there: str
) -> None:
    with hosts[0].entered():  # the name of an interface belongs to a namespace
        await left.send(b"query", (there, right.getlocal().port))
    with hosts[1].entered():
        query = await right.recv()
        here = there.replace("2", "1").replace("left", "right")
        assert query.address == (here, left.getlocal().port)
        assert query.destination == (there.replace("left", "right"), right.getlocal().port)
        await right.send(b"answer", query.address, source=query.destination)
    with hosts[0].entered():
        answer = await left.recv()
        assert (answer.data, answer.address.host) == (b"answer", there)
        assert answer.destination is not None
        assert answer.destination.host == here.replace("right", "left")


async def test_an_answer_comes_from_the_second_address(
    hosts: tuple[Namespace, Namespace], left: UDPSocket, right: UDPSocket
) -> None:
    """A socket bound to all addresses would answer from the first address of the interface."""
    hosts[1].ip("address add 10.0.0.9/24 dev right")
    hosts[1].add_ipv6("fd00::9", "right")
    hosts[1].add_ipv6("fe80::9", "right")
    for host in ("10.0.0.9", "fd00::9", "fe80::9%left"):
        with hosts[0].entered():
            await left.send(b"query", (host, right.getlocal().port))
        with hosts[1].entered():
            query = await right.recv()
            await right.send(b"answer", query.address, source=query.destination)
        with hosts[0].entered():
            assert (await left.recv()).address == (host, right.getlocal().port)


@pytest.mark.parametrize("group", ["239.1.2.3", "ff02::1234%left", "ff05::1234"])
async def test_a_group_between_hosts(
    hosts: tuple[Namespace, Namespace], left: UDPSocket, right: UDPSocket, group: str
) -> None:
    port = right.getlocal().port
    with hosts[1].entered():
        right.join_group(group.split("%")[0], "right")
    hosts[0].ip("route add 239.0.0.0/8 dev left")
    with hosts[0].entered():
        await left.send(b"to all", (group, port))
    with hosts[1].entered():
        got = await right.recv()
        assert got.destination == (group.replace("left", "right"), port)
        with pytest.raises(OSError, match=r"^\[Errno 22\] cannot send to .* from .*: Invalid"):
            await right.send(b"from the group", got.address, source=got.destination)
        await right.send(b"answer", got.address)
    with hosts[0].entered():
        assert (await left.recv()).address.host.startswith(("10.0.0.2", "fd00::2", "fe80::2"))


@pytest.mark.parametrize("host", ["10.0.0.255", "255.255.255.255"])
async def test_a_broadcast_between_hosts(
    hosts: tuple[Namespace, Namespace], left: UDPSocket, right: UDPSocket, host: str
) -> None:
    port = right.getlocal().port
    hosts[0].ip("route add default dev left")
    await left.send(b"to all", (host, port))
    got = await right.recv()
    assert got[:3] == (b"to all", ("10.0.0.1", left.getlocal().port), (host, port))
    with pytest.raises(OSError, match="cannot send to"):
        await right.send(b"from all", got.address, source=got.destination)


async def test_icmp_of_a_router_is_the_error_of_the_next_call(
    hosts: tuple[Namespace, Namespace],
) -> None:
    hosts[0].ip("route add default via 10.0.0.2 dev left")
    hosts[1].ip("route add prohibit 10.9.0.0/16")
    with hosts[1].entered(), open("/proc/sys/net/ipv4/ip_forward", "w") as forward:
        forward.write("1")
    with hosts[0].entered():
        peer = await connect_udp("10.9.9.9", 9)
    async with peer:
        await peer.send(b"x")
        with pytest.raises(OSError, match=r"cannot receive from 10\.9\.9\.9:9: ") as caught:
            await peer.recv()
        assert caught.value.errno == errno.EHOSTUNREACH


@pytest.mark.parametrize("ending", ["neighbour", "cancelled", "closed", "stopped"])
async def test_sends_wait_while_the_kernel_has_no_room(
    hosts: tuple[Namespace, Namespace], left: UDPSocket, ending: str
) -> None:
    """The kernel queues datagrams to a neighbour that does not answer ARP requests."""
    left.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4608)
    absent = ("10.0.0.7", 7)
    sent = 0

    async def fill() -> None:
        nonlocal sent
        while True:
            await left.send(bytes(1000), absent)
            sent += 1

    async def send_one() -> None:
        if ending == "closed":
            with pytest.raises(trio.ClosedResourceError, match="already closed the UDP socket "):
                await left.send(b"waits", absent)
        else:
            await left.send(b"waits", absent)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(fill)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert sent
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(send_one)
        await trio.testing.wait_all_tasks_blocked()
        if ending == "stopped":
            left.stop_receiving()
            await trio.testing.wait_all_tasks_blocked()
        if ending == "cancelled":
            nursery.cancel_scope.cancel()
        elif ending == "closed":
            await left.close()
        else:
            hosts[0].ip("neighbour replace 10.0.0.7 lladdr 02:00:00:00:00:07 dev left")
    assert nursery.cancel_scope.cancelled_caught == (ending == "cancelled")


async def test_groups_of_ipv6_on_loopback() -> None:
    with new_namespace() as namespace:
        namespace.ip("-6 route add local ff00::/8 dev lo table local")
        with namespace.entered():
            member, stranger = open_udp_nowait(), open_udp_nowait(host="::")
        async with member, stranger:
            port = member.getlocal().port
            with namespace.entered():
                member.join_group("ff02::1234%lo")
                for group in (
                    "ff02::5678%lo",
                    "ff02::1234%lo",
                ):  # the member has joined only the second group
                    await stranger.send(b"hello", (group, port))
                got = await member.recv()
                assert got.destination == ("ff02::1234%lo", port)
                member.leave_group("ff02::1234", "lo")
                member.join_group("ff05::9", "lo")
                for group in ("ff02::1234%lo", "ff05::9"):
                    await stranger.send(b"again", (group, port))
                got = await member.recv()
                assert got.destination == ("ff05::9", port)


async def test_without_a_route_a_group_needs_an_interface() -> None:
    text = r"^\[Errno 19\] cannot join 239\.1\.2\.3: No such device \(pass the interface\)$"
    with new_namespace() as namespace:
        with namespace.entered():
            udp = open_udp_nowait(host="0.0.0.0")
        async with udp:
            with namespace.entered(), pytest.raises(OSError, match=text):
                udp.join_group("239.1.2.3")
