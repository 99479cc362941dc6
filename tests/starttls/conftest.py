"""Fixtures: the two ends of a connection, encrypted or in plain text."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from helpers.pairs import closing, pair
from trisock import ClientTLS, ServerTLS, Socket


@pytest.fixture
def layer() -> str:
    """``"tls"`` if the ends ``a`` and ``b`` have called starttls, otherwise ``"plain"``."""
    return "tls"


@pytest.fixture
async def ends(
    layer: str, client_tls: ClientTLS, server_tls: ServerTLS
) -> AsyncIterator[tuple[Socket, Socket]]:
    a, b = await pair(layer, client_tls, server_tls)
    async with closing(a, b):
        yield a, b
