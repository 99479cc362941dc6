"""Cancel trisock.starttls at every cancel point (see helpers/cancellation.py)."""

from __future__ import annotations

import pytest

from helpers.cancellation import (
    TLS,
    UNIX,
    Attempt,
    Connections,
    at_every_cancel_point,
    covers,
    during,
)
from helpers.peers import Script
from helpers.starttls_conversations import SSL_REQUEST
from trisock.starttls import accept, upgrade


@covers("starttls.upgrade", "starttls.accept")
@pytest.mark.parametrize("layer", TLS)
@at_every_cancel_point
async def test_a_cancelled_negotiation_closes_the_socket(
    attempt: Attempt, layer: str, connections: Connections
) -> None:
    is_client = layer.endswith("client")
    call, heard, said = (upgrade, SSL_REQUEST, b"S") if is_client else (accept, b"S", SSL_REQUEST)
    async with connections.pair(UNIX) as (sock, peer):

        def script() -> Script:
            if not is_client:
                peer.say(said)
            while len(peer.heard) < len(heard) and not peer.gone:
                yield
                peer.act()
            if is_client:
                peer.say(said)
            connections.start_tls(peer, layer, after=len(heard))
            yield from peer.acting()

        await attempt(lambda: call(sock, "postgres", connections.role_of(layer)), during(script()))
        if attempt.cancelled:
            assert sock.fileno() == -1
            return
        assert attempt.error is None
        assert sock.istls()
        await sock.send(b"confidential")
        peer.act()
        assert peer.heard == heard + b"confidential"
