"""Datagrams are received whole, with the address of the sender, and sent whole."""

from __future__ import annotations

import socket

import pytest

from trisock import Address, Datagram, UDPSocket, connect_udp, open_udp

LONGEST = 65507  # bytes of a datagram over IPv4


@pytest.mark.parametrize("size", [0, 1, 1472, 9216, LONGEST])
async def test_a_datagram_arrives_whole(udp: UDPSocket, client: UDPSocket, size: int) -> None:
    data = bytes(range(256)) * (size // 256) + bytes(size % 256)
    await client.send(data)
    got = await udp.recv()
    assert got == Datagram(
        data, client.getlocal(), Address("127.0.0.1", udp.getlocal().port), False
    )
    await udp.send(got.data, got.address)
    assert (await client.recv()).data == data


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
        assert (await client.recv()).data == b"answer"


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
async def test_every_kind_of_buffer_is_sent(
    udp: UDPSocket, port: int, raw: socket.socket, kind: type
) -> None:
    await udp.send(kind(b"data"), raw.getsockname())
    assert raw.recvfrom(100) == (b"data", ("127.0.0.1", port))


async def test_a_longer_datagram_is_truncated(udp: UDPSocket, client: UDPSocket) -> None:
    for data in (b"12345", b"123456", b"next"):
        await client.send(data)
    assert (await udp.recv(5))[::3] == (b"12345", False)
    assert (await udp.recv(5))[::3] == (b"12345", True)
    assert (await udp.recv(5))[::3] == (b"next", False)


async def test_an_answer_comes_from_the_address_that_was_asked(udp: UDPSocket, port: int) -> None:
    async with await open_udp(host="127.0.0.1") as client:
        for host in ("127.0.0.1", "127.0.0.2", "127.0.0.3"):
            await client.send(b"query", (host, port))
            query = await udp.recv()
            assert query.destination == (host, port)
            await udp.send(b"answer", query.address, source=query.destination)
            assert (await client.recv()).address == (host, port)
