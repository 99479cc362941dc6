"""Small STARTTLS servers, for third-party clients.

Each server is a function ``protocol(site, sock)``. It supports the commands that the clients send.
If ``trisock.starttls.accept`` supports the protocol, it acts as the server until TLS starts.
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass, field
from pathlib import Path

from trisock import Certificate, ServerTLS, Socket, starttls

CRLF = b"\r\n"
USER = "user"
PASSWORD = "pencil"


@dataclass
class Site:
    """The common state of the servers of one test.

    Attributes:
      certificate: the servers' certificate.
      directory: the directory of the FTP server's files.
      mail: the messages that the servers have received or will deliver.
      commands: (TLS version or None, command) for each received command.
    """

    certificate: Certificate
    directory: Path
    mail: list[bytes] = field(default_factory=list)
    commands: list[tuple[str | None, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tls = ServerTLS(self.certificate)

    def record(self, sock: Socket, command: bytes) -> tuple[str, str]:
        """Record a command. Return its first word in upper case, and the rest of the command."""
        self.commands.append((sock.tls.version if sock.tls else None, command))
        verb, _, argument = command.decode("latin-1").partition(" ")
        return verb.upper(), argument


def knows_password(response: bytes) -> bool:
    """Return whether a response to SASL's PLAIN has the user and the password (RFC 4616)."""
    return base64.b64decode(response) == f"\0{USER}\0{PASSWORD}".encode()


# ---- mail ----


async def receive_text(sock: Socket) -> bytes:
    """Read lines until a line with only a dot, and undo the dot-stuffing."""
    lines = []
    async for line in sock.lines(delimiter=CRLF, keep_ends=True):
        if line == b".\r\n":
            break
        lines.append(line.removeprefix(b"."))
    return b"".join(lines)


def dot_stuffed(text: bytes) -> bytes:
    return re.sub(rb"(?m)^\.", b"..", text) + b".\r\n"


async def smtp(site: Site, sock: Socket, *, must_log_in: bool = False) -> None:
    """Receive mail over SMTP (RFC 3207)."""
    await starttls.accept(sock, "smtp", site.tls, hostname="localhost")
    await receive_mail(site, sock, must_log_in=must_log_in)


async def lmtp(site: Site, sock: Socket) -> None:
    """Receive mail over LMTP (RFC 2033), with one recipient."""
    await starttls.accept(sock, "lmtp", site.tls, hostname="localhost")
    await receive_mail(site, sock)


async def receive_mail(site: Site, sock: Socket, *, must_log_in: bool = False) -> None:
    """Speak SMTP or LMTP under TLS."""
    logged_in = False
    async for line in sock.lines(delimiter=CRLF):
        match site.record(sock, line):
            case "EHLO" | "LHLO", _:
                await sock.send(b"250-localhost\r\n250 AUTH PLAIN\r\n")
            case "AUTH", argument:
                response = argument.removeprefix("PLAIN").strip().encode()
                if not response:
                    await sock.send(b"334 \r\n")
                    response = (await sock.recv_line(delimiter=CRLF)).strip()
                logged_in = knows_password(response)
                await sock.send(b"235 welcome\r\n" if logged_in else b"535 no\r\n")
            case "MAIL", _ if must_log_in and not logged_in:
                await sock.send(b"530 log in first\r\n")
            case "MAIL" | "RCPT" | "RSET" | "NOOP", _:
                await sock.send(b"250 ok\r\n")
            case "DATA", _:
                await sock.send(b"354 end with a dot\r\n")
                site.mail.append(await receive_text(sock))
                await sock.send(b"250 ok\r\n")
            case "QUIT", _:
                await sock.send(b"221 goodbye\r\n")
                return
            case _:
                await sock.send(b"502 no\r\n")


async def submission(site: Site, sock: Socket) -> None:
    """Receive mail after a log-in over TLS (RFC 6409)."""
    await smtp(site, sock, must_log_in=True)


async def pop3(site: Site, sock: Socket) -> None:
    """Deliver mail over POP3 (RFC 2595)."""
    await starttls.accept(sock, "pop3", site.tls)
    async for line in sock.lines(delimiter=CRLF):
        match site.record(sock, line):
            case "CAPA", _:
                await sock.send(b"+OK\r\nUSER\r\n.\r\n")
            case "USER", _:
                await sock.send(b"+OK\r\n")
            case "PASS", password:
                await sock.send(b"+OK\r\n" if password == PASSWORD else b"-ERR no\r\n")
            case "STAT", _:
                await sock.send(b"+OK %d %d\r\n" % (len(site.mail), sum(map(len, site.mail))))
            case "RETR", number:
                await sock.send(b"+OK\r\n", dot_stuffed(site.mail[int(number) - 1]))
            case "QUIT", _:
                await sock.send(b"+OK goodbye\r\n")
                return
            case _:
                await sock.send(b"-ERR no\r\n")


async def imap(site: Site, sock: Socket) -> None:
    """Receive and deliver mail over IMAP (RFC 9051)."""
    await starttls.accept(sock, "imap", site.tls)
    async for line in sock.lines(delimiter=CRLF):
        tag, _, command = line.partition(b" ")
        match site.record(sock, command):
            case "CAPABILITY", _:
                # curl remembers LOGINDISABLED from before TLS, and then needs AUTH=PLAIN.
                await sock.send(b"* CAPABILITY IMAP4rev1 AUTH=PLAIN\r\n")
            case "AUTHENTICATE", "PLAIN":
                await sock.send(b"+ \r\n")
                if not knows_password(await sock.recv_line(delimiter=CRLF)):
                    await sock.send(tag, b" NO wrong\r\n")
                    continue
            case "LOGIN", argument:
                if argument.replace('"', "") != f"{USER} {PASSWORD}":
                    await sock.send(tag, b" NO wrong\r\n")
                    continue
            case "SELECT", _:
                await sock.send(b"* %d EXISTS\r\n" % len(site.mail))
            case "APPEND", argument:
                await sock.send(b"+ go ahead\r\n")
                size = int(argument.rpartition("{")[2].removesuffix("}"))
                site.mail.append(await sock.recv_exactly(size))
                await sock.recv_until(CRLF)
            case "FETCH" | "UID", argument:
                number = int(argument.removeprefix("FETCH ").partition(" ")[0])
                text = site.mail[number - 1]
                await sock.send(
                    b"* %d FETCH (UID %d BODY[] {%d}\r\n" % (number, number, len(text)),
                    text,
                    b")\r\n",
                )
            case "LOGOUT", _:
                await sock.send(b"* BYE goodbye\r\n", tag, b" OK done\r\n")
                return
            case _:
                await sock.send(tag, b" BAD unknown command\r\n")
                continue
        await sock.send(tag, b" OK done\r\n")


async def sieve(site: Site, sock: Socket) -> None:
    """Speak ManageSieve, and repeat the capabilities after STARTTLS (RFC 5804)."""

    async def greet() -> None:
        offer = b'"SASL" "PLAIN"' if sock.istls() else b'"STARTTLS"'
        await sock.send(b'"IMPLEMENTATION" "test"\r\n', offer, b'\r\nOK "ready"\r\n')

    await greet()
    async for line in sock.lines(delimiter=CRLF):
        match site.record(sock, line):
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b'OK "go ahead"\r\n')
                await sock.starttls(site.tls)
                await greet()
            case "LOGOUT", _:
                await sock.send(b'OK "goodbye"\r\n')
                return
            case _:
                await sock.send(b'NO "unknown command"\r\n')


async def nntp(site: Site, sock: Socket) -> None:
    """Receive and deliver articles over NNTP (RFC 4642)."""
    await sock.send(b"200 ready\r\n")
    async for line in sock.lines(delimiter=CRLF):
        match site.record(sock, line):
            case "CAPABILITIES", _:
                offer = b"POST" if sock.istls() else b"STARTTLS"
                await sock.send(b"101 capabilities\r\nVERSION 2\r\n", offer, b"\r\n.\r\n")
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b"382 go ahead\r\n")
                await sock.starttls(site.tls)
            case "POST", _ if sock.istls():
                await sock.send(b"340 end with a dot\r\n")
                site.mail.append(await receive_text(sock))
                await sock.send(b"240 ok\r\n")
            case "ARTICLE", number if sock.istls():
                await sock.send(b"220 1 <1@localhost>\r\n", dot_stuffed(site.mail[int(number) - 1]))
            case "QUIT", _:
                await sock.send(b"205 goodbye\r\n")
                return
            case _:
                await sock.send(b"500 unknown command\r\n")


# ---- XMPP, IRC, Telnet ----


async def xmpp(site: Site, sock: Socket) -> None:
    """Open an XMPP stream in plain text, then a new one under TLS (RFC 6120, section 5)."""
    while True:
        tag = await sock.recv_until(b">")
        match site.record(sock, tag.strip().strip(b"</>")):
            case "STREAM:STREAM", "":
                await sock.send(b"</stream:stream>")
                return
            case "STREAM:STREAM", _:
                offer = b"<starttls xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>"
                await sock.send(
                    b"<?xml version='1.0'?>",
                    b"<stream:stream xmlns:stream='http://etherx.jabber.org/streams' ",
                    b"xmlns='jabber:client' from='localhost' id='1' version='1.0'>",
                    b"<stream:features>",
                    b"" if sock.istls() else offer,
                    b"</stream:features>",
                )
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b"<proceed xmlns='urn:ietf:params:xml:ns:xmpp-tls'/>")
                await sock.starttls(site.tls)


async def irc(site: Site, sock: Socket) -> None:
    """Speak IRC, where the client sends first."""
    async for line in sock.lines(delimiter=CRLF):
        match site.record(sock, line):
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b":localhost 670 * :go ahead\r\n")
                await sock.starttls(site.tls)
            case "PING", token:
                await sock.send(b":localhost PONG ", token.encode(), CRLF)
            case "QUIT", _:
                await sock.send(b"ERROR :goodbye\r\n")
                return


DO_START_TLS = b"\xff\xfd\x2e"
WILL_START_TLS = b"\xff\xfb\x2e"
TLS_FOLLOWS = b"\xff\xfa\x2e\x01\xff\xf0"


async def telnet(site: Site, sock: Socket) -> None:
    """Request TLS, as a Telnet server does, and echo one line."""
    await sock.send(DO_START_TLS)
    if await sock.recv_exactly(9) == WILL_START_TLS + TLS_FOLLOWS:
        await sock.send(TLS_FOLLOWS)
        await sock.starttls(site.tls)
        line = await sock.recv_until(CRLF)
        site.record(sock, line)
        await sock.send(b"received ", line)
