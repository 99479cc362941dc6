"""What Trio libraries ask of a SocketStream, they may ask of a Socket."""

from __future__ import annotations

import pytest

from helpers.pairs import closing, tcp_pair


async def test_a_socket_has_the_socket_of_its_stream() -> None:
    client, server = await tcp_pair()
    async with closing(client, server):
        assert client.socket is client.stream.socket
        assert client.socket.getpeername() == tuple(server.getlocal())
        with pytest.raises(AttributeError):
            client.socket = server.socket  # type: ignore[misc]
        assert not hasattr(client, "do_handshake")  # which would mean TLS
