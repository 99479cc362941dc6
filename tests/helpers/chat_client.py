"""The client side of XMPP, IRC, NNTP and Telnet, after an upgrade to TLS."""

from __future__ import annotations

from helpers.mail_client import ask, pop3_lines
from helpers.tls_clients import CRLF, RefusedError
from trisock import Socket

# ---- XMPP ----


async def xmpp_features(sock: Socket, namespace: bytes) -> bytes:
    """Open a stream, and return its features (RFC 6120, section 4)."""
    await sock.send(
        b"<?xml version='1.0'?><stream:stream xmlns='jabber:%s' to='localhost' version='1.0'"
        b" xmlns:stream='http://etherx.jabber.org/streams'>" % namespace
    )
    return await sock.recv_until(b"</stream:features>")


async def xmpp_client_hello(sock: Socket) -> None:
    """Prosody offers PLAIN under TLS only."""
    features = await xmpp_features(sock, b"client")
    assert b"<mechanism>PLAIN</mechanism>" in features
    assert b"urn:ietf:params:xml:ns:xmpp-tls" not in features


async def xmpp_server_hello(sock: Socket) -> None:
    features = await xmpp_features(sock, b"server")
    assert b"urn:xmpp:features:dialback" in features
    assert b"urn:ietf:params:xml:ns:xmpp-tls" not in features


# ---- IRC ----


async def irc_login(sock: Socket) -> None:
    """Register. Ask the server whether the connection is secure (numeric 671)."""
    await sock.send(b"NICK alice\r\nUSER alice 0 * :alice\r\n")
    await _irc_numeric(sock, b"001")
    await sock.send(b"WHOIS alice\r\n")
    await _irc_numeric(sock, b"671")


async def _irc_numeric(sock: Socket, numeric: bytes) -> None:
    """Read lines until this numeric reply, and answer PING."""
    async for line in sock.lines(delimiter=CRLF):
        words = line.split(b" ")
        if words[0] == b"PING":
            await sock.send(b"PONG ", words[1], CRLF)
        elif words[1] == numeric:
            return
    raise RefusedError("the server closed the connection")


# ---- NNTP ----


async def nntp_hello(sock: Socket) -> None:
    await ask(sock, b"CAPABILITIES", 101)
    capabilities = await pop3_lines(sock)
    assert b"READER" in capabilities
    assert b"STARTTLS" not in capabilities
    await ask(sock, b"DATE", 111)


# ---- Telnet ----

_IAC, _DO, _WONT, _WILL, _DONT = b"\xff", 0xFD, b"\xfc", 0xFB, b"\xfe"


async def telnet_prompt(sock: Socket) -> None:
    """Refuse all options, and wait for the request for a user name (RFC 854)."""
    text = b""
    while b"Username: " not in text:
        byte = await sock.recv_exactly(1)
        if byte != _IAC:
            text += byte
            continue
        verb, option = await sock.recv_exactly(2)
        if verb in (_DO, _WILL):
            await sock.send(_IAC, _WONT if verb == _DO else _DONT, bytes([option]))
