"""Multicast groups on loopback. (Those of IPv6 are in test_namespaces.)"""

from __future__ import annotations

import re
import socket
from collections.abc import AsyncIterator

import pytest
import trio

from helpers.waiting import is_waiting
from trisock import UDPSocket, open_udp

LO = socket.if_nametoindex("lo")
GROUP = "239.1.2.3"


@pytest.fixture
async def sender() -> AsyncIterator[UDPSocket]:
    """A socket whose datagrams to a group stay on the loopback interface."""
    async with await open_udp(host="127.0.0.1") as sender:
        yield sender


@pytest.fixture(params=[None, "0.0.0.0", GROUP])
async def member(request: pytest.FixtureRequest) -> AsyncIterator[UDPSocket]:
    """A socket that can join a group: bound to all addresses, to 0.0.0.0, or to the group."""
    async with await open_udp(host=request.param) as member:
        yield member


@pytest.mark.parametrize("interface", ["lo", LO, str(LO)])
async def test_a_member_gets_what_is_sent_to_the_group(
    member: UDPSocket, sender: UDPSocket, interface: str | int
) -> None:
    port = member.getlocal().port
    member.join_group(GROUP, interface)
    await sender.send(b"hello", (GROUP, port))
    assert await member.recv() == (b"hello", sender.getlocal(), (GROUP, port), False)
    member.leave_group(GROUP, interface)
    await sender.send(b"hello", (GROUP, port))
    assert not is_waiting(member)


@pytest.mark.parametrize(("group", "interface"), [("ff02::1234", "lo"), ("ff02::1234%lo", None)])
async def test_a_group_of_ipv6_is_joined_once(
    udp: UDPSocket, group: str, interface: str | None
) -> None:
    udp.join_group(group, interface)
    with pytest.raises(OSError, match=re.escape(f"cannot join {group}") + ".*: Address already in"):
        udp.join_group("ff02::1234%lo" if interface is None else group, interface)
    udp.leave_group("ff02::1234", LO)


async def test_a_socket_gets_only_the_groups_that_it_joined(
    member: UDPSocket, sender: UDPSocket
) -> None:
    """By default, Linux delivers all groups that any socket of the machine has joined."""
    port = member.getlocal().port
    async with await open_udp() as other:
        other.join_group(GROUP, "lo")
        await sender.send(b"for the other", (GROUP, port))
        assert not is_waiting(member)
        member.join_group("239.1.2.4", "lo")
        await sender.send(b"for the other", (GROUP, port))
        assert not is_waiting(member)


async def test_a_group_cannot_be_the_source_of_an_answer(udp: UDPSocket, sender: UDPSocket) -> None:
    udp.join_group(GROUP, "lo")
    await sender.send(b"query", (GROUP, udp.getlocal().port))
    query = await udp.recv()
    with pytest.raises(OSError, match="Invalid argument"):
        await udp.send(b"answer", query.address, source=query.destination)
    await udp.send(b"answer", query.address)
    assert (await sender.recv()).data == b"answer"


async def test_the_source_chooses_the_interface_for_a_group(udp: UDPSocket, port: int) -> None:
    udp.join_group(GROUP, "lo")
    await udp.send(b"hello", (GROUP, port), source=("127.0.0.1", port))
    assert await udp.recv() == (b"hello", ("127.0.0.1", port), (GROUP, port), False)


@pytest.mark.parametrize(
    ("group", "interface", "text"),
    [
        (GROUP, "absent", "cannot join 239.1.2.3 on the interface absent: No such device"),
        (GROUP, "a\nb", "cannot join 239.1.2.3 on the interface a\\nb: No such device"),
        (GROUP, 999_999, "cannot join 239.1.2.3 on the interface 999999: No such device"),
        (GROUP, "2147483648", "cannot join 239.1.2.3 on the interface 2147483648: No such device"),
        ("ff02::1%4294967297", None, "cannot join ff02::1%4294967297: No such device"),
        ("ff02::1", "absent", "cannot join ff02::1 on the interface absent: No such device"),
        ("ff02::1%absent", None, "cannot join ff02::1%absent: No such device"),
        (GROUP, "lo", "cannot join 239.1.2.3 on the interface lo: Address already in use"),
    ],
)
async def test_a_group_that_cannot_be_joined_is_an_oserror(
    udp: UDPSocket, group: str, interface: str | int | None, text: str
) -> None:
    udp.join_group(GROUP, "lo")
    with pytest.raises(OSError, match=re.escape(text) + "$"):
        udp.join_group(group, interface)


async def test_other_groups_cannot_be_left(udp: UDPSocket) -> None:
    with pytest.raises(OSError, match=r"cannot leave 239\.1\.2\.3 on the interface lo: Cannot as"):
        udp.leave_group(GROUP, "lo")


async def test_an_ipv4_socket_has_no_ipv6_groups(sender: UDPSocket) -> None:
    for change, verb in ((sender.join_group, "join"), (sender.leave_group, "leave")):
        with pytest.raises(OSError, match=rf"cannot {verb} ff02::1: .* \(this socket has only"):
            change("ff02::1")


@pytest.mark.parametrize(
    ("group", "interface", "error", "text"),
    [
        ("127.0.0.1", None, ValueError, "'127.0.0.1' is not the address of a multicast group"),
        ("240.0.0.1", None, ValueError, "'240.0.0.1' is not the address of a multicast group"),
        ("fe80::1", None, ValueError, "'fe80::1' is not the address of a multicast group"),
        ("all.example", None, ValueError, "'all.example' is not the address of a multicast group"),
        ("ff02::1%a\nb", None, ValueError, "the zone after the % is invalid"),
        (b"239.1.2.3", None, TypeError, "a group must be a str, not bytes (9 bytes)"),
        (None, None, TypeError, "a group must be a str, not None"),
        (GROUP, "", ValueError, "there is no such interface: ''"),
        (GROUP, "a\0b", ValueError, "there is no such interface: a str of 3 characters"),
        (GROUP, 0, ValueError, "there is no such interface: 0"),
        (GROUP, -1, ValueError, "there is no such interface: -1"),
        (GROUP, 1 << 31, ValueError, "there is no such interface: 2147483648"),
        (GROUP, True, TypeError, "interface must be a name, a number or None, not True"),
        (GROUP, b"lo", TypeError, "interface must be a name, a number or None, not bytes"),
    ],
)
async def test_a_wrong_group_or_interface_is_an_error(
    udp: UDPSocket, group: str, interface: str | int | None, error: type[Exception], text: str
) -> None:
    for change in (udp.join_group, udp.leave_group):
        with pytest.raises(error, match=re.escape(text)):
            change(group, interface)


async def test_a_closed_socket_joins_nothing(udp: UDPSocket) -> None:
    await udp.close()
    for change in (udp.join_group, udp.leave_group):
        with pytest.raises(trio.ClosedResourceError, match="already closed the UDP socket "):
            change(GROUP, "lo")
