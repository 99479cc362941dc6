"""upgrade: the client's side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING

from .._address import is_unix_address
from .._arguments import seconds_or_inf, type_name
from .._tls.roles import ClientTLS, resolve_role
from .conversation import CheckQuiet, Names, Negotiation, address_literal
from .driver import check_protocol, check_socket, run
from .ftp import ftp_client
from .imap import imap_client
from .irc import irc_client
from .ldap import ldap_client
from .mysql import mysql_client
from .nntp import nntp_client
from .pop3 import pop3_client
from .postgres import postgres_client
from .sieve import sieve_client
from .smtp import lmtp_client, smtp_client
from .telnet import telnet_client
from .xmpp import xmpp_client, xmpp_server_client

if TYPE_CHECKING:
    from .._address import Address
    from .._net.socket import Socket
    from .._tls.roles import TLSArgument

_CLIENTS: dict[str, tuple[tuple[int, ...], Callable[[Names], Negotiation]]] = {
    "smtp": ((587, 25), smtp_client),
    "lmtp": ((24,), lmtp_client),
    "imap": ((143,), imap_client),
    "pop3": ((110,), pop3_client),
    "sieve": ((4190,), sieve_client),
    "ftp": ((21,), ftp_client),
    "nntp": ((119,), nntp_client),
    "ldap": ((389,), ldap_client),
    "postgres": ((5432,), postgres_client),
    "mysql": ((3306,), mysql_client),
    "xmpp": ((5222,), xmpp_client),
    "xmpp-server": ((5269,), xmpp_server_client),
    "irc": ((6667,), irc_client),
    "telnet": ((23,), telnet_client),
}

#: The protocols of ``upgrade``, each with its default ports. ``connect(starttls=)`` uses the first
#: port.
PROTOCOLS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {name: ports for name, (ports, _) in _CLIENTS.items()}
)


async def upgrade(
    sock: Socket, protocol: str, tls: TLSArgument | None = None, *, timeout: float | None = 60
) -> bytes:
    """Ask a server for TLS as the protocol requires, then start TLS.

    Call this on a new connection, because it reads the greeting. Meanwhile, no other task may use
    the connection.

    Args:
      sock: a connection in plain text, from which nothing was read.
      protocol: one of ``PROTOCOLS``.
      tls: the role of a TLS client, as in ``Socket.starttls``. ``None`` verifies the server for the
        host that was passed to ``connect``.
      timeout: how many seconds the negotiation and the handshake may take together, or ``None`` for
        no limit.

    Returns: the greeting, without its last line end. POP3's greeting contains APOP's timestamp.
    MySQL's greeting is the server's first packet, with its header. For LDAP, PostgreSQL, XMPP, IRC
    and Telnet the greeting is ``b""``.

    Raises:
      StartTLSError: the server does not offer TLS, refused it, violated the protocol, was silent
        for too long, or ended the connection. The socket is closed.
      TLSError: the handshake failed. The socket is closed.
      RuntimeError: the connection already uses TLS. Nothing has changed.
      TypeError, ValueError: an argument is invalid. Nothing has changed.
      trio.BusyResourceError: another task is reading. Nothing has changed. If another task is
        sending, the socket is closed.
      trio.ClosedResourceError: the socket is closed, or ``send_eof`` was called.

    If cancelled, the socket is closed immediately. Once the negotiation has failed, nothing more is
    sent in plain text.

    **Forget what was said before TLS**, including the greeting: an attacker may have written it.
    Ask for the capabilities again.

    Before TLS, the server may send at most 64 KiB and 512 lines, with at most 8 KiB per line.
    XMPP's tags and Telnet's commands count as lines. The greeting may have at most 16 KiB.
    """
    check_protocol(protocol, PROTOCOLS)
    seconds = seconds_or_inf("timeout", timeout)
    if tls is None:
        tls = ClientTLS()
    role = resolve_role(
        tls, server_hostname=None, connected_host=sock.connected_host, side=sock.getside()
    )
    if role.server_side:
        raise TypeError(f"tls must be a TLS client's role, not {type_name(tls)}")
    check_socket(sock)
    names = Names(_own_name(sock.getlocal()), role.server_hostname)
    _, client = _CLIENTS[protocol]
    negotiation = client(names)  # raises an error if it needs a name that is missing
    greeting, _ = await run(sock, protocol, _then_quiet(negotiation), tls, seconds)
    return greeting


def _then_quiet(negotiation: Negotiation) -> Negotiation:
    """Check that nothing follows the server's last reply: in TLS, the client speaks first."""
    greeting = yield from negotiation
    yield CheckQuiet()
    return greeting


def _own_name(address: Address) -> bytes:
    """Return this host's address as its name, because a lookup could take long."""
    return b"localhost" if is_unix_address(address) else address_literal(address.host)
