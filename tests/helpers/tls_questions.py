"""A peer under TLS that has a client answer while it reads, and hears what it says."""

from __future__ import annotations

import contextlib
import ctypes
import socket
import ssl
from collections.abc import AsyncIterator

import trio
import trio.testing

from helpers.authority import Authority
from helpers.pairs import closing, raw_unix_pair
from helpers.raw_tls import RawTLS
from trisock import Certificate, Socket


@contextlib.asynccontextmanager
async def asked(
    authority: Authority, wide_certificate: Certificate | None = None
) -> AsyncIterator[tuple[Socket, RawTLS]]:
    """Give a client under TLS 1.3, and a server that can ask it for a certificate at any time."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue("example.org").load_into(server_context)
    server_context.load_verify_locations(cadata=authority.pem.decode())
    server_context.verify_mode = ssl.CERT_OPTIONAL
    server_context.post_handshake_auth = True
    client_context = ssl.create_default_context(cadata=authority.pem.decode())
    client_context.post_handshake_auth = True
    if wide_certificate is not None:
        wide_certificate.load_into(client_context)
    sock, raw = raw_unix_pair()
    peer = RawTLS(raw, server_context, server_side=True)
    with raw:
        async with closing(sock):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, peer.run, peer.ssl.do_handshake)
                await sock.starttls(client_context, server_hostname="example.org")
            raw.setblocking(False)
            # So little room that a message does not fit in, and waits in the middle of it.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            yield sock, peer


def say(peer: RawTLS, data: bytes, *, asking: bool) -> None:
    if asking:
        peer.ssl.verify_client_post_handshake()
    peer.ssl.write(data)
    peer.raw.sendall(peer.outgoing.read())


def ask(peer: RawTLS) -> None:
    peer.ssl.verify_client_post_handshake()
    with contextlib.suppress(ssl.SSLWantReadError):
        peer.ssl.do_handshake()
    peer.raw.sendall(peer.outgoing.read())


def heard(peer: RawTLS) -> bytes:
    """Return everything that the peer can decrypt now."""
    data = b""
    with contextlib.suppress(BlockingIOError):
        while chunk := peer.raw.recv(65536):
            peer.incoming.write(chunk)
    with contextlib.suppress(ssl.SSLWantReadError):
        while part := peer.ssl.read(65536):
            data += part
    return data


async def start(nursery: trio.Nursery, function: object, *args: object) -> None:
    nursery.start_soon(function, *args)  # type: ignore[arg-type]
    await trio.testing.wait_all_tasks_blocked()


async def ends(peer: RawTLS) -> tuple[bytes, bool]:
    """Read to the end; return what came, and whether close_notify was the end."""
    data = b""
    while True:
        try:
            part = peer.ssl.read(65536)
        except ssl.SSLWantReadError:
            await trio.lowlevel.wait_readable(peer.raw)
            chunk = peer.raw.recv(65536)
            if not chunk:
                peer.raw.close()
                return data, False
            peer.incoming.write(chunk)
        else:
            if not part:
                peer.raw.shutdown(socket.SHUT_WR)
                return data, True
            data += part


async def answered(peer: object) -> None:
    """Wait until the peer has the answer to its question: then it can ask again."""
    while True:
        heard(peer)  # type: ignore[arg-type]
        with contextlib.suppress(Exception):
            peer.ssl.verify_client_post_handshake()  # type: ignore[attr-defined]
            return
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(peer.raw)  # type: ignore[attr-defined]


def next_key_update(peer: RawTLS, *, asking: bool = False) -> bytes:
    """Let OpenSSL change its keys, which the ssl module cannot."""
    import _ssl

    libssl = ctypes.CDLL(_ssl.__file__)
    libssl.SSL_key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
    libssl.SSL_do_handshake.argtypes = [ctypes.c_void_p]
    # PySSLSocket: the object's head, a weak reference to a socket, the SSL.
    address = id(peer.ssl._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)  # type: ignore[attr-defined]
    pointer = ctypes.c_void_p.from_address(address).value
    assert libssl.SSL_key_update(pointer, int(asking)) == 1
    libssl.SSL_do_handshake(pointer)
    return peer.outgoing.read()
