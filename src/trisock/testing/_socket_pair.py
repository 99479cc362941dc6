"""socket_pair: the two ends of a connection over loopback."""

from __future__ import annotations

import trio

import trisock

from .. import Socket, _guard
from ._arguments import check_bool
from ._authority import shared_authority


async def socket_pair(*, tls: bool = False) -> tuple[Socket, Socket]:
    """Return the two ends, client and server, of a TCP connection over loopback.

    Args:
      tls: whether to call ``starttls`` at both ends. The client has verified the server's
        certificate, which is for ``localhost``.

    Raises:
      ImportError: ``tls`` is True, and trustme is not installed.
      OSError: the machine has no more ports or descriptors.

    A cancelled call leaves nothing open.
    """
    check_bool("tls", tls)
    authority = shared_authority() if tls else None
    client, server = await _connected()
    if authority is None:
        return client, server
    try:
        # The server's half of the handshake is a task, because each half waits for the other.
        with _guard.bare():
            async with trio.open_nursery() as nursery:
                nursery.start_soon(server.starttls, authority.server_tls())
                await client.starttls(authority.client_tls())
    except BaseException:
        client.abort()
        server.abort()
        raise
    return client, server


async def _connected() -> tuple[Socket, Socket]:
    listener = await trisock.listen(0, host="127.0.0.1")
    try:
        client = await trisock.connect("127.0.0.1", listener.port)
        try:
            # Another program on this machine may have connected first.
            while (server := await listener.accept()).getpeer() != client.getlocal():
                server.abort()
        except BaseException:
            client.abort()
            raise
    finally:
        listener.abort()  # not close(): if cancelled, it would lose the sockets
    return client, server
