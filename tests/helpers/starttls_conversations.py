"""A good conversation of each protocol of ``trisock.starttls``, and a driver without I/O."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from trisock.starttls.client import _CLIENTS
from trisock.starttls.conversation import (
    CheckQuiet,
    Exactly,
    Farewell,
    Line,
    Names,
    Negotiation,
    Offered,
    Refusal,
    Request,
    Send,
    Until,
)
from trisock.starttls.server import _SERVERS

SSL_REQUEST = struct.pack("!ii", 8, 80877103)
GSSENC_REQUEST = struct.pack("!ii", 8, 80877104)
CANCEL_REQUEST = struct.pack("!iiii", 16, 80877102, 1, 2)

LDAP_REQUEST = bytes.fromhex("301d02010177188016") + b"1.3.6.1.4.1.1466.20037"
LDAP_SUCCESS = bytes.fromhex("300c02010178070a010004000400")

XMPP_HEADER = (
    "<?xml version='1.0'?><stream:stream to='example.org' version='1.0' xmlns='jabber:{}' "
    "xmlns:stream='http://etherx.jabber.org/streams'>"
)
XMPP_GREETING = (
    b"<?xml version='1.0'?><stream:stream from='example.org' id='a>b' version='1.0' "
    b"xmlns='jabber:client' xmlns:stream='http://etherx.jabber.org/streams'>"
)
XMPP_TLS = b"xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
XMPP_FEATURES = (
    b"<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'><required/></starttls>"
    b"<mechanisms xmlns='urn:ietf:params:xml:ns:xmpp-sasl'><mechanism>PLAIN</mechanism>"
    b"</mechanisms></stream:features>"
)


def mysql_greeting(flags: int, number: int = 0) -> bytes:
    """Return a handshake packet of version 10."""
    packet = b"\x0a8.0.36\0" + struct.pack(
        "<I8sxHBHH", 7, b"saltsalt", flags & 0xFFFF, 45, 2, flags >> 16
    )
    return packet_of(
        number, packet + b"\x15" + bytes(10) + b"moresaltmore\0mysql_native_password\0"
    )


def packet_of(number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "little") + bytes([number]) + content


MYSQL_FLAGS = 0xDFFFFFFF
MYSQL_GREETING = mysql_greeting(MYSQL_FLAGS)
MYSQL_REQUEST = packet_of(1, struct.pack("<IIB23x", 0x8AA05, 0xFFFFFF, 45))


@dataclass
class Heard:
    """Data that our side must send at this point."""

    data: bytes


# What the peer sends (bytes), and what we send (Heard), in order. We name ourselves "localhost",
# and the server is example.org.
Conversation = list["bytes | Heard"]

CLIENT_CONVERSATIONS: dict[str, Conversation] = {
    "smtp": [
        b"220-mx.example.org\r\n220 ready\r\n",
        Heard(b"EHLO localhost\r\n"),
        b"250-mx.example.org\r\n250-SIZE 1000\r\n250 starttls\r\n",
        Heard(b"STARTTLS\r\n"),
        b"220 go ahead\r\n",
    ],
    "lmtp": [
        b"220 ready\r\n",
        Heard(b"LHLO localhost\r\n"),
        b"250-mx.example.org\r\n250-STARTTLS\r\n250 PIPELINING\r\n",
        Heard(b"STARTTLS\r\n"),
        b"220 go ahead\r\n",
    ],
    "imap": [
        b"* OK [ALERT] {5}\r\nhe\r\no ready\r\n",
        Heard(b"a1 CAPABILITY\r\n"),
        b"* NO {3}\r\na1 \r\n* CAPABILITY IMAP4rev2 STARTTLS\r\na1 OK done\r\n",
        Heard(b"a2 STARTTLS\r\n"),
        b"* 3 EXISTS\r\na2 OK begin TLS\r\n",
    ],
    "pop3": [
        b"+OK ready <1.2@mx.example.org>\r\n",
        Heard(b"STLS\r\n"),
        b"+OK begin TLS\r\n",
    ],
    "sieve": [
        b'"IMPLEMENTATION" "x"\r\n"SIEVE" {2}\r\nOK\r\n"StartTLS"\r\nOK "ready"\r\n',
        Heard(b"STARTTLS\r\n"),
        b'OK "begin TLS"\r\n',
    ],
    "ftp": [
        b"120 wait\r\n220-welcome\r\n220\r\n 220 x\r\n220 ready\r\n",
        Heard(b"AUTH TLS\r\n"),
        b"234 begin TLS\r\n",
    ],
    "nntp": [b"201 ready\r\n", Heard(b"STARTTLS\r\n"), b"382 begin TLS\r\n"],
    "ldap": [Heard(LDAP_REQUEST), LDAP_SUCCESS],
    "postgres": [Heard(SSL_REQUEST), b"S"],
    "mysql": [MYSQL_GREETING, Heard(MYSQL_REQUEST)],
    "xmpp": [
        Heard(XMPP_HEADER.format("client").encode()),
        XMPP_GREETING + XMPP_FEATURES,
        Heard(b"<starttls " + XMPP_TLS),
        b" \n<proceed " + XMPP_TLS,
    ],
    "xmpp-server": [
        Heard(XMPP_HEADER.format("server").encode()),
        XMPP_GREETING + XMPP_FEATURES,
        Heard(b"<starttls " + XMPP_TLS),
        b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'></proceed>",
    ],
    "irc": [
        Heard(b"STARTTLS\r\n"),
        b":irc.example.org NOTICE * :*** Looking up\r\nPING :1 2\r\n",
        Heard(b"PONG :1 2\r\n"),
        b"@time=1 :irc.example.org 670 * :go ahead\r\n",
    ],
    "telnet": [
        b"login\xff\xfd\x18",
        Heard(b"\xff\xfb\x2e\xff\xfc\x18"),
        b"\xff\xfb\x01",
        Heard(b"\xff\xfe\x01"),
        b"\xff\xf1\xff\xfc\x05\xff\xfa\x18\x01\xff\xf0\xff\xfd\x2e",
        Heard(b"\xff\xfa\x2e\x01\xff\xf0"),
        b"\xff\xfd\x18x\xff\xfa\x2e\x01\xff\xf0",
    ],
}

SERVER_CONVERSATIONS: dict[str, Conversation] = {
    "smtp": [
        Heard(b"220 localhost ESMTP\r\n"),
        b"ehlo me\r\n",
        Heard(b"250-localhost\r\n250 STARTTLS\r\n"),
        b"MAIL FROM:<a@b.example>\r\n",
        Heard(b"530 Must issue a STARTTLS command first\r\n"),
        b"starttls\r\n",
        Heard(b"220 Go ahead\r\n"),
    ],
    "lmtp": [
        Heard(b"220 localhost LMTP\r\n"),
        b"LHLO me\r\n",
        Heard(b"250-localhost\r\n250 STARTTLS\r\n"),
        b"STARTTLS\r\n",
        Heard(b"220 Go ahead\r\n"),
    ],
    "imap": [
        Heard(b"* OK [CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED] ready\r\n"),
        b"1 capability\r\n",
        Heard(b"* CAPABILITY IMAP4rev1 STARTTLS LOGINDISABLED\r\n1 OK done\r\n"),
        b"2 LOGIN me secret\r\n",
        Heard(b"2 NO [PRIVACYREQUIRED] STARTTLS first\r\n"),
        b"3 starttls\r\n",
        Heard(b"3 OK begin TLS\r\n"),
    ],
    "pop3": [
        Heard(b"+OK ready\r\n"),
        b"CAPA\r\n",
        Heard(b"+OK\r\nSTLS\r\n.\r\n"),
        b"USER me\r\n",
        Heard(b"-ERR STLS first\r\n"),
        b"stls\r\n",
        Heard(b"+OK begin TLS\r\n"),
    ],
    "postgres": [GSSENC_REQUEST, Heard(b"N"), SSL_REQUEST, Heard(b"S")],
}

NAMES = Names(b"localhost", "example.org")


def client(protocol: str) -> Negotiation:
    return _CLIENTS[protocol][1](NAMES)


def server(protocol: str) -> Negotiation:
    return _SERVERS[protocol](NAMES)


def said_by_peer(conversation: Conversation) -> bytes:
    return b"".join(each for each in conversation if isinstance(each, bytes))


def said_by_us(conversation: Conversation) -> bytes:
    return b"".join(each.data for each in conversation if isinstance(each, Heard))


class EndOfInputError(Exception):
    """The negotiation needs more bytes than the conversation has."""


class Replay:
    """Runs a negotiation on bytes that have all arrived.

    Attributes:
      sent: what the negotiation has sent.
      unread: the received bytes that the negotiation has not read.
      greeting: the negotiation's return value, or ``None``.
      refusal: the ``Refusal`` that the negotiation raised, or ``None``.
    """

    def __init__(self, negotiation: Negotiation, received: bytes) -> None:
        self.sent = b""
        self.unread = received
        self.greeting: bytes | None = None
        self.refusal: Refusal | None = None
        try:
            request = next(negotiation)
            while True:
                request = negotiation.send(self._answer(request))
        except StopIteration as stop:
            self.greeting = stop.value
        except Refusal as refusal:
            self.refusal = refusal

    def _answer(self, request: Request) -> bytes:
        if isinstance(request, Send):
            self.sent += request.data
            return b""
        if isinstance(request, (CheckQuiet, Farewell, Offered)):
            return b""
        if isinstance(request, Exactly):
            return self._take(request.size)
        delimiter = request.delimiter if isinstance(request, Until) else b"\n"
        if delimiter not in self.unread:
            raise EndOfInputError(self.unread)
        taken = self._take(self.unread.index(delimiter) + len(delimiter))
        return taken.removesuffix(b"\n").removesuffix(b"\r") if isinstance(request, Line) else taken

    def _take(self, size: int) -> bytes:
        if len(self.unread) < size:
            raise EndOfInputError(self.unread)
        taken, self.unread = self.unread[:size], self.unread[size:]
        return taken
