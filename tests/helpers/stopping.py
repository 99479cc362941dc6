"""Helpers for stopping servers: listeners, packet filters, and clients that connect meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio

import trisock
from trisock import Listener, Socket
from trisock._server import draining

needs_filter = pytest.mark.skipif(os.geteuid() != 0, reason="attaching this filter may need root")

# After SO_LOCK_FILTER is set, SO_ATTACH_FILTER fails with EPERM, even for root.
LOCK_FILTER = 44

# Drops each packet without the SYN flag, so a client's handshake cannot complete. It is _DROP_SYN
# with its last two instructions exchanged.
DROP_ACK = draining._DROP_SYN[:16] + draining._DROP_SYN[24:] + draining._DROP_SYN[16:24]


def lock_filter(listener: Listener) -> None:
    """Prevent a later SO_ATTACH_FILTER on the sockets of a listener."""
    for sock in listener._listening.sockets:
        sock.setsockopt(socket.SOL_SOCKET, LOCK_FILTER, 1)


def hold_handshakes(listener: Listener) -> None:
    """Let clients connect halfway: the last packet of their TCP handshake is dropped."""
    program = ctypes.create_string_buffer(DROP_ACK)
    argument = struct.pack("HP", 4, ctypes.addressof(program))
    for sock in listener._listening.sockets:
        sock.setsockopt(socket.SOL_SOCKET, draining._SO_ATTACH_FILTER, argument)


@contextlib.asynccontextmanager
async def listening(kind: str, directory: Path) -> AsyncIterator[Listener]:
    """Listen on a host, or on a Unix socket if ``kind`` is ``"unix"``."""
    if kind == "unix":
        listener = await trisock.listen_unix(directory / "socket")
    else:
        listener = await trisock.listen(0, host=kind)
    async with listener:
        yield listener


async def connect_to(listener: Listener | trisock.Server) -> Socket:
    host, port = listener.addresses[0]
    return await (trisock.connect(host, port) if port else trisock.connect_unix(host))


async def greet(sock: Socket) -> None:
    await sock.send(b"hello")


class ConnectingAtEachStep(trio.abc.Instrument):
    """Connects a client before each step of any task, up to 60 clients."""

    def __init__(self, address: tuple[str, int] | str) -> None:
        self.address = address
        self.connected: list[socket.socket] = []
        self.others: list[socket.socket] = []

    def before_task_step(self, task: trio.lowlevel.Task) -> None:
        if len(self.connected) + len(self.others) == 60:
            return
        host = self.address[0]
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.socket(socket.AF_UNIX if isinstance(self.address, str) else family)
        sock.setblocking(False)
        sock.connect_ex(self.address)
        try:
            sock.getpeername()  # over loopback, a handshake ends before connect(2) returns
        except OSError:
            self.others.append(sock)
        else:
            self.connected.append(sock)
