"""Fixtures: UDP sockets on loopback."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Iterator

import pytest

from trisock import UDPSocket, connect_udp, open_udp


@pytest.fixture
async def udp() -> AsyncIterator[UDPSocket]:
    """A socket on all addresses, IPv4 and IPv6."""
    async with await open_udp() as udp:
        yield udp


@pytest.fixture
def port(udp: UDPSocket) -> int:
    """The port of ``udp``."""
    return udp.getlocal().port


@pytest.fixture
async def client(port: int) -> AsyncIterator[UDPSocket]:
    """A socket whose only peer is ``udp``."""
    async with await connect_udp("127.0.0.1", port) as client:
        yield client


@pytest.fixture
def raw() -> Iterator[socket.socket]:
    """A blocking socket of the standard library, on 127.0.0.1."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as raw:
        raw.bind(("127.0.0.1", 0))
        yield raw
