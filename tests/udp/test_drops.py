"""The kernel counts what it drops, and info() shows the count."""

from __future__ import annotations

import os
import socket
import struct

import pytest

from helpers.waiting import is_waiting
from trisock import UDPSocket, connect_udp, open_udp
from trisock._udp import syscalls

SO_RXQ_OVFL = 40  # Python has no name for it


@pytest.mark.parametrize("host", [None, "127.0.0.1"])
async def test_dropped_datagrams_are_counted(host: str | None) -> None:
    async with await open_udp(host=host) as udp:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        udp.setsockopt(socket.SOL_SOCKET, SO_RXQ_OVFL, 1)
        async with await connect_udp("127.0.0.1", udp.getlocal().port) as client:
            for _ in range(500):
                await client.send(bytes(100))
            received = 0
            while is_waiting(udp):
                await udp.recv()
                received += 1
            assert 0 < received < 500
            assert udp.info().dropped == 500 - received
            # SO_RXQ_OVFL attaches the same counter to the next datagram.
            await client.send(b"next")
            with socket.socket(fileno=os.dup(udp.fileno())) as raw:
                data, ancillary, _, _ = raw.recvmsg(100, 256)
            assert data == b"next"
            [counted] = [value for _, kind, value in ancillary if kind == SO_RXQ_OVFL]
            assert struct.unpack("@I", counted) == (500 - received,)
            # With this option, the destination is still known.
            await client.send(b"last")
            assert (await udp.recv()).destination == client.getpeer()


async def test_dropped_is_none_if_the_kernel_does_not_count(
    udp: UDPSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(syscalls, "_SO_MEMINFO", 9999)
    assert udp.info().dropped is None
