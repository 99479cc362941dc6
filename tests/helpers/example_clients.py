"""Helpers for tests that connect to the examples as a client."""

from __future__ import annotations

import pathlib
from typing import Any

from trisock import ClientTLS, Socket


def trusting(ca: str, **options: Any) -> ClientTLS:
    return ClientTLS("localhost", ca=pathlib.Path(ca).read_bytes(), **options)


async def reply(sock: Socket) -> str:
    """Receive a reply of one or more lines."""
    lines = []
    async for line in sock.lines(delimiter=b"\r\n"):
        lines.append(line.decode())
        if line[3:4] == b" ":
            return "\n".join(lines)
    raise AssertionError("the server closed the connection")


async def codes(sock: Socket, sent: bytes) -> list[int]:
    """Send one or more lines in one call. Return the code of each reply."""
    await sock.send(sent)
    return [int((await reply(sock))[:3]) for _ in range(sent.count(b"\r\n"))]
