"""The commands that the injection test sends, for each protocol (no I/O).

The test sends a command in plain text behind STARTTLS, in the same segment. Inside TLS it sends
only a farewell. A server that answers the injected command there has taken plain text for encrypted
text (CVE-2011-0411; "Why TLS Is Better Without STARTTLS", USENIX Security 2021).
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class InjectedCommand:
    """What to send for one protocol, and how to tell the answers apart.

    Attributes:
      starttls: bytes that only the message which begins TLS contains.
      command: the command to send behind it, in plain text.
      farewell: what to send inside TLS, so that the server ends the connection.
      is_answered: whether the bytes that came inside TLS answer the injected command.
    """

    starttls: bytes
    command: bytes
    farewell: bytes
    is_answered: Callable[[bytes], bool]


def _holds(*parts: bytes) -> Callable[[bytes], bool]:
    return lambda data: any(part in data for part in parts)


def _begins_otherwise(*codes: bytes) -> Callable[[bytes], bool]:
    """Recognize a first reply that does not answer the farewell: it has none of these codes."""
    return lambda data: re.match(rb"[0-9]{3}", data) is not None and data[:3] not in codes


# 421 and 400: the server is shutting down. 220, 200 and 201: it greets again, against the RFCs.
_QUITS = _begins_otherwise(b"221", b"421", b"220")
_NNTP_QUITS = _begins_otherwise(b"205", b"400", b"200", b"201")

_SMTP = InjectedCommand(b"STARTTLS\r\n", b"NOOP\r\n", b"QUIT\r\n", _QUITS)

_TAG = b"trisock-injected"

# LDAPMessages (RFC 4511, section 4): a search of the root DSE, and an UnbindRequest, which a server
# does not answer. An answer has the messageID of its request: 77.
_LDAP_ID = b"\x02\x01\x4d"
_LDAP_SEARCH = (
    bytes.fromhex("302a 02014d 6325 0400 0a0100 0a0100 020101 020100 010100 870b")
    + b"objectClass"
    + bytes.fromhex("3005 0403 312e31")
)
_LDAP_UNBIND = bytes.fromhex("3005 020103 4200")

# PostgreSQL ("Message Formats"): a StartupMessage, and a CancelRequest, which a server does not
# answer.
_POSTGRES_FIELDS = b"\x00\x03\x00\x00user\0trisock\0database\0trisock\0\0"
_POSTGRES_STARTUP = struct.pack("!I", 4 + len(_POSTGRES_FIELDS)) + _POSTGRES_FIELDS
_POSTGRES_CANCEL = bytes.fromhex("00000010 04d2162e 00000000 00000000")


def _answers_startup(data: bytes) -> bool:
    # Since CVE-2021-23214, a server that has noticed says so inside TLS: a protocol violation.
    return bool(data) and b"C08P01\0" not in data


# MySQL ("Protocol::HandshakeResponse41"): a login as trisock without a password. A packet of one
# byte is the farewell: a server answers that the handshake is bad.
_MYSQL_LOGIN = (
    struct.pack("<IIB23x", 0x0008AA05, 0xFFFFFF, 45) + b"trisock\0\0mysql_native_password\0"
)
_MYSQL_PACKET = len(_MYSQL_LOGIN).to_bytes(3, "little") + b"\x02" + _MYSQL_LOGIN
_MYSQL_FAREWELL = b"\x01\0\0\x02\0"
_MYSQL_DENIED = (1045, 1251, 1524, 1698)  # errors of a login that was read as one


def _answers_login(data: bytes) -> bool:
    packet = data[4:]
    if packet[:1] == b"\xff":
        return int.from_bytes(packet[1:3], "little") in _MYSQL_DENIED
    return bool(packet)


def _xmpp(namespace: bytes) -> InjectedCommand:
    # A stream begins anew inside TLS (RFC 6120, section 5.4.3.3). An injected header makes the
    # server send its features; the bare end of a stream is an error.
    header = (
        b"<?xml version='1.0'?><stream:stream to='trisock.invalid' version='1.0' xmlns='"
        + namespace
        + b"' xmlns:stream='http://etherx.jabber.org/streams'>"
    )
    features = _holds(b"<stream:features", b"<host-unknown")
    return InjectedCommand(b"<starttls", header, b"</stream:stream>", features)


#: The protocols of ``starttls.PROTOCOLS``, but for Telnet: its servers speak unasked, so that
#: nothing tells an answer.
INJECTED_COMMANDS: dict[str, InjectedCommand] = {
    "smtp": _SMTP,
    "lmtp": _SMTP,
    "imap": InjectedCommand(
        b" STARTTLS\r\n", _TAG + b" NOOP\r\n", b"trisock-end LOGOUT\r\n", _holds(_TAG)
    ),
    "pop3": InjectedCommand(
        b"STLS\r\n", b"XINJECTED\r\n", b"QUIT\r\n", lambda data: data[:4].upper() == b"-ERR"
    ),
    "sieve": InjectedCommand(
        b"STARTTLS\r\n", b'NOOP "' + _TAG + b'"\r\n', b"LOGOUT\r\n", _holds(_TAG)
    ),
    "ftp": InjectedCommand(b"AUTH TLS\r\n", b"NOOP\r\n", b"QUIT\r\n", _QUITS),
    "nntp": InjectedCommand(b"STARTTLS\r\n", b"DATE\r\n", b"QUIT\r\n", _NNTP_QUITS),
    "ldap": InjectedCommand(
        b"1.3.6.1.4.1.1466.20037", _LDAP_SEARCH, _LDAP_UNBIND, _holds(_LDAP_ID)
    ),
    "postgres": InjectedCommand(
        bytes.fromhex("04d2162f"), _POSTGRES_STARTUP, _POSTGRES_CANCEL, _answers_startup
    ),
    "mysql": InjectedCommand(b"\x20\0\0\x01", _MYSQL_PACKET, _MYSQL_FAREWELL, _answers_login),
    "xmpp": _xmpp(b"jabber:client"),
    "xmpp-server": _xmpp(b"jabber:server"),
    "irc": InjectedCommand(
        b"STARTTLS\r\n", b"CAP LS 302\r\n", b"QUIT\r\n", _holds(b" CAP ", b" 451 ")
    ),
}
