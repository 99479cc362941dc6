"""A small FTP server for third-party clients (see starttls_servers.py)."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import trio

import trisock
from helpers.starttls_servers import CRLF, PASSWORD, Site
from trisock import Address, Listener, Socket


async def ftp(site: Site, sock: Socket) -> None:
    """Send and receive files over FTP (RFC 959, 2228, 2428, 4217)."""
    async with contextlib.aclosing(FTP(site, sock)) as connection:
        await connection.serve()


@dataclass
class FTP:
    """A control connection.

    Attributes:
      protected: whether data connections use TLS.
      listener: the listener for the client's data connection (passive mode).
      target: the client's address for the data connection (active mode).
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
            verb, argument = self.site.record(self.control, line)
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
                await self.reply("331 password required")
            case "PASS", password:
                await self.reply("230 welcome" if password == PASSWORD else "530 no")
            case "PWD", _:
                await self.reply('257 "/"')
            case "FEAT", _:
                await self.reply("211-features\r\n AUTH TLS\r\n PBSZ\r\n PROT\r\n211 end")
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
                await self.reply("200 plain text from here")
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
                self.listener = await trisock.listen(0, host=host)
                port = self.listener.port
                if verb == "PASV":
                    numbers = ",".join([*host.split("."), *map(str, divmod(port, 256))])
                    await self.reply(f"227 connect to ({numbers})")
                else:
                    await self.reply(f"229 connect to (|||{port}|)")
                return
            case "PORT":
                a, b, c, d, high, low = argument.split(",")
                self.target = Address(f"{a}.{b}.{c}.{d}", int(high) * 256 + int(low))
            case "EPRT":
                _, _, where, at, _ = argument.split(argument[0])
                self.target = Address(where, int(at))
        # Never connect to a third party (RFC 2577, section 3).
        await self.reply("200 ok" if self.target and self.target.host == client else "501 no")

    @contextlib.asynccontextmanager
    async def data_connection(self) -> AsyncIterator[Socket]:
        await self.reply("150 opening the data connection")
        if self.listener is not None:
            sock = await self.listener.accept()
        else:
            assert self.target is not None
            sock = await trisock.connect(*self.target, local_address=self.control.getlocal().host)
        async with sock:
            if self.protected:
                # Even in active mode, the FTP server is the TLS server (RFC 4217, section 7).
                await sock.starttls(self.site.tls)
            yield sock

    async def file(self, verb: str, path: Path) -> None:
        if verb in ("RETR", "SIZE") and not path.is_file():
            await self.reply("550 no such file")
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
                    # A truncated upload raises TLSError here, before the file is written.
                    content = b"".join([chunk async for chunk in data])
                    path.write_bytes(content)
        except trio.BrokenResourceError as exc:
            await self.reply(f"426 {exc}")
        else:
            await self.reply("226 done")
