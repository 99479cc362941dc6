"""Packet info is built and parsed as the kernel's structures say. No I/O."""

from __future__ import annotations

import socket
import struct

import pytest

from trisock import Address
from trisock._udp.addresses import address_from, pack_for, pack_host, sockaddr_for
from trisock._udp.local_hosts import Destinations, Sources
from trisock._udp.packet_info import (
    IP_PKTINFO,
    IPV6_PKTINFO,
    AncillaryItem,
    destination_host,
    needs_zone,
    source_item,
)

SO_TIMESTAMP = 29  # the value on Linux, for which Python has no name

LO = socket.if_nametoindex("lo")


def ipv6_item(host: str, interface: int = 0) -> AncillaryItem:
    packed = socket.inet_pton(socket.AF_INET6, host)
    return socket.IPPROTO_IPV6, IPV6_PKTINFO, packed + struct.pack("@I", interface)


def ipv4_item(destination: str, local: str = "0.0.0.0", interface: int = 0) -> AncillaryItem:
    packed = socket.inet_aton(local) + socket.inet_aton(destination)
    return socket.IPPROTO_IP, IP_PKTINFO, struct.pack("@I", interface) + packed


@pytest.mark.parametrize(
    ("item", "host"),
    [
        (ipv4_item("127.0.0.1", "127.0.0.1", LO), "127.0.0.1"),
        (
            ipv4_item("224.0.0.251", "192.0.2.1", LO),
            "224.0.0.251",
        ),  # the address in the header, not the local one
        (ipv6_item("::1", LO), "::1"),
        (ipv6_item("2001:db8::1", LO), "2001:db8::1"),
        (ipv6_item("fe80::1", LO), "fe80::1%lo"),
        (ipv6_item("fe80::1", 999_999), "fe80::1%999999"),
        (ipv6_item("ff02::fb", LO), "ff02::fb%lo"),
        (ipv6_item("ff05::fb", LO), "ff05::fb"),
        (ipv6_item("::ffff:192.0.2.1", LO), "192.0.2.1"),
        (ipv6_item("fe80::1", 0), "fe80::1"),
    ],
)
def test_the_destination_of_a_datagram(item: AncillaryItem, host: str) -> None:
    other = (socket.SOL_SOCKET, SO_TIMESTAMP, bytes(16))
    for items in ([item], [other, item], [item, other]):
        assert destination_host(items) == host
        assert Destinations(53).find(items) == (host, 53)


@pytest.mark.parametrize(
    "items",
    [
        [],
        [(socket.SOL_SOCKET, SO_TIMESTAMP, bytes(16))],
        [(socket.IPPROTO_IP, IP_PKTINFO, bytes(11))],  # cut short by a small buffer
        [(socket.IPPROTO_IPV6, IPV6_PKTINFO, bytes(19))],
        [(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, bytes(20))],
    ],
)
def test_no_destination_without_packet_info(items: list[AncillaryItem]) -> None:
    assert destination_host(items) is None
    assert Destinations(53).find(items) is None


def test_remembered_destinations_are_bounded() -> None:
    destinations = Destinations(53)
    for number in range(2000):
        host = f"127.0.{number // 250}.{number % 250}"
        for _ in range(2):
            assert destinations.find([ipv4_item(host)]) == (host, 53)
    assert len(destinations._known) < 300


@pytest.mark.parametrize(
    ("host", "zoned"),
    [
        *((host, True) for host in ("fe80::1", "febf::1", "ff01::1", "ff02::1", "ff12::1")),
        *((host, False) for host in ("fec0::1", "fd00::1", "::1", "ff03::1", "ff0e::1")),
    ],
)
def test_addresses_that_need_a_zone(host: str, zoned: bool) -> None:
    assert needs_zone(socket.inet_pton(socket.AF_INET6, host)) == zoned


def test_the_ancillary_data_of_a_source() -> None:
    packed = socket.inet_aton("192.0.2.1")
    assert source_item(socket.AF_INET, packed) == ipv4_item("0.0.0.0", "192.0.2.1")
    packed = socket.inet_pton(socket.AF_INET6, "fe80::1")
    assert source_item(socket.AF_INET6, packed, 7) == ipv6_item("fe80::1", 7)


@pytest.mark.parametrize(
    ("family", "host", "item"),
    [
        (socket.AF_INET, "192.0.2.1", ipv4_item("0.0.0.0", "192.0.2.1")),
        (socket.AF_INET6, "192.0.2.1", ipv6_item("::ffff:192.0.2.1")),
        (socket.AF_INET6, "2001:db8::1", ipv6_item("2001:db8::1")),
        (socket.AF_INET6, "2001:db8::1%lo", ipv6_item("2001:db8::1")),
        (socket.AF_INET6, "fe80::1%lo", ipv6_item("fe80::1", LO)),
        (socket.AF_INET6, f"fe80::1%{LO}", ipv6_item("fe80::1", LO)),
        (socket.AF_INET6, "::", None),  # the socket's own address
    ],
)
def test_a_source_is_remembered(family: int, host: str, item: AncillaryItem | None) -> None:
    sources = Sources(family, Address("::" if family == socket.AF_INET6 else "0.0.0.0", 53))
    for source in ((host, 53), Address(host, 53), Address(host, 53)):
        assert sources.find(source) == item


def test_remembered_sources_are_bounded() -> None:
    sources = Sources(socket.AF_INET, Address("0.0.0.0", 53))
    for number in range(2000):
        host = f"127.0.{number // 250}.{number % 250}"
        for _ in range(2):
            assert sources.find(Address(host, 53)) == ipv4_item("0.0.0.0", host)
    assert sources.find(Address("0.0.0.0", 53)) is None
    assert len(sources._known) < 300


@pytest.mark.parametrize(
    ("sockaddr", "address"),
    [
        (("127.0.0.1", 9), ("127.0.0.1", 9)),
        (("::1", 9, 0, 0), ("::1", 9)),
        (("::ffff:127.0.0.1", 9, 0, 0), ("127.0.0.1", 9)),
        (("fe80::1", 9, 0, LO), ("fe80::1%lo", 9)),
        (("64:ff9b::7f00:1", 9, 0, 0), ("64:ff9b::7f00:1", 9)),
    ],
)
def test_the_sockaddr_of_a_sender(sockaddr: tuple[object, ...], address: tuple[str, int]) -> None:
    assert address_from(sockaddr) == address
    assert type(address_from(sockaddr)) is Address


@pytest.mark.parametrize(
    ("family", "host", "sockaddr"),
    [
        (socket.AF_INET, "127.0.0.1", ("127.0.0.1", 9)),
        (socket.AF_INET6, "127.0.0.1", ("::ffff:127.0.0.1", 9, 0, 0)),
        (socket.AF_INET6, "::1", ("::1", 9, 0, 0)),
        (socket.AF_INET6, "fe80::1%lo", ("fe80::1", 9, 0, LO)),
        (socket.AF_INET6, "example.org", None),
        (socket.AF_INET, "example.org", None),
        (socket.AF_INET, "a\0b", None),
        (socket.AF_INET6, "::\0", None),
    ],
)
def test_the_sockaddr_of_a_receiver(family: int, host: str, sockaddr: object) -> None:
    assert sockaddr_for(family, host, 9) == sockaddr


def test_an_ipv4_socket_has_no_ipv6_addresses() -> None:
    for find in (lambda: sockaddr_for(socket.AF_INET, "::1", 9), lambda: pack_for(2, "::1")):
        with pytest.raises(OSError, match="not supported"):
            find()


def test_packed_hosts() -> None:
    assert pack_host("1.2.3.4") == (bytes([1, 2, 3, 4]), 0)
    assert pack_for(socket.AF_INET, "localhost") is None
    with pytest.raises(ValueError, match="the zone after the % is invalid"):
        pack_host("fe80::1%a\nb")
    with pytest.raises(OSError, match="No such device"):
        pack_host("fe80::1%absent")
