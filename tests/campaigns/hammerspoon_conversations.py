"""Conversations of ``trisock.hammerspoon`` for the soak: peers that vanish, and slow callbacks."""

from __future__ import annotations

import random
import socket
import struct
from collections import Counter
from typing import Any

import trio

from trisock import hammerspoon

LOCALHOST = "127.0.0.1"

# Seconds until a connection is dropped whose peer is gone, and what a busy machine takes longer.
_DROPPED_WITHIN = 2 + 8


def _server(hs: hammerspoon.Sockets, site: Any, rng: random.Random, fn: Any) -> hammerspoon.Socket:
    if rng.random() < 0.5:
        return hs.server(str(site.directory / f"hs-{rng.randrange(10**9)}"), fn)
    return hs.server(0, fn)


def _client(server: hammerspoon.Socket) -> socket.socket:
    info = server.info()
    if info["unixSocketPath"]:
        raw = socket.socket(socket.AF_UNIX)
        raw.connect(info["unixSocketPath"])
        return raw
    return socket.create_connection((LOCALHOST, info["localPort"]))


async def hammerspoon_peers_vanish(site: Any, rng: random.Random) -> None:
    """Clients send lines and go, by FIN or RST, while the server writes to them, or reads, or not.

    Each line of a client that has ended cleanly is read, if there are reads for it before the two
    seconds are over; and no connection stays.
    """
    heard: Counter[bytes] = Counter()
    sent: Counter[bytes] = Counter()

    def hear(data: bytes, tag: int) -> None:
        heard[data] += 1

    async with hammerspoon.open_sockets() as hs:
        server = _server(hs, site, rng, hear)
        clients = [_client(server) for _ in range(rng.randint(1, 5))]
        while server.connections() < len(clients):
            await trio.lowlevel.checkpoint()
        reads = rng.choice([0, 3])
        reads_first = rng.random() < 0.5
        for _ in range(reads if reads_first else 0):
            server.read("\n")
        for number, client in enumerate(clients):
            lines = [b"%d.%d\n" % (number, each) for each in range(rng.randint(0, 3))]
            client.sendall(b"".join(lines))
            if rng.random() < 0.3 and client.family != socket.AF_UNIX:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            else:
                sent.update(lines)
            client.close()
        for _ in range(rng.randint(0, 3)):
            server.write("to all\n")
            await trio.sleep(rng.choice([0, 0.002]))
        for _ in range(0 if reads_first else reads):
            server.read("\n")
        with trio.fail_after(_DROPPED_WITHIN):
            while server.connections():
                await trio.sleep(0.01)
        missing = sent - heard if reads else Counter()
        if missing:
            raise AssertionError(f"lost: {missing}")


async def hammerspoon_floods(site: Any, rng: random.Random) -> None:
    """A flood of lines, most of them empty, to a callback that is slow: all come, in order."""
    number = rng.randint(100, 2000)
    heard: list[bytes] = []

    async def slow(data: bytes, tag: int) -> None:
        heard.append(data)
        if rng.random() < 0.05:
            await trio.sleep(0.001)
        server.read("\n")

    async with hammerspoon.open_sockets() as hs:
        server = _server(hs, site, rng, slow)
        client = _client(server)
        while not server.connections():
            await trio.lowlevel.checkpoint()
        for _ in range(rng.randint(1, 50)):
            server.read("\n")
        lines = [b"\n" if rng.random() < 0.9 else b"x" * 5000 + b"\n" for _ in range(number)]
        await trio.to_thread.run_sync(client.sendall, b"".join(lines))
        client.close()
        while server.connections():
            await trio.sleep(0.001)
        if heard != lines:
            raise AssertionError(f"{len(heard)} of {number} lines were read")
