"""Small servers of the protocols that turn to TLS in mid-conversation, for clients of others.

Each knows as much of its protocol as such clients ask for. A server is ``protocol(site, sock)``.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import hmac
import re
import socket
import struct
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path

import trio
from cryptography import x509

import trisock
from trisock import Address, Certificate, Listener, ServerTLS, Socket

CRLF = b"\r\n"
USER = "user"
PASSWORD = "pencil"


@dataclass
class Site:
    """What the servers of one test have in common.

    Attributes:
      certificate: what they show.
      directory: where FTP's files are.
      mail: the messages that were taken in and are given out.
      heard: each command that was obeyed, with the version of TLS it came by (None: in the clear).
    """

    certificate: Certificate
    directory: Path
    mail: list[bytes] = field(default_factory=list)
    heard: list[tuple[str | None, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.tls = ServerTLS(self.certificate)

    def hear(self, sock: Socket, command: bytes) -> tuple[str, str]:
        """Note a command; return its first word in upper case, and the rest."""
        self.heard.append((sock.tls.version if sock.tls else None, command))
        verb, _, argument = command.decode("latin-1").partition(" ")
        return verb.upper(), argument


# ---- mail ----


async def receive_text(sock: Socket) -> bytes:
    """Read lines up to a single dot, and take off the dots that others were sent with."""
    lines = []
    async for line in sock.lines(delimiter=CRLF, keep_ends=True):
        if line == b".\r\n":
            break
        lines.append(line.removeprefix(b"."))
    return b"".join(lines)


def dotted(text: bytes) -> bytes:
    return re.sub(rb"(?m)^\.", b"..", text) + b".\r\n"


async def smtp(site: Site, sock: Socket, *, must_log_in: bool = False) -> None:
    """Take mail by SMTP (RFC 3207); LMTP with one recipient is no different."""
    logged_in = False
    await sock.send(b"220 localhost ready\r\n")
    async for line in sock.lines(delimiter=CRLF):
        match site.hear(sock, line):
            case "EHLO" | "LHLO", _:
                offer = b"AUTH PLAIN" if sock.istls() else b"STARTTLS"
                await sock.send(b"250-localhost\r\n250 ", offer, CRLF)
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b"220 go ahead\r\n")
                await sock.starttls(site.tls)
            case "AUTH", argument if sock.istls():
                response = argument.removeprefix("PLAIN").strip().encode()
                if not response:
                    await sock.send(b"334 \r\n")
                    response = (await sock.recv_until(CRLF)).strip()
                logged_in = base64.b64decode(response) == f"\0{USER}\0{PASSWORD}".encode()
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
    """Take mail from those who have logged in, which is offered under TLS only (RFC 6409)."""
    await smtp(site, sock, must_log_in=True)


async def pop3(site: Site, sock: Socket) -> None:
    """Give out mail by POP3 (RFC 2595)."""
    await sock.send(b"+OK ready\r\n")
    async for line in sock.lines(delimiter=CRLF):
        match site.hear(sock, line):
            case "CAPA", _:
                await sock.send(b"+OK\r\n", b"USER" if sock.istls() else b"STLS", b"\r\n.\r\n")
            case "STLS", _ if not sock.istls():
                await sock.send(b"+OK go ahead\r\n")
                await sock.starttls(site.tls)
            case "USER", _ if sock.istls():
                await sock.send(b"+OK\r\n")
            case "PASS", password if sock.istls():
                await sock.send(b"+OK\r\n" if password == PASSWORD else b"-ERR no\r\n")
            case "STAT", _ if sock.istls():
                await sock.send(b"+OK %d %d\r\n" % (len(site.mail), sum(map(len, site.mail))))
            case "RETR", number if sock.istls():
                await sock.send(b"+OK\r\n", dotted(site.mail[int(number) - 1]))
            case "QUIT", _:
                await sock.send(b"+OK goodbye\r\n")
                return
            case _:
                await sock.send(b"-ERR no\r\n")


async def imap(site: Site, sock: Socket) -> None:
    """Take mail in and give it out by IMAP (RFC 9051)."""
    await sock.send(b"* OK IMAP4rev1 ready\r\n")
    async for line in sock.lines(delimiter=CRLF):
        tag, _, command = line.partition(b" ")
        match site.hear(sock, command):
            case "CAPABILITY", _:
                offer = b"" if sock.istls() else b" STARTTLS"
                await sock.send(b"* CAPABILITY IMAP4rev1", offer, CRLF)
            case "STARTTLS", _ if not sock.istls():
                await sock.send(tag, b" OK go ahead\r\n")
                await sock.starttls(site.tls)
                continue
            case "LOGIN", argument if sock.istls():
                if argument.replace('"', "") != f"{USER} {PASSWORD}":
                    await sock.send(tag, b" NO wrong\r\n")
                    continue
            case "SELECT", _ if sock.istls():
                await sock.send(b"* %d EXISTS\r\n" % len(site.mail))
            case "APPEND", argument if sock.istls():
                await sock.send(b"+ go ahead\r\n")
                size = int(argument.rpartition("{")[2].removesuffix("}"))
                site.mail.append(await sock.recv_exactly(size))
                await sock.recv_until(CRLF)
            case "FETCH" | "UID", argument if sock.istls():
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
                await sock.send(tag, b" BAD what?\r\n")
                continue
        await sock.send(tag, b" OK done\r\n")


async def sieve(site: Site, sock: Socket) -> None:
    """Speak ManageSieve, which says anew after STARTTLS what it offers (RFC 5804)."""

    async def greet() -> None:
        offer = b'"SASL" "PLAIN"' if sock.istls() else b'"STARTTLS"'
        await sock.send(b'"IMPLEMENTATION" "test"\r\n', offer, b'\r\nOK "ready"\r\n')

    await greet()
    async for line in sock.lines(delimiter=CRLF):
        match site.hear(sock, line):
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b'OK "go ahead"\r\n')
                await sock.starttls(site.tls)
                await greet()
            case "LOGOUT", _:
                await sock.send(b'OK "goodbye"\r\n')
                return
            case _:
                await sock.send(b'NO "what?"\r\n')


async def nntp(site: Site, sock: Socket) -> None:
    """Take articles in and give them out by NNTP (RFC 4642)."""
    await sock.send(b"200 ready\r\n")
    async for line in sock.lines(delimiter=CRLF):
        match site.hear(sock, line):
            case "CAPABILITIES", _:
                offer = b"POST" if sock.istls() else b"STARTTLS"
                await sock.send(b"101 what there is\r\nVERSION 2\r\n", offer, b"\r\n.\r\n")
            case "STARTTLS", _ if not sock.istls():
                await sock.send(b"382 go ahead\r\n")
                await sock.starttls(site.tls)
            case "POST", _ if sock.istls():
                await sock.send(b"340 end with a dot\r\n")
                site.mail.append(await receive_text(sock))
                await sock.send(b"240 ok\r\n")
            case "ARTICLE", number if sock.istls():
                await sock.send(b"220 1 <1@localhost>\r\n", dotted(site.mail[int(number) - 1]))
            case "QUIT", _:
                await sock.send(b"205 goodbye\r\n")
                return
            case _:
                await sock.send(b"500 what?\r\n")


# ---- FTP ----


async def ftp(site: Site, sock: Socket) -> None:
    """Give out and take in files by FTP (RFC 959, 2228, 2428, 4217)."""
    async with contextlib.aclosing(FTP(site, sock)) as connection:
        await connection.serve()


@dataclass
class FTP:
    """A control connection.

    Attributes:
      protected: whether data connections are to be TLS.
      listener: where the client's data connection will come in (passive mode).
      target: where the client waits for ours (active mode).
    """

    site: Site
    control: Socket
    protected: bool = False
    listener: Listener | None = None
    target: Address | None = None

    async def aclose(self) -> None:
        if self.listener is not None:
            await self.listener.close()

    async def reply(self, text: str) -> None:
        await self.control.send(text.encode(), CRLF)

    async def serve(self) -> None:
        await self.reply("220 ready")
        async for line in self.control.lines(delimiter=CRLF):
            verb, argument = self.site.hear(self.control, line)
            if verb == "QUIT":
                await self.reply("221 goodbye")
                return
            if verb in ("AUTH", "PBSZ", "PROT", "CCC"):
                await self.security(verb, argument)
            elif verb in ("PASV", "EPSV", "PORT", "EPRT"):
                await self.arrange_data_connection(verb, argument)
            elif verb in ("RETR", "STOR", "SIZE", "NLST"):
                await self.file(verb, self.site.directory / Path(argument).name)
            else:
                await self.other(verb, argument)

    async def other(self, verb: str, argument: str) -> None:
        match verb, argument:
            case "USER", _:
                await self.reply("331 and the password?")
            case "PASS", password:
                await self.reply("230 welcome" if password == PASSWORD else "530 no")
            case "PWD", _:
                await self.reply('257 "/"')
            case "FEAT", _:
                await self.reply("211-these\r\n AUTH TLS\r\n PBSZ\r\n PROT\r\n211 and no more")
            case "TYPE" | "CWD" | "NOOP", _:
                await self.reply("200 ok")
            case _:
                await self.reply("502 no")

    async def security(self, verb: str, argument: str) -> None:
        match verb, argument.upper():
            case "AUTH", "TLS" | "TLS-C" if not self.control.istls():
                await self.reply("234 go ahead")
                await self.control.starttls(self.site.tls)
            case "PBSZ", "0" if self.control.istls():
                await self.reply("200 ok")
            case "PROT", "C" | "P" as level if self.control.istls():
                self.protected = level == "P"
                await self.reply("200 ok")
            case "CCC", "" if self.control.istls():
                await self.reply("200 in the clear from here")
                await self.control.stoptls()
            case _:
                await self.reply("503 not now")

    async def arrange_data_connection(self, verb: str, argument: str) -> None:
        await self.aclose()
        self.listener = self.target = None
        client, _ = self.control.getpeer()
        match verb:
            case "PASV" | "EPSV":
                host, _ = self.control.getlocal()
                self.listener = await trisock.listen(0, host)
                port = self.listener.port
                if verb == "PASV":
                    numbers = ",".join([*host.split("."), *map(str, divmod(port, 256))])
                    await self.reply(f"227 come to ({numbers})")
                else:
                    await self.reply(f"229 come to (|||{port}|)")
                return
            case "PORT":
                a, b, c, d, high, low = argument.split(",")
                self.target = Address(f"{a}.{b}.{c}.{d}", int(high) * 256 + int(low))
            case "EPRT":
                _, _, where, at, _ = argument.split(argument[0])
                self.target = Address(where, int(at))
        # Nobody has us connect to a third party (RFC 2577, section 3).
        await self.reply("200 ok" if self.target and self.target.host == client else "501 no")

    @contextlib.asynccontextmanager
    async def data_connection(self) -> AsyncIterator[Socket]:
        await self.reply("150 here it comes")
        if self.listener is not None:
            sock = await self.listener.accept()
        else:
            assert self.target is not None
            sock = await trisock.connect(*self.target, local_address=self.control.getlocal().host)
        async with sock:
            if self.protected:
                # The FTP server is the TLS server, also where it connects (RFC 4217, section 7).
                await sock.starttls(self.site.tls)
            yield sock

    async def file(self, verb: str, path: Path) -> None:
        if verb in ("RETR", "SIZE") and not path.is_file():
            await self.reply("550 there is none")
            return
        if verb == "SIZE":
            await self.reply(f"213 {path.stat().st_size}")
            return
        try:
            async with self.data_connection() as data:
                if verb == "RETR":
                    with path.open("rb") as file:
                        await data.send_file(file)
                elif verb == "NLST":
                    names = sorted(each.name for each in self.site.directory.iterdir())
                    await data.send("".join(f"{name}\r\n" for name in names).encode())
                else:
                    # A cut-off upload is a TLSError here, and leaves no file.
                    content = b"".join([chunk async for chunk in data])
                    path.write_bytes(content)
        except trio.BrokenResourceError as exc:
            await self.reply(f"426 {exc}")
        else:
            await self.reply("226 done")


# ---- XMPP, IRC, Telnet ----


async def xmpp(site: Site, sock: Socket) -> None:
    """Open an XMPP stream, and another one under TLS (RFC 6120, section 5)."""
    while True:
        tag = await sock.recv_until(b">")
        match site.hear(sock, tag.strip().strip(b"</>")):
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
    """Speak IRC: the client asks for TLS before anything was said."""
    async for line in sock.lines(delimiter=CRLF):
        match site.hear(sock, line):
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
    """Ask for TLS, as a Telnet server does, and then echo one line."""
    await sock.send(DO_START_TLS)
    if await sock.recv_exactly(9) == WILL_START_TLS + TLS_FOLLOWS:
        await sock.send(TLS_FOLLOWS)
        await sock.starttls(site.tls)
        line = await sock.recv_until(CRLF)
        site.hear(sock, line)
        await sock.send(b"you said ", line)


# ---- LDAP ----

START_TLS = b"1.3.6.1.4.1.1466.20037"


async def receive_ber(sock: Socket) -> bytes:
    """Return the content of the next BER value."""
    _, size = await sock.recv_exactly(2)
    if size & 0x80:
        size = int.from_bytes(await sock.recv_exactly(size & 0x7F), "big")
    return await sock.recv_exactly(size)


def split_ber(data: bytes) -> list[tuple[int, bytes]]:
    """Return the tags and contents of the BER values that follow each other."""
    found = []
    while data:
        tag, size, data = data[0], data[1], data[2:]
        if size & 0x80:
            width = size & 0x7F
            size, data = int.from_bytes(data[:width], "big"), data[width:]
        found.append((tag, data[:size]))
        data = data[size:]
    return found


def ber(tag: int, *contents: bytes) -> bytes:
    content = b"".join(contents)
    size = len(content)
    if size < 0x80:
        return bytes([tag, size]) + content
    return bytes([tag, 0x84]) + size.to_bytes(4, "big") + content


def ldap_message(number: bytes, tag: int, *contents: bytes) -> bytes:
    return ber(0x30, ber(0x02, number), ber(tag, *contents))


SUCCESS = (ber(0x0A, b"\0"), ber(0x04), ber(0x04))


async def ldap(site: Site, sock: Socket) -> None:
    """Hold one entry, whose description is the first mail; take in any other (RFC 4511)."""
    names = {0x60: "bind", 0x63: "search", 0x68: "add", 0x77: "extended"}
    while True:
        (_, number), (tag, content), *_ = split_ber(await receive_ber(sock))
        site.hear(sock, names.get(tag, "unbind").encode() + b" " + content)
        match names.get(tag):
            case "extended" if split_ber(content)[0][1] == START_TLS and not sock.istls():
                await sock.send(ldap_message(number, 0x78, *SUCCESS))
                await sock.starttls(site.tls)
            case "bind":
                await sock.send(ldap_message(number, 0x61, *SUCCESS))
            case "search":
                values = ber(0x31, *(ber(0x04, text) for text in site.mail))
                attribute = ber(0x30, ber(0x04, b"description"), values)
                entry = ber(0x04, b"dc=example"), ber(0x30, attribute)
                await sock.send(ldap_message(number, 0x64, *entry))
                await sock.send(ldap_message(number, 0x65, *SUCCESS))
            case "add":
                await sock.send(ldap_message(number, 0x69, *SUCCESS))
            case _:
                return


# ---- databases ----

SSL_REQUEST = struct.pack("!ii", 8, 80877103)


def pg(kind: bytes, *fields: bytes) -> bytes:
    content = b"".join(fields)
    return kind + struct.pack("!i", len(content) + 4) + content


async def receive_pg(sock: Socket) -> bytes:
    (size,) = struct.unpack("!i", await sock.recv_exactly(4))
    return await sock.recv_exactly(size - 4)


async def postgres(site: Site, sock: Socket, *, password: bool = False) -> None:
    """Answer queries with the literal that is in them."""
    while (startup := await receive_pg(sock))[:2] != b"\0\3":  # not version 3 of the protocol
        if startup != SSL_REQUEST[4:] or sock.istls():
            await sock.send(b"N")
            continue
        await sock.send(b"S")
        await sock.starttls(site.tls)
    site.hear(sock, startup)
    if password and not await scram_sha_256_plus(site, sock):
        await sock.send(pg(b"E", b"SFATAL\0C28P01\0Mno channel binding, no entry\0\0"))
        return
    await sock.send(pg(b"R", struct.pack("!i", 0)))
    for name, value in [(b"client_encoding", b"UTF8"), (b"server_version", b"15.0")]:
        await sock.send(pg(b"S", name, b"\0", value, b"\0"))
    await sock.send(pg(b"Z", b"I"))
    while (kind := await sock.recv_exactly(1)) == b"Q":
        query = await receive_pg(sock)
        site.hear(sock, query)
        text = query.split(b"'")[1]
        column = b"column\0" + struct.pack("!ihihih", 0, 0, 25, -1, -1, 0)
        await sock.send(
            pg(b"T", struct.pack("!h", 1), column),
            pg(b"D", struct.pack("!hi", 1, len(text)), text),
            pg(b"C", b"SELECT 1\0"),
            pg(b"Z", b"I"),
        )
    site.hear(sock, kind)


async def postgres_with_password(site: Site, sock: Socket) -> None:
    """Answer those who know the password and have met this very certificate."""
    await postgres(site, sock, password=True)


async def scram_sha_256_plus(site: Site, sock: Socket) -> bool:
    """Authenticate by SCRAM with channel binding (RFC 5802, 5929 and 7677)."""

    def sign(key: bytes, text: bytes) -> bytes:
        return hmac.digest(key, text, "sha256")

    async def receive() -> bytes:
        assert await sock.recv_exactly(1) == b"p"
        return await receive_pg(sock)

    await sock.send(pg(b"R", struct.pack("!i", 10), b"SCRAM-SHA-256-PLUS\0\0"))
    mechanism, _, response = (await receive()).partition(b"\0")
    first = response[4:]  # behind its size
    gs2_header = b"p=tls-server-end-point,,"
    if mechanism != b"SCRAM-SHA-256-PLUS" or not first.startswith(gs2_header):
        return False
    bare = first.removeprefix(gs2_header)
    nonce, salt, iterations = bare.partition(b",r=")[2] + b"server", b"salt", 4096
    challenge = b"r=%b,s=%b,i=%d" % (nonce, base64.b64encode(salt), iterations)
    await sock.send(pg(b"R", struct.pack("!i", 11), challenge))
    without_proof, _, proof = (await receive()).rpartition(b",p=")
    certificate = x509.load_pem_x509_certificate(site.certificate._chain)
    assert certificate.signature_hash_algorithm is not None
    binding = gs2_header + certificate.fingerprint(certificate.signature_hash_algorithm)
    if without_proof != b"c=%b,r=%b" % (base64.b64encode(binding), nonce):
        return False
    salted = hashlib.pbkdf2_hmac("sha256", PASSWORD.encode(), salt, iterations)
    text = b",".join([bare, challenge, without_proof])
    stored_key = hashlib.sha256(sign(salted, b"Client Key")).digest()
    signature = sign(stored_key, text)
    client_key = bytes(a ^ b for a, b in zip(base64.b64decode(proof), signature, strict=True))
    if hashlib.sha256(client_key).digest() != stored_key:
        return False
    verifier = base64.b64encode(sign(sign(salted, b"Server Key"), text))
    await sock.send(pg(b"R", struct.pack("!i", 12), b"v=", verifier))
    return True


CLIENT_SSL = 0x0800


def mysql_packet(number: int, content: bytes) -> bytes:
    return len(content).to_bytes(3, "little") + bytes([number]) + content


async def receive_mysql(sock: Socket) -> tuple[int, bytes]:
    *size, number = await sock.recv_exactly(4)
    return number, await sock.recv_exactly(int.from_bytes(bytes(size), "little"))


# Version 10 of the protocol, the server's version, a thread, 8 bytes of salt, the lower half of the
# capabilities (with CLIENT_SSL), UTF-8, a status, the upper half and a filler, 12 bytes of salt.
MYSQL_GREETING = mysql_packet(
    0,
    b"\x0a8.0.0\0" + bytes(4) + b"12345678\0\x00\x8a\x21\2\0" + bytes(13) + b"123456789012\0",
)


async def mysql(site: Site, sock: Socket) -> None:
    """Let everybody in under TLS, and answer their commands with OK."""
    await sock.send(MYSQL_GREETING)
    _, request = await receive_mysql(sock)
    if not int.from_bytes(request[:2], "little") & CLIENT_SSL or len(request) != 32:
        return
    await sock.starttls(site.tls)
    while True:
        number, command = await receive_mysql(sock)
        site.hear(sock, command)
        if command == b"\1":  # quit
            return
        await sock.send(mysql_packet(number + 1, b"\0\0\0\2\0\0\0"))


# ---- behind a proxy ----

PROXY_V2 = b"\r\n\r\n\0\r\nQUIT\n"


@dataclass(frozen=True)
class Proxied:
    """What a PROXY header says: whose connection it is (None: the proxy's own), and what else."""

    client: Address | None
    fields: dict[int, bytes] = field(default_factory=dict)


async def receive_proxy_header(sock: Socket) -> Proxied:
    """Read the header that HAProxy puts in front of a connection, version 1 or 2."""
    start = await sock.recv_exactly(12)
    if start != PROXY_V2:
        sock.unrecv(start)
        match (await sock.recv_until(CRLF, max_bytes=107)).split():
            case [b"PROXY", b"UNKNOWN", *_]:
                return Proxied(None)
            case [b"PROXY", b"TCP4" | b"TCP6", client, _, client_port, _]:
                return Proxied(Address(client.decode(), int(client_port)))
        raise ValueError("this is no PROXY header")
    command, family, size = struct.unpack("!BBH", await sock.recv_exactly(4))
    content = await sock.recv_exactly(size)
    if command == 0x20:  # LOCAL
        return Proxied(None)
    kind, width = {0x11: (socket.AF_INET, 4), 0x21: (socket.AF_INET6, 16)}[family]
    host = socket.inet_ntop(kind, content[:width])
    (port,) = struct.unpack_from("!H", content, 2 * width)
    return Proxied(Address(host, port), split_tlv(content[2 * width + 4 :]))


def split_tlv(data: bytes) -> dict[int, bytes]:
    found = {}
    while data:
        kind, size = struct.unpack_from("!BH", data)
        found[kind], data = data[3 : 3 + size], data[3 + size :]
    return found
