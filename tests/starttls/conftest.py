"""Fixtures: the two ends of a connection, encrypted or in plain text."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from helpers.pairs import closing
from trisock import Socket
from trisock.testing import socket_pair


@pytest.fixture
def layer() -> str:
    """``"tls"`` if the ends ``a`` and ``b`` have called starttls, otherwise ``"plain"``."""
    return "tls"


@pytest.fixture
async def ends(layer: str) -> AsyncIterator[tuple[Socket, Socket]]:
    a, b = await socket_pair(tls=layer == "tls")
    async with closing(a, b):
        yield a, b
