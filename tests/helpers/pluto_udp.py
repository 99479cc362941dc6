"""UDP sockets of ``trisock.pluto``, and their peers."""

from __future__ import annotations

import contextlib
import select
import socket as stdlib
from collections.abc import Iterator
from typing import Any

import pytest
import trio

from helpers.deadline import DEADLINE
from helpers.pluto import got, inside
from trisock.pluto import socket


@contextlib.contextmanager
def raw_socket(host: str = "127.0.0.1") -> Iterator[stdlib.socket]:
    family = stdlib.AF_INET6 if ":" in host else stdlib.AF_INET
    with stdlib.socket(family, stdlib.SOCK_DGRAM) as raw:
        raw.bind((host, 0))
        raw.settimeout(DEADLINE)
        yield raw


def can_bind_ipv6() -> bool:
    try:
        with raw_socket("::1"):
            return True
    except OSError:
        return False


needs_ipv6 = pytest.mark.skipif(not can_bind_ipv6(), reason="no IPv6 here")


def udpserver(where: int | str = "127.0.0.1:0") -> Any:
    server = socket.udpserver(where)
    assert server is not None
    return server


async def udp_client(raw: stdlib.socket) -> Any:
    host, port = raw.getsockname()[:2]
    client = await got(socket.connect(host, port, "udp"))
    assert client is not None
    return client


async def wait_arrived(sock: Any) -> None:
    """Wait until a datagram has arrived."""
    if inside():
        await trio.lowlevel.wait_readable(sock._transport._udp.fileno())
    else:
        select.select([sock._transport._udp.fileno()], [], [], DEADLINE)
