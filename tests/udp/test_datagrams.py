"""Datagrams are sent and received whole, with the addresses of both ends."""

from __future__ import annotations

import enum
import socket

import pytest
import trio

from helpers.resolver import Resolver
from trisock import Address, Datagram, UDPSocket, connect_udp, open_udp

SO_TIMESTAMP = 29  # The value on Linux, for which Python has no name.
LONGEST = 65507  # The maximum size (bytes) of a datagram over IPv4.


@pytest.mark.parametrize("size", [0, 1, 1472, 9216, LONGEST])
async def test_a_datagram_arrives_whole(udp: UDPSocket, client: UDPSocket, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    await client.send(data)
    got = await udp.recv()
    assert got == Datagram(
        data, client.getlocal(), Address("127.0.0.1", udp.getlocal().port), False
    )
    assert type(got.address) is type(got.destination) is Address
    await udp.send(got.data, got.address)
    assert (await client.recv()).data == data


async def test_the_longest_datagram_over_ipv6(udp: UDPSocket, port: int) -> None:
    async with await connect_udp("::1", port) as client:
        await client.send(bytes(65527))
        got = await udp.recv()
        assert (len(got.data), got.truncated) == (65527, False)


@pytest.mark.parametrize(("host", "size"), [("127.0.0.1", 65508), ("::1", 65528)])
async def test_a_datagram_that_is_too_long_is_an_error(
    udp: UDPSocket, port: int, host: str, size: int
) -> None:
    where = f"[{host}]" if ":" in host else host
    with pytest.raises(OSError, match="Message too long") as caught:
        await udp.send(bytes(size), (host, port))
    assert (
        str(caught.value)
        == f"[Errno 90] cannot send to {where}:{port}: Message too long ({size} bytes)"
    )


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
async def test_hosts_of_both_families_reach_one_socket(
    udp: UDPSocket, port: int, host: str
) -> None:
    async with await connect_udp(host, port) as client:
        await client.send(b"hello")
        got = await udp.recv()
        assert got.address == client.getlocal()
        assert got.destination == client.getpeer()
        await udp.send(b"answer", got.address, source=got.destination)
        assert await client.recv() == (b"answer", got.destination, client.getlocal(), False)


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_every_kind_of_buffer_is_sent(
    udp: UDPSocket, port: int, raw: socket.socket, kind: type
) -> None:
    await udp.send(kind(b"data"), raw.getsockname())
    assert raw.recvfrom(100) == (b"data", ("127.0.0.1", port))


async def test_a_sliced_memoryview_is_sent(
    udp: UDPSocket, client: UDPSocket, raw: socket.socket
) -> None:
    view = memoryview(b"0123456789")[::3]
    await udp.send(view, raw.getsockname())
    assert raw.recv(100) == b"0369"
    await client.send(view)
    assert (await udp.recv()).data == b"0369"


async def test_a_longer_datagram_is_truncated(udp: UDPSocket, client: UDPSocket) -> None:
    for data in (b"12345", b"123456", b"next"):
        await client.send(data)
    assert (await udp.recv(5))[::3] == (b"12345", False)
    assert (await udp.recv(5))[::3] == (b"12345", True)
    assert (await udp.recv(5))[::3] == (b"next", False)
    await client.send(b"huge")
    assert (await udp.recv(1 << 60))[::3] == (b"huge", False)


def test_repr_does_not_show_the_data() -> None:
    datagram = Datagram(b"secret", Address("192.0.2.1", 9), Address("::1", 53), True)
    text = "<trisock.Datagram 6 bytes (truncated) from 192.0.2.1:9 to [::1]:53>"
    assert repr(datagram) == str(datagram) == text


# ---- the destination, and the source of the answer ----


async def test_an_answer_comes_from_the_querys_destination(udp: UDPSocket, port: int) -> None:
    async with await open_udp(host="127.0.0.1") as client:
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            await client.send(b"query", (host, port))
            query = await udp.recv()
            assert query.destination == (host, port)
            await udp.send(b"answer", query.address, source=query.destination)
            assert (await client.recv()).address == (host, port)
            await udp.send(b"answer", query.address)  # without a source, the system chooses
            assert (await client.recv()).address == ("127.0.0.1", port)


@pytest.mark.parametrize(("any_host", "host"), [("0.0.0.0", "127.0.0.2"), ("::", "::1")])
async def test_sockets_of_one_family_know_the_destination(any_host: str, host: str) -> None:
    async with await open_udp(host=any_host) as udp, await open_udp(host=host) as client:
        port = udp.getlocal().port
        await client.send(b"query", (host, port))
        query = await udp.recv()
        assert query == (b"query", client.getlocal(), (host, port), False)
        await udp.send(b"answer", query.address, source=query.destination)
        assert (await client.recv()).address == (host, port)


async def test_the_destination_at_a_socket_with_one_address_is_that_address() -> None:
    async with await open_udp(host="127.0.0.2") as udp, await open_udp(host="127.0.0.1") as client:
        await client.send(b"query", udp.getlocal())
        query = await udp.recv()
        assert query.destination == udp.getlocal()
        await udp.send(b"answer", query.address, source=query.destination)
        assert (await client.recv()).address == udp.getlocal()
        # The system allows another source, too.
        await udp.send(b"answer", query.address, source=("127.0.0.3", udp.getlocal().port))
        assert (await client.recv()).address.host == "127.0.0.3"


async def test_a_socket_with_one_peer_can_choose_its_source(raw: socket.socket) -> None:
    async with await connect_udp(*raw.getsockname()) as client:
        await client.send(b"x", source=("127.0.0.2", client.getlocal().port))
        assert raw.recvfrom(10) == (b"x", ("127.0.0.2", client.getlocal().port))
        await client.send(b"y", source=client.getlocal())
        assert raw.recvfrom(10) == (b"y", client.getlocal())


async def test_more_ancillary_data_does_not_hide_the_destination(
    udp: UDPSocket, port: int, client: UDPSocket
) -> None:
    udp.setsockopt(socket.SOL_SOCKET, SO_TIMESTAMP, 1)
    await client.send(b"hello")
    assert (await udp.recv()).destination == ("127.0.0.1", port)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (("224.0.0.1", 0), "Invalid argument"),  # A group.
        (("127.255.255.255", 0), "Network is unreachable"),  # A broadcast address.
        (("255.255.255.255", 0), "Invalid argument"),
        (("192.0.2.99", 0), "Network is unreachable"),  # Another machine.
        (("::1", 0), "Invalid argument"),  # An address of the other family.
        (("fe80::1%absent", 0), "No such device"),
        (("fe80::1%4294967297", 0), "No such device"),  # Must not wrap around to interface 1.
    ],
)
async def test_a_source_that_is_not_local_raises_an_oserror(
    udp: UDPSocket, port: int, raw: socket.socket, source: tuple[str, int], text: str
) -> None:
    """A peer can choose its datagram's destination, so a reply must not raise a ``ValueError``."""
    with pytest.raises(OSError, match=rf"cannot send to 127.* from .*:{port}: {text}"):
        await udp.send(b"x", raw.getsockname(), source=(source[0], port))


async def test_a_source_of_the_wrong_family_is_an_oserror(raw: socket.socket) -> None:
    async with await open_udp(host="0.0.0.0") as udp:
        port = udp.getlocal().port
        where = rf"cannot send to 127\.0\.0\.1:\d+ from \[::1\]:{port}"
        text = rf"{where}: .*not supported .*\(this socket has only IPv4\)$"
        with pytest.raises(OSError, match=text):
            await udp.send(b"x", raw.getsockname(), source=("::1", port))


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_choosing_the_source_raises_an_oserror_where_unsupported(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows has neither the packet info options nor ``sendmsg``."""

    def cannot(*_: object) -> None:
        raise OSError("this system cannot choose the source of a datagram")

    monkeypatch.setattr("trisock._udp.packet_info.IP_PKTINFO", 0)
    monkeypatch.setattr("trisock._udp.packet_info.IPV6_PKTINFO", 0)
    monkeypatch.setattr("trisock._udp.syscalls.send_from", cannot)
    async with await open_udp(host=host) as udp:
        await udp.send(b"x", udp.getlocal(), source=udp.getlocal())
        other = "127.0.0.2" if host == "127.0.0.1" else "::2"
        with pytest.raises(OSError, match=r"cannot send to .* from .*: this system cannot"):
            await udp.send(b"x", udp.getlocal(), source=(other, udp.getlocal().port))


async def test_a_source_with_another_port_is_an_error(
    udp: UDPSocket, port: int, raw: socket.socket
) -> None:
    with pytest.raises(ValueError, match=f"^a source must have the socket's port, {port}, not 9$"):
        await udp.send(b"x", raw.getsockname(), source=("127.0.0.1", 9))
    with pytest.raises(ValueError, match="a source must be an address, not a name: 'localhost'"):
        await udp.send(b"x", raw.getsockname(), source=("localhost", port))
    for source in ("127.0.0.1", ("127.0.0.1",), ["127.0.0.1", port], (b"127.0.0.1", port)):
        with pytest.raises(TypeError):
            await udp.send(b"x", raw.getsockname(), source=source)  # type: ignore[arg-type]


# ---- the receiver ----


async def test_the_name_of_a_receiver_is_looked_up_each_time(
    udp: UDPSocket, port: int, raw: socket.socket
) -> None:
    resolver = Resolver(here=["127.0.0.1", "::1"], six=["::1"])
    trio.socket.set_custom_hostname_resolver(resolver)
    for _ in range(2):
        await udp.send(b"x", ("here", raw.getsockname()[1]))
        assert raw.recv(10) == b"x"
    await udp.send(b"y", ("six", port))
    assert (await udp.recv()).address == ("::1", port)
    assert resolver.asked == [b"here", b"here", b"six"]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
async def test_a_name_is_looked_up_in_the_family_of_the_socket(host: str) -> None:
    trio.socket.set_custom_hostname_resolver(Resolver(name=["127.0.0.1", "::1"]))
    async with await open_udp(host=host) as udp:
        await udp.send(b"x", ("name", udp.getlocal().port))
        assert (await udp.recv()).address == udp.getlocal()


async def test_a_port_may_be_an_enum(udp: UDPSocket, port: int) -> None:
    ports = enum.IntEnum("Port", {"OWN": port})
    await udp.send(b"x", ("127.0.0.1", ports.OWN))  # type: ignore[attr-defined]
    assert (await udp.recv()).data == b"x"


async def test_an_unknown_name_is_a_gaierror(udp: UDPSocket) -> None:
    with pytest.raises(socket.gaierror, match=r"cannot send to no\.such\.invalid:9: "):
        await udp.send(b"x", ("no.such.invalid", 9))


async def test_a_receiver_that_cannot_be_reached_is_an_oserror(udp: UDPSocket, port: int) -> None:
    """A server gets addresses from the network, so none of them may be a ``ValueError``."""
    with pytest.raises(OSError, match=r"cannot send to 127\.0\.0\.1:0: Invalid argument"):
        await udp.send(b"x", ("127.0.0.1", 0))
    for zone in ("absent", "4294967297"):
        with pytest.raises(OSError, match=rf"cannot send to \[fe80::1%{zone}\]:9: No such device"):
            await udp.send(b"x", (f"fe80::1%{zone}", 9))
    with pytest.raises(
        PermissionError, match=r"cannot send to 127\.255\.255\.255:9: Permission denied \(if"
    ):
        await udp.send(b"x", ("127.255.255.255", 9))
    async with await open_udp(host="127.0.0.1") as ipv4, await open_udp(host="::1") as ipv6:
        with pytest.raises(
            OSError, match=r"cannot send to \[::1\]:9: .* \(this socket has only IPv4\)$"
        ):
            await ipv4.send(b"x", ("::1", 9))
        with pytest.raises(OSError, match=r"cannot send to 127\.0\.0\.1:9: Network is unreach"):
            await ipv6.send(b"x", ("127.0.0.1", 9))


@pytest.mark.parametrize(
    ("address", "error"),
    [
        (None, TypeError),
        ("127.0.0.1", TypeError),
        ("ab", TypeError),  # a str of two items
        (["127.0.0.1", 9], TypeError),
        (("127.0.0.1",), TypeError),
        (("127.0.0.1", "9"), TypeError),
        (("127.0.0.1", True), TypeError),
        ((b"127.0.0.1", 9), TypeError),
        (("127.0.0.1", -1), ValueError),
        (("127.0.0.1", 65536), ValueError),
        (("", 9), ValueError),
        (("*", 9), ValueError),
        (("<broadcast>", 9), ValueError),  # Python's socket module accepts this name
        (("a\0b", 9), ValueError),
        (("a b\n", 9), ValueError),
        (("fe80::1%\n", 9), ValueError),
    ],
)
async def test_a_wrong_address_is_an_error(
    udp: UDPSocket, address: object, error: type[Exception]
) -> None:
    with pytest.raises(error) as caught:
        await udp.send(b"x", address)  # type: ignore[arg-type]
    assert str(caught.value).isprintable()


async def test_wrong_data_is_an_error(udp: UDPSocket, client: UDPSocket) -> None:
    for data in ("text", None, 5, [b"x"]):
        with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview, not"):
            await udp.send(data, ("127.0.0.1", 9))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match="expected bytes, bytearray or memoryview, not"):
            await client.send(data)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("max_bytes", "error"),
    [(0, ValueError), (-1, ValueError), (None, TypeError), ("5", TypeError), (1.5, TypeError)],
)
async def test_a_wrong_max_bytes_is_an_error(
    udp: UDPSocket, client: UDPSocket, max_bytes: object, error: type[Exception]
) -> None:
    await client.send(b"kept")
    with pytest.raises(error, match="max_bytes must be"):
        await udp.recv(max_bytes)  # type: ignore[arg-type]
    assert (await udp.recv()).data == b"kept"
