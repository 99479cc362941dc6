"""Handlers without faults, and a check of the faults that ``check_handler`` finds."""

from __future__ import annotations

from typing import Any

import pytest

import trisock
from trisock import Socket
from trisock.testing import check_handler

STARTTLS = b"STARTTLS\r\n"


async def discard(sock: Socket) -> None:
    async for _ in sock:
        pass


async def answer_lines(sock: Socket) -> None:
    async for line in sock.lines():
        await sock.send(b"ok " + line + b"\n")


async def leave_at_once(sock: Socket) -> None:
    await sock.send(b"goodbye\n")


async def finds(message: str, handler: trisock.Handler, **options: Any) -> AssertionError:
    """Check that ``check_handler`` raises exactly this message."""
    with pytest.raises(AssertionError) as caught:
        await check_handler(handler, **options)
    assert str(caught.value) == message
    return caught.value
