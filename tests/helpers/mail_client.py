"""The client side of SMTP, LMTP, IMAP, POP3 and ManageSieve: commands and replies."""

from __future__ import annotations

import base64
import secrets

import trisock
from helpers.real_servers import PASSWORD
from helpers.tls_clients import CRLF, RefusedError
from trisock import Socket

# ---- SMTP, LMTP and FTP: commands, and replies with a code ----


async def reply(sock: Socket) -> tuple[int, bytes]:
    line = text = await sock.recv_until(CRLF)
    code = line[:3]
    if line[3:4] == b"-":
        while not line.startswith(code + b" "):
            line = await sock.recv_until(CRLF)
            text += line
    return int(code), text


async def expect(sock: Socket, code: int) -> bytes:
    got, text = await reply(sock)
    if got != code:
        raise RefusedError(text)
    return text


async def ask(sock: Socket, command: bytes, code: int) -> bytes:
    await sock.send(command, CRLF)
    return await expect(sock, code)


async def smtp_hello(sock: Socket) -> None:
    assert b"STARTTLS" not in await ask(sock, b"EHLO client.example.org", 250)


async def lmtp_hello(sock: Socket) -> None:
    assert b"STARTTLS" not in await ask(sock, b"LHLO client.example.org", 250)


def a_mail() -> bytes:
    """Return a message of about 1 MB. It contains every kind of line that starts with a dot."""
    lines = [base64.b64encode(secrets.token_bytes(57)) for _ in range(13_000)]
    lines[5000:5000] = [b".", b"..", b"", b".a", b"..a"]
    return CRLF.join([b"Subject: large", b"", *lines, b""])


def stuffed(mail: bytes) -> bytes:
    """Return a message, dot-stuffed and terminated (RFC 5321, section 4.5.2)."""
    return (CRLF + mail).replace(b"\r\n.", b"\r\n..")[2:] + b".\r\n"


async def deliver(sock: Socket, mail: bytes, recipient: bytes) -> None:
    """Deliver a message, with pipelined commands (RFC 2920)."""
    await sock.send(b"MAIL FROM:<a@b.example>\r\nRCPT TO:<%s>\r\nDATA\r\n" % recipient)
    replies = [await reply(sock) for _ in range(3)]
    if [code for code, _ in replies] != [250, 250, 354]:
        raise RefusedError(replies)
    await sock.send(stuffed(mail))
    await expect(sock, 250)
    await ask(sock, b"QUIT", 221)


async def receive_mail(listener: trisock.Listener) -> bytes:
    """Receive one message as an LMTP server."""
    async with await listener.accept() as sock:
        await sock.send(b"220 ready\r\n")
        while not (command := await sock.recv_until(CRLF)).startswith(b"DATA"):
            assert command[:4] in (b"LHLO", b"MAIL", b"RCPT")
            await sock.send(b"250 ok\r\n")
        await sock.send(b"354 go ahead\r\n")
        mail = await sock.recv_until(b"\r\n.\r\n", max_bytes=10_000_000)
        await sock.send(b"250 ok\r\n")
        assert await sock.recv_until(CRLF) == b"QUIT\r\n"
        await sock.send(b"221 goodbye\r\n")
    return (CRLF + mail[:-3]).replace(b"\r\n..", b"\r\n.")[2:]


# ---- IMAP and POP3 ----


async def imap(sock: Socket, command: bytes) -> list[bytes]:
    """Send a command. Return the lines that the server sends before OK."""
    await sock.send(b"a ", command, CRLF)
    return await imap_ok(sock)


async def imap_ok(sock: Socket) -> list[bytes]:
    lines: list[bytes] = []
    async for line in sock.lines(delimiter=CRLF):
        if line.startswith(b"a "):
            if not line.startswith(b"a OK "):
                raise RefusedError(line)
            return lines
        lines.append(line)
    raise RefusedError("the server closed the connection")


async def imap_login(sock: Socket) -> None:
    await imap(sock, b"LOGIN alice " + PASSWORD.encode())


async def imap_hello(sock: Socket) -> None:
    """Check that a server under TLS offers SASL's PLAIN, and no longer offers STARTTLS."""
    (capabilities,) = await imap(sock, b"CAPABILITY")
    assert b"AUTH=PLAIN" in capabilities.split()
    assert b"STARTTLS" not in capabilities.split()


async def pop3_ok(sock: Socket) -> bytes:
    line = await sock.recv_until(CRLF)
    if not line.startswith(b"+OK"):
        raise RefusedError(line)
    return line


async def pop3(sock: Socket, command: bytes) -> bytes:
    await sock.send(command, CRLF)
    return await pop3_ok(sock)


async def pop3_lines(sock: Socket) -> list[bytes]:
    lines: list[bytes] = []
    async for line in sock.lines(delimiter=CRLF):
        if line == b".":
            break
        lines.append(line.removeprefix(b"."))
    return lines


async def pop3_hello(sock: Socket) -> None:
    await pop3(sock, b"CAPA")
    capabilities = await pop3_lines(sock)
    assert b"SASL PLAIN" in capabilities
    assert b"STLS" not in capabilities


async def pop3_login(sock: Socket) -> None:
    await pop3(sock, b"USER alice")
    await pop3(sock, b"PASS " + PASSWORD.encode())


# ---- ManageSieve ----


async def sieve_hello(sock: Socket) -> None:
    """After the handshake, the server sends its capabilities unasked (RFC 5804, section 2.2)."""
    capabilities = await sieve_ok(sock)
    assert b'"SASL" "PLAIN"' in capabilities
    assert b'"STARTTLS"' not in capabilities


async def sieve_login(sock: Socket) -> None:
    await sieve_hello(sock)
    response = base64.b64encode(f"\0alice\0{PASSWORD}".encode())
    await sock.send(b'AUTHENTICATE "PLAIN" "%s"\r\n' % response)
    await sieve_ok(sock)


async def sieve_ok(sock: Socket) -> list[bytes]:
    """Return the lines that the server sends before OK."""
    lines: list[bytes] = []
    async for line in sock.lines(delimiter=CRLF):
        if line.startswith((b"NO", b"BYE")):
            raise RefusedError(line)
        if line.startswith(b"OK"):
            return lines
        lines.append(line)
    raise RefusedError("the server closed the connection")
