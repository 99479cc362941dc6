"""The commands that the injection test sends, for each protocol (no I/O).

An attacker can add a plain-text command to the segment in which a client asks for TLS. A vulnerable
server keeps this command, and executes it inside TLS, as if the client had sent it encrypted
(CVE-2011-0411; "Why TLS Is Better Without STARTTLS", USENIX Security 2021).

The test adds a harmless command in the same way. Inside TLS, the test sends only the command that
ends the session. An answer to the harmless command inside TLS shows that the server is vulnerable.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class InjectedCommand:
    """What to send for one protocol, and how to recognize the answer.

    Attributes:
      starttls: part of the message that asks for TLS. No other message contains this part.
      command: the harmless command, which is sent in plain text, in the same segment.
      quit: the command that ends the session, which is sent inside TLS.
      is_answered: tells whether the bytes received inside TLS contain an answer to ``command``.
    """

    starttls: bytes
    command: bytes
    quit: bytes
    is_answered: Callable[[bytes], bool]


def _holds(*parts: bytes) -> Callable[[bytes], bool]:
    return lambda data: any(part in data for part in parts)


def _first_code_is_not(*codes: bytes) -> Callable[[bytes], bool]:
    """Recognize an answer by the first code: the reply to ``quit`` alone has one of ``codes``."""
    return lambda data: re.match(rb"[0-9]{3}", data) is not None and data[:3] not in codes


# 221 and 205 answer QUIT. 421 and 400: the server is shutting down. 220, 200 and 201: the server
# greets again inside TLS, which the RFCs forbid.
_IS_ANSWERED = _first_code_is_not(b"221", b"421", b"220")
_NNTP_IS_ANSWERED = _first_code_is_not(b"205", b"400", b"200", b"201")

_SMTP = InjectedCommand(b"STARTTLS\r\n", b"NOOP\r\n", b"QUIT\r\n", _IS_ANSWERED)

_TAG = b"trisock-injected"

# LDAPMessages (RFC 4511, section 4): a search of the root DSE, and an UnbindRequest. A server does
# not answer an UnbindRequest. The answer to the search has the search's messageID, 77.
_LDAP_ID = b"\x02\x01\x4d"
_LDAP_SEARCH = (
    bytes.fromhex("302a 02014d 6325 0400 0a0100 0a0100 020101 020100 010100 870b")
    + b"objectClass"
    + bytes.fromhex("3005 0403 312e31")
)
_LDAP_UNBIND = bytes.fromhex("3005 020103 4200")

# PostgreSQL ("Message Formats"): a StartupMessage, and a CancelRequest. A server does not answer a
# CancelRequest.
_POSTGRES_FIELDS = b"\x00\x03\x00\x00user\0trisock\0database\0trisock\0\0"
_POSTGRES_STARTUP = struct.pack("!I", 4 + len(_POSTGRES_FIELDS)) + _POSTGRES_FIELDS
_POSTGRES_CANCEL = bytes.fromhex("00000010 04d2162e 00000000 00000000")


def _answers_startup(data: bytes) -> bool:
    # A server with the fix for CVE-2021-23214 notices the injected bytes, and reports a protocol
    # violation (08P01) inside TLS.
    return bool(data) and b"C08P01\0" not in data


# MySQL ("Protocol::HandshakeResponse41"): a login as trisock without a password. A packet of one
# byte ends the session: the server answers that the handshake is bad.
_MYSQL_LOGIN = (
    struct.pack("<IIB23x", 0x0008AA05, 0xFFFFFF, 45) + b"trisock\0\0mysql_native_password\0"
)
_MYSQL_PACKET = len(_MYSQL_LOGIN).to_bytes(3, "little") + b"\x02" + _MYSQL_LOGIN
_MYSQL_BAD_PACKET = b"\x01\0\0\x02\0"
_MYSQL_DENIED = (1045, 1251, 1524, 1698)  # the errors of a server that has read the login


def _answers_login(data: bytes) -> bool:
    packet = data[4:]
    if packet[:1] == b"\xff":
        return int.from_bytes(packet[1:3], "little") in _MYSQL_DENIED
    return bool(packet)


def _xmpp(namespace: bytes) -> InjectedCommand:
    # Inside TLS, a new stream begins with a header (RFC 6120, section 5.4.3.3). If the server
    # executes an injected header, it sends its features. Otherwise, it reports an error, because
    # ``quit`` ends a stream that has not begun.
    header = (
        b"<?xml version='1.0'?><stream:stream to='trisock.invalid' version='1.0' xmlns='"
        + namespace
        + b"' xmlns:stream='http://etherx.jabber.org/streams'>"
    )
    features = _holds(b"<stream:features", b"<host-unknown")
    return InjectedCommand(b"<starttls", header, b"</stream:stream>", features)


#: The commands for each protocol of ``starttls.PROTOCOLS``. Telnet is missing: its servers send
#: data unasked, so an answer cannot be recognized.
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
    "ftp": InjectedCommand(b"AUTH TLS\r\n", b"NOOP\r\n", b"QUIT\r\n", _IS_ANSWERED),
    "nntp": InjectedCommand(b"STARTTLS\r\n", b"DATE\r\n", b"QUIT\r\n", _NNTP_IS_ANSWERED),
    "ldap": InjectedCommand(
        b"1.3.6.1.4.1.1466.20037", _LDAP_SEARCH, _LDAP_UNBIND, _holds(_LDAP_ID)
    ),
    "postgres": InjectedCommand(
        bytes.fromhex("04d2162f"), _POSTGRES_STARTUP, _POSTGRES_CANCEL, _answers_startup
    ),
    "mysql": InjectedCommand(b"\x20\0\0\x01", _MYSQL_PACKET, _MYSQL_BAD_PACKET, _answers_login),
    "xmpp": _xmpp(b"jabber:client"),
    "xmpp-server": _xmpp(b"jabber:server"),
    "irc": InjectedCommand(
        b"STARTTLS\r\n", b"CAP LS 302\r\n", b"QUIT\r\n", _holds(b" CAP ", b" 451 ")
    ),
}
