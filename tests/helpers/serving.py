"""Handlers, and clients of a server."""

from __future__ import annotations

import trisock
from trisock import Socket


async def echo(sock: Socket) -> None:
    async for chunk in sock:
        await sock.send(chunk)


async def connect(server: trisock.Server, **options: object) -> Socket:
    return await trisock.connect("127.0.0.1", server.port, **options)  # type: ignore[arg-type]


async def chat(sock: Socket) -> None:
    await sock.send(b"hi\n")
    await sock.recv()
