"""Open the connection that a URL describes."""

from __future__ import annotations

import trio

from .. import (
    ClientTLS,
    ProxyHeader,
    Socket,
    TLSError,
    connect,
    connect_unix,
    starttls,
)
from .roles import Roles
from .stages import Opening, Stage
from .urls import Target

#: The errors that a network, a peer or its certificate can cause. ``TLSError`` and
#: ``StartTLSError`` are ``BrokenResourceError`` too. A ``ValueError`` would be a bug here, because
#: the arguments were checked before.
NETWORK_ERRORS = (OSError, trio.BrokenResourceError)

# OpenSSL's reasons when a server shares no ALPN protocol with us (RFC 7301, section 3.2).
_NO_ALPN = ("NO_APPLICATION_PROTOCOL", "TLSV1_ALERT_NO_APPLICATION_PROTOCOL")


async def open_target(
    target: Target,
    roles: Roles,
    alpn: tuple[str, ...],
    opening: Opening,
    *,
    verify: bool = True,
    proxy_protocol: bool = False,
) -> Socket:
    """Connect, and start TLS if the URL says so. A cancelled or failed call leaves nothing open.

    If the server refuses all protocols that we offer by ALPN, a second connection offers none. Most
    mail clients offer none either.

    Args:
      target: where to connect.
      roles: the roles for TLS.
      alpn: the protocols to offer by ALPN.
      opening: records the current stage.
      verify: whether to verify the certificate. A verified certificate must be valid for the name
        in ``roles`` or, if there is none, for the URL's host.
      proxy_protocol: whether to send a PROXY header first, with the connection's own addresses.

    Raises: one of ``NETWORK_ERRORS``. The call has no time limit of its own.
    """
    try:
        return await _open(target, roles.role(alpn, verify=verify), opening, proxy_protocol)
    except TLSError as exc:
        if exc.reason not in _NO_ALPN or not alpn:
            raise
    return await _open(target, roles.role((), verify=verify), opening, proxy_protocol)


async def _open(target: Target, tls: ClientTLS, opening: Opening, proxy_protocol: bool) -> Socket:
    sock = await connect_plain(target, opening)
    try:
        if proxy_protocol:
            await sock.send(_proxy_header(sock).to_bytes())
        protocol = target.scheme.protocol
        if protocol is not None:
            await starttls.upgrade(opening.negotiating(sock), protocol, tls, timeout=None)
        elif target.scheme.tls:
            opening.stage = Stage.HANDSHAKE
            await sock.starttls(tls, handshake_timeout=None)
    except BaseException:
        sock.abort()
        raise
    return sock


async def connect_plain(target: Target, opening: Opening) -> Socket:
    """Connect, and stay in plain text."""
    with opening.connecting():
        if target.path is not None:
            return await connect_unix(target.path)
        return await connect(target.host, target.port)


def _proxy_header(sock: Socket) -> ProxyHeader:
    """Return a header of version 1, which most servers understand."""
    source, destination = sock.getlocal(), sock.getpeer()
    if not destination.port:  # a Unix socket: version 1 has no addresses for it
        return ProxyHeader(version=1)
    return ProxyHeader(version=1, source=source, destination=destination)
