"""accept: the server's side."""

from __future__ import annotations

import re
import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from .._address import to_ascii_host
from .._arguments import quoted, seconds_or_inf, type_name
from .._tls.roles import resolve_role
from .conversation import Names, Negotiation, address_literal
from .driver import check_protocol, check_socket, run
from .imap import imap_server
from .pop3 import pop3_server
from .postgres import postgres_server
from .smtp import lmtp_server, smtp_server

if TYPE_CHECKING:
    from .._net.socket import Socket
    from .._tls.info import TLSInfo
    from .._tls.roles import TLSArgument

_SERVERS: dict[str, Callable[[Names], Negotiation]] = {
    "smtp": smtp_server,
    "lmtp": lmtp_server,
    "imap": imap_server,
    "pop3": pop3_server,
    "postgres": postgres_server,
}

# SMTP also allows an address literal: [192.0.2.1] (RFC 5321, section 4.1.3).
_ADDRESS_LITERAL = re.compile(r"\[[0-9A-Za-z:.-]{1,64}\]")


async def accept(
    sock: Socket,
    protocol: str,
    tls: TLSArgument,
    *,
    hostname: str | None = None,
    timeout: float | None = 60,
) -> TLSInfo:
    """Act as the server until the client asks for TLS, then start TLS.

    Call this at the start of a handler. It sends the greeting, offers STARTTLS, and refuses every
    command that needs TLS, with the protocol's own replies. There is no second greeting under TLS:
    the client sends first (in SMTP, ``EHLO`` again).

    If the server stops or the time limit ends, SMTP and LMTP clients get a reply 421, and IMAP
    clients get ``BYE`` (RFC 5321, section 3.8; RFC 9051, section 7.1.5). A tenth of the time limit,
    but at most one second, is reserved for this reply.

    Args:
      sock: a new connection in plain text.
      protocol: ``"smtp"``, ``"lmtp"``, ``"imap"``, ``"pop3"`` or ``"postgres"``.
      tls: the role of a TLS server, as in ``Socket.starttls``.
      hostname: the name that the server sends in SMTP and LMTP: a host name, an IP address, or an
        address literal such as ``"[192.0.2.1]"``. The default is the machine's name.
      timeout: how many seconds the negotiation and the handshake may take together, or ``None`` for
        no limit.

    Returns: the negotiated parameters (also in ``Socket.tls``).

    Raises:
      StartTLSError: the client quit, sent 20 commands without asking for TLS, violated the
        protocol, was silent for too long, or ended the connection. The socket is closed, after the
        protocol's reply if there is one. In a handler of ``bind``, this error is logged in one
        line, like all errors that a peer can cause.
      TLSError: the handshake failed. The socket is closed.
      ServerClosing: the server is stopping, and the client has not asked for TLS. The socket is
        closed.
      RuntimeError: the connection already uses TLS. Nothing has changed.
      TypeError, ValueError: an argument is invalid. Nothing was sent.
      trio.BusyResourceError, trio.ClosedResourceError: as in ``upgrade``.

    If cancelled, the socket is closed immediately.

    ``Server.broadcast`` without ``to`` also sends to clients that have not asked for TLS yet, in
    plain text. To avoid this, pass it the sockets for which ``accept`` has returned.

    Plain text that the client sends after STARTTLS is never executed, and the connection ends
    (CVE-2011-0411; for PostgreSQL, CVE-2021-23214). The limits of ``upgrade`` apply.
    """
    check_protocol(protocol, _SERVERS)
    seconds = seconds_or_inf("timeout", timeout)
    own = _own_name(hostname)
    # A server verifies no host name. With this name, a client's role is resolved, and refused
    # below.
    role = resolve_role(tls, server_hostname=None, connected_host="client", side=sock.getside())
    if not role.server_side:
        raise TypeError(f"tls must be a TLS server's role, not {type_name(tls)}")
    check_socket(sock)
    _, info = await run(sock, protocol, _SERVERS[protocol](Names(own)), tls, seconds)
    return info


def _own_name(hostname: str | None) -> bytes:
    if hostname is None:
        try:
            return to_ascii_host(socket.gethostname()).encode()
        except ValueError:  # the machine has a name that no client would accept
            return b"localhost"
    if not isinstance(hostname, str):
        raise TypeError(f"hostname must be a str or None, not {quoted(hostname)}")
    if _ADDRESS_LITERAL.fullmatch(hostname):
        return hostname.encode()
    try:
        return address_literal(hostname)
    except ValueError:  # a host name
        return to_ascii_host(hostname).encode()
