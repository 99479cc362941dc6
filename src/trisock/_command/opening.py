"""Open the connection that a URL describes."""

from __future__ import annotations

import trio

from .. import (
    ClientTLS,
    LimitExceededError,
    ProxyHeader,
    Socket,
    connect,
    connect_unix,
    starttls,
)
from .urls import Target

#: What a network, a peer and its certificate can cause.
NETWORK_ERRORS = (OSError, trio.BrokenResourceError, EOFError, LimitExceededError, ValueError)


async def open_target(
    target: Target, tls: ClientTLS, *, timeout: float | None = 60, proxy_protocol: bool = False
) -> Socket:
    """Connect, and start TLS if the URL says so. A cancelled or failed call leaves nothing open.

    Args:
      target: where to connect.
      tls: the role for TLS. It verifies the name in the role, or the URL's host.
      timeout: how many seconds STARTTLS and the handshake may take together, or ``None`` for no
        limit.
      proxy_protocol: whether to send a PROXY header first, with the connection's own addresses.

    Raises: one of ``NETWORK_ERRORS``.
    """
    sock = await connect_plain(target)
    try:
        if proxy_protocol:
            await sock.send(_proxy_header(sock).to_bytes())
        if target.scheme.protocol is not None:
            await starttls.upgrade(sock, target.scheme.protocol, tls, timeout=timeout)
        elif target.scheme.tls:
            await sock.starttls(tls, handshake_timeout=timeout)
    except BaseException:
        sock.abort()
        raise
    return sock


async def connect_plain(target: Target) -> Socket:
    """Connect, and stay in plain text."""
    if target.path is not None:
        return await connect_unix(target.path)
    return await connect(target.host, target.port)


def _proxy_header(sock: Socket) -> ProxyHeader:
    """Return a header of version 1, which most servers understand."""
    source, destination = sock.getlocal(), sock.getpeer()
    if not destination.port:  # a Unix socket: version 1 has no addresses for it
        return ProxyHeader(version=1)
    return ProxyHeader(version=1, source=source, destination=destination)
