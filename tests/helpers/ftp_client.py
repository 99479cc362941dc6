"""The client side of FTP."""

from __future__ import annotations

import contextlib
import ssl
from collections.abc import AsyncIterator

import trisock
from helpers.mail_client import ask, expect
from helpers.real_servers import PASSWORD
from trisock import ClientTLS, Socket


async def ftp_login(sock: Socket, user: bytes = b"alice") -> None:
    await ask(sock, b"USER " + user, 331)
    await ask(sock, b"PASS " + PASSWORD.encode(), 230)
    await ask(sock, b"PBSZ 0", 200)
    await ask(sock, b"PROT P", 200)
    await ask(sock, b"TYPE I", 200)


async def vsftp_login(sock: Socket) -> None:
    await ftp_login(sock, b"anonymous")


@contextlib.asynccontextmanager
async def ftp_transfer(
    sock: Socket, tls: ClientTLS | ssl.SSLContext, command: bytes
) -> AsyncIterator[Socket]:
    """Open a command's data connection. At the end, check that the server reports success."""
    answer = await ask(sock, b"EPSV", 229)  # RFC 2428
    async with await trisock.connect("127.0.0.1", int(answer.split(b"|")[3])) as channel:
        await ask(sock, command, 150)
        await channel.starttls(tls, server_hostname="localhost")
        yield channel
    await expect(sock, 226)
