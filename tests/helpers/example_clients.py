"""What clients of the examples share."""

from __future__ import annotations

import pathlib
from typing import Any

from trisock import ClientTLS, Socket


def trusting(ca: str, **options: Any) -> ClientTLS:
    return ClientTLS("localhost", ca=pathlib.Path(ca).read_bytes(), **options)


async def reply(sock: Socket) -> str:
    """Return a reply, of whatever number of lines, as text."""
    lines = []
    async for line in sock.lines(delimiter=b"\r\n"):
        lines.append(line.decode())
        if line[3:4] == b" ":
            return "\n".join(lines)
    raise AssertionError("the server has closed the connection")


async def codes(sock: Socket, sent: bytes) -> list[int]:
    """Send a line or more, at once, and return the codes of as many replies."""
    await sock.send(sent)
    return [int((await reply(sock))[:3]) for _ in range(sent.count(b"\r\n"))]
