"""Servers for the injection test, which accept, drop or answer a command after STARTTLS."""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from helpers.local_servers import LocalServer
from trisock import ServerTLS, Socket
from trisock._command.injected_commands import INJECTED_COMMANDS


class Manner(enum.Enum):
    """What a server does with a command that arrived in the same segment as STARTTLS."""

    BELIEVES = "answers it inside TLS"
    FORGETS = "drops it, as Postfix does"
    ANSWERS = "answers it in plain text, ahead of TLS"
    MUTE = "answers nothing at all inside TLS"
    HANGS = "never starts TLS"


@dataclass(frozen=True)
class Words:
    """The messages of a server.

    ``request`` matches the whole message that asks for TLS. ``bye`` answers the command that
    ends the session, and ``answer`` the injected command. ``before`` has the client's commands
    before STARTTLS, each with its reply.
    """

    greeting: bytes
    request: bytes
    go_ahead: bytes
    answer: bytes
    bye: bytes
    before: tuple[tuple[bytes, bytes], ...] = ()


_FEATURES = (
    b"<stream:features><starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/></stream:features>"
)
_HEADER = (
    b"<stream:stream xmlns='%b' xmlns:stream='http://etherx.jabber.org/streams' version='1.0'>"
)
_NOT_XML = b"<stream:error><not-well-formed/></stream:error>"


def _xmpp(namespace: bytes) -> Words:
    header = _HEADER % namespace
    return Words(
        b"",
        rb"<starttls[^>]*/>",
        b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>",
        header + _FEATURES,
        header + _NOT_XML,
        ((b"<?xml", header + _FEATURES),),
    )


def _packet(number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "little") + bytes([number]) + content


def _mysql_error(number: int) -> bytes:
    return _packet(3, b"\xff" + number.to_bytes(2, "little") + b"#28000denied")


_MYSQL_GREETING = _packet(
    0,
    b"\x0a8.4.0\x00\x01\x00\x00\x0012345678\x00\xff\xff" + b"\x2d\x02\0\xff\xdf\x15" + bytes(11),
)

_SMTP_OFFER = b"250-here\r\n250 STARTTLS\r\n"
_STARTTLS = rb"STARTTLS\r\n"

WORDS = {
    "smtp": Words(
        b"220 ready\r\n", _STARTTLS, b"220 go ahead\r\n", b"250 ok\r\n", b"221 bye\r\n",
        ((b"EHLO", _SMTP_OFFER),),
    ),
    "lmtp": Words(
        b"220 ready\r\n", _STARTTLS, b"220 go ahead\r\n", b"250 ok\r\n", b"221 bye\r\n",
        ((b"LHLO", _SMTP_OFFER),),
    ),
    "imap": Words(
        b"* OK ready\r\n", rb"a2 STARTTLS\r\n", b"a2 OK go\r\n", b"trisock-injected OK done\r\n",
        b"* BYE\r\ntrisock-end OK done\r\n",
        ((b"a1 ", b"* CAPABILITY IMAP4rev1 STARTTLS\r\na1 OK done\r\n"),),
    ),
    "pop3": Words(b"+OK ready\r\n", rb"STLS\r\n", b"+OK go\r\n", b"-ERR what?\r\n", b"+OK bye\r\n"),
    "sieve": Words(
        b'"STARTTLS"\r\nOK\r\n', _STARTTLS, b"OK go\r\n", b'OK (TAG "trisock-injected")\r\n',
        b'"SASL" "PLAIN"\r\nOK\r\nOK bye\r\n',
    ),
    "ftp": Words(b"220 hi\r\n", rb"AUTH TLS\r\n", b"234 go\r\n", b"200 ok\r\n", b"221 bye\r\n"),
    "nntp": Words(
        b"200 hi\r\n", _STARTTLS, b"382 go\r\n", b"111 20260101000000\r\n", b"205 bye\r\n"
    ),
    "irc": Words(
        b":here NOTICE * :looking\r\n", _STARTTLS, b":here 670 * :go\r\n",
        b":here CAP * LS :tls\r\n", b"ERROR :bye\r\n",
    ),
    "ldap": Words(
        b"", rb".*1\.3\.6\.1\.4\.1\.1466\.20037",
        bytes.fromhex("300c 020101 7807 0a0100 0400 0400"),
        bytes.fromhex("300c 02014d 6507 0a0100 0400 0400"), b"",
    ),
    "postgres": Words(b"", bytes.fromhex("0000000804d2162f"), b"S", b"R\0\0\0\x08\0\0\0\x03", b""),
    "mysql": Words(
        _MYSQL_GREETING, rb"\x20\0\0\x01.{32}", b"", _mysql_error(1045), _mysql_error(1043)
    ),
    "xmpp": _xmpp(b"jabber:client"),
    "xmpp-server": _xmpp(b"jabber:server"),
}  # fmt: skip


def server(protocol: str, manner: Manner, tls: ServerTLS) -> LocalServer:
    """Return a server of this protocol."""
    words = WORDS[protocol]

    async def handler(sock: Socket) -> None:
        await sock.send(words.greeting)
        rest = await _reach_starttls(sock, words)
        # MySQL has no go-ahead, so the client's handshake may have arrived already.
        size = len(INJECTED_COMMANDS[protocol].command) if b"\x16\x03" not in rest[:3] else 0
        injected = rest[:size]
        sock.unrecv(rest[size:])
        if manner is Manner.HANGS and injected:
            await sock.recv()
            return
        plain = words.answer if injected and manner is Manner.ANSWERS else b""
        await sock.send(words.go_ahead + plain)
        await sock.starttls(tls)
        if manner is Manner.BELIEVES and injected:
            await sock.send(words.answer)
        if await sock.recv() and manner is not Manner.MUTE:
            await sock.send(words.bye)

    return LocalServer(handler)


async def _reach_starttls(sock: Socket, words: Words) -> bytes:
    """Answer the client until it asks for TLS. Return the rest of that segment."""
    while data := await sock.recv():
        found = re.search(words.request, data, re.DOTALL)
        if found is not None:
            return data[found.end() :]
        for words_of_client, reply in words.before:
            if data.startswith(words_of_client):
                await sock.send(reply)
    return b""
