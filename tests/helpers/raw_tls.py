"""A TLS peer made with the ssl module, and functions that upgrade both ends of a connection."""

from __future__ import annotations

import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from typing import Any

import trio

import trisock
from helpers.pairs import closing, raw_pair
from trisock import ServerTLS, Socket, TLSError, TLSInfo
from trisock.testing import Authority


async def upgrade(
    client: Socket, client_tls: object, server: Socket, server_tls: object
) -> tuple[trisock.TLSInfo, trisock.TLSInfo]:
    """Call starttls at both ends of a connection, and return the TLSInfo of each end."""
    infos: dict[str, trisock.TLSInfo] = {}

    async def server_side() -> None:
        infos["server"] = await server.starttls(server_tls)  # type: ignore[arg-type]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(server_side)
        infos["client"] = await client.starttls(client_tls)  # type: ignore[arg-type]
    return infos["client"], infos["server"]


class RawTLS:
    """A blocking peer built on ``ssl``. It can do things that a trisock peer cannot."""

    def __init__(self, raw: socket.socket, context: ssl.SSLContext, **options: object) -> None:
        self.raw = raw
        self.incoming, self.outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self.ssl = context.wrap_bio(self.incoming, self.outgoing, **options)  # type: ignore[arg-type]

    def run(self, function: Callable[[], object]) -> object:
        """Call a method of the SSLObject until it returns. Raise ``EOFError`` at EOF."""
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

    def handshake_unflushed(self) -> None:
        """Finish the handshake, but leave the last flight in ``outgoing``."""
        while True:
            try:
                return self.ssl.do_handshake()
            except ssl.SSLWantReadError:
                self.flush()
                self.incoming.write(self.raw.recv(65536))

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self.raw.sendall(self.outgoing.read())


def raw_client_context(authority: Authority, version: str = "TLSv1_3") -> ssl.SSLContext:
    """Return a client context that trusts the authority. ``version`` is the highest TLS version."""
    context = ssl.create_default_context(cadata=authority.ca.decode())
    context.maximum_version = ssl.TLSVersion[version]
    return context


async def handshake(sock: Socket, tls: Any, peer: RawTLS, **options: Any) -> TLSInfo:
    """Call starttls while the peer does its handshake in a thread."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
        return await sock.starttls(tls, **options)


@contextlib.asynccontextmanager
async def tls_server_and_raw_client(
    authority: Authority, server_tls: ServerTLS, version: str = "TLSv1_3"
) -> AsyncIterator[tuple[Socket, RawTLS]]:
    """Yield a server's Socket and its raw client, after the TLS handshake."""
    sock, raw = raw_pair()
    peer = RawTLS(raw, raw_client_context(authority, version), server_hostname="example.org")
    with raw:
        async with closing(sock):
            await handshake(sock, server_tls, peer)
            yield sock, peer


Outcome = TLSInfo | TLSError


async def visit(
    server_tls: ServerTLS, context: ssl.SSLContext, name: str, session: ssl.SSLSession | None
) -> tuple[Outcome, ssl.SSLSession | None]:
    """Serve one client, which may resume a session. Return the server's outcome and the session."""
    sock, raw = raw_pair()
    peer = RawTLS(raw, context, server_hostname=name, session=session)

    def client() -> None:
        with contextlib.suppress(ssl.SSLError, EOFError):
            peer.run(peer.ssl.do_handshake)
            peer.run(lambda: peer.ssl.read(100))  # in TLS 1.3, also reads the session tickets
            peer.run(lambda: peer.ssl.unwrap())
        with contextlib.suppress(OSError):
            raw.shutdown(socket.SHUT_WR)  # or else the server's close waits for a delayed ACK

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
