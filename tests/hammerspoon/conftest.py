"""Fixtures for the tests of trisock.hammerspoon."""

from __future__ import annotations

import logging
import pathlib
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest
from trio.testing import MockClock

import trisock
from helpers.hammerspoon import LOCALHOST, Calls, Log, connected, raw_client, until
from helpers.hammerspoon_udp import IPV6_LOCALHOST, raw_udp
from trisock import hammerspoon
from trisock.hammerspoon import Socket, Sockets, UDPSocket, UDPSockets


@pytest.fixture
async def hs() -> AsyncIterator[Sockets]:
    async with hammerspoon.open_sockets() as hs:
        yield hs


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def log(caplog: Log) -> Log:
    caplog.set_level(logging.DEBUG, "trisock.hammerspoon")
    return caplog


@pytest.fixture
def path(tmp_path: pathlib.Path) -> str:
    return str(tmp_path / "socket")


@pytest.fixture(params=["TCP", "Unix"])
def port_or_path(request: pytest.FixtureRequest, path: str) -> int | str:
    """Port 0 (any free port), or the path of a Unix socket."""
    return 0 if request.param == "TCP" else path


@pytest.fixture
async def server(hs: Sockets, port_or_path: int | str, calls: Calls) -> Socket:
    """A listening object, with ``calls`` as its callback."""
    return hs.server(port_or_path, calls)


@pytest.fixture
async def raw(server: Socket) -> AsyncIterator[socket.socket]:
    """A blocking socket, connected to ``server``."""
    with raw_client(server) as raw:
        await until(server.connected)
        yield raw


@pytest.fixture
async def pair(
    hs: Sockets, path: str, calls: Calls, request: pytest.FixtureRequest
) -> AsyncIterator[tuple[Socket, trisock.Socket]]:
    """``client`` and ``peer``, connected over TCP, or by path if parametrized as ``"Unix"``."""
    is_unix = getattr(request, "param", "TCP") == "Unix"
    async with connected(hs, path if is_unix else "", calls) as pair:
        yield pair


@pytest.fixture
def client(pair: tuple[Socket, trisock.Socket]) -> Socket:
    """An object that is connected to ``peer``, with ``calls`` as its callback."""
    return pair[0]


@pytest.fixture
def peer(pair: tuple[Socket, trisock.Socket]) -> trisock.Socket:
    return pair[1]


@pytest.fixture
def autojump_clock() -> MockClock:
    """A clock that jumps when all tasks have been blocked for 20 ms.

    Data that is sent over loopback arrives sooner.
    """
    return MockClock(autojump_threshold=0.02)


# ---- hs.udp ----


@pytest.fixture
def udp(hs: Sockets) -> UDPSockets:
    return hs.udp


@pytest.fixture(params=[LOCALHOST, IPV6_LOCALHOST])
def host(request: pytest.FixtureRequest) -> str:
    """An address of this machine: IPv4, then IPv6."""
    address: str = request.param
    return address


@pytest.fixture
def there(host: str) -> Iterator[Any]:
    """A UDP socket of Trio that is bound to ``host``."""
    with raw_udp(host) as sock:
        yield sock


@pytest.fixture
def listening(udp: UDPSockets, calls: Calls) -> UDPSocket:
    """An object that listens on IPv4 and IPv6, with ``calls`` as its callback."""
    return udp.server(0, calls)
