"""TLS by the ssl module itself at the other end, and by both ends at once."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import Callable

import trio

import trisock
from helpers.pairs import closing, raw_pair
from trisock import ServerTLS, Socket, TLSError, TLSInfo


async def upgrade(
    client: Socket, client_tls: object, server: Socket, server_tls: object
) -> tuple[trisock.TLSInfo, trisock.TLSInfo]:
    infos: dict[str, trisock.TLSInfo] = {}

    async def server_side() -> None:
        infos["server"] = await server.starttls(server_tls)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server_side)
        infos["client"] = await client.starttls(client_tls)  # type: ignore[arg-type]
    return infos["client"], infos["server"]


class RawTLS:
    """The ssl module's own blocking peer, for what a trisock peer would not do."""

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, **options: object) -> None:
        self.raw = raw
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(self.incoming, self.outgoing, **options)  # type: ignore[arg-type]

    def run(self, function: Callable[[], object]) -> object:
        """Run a function of the SSLObject to its end, or raise what it or the wire raises."""
        while True:
            try:
                return function()
            except ssl.SSLWantReadError:
                self.flush()
                data = self.raw.recv(65536)
                if not data:
                    raise EOFError from None
                self.incoming.write(data)
            finally:
                self.flush()

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.raw.sendall(self.outgoing.read())


Outcome = TLSInfo | TLSError


async def visit(
    server_tls: ServerTLS, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None
) -> tuple[Outcome, ssl.SSLSession | None]:
    """Let a client in, perhaps with a session that it has; return what the server says of it."""
    sock, raw = raw_pair()
    peer = RawTLS(raw, context, server_hostname=name, session=session)

    def client() -> None:
        with contextlib.suppress(ssl.SSLError, EOFError):
            peer.run(peer.ssl.do_handshake)
            peer.run(lambda: peer.ssl.read(100))  # in TLS 1.3 a session comes with the first data
            peer.run(lambda: peer.ssl.unwrap())

    with raw:
        async with closing(sock), trio.open_nursery() as nursery:
            nursery.start_soon(trio.to_thread.run_sync, client)
            try:
                outcome: Outcome = await sock.starttls(server_tls)
                await sock.send(b"welcome")
                assert await sock.recv() == b""
            except TLSError as exc:
                outcome = exc
            await sock.close()
    return outcome, peer.ssl.session
