"""Programs that run a service, and a stand-in for systemd that receives notifications."""

from __future__ import annotations

import os
import re
import socket
import struct
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import trio

import trisock
from helpers.examples import Running, started
from trisock import Service

# Every program begins with these lines. ``listener`` gets a free port, which the program prints.
PROLOGUE = """
import logging, os, signal, sys
import trio, trisock
def say(*words): print(*words, flush=True)
listener = trisock.listen_nowait(0, host="127.0.0.1")
async def echo(sock):
    async for line in sock.lines():
        await sock.send(line, b"\\n")
say(listener.port)
"""


@asynccontextmanager
async def program(source: str, **environment: str) -> AsyncIterator[Running]:
    """Run a program. It must print its port first; ``Running.port`` is this port."""
    command = [sys.executable, "-X", "dev", "-c", PROLOGUE + source]
    async with started(command, env={**os.environ, **environment}) as running:
        running.port = int(await running.line())
        yield running


class Systemd:
    """A datagram socket that receives notifications, and checks who sent them."""

    def __init__(self, sock: socket.socket, path: str) -> None:
        self.socket = sock
        self.path = path

    async def receive(self, pid: int | None = None) -> bytes:
        """Return the next message. If ``pid`` is given, that process must have sent it."""
        await trio.lowlevel.wait_readable(self.socket)
        message, ancillary, _, _ = self.socket.recvmsg(4096, socket.CMSG_SPACE(12))
        [(_, kind, data)] = ancillary
        assert kind == socket.SCM_CREDENTIALS
        assert pid is None or struct.unpack("3i", data)[0] == pid
        return message

    def silent(self) -> bool:
        """Return whether no message is waiting."""
        try:
            self.socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
        except BlockingIOError:
            return True
        return False


@contextmanager
def systemd(path: str | Path) -> Iterator[Systemd]:
    """Listen for notifications. A path that begins with ``@`` is an abstract name."""
    text = str(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(re.sub("^@", "\0", text))
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        yield Systemd(sock, text)


@contextmanager
def no_stray_cancelled() -> Iterator[None]:
    """Fail if the block raises ``Cancelled``. (pytest-trio would mistake it for its own.)"""
    try:
        yield
    except trio.Cancelled as exc:
        raise AssertionError("a stray Cancelled") from exc


@asynccontextmanager
async def checked_service(
    check: Callable[[], Awaitable[object]], **options: Any
) -> AsyncIterator[Service]:
    """Open a service, and stop it when ``check()`` returns. Fail if the service ends earlier."""
    checked = False

    async def check_and_stop() -> None:
        nonlocal checked
        await check()
        checked = True
        service.stop()

    with no_stray_cancelled():
        async with trisock.open_service(**options) as service:
            yield service
            service.nursery.start_soon(check_and_stop)
        assert checked, "the service ended before it was stopped"
