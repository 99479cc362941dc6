"""A TLS peer that requests post-handshake authentication and key updates.

In TLS 1.3, both can occur at any time after the handshake (RFC 8446, section 4.6). The Socket
receives such a request during a read, so the read may have to send a response.
"""

from __future__ import annotations

import contextlib
import ctypes
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import trio
import trio.testing

from helpers.pairs import closing, raw_unix_pair
from helpers.raw_tls import RawTLS, handshake, raw_client_context
from trisock import Certificate, Socket
from trisock.testing import Authority


class PostHandshakePeer(RawTLS):
    """A TLS peer. Its socket must be blocking during the handshake, and non-blocking later."""

    def send(self, data: bytes) -> None:
        self.ssl.write(data)
        self.raw.sendall(self.outgoing.read())

    def request_certificate(self, data: bytes = b"") -> None:
        """Request the client's certificate. Send the data, if any, in the same segment."""
        self.ssl.verify_client_post_handshake()
        if data:
            self.ssl.write(data)
        else:
            with contextlib.suppress(ssl.SSLWantReadError):
                self.ssl.do_handshake()
        self.raw.sendall(self.outgoing.read())

    def key_update(self, *, request: bool = False) -> bytes:
        """Return a KeyUpdate message, which OpenSSL can send but the ssl module cannot."""
        import _ssl

        libssl = ctypes.CDLL(_ssl.__file__)
        libssl.SSL_key_update.argtypes = [ctypes.c_void_p, ctypes.c_int]
        libssl.SSL_do_handshake.argtypes = [ctypes.c_void_p]
        # The layout of PySSLSocket: PyObject_HEAD, a weak reference to a socket, the SSL pointer.
        address = id(self.ssl._sslobj) + object.__basicsize__ + ctypes.sizeof(ctypes.c_void_p)  # type: ignore[attr-defined]
        pointer = ctypes.c_void_p.from_address(address).value
        assert libssl.SSL_key_update(pointer, int(request)) == 1
        libssl.SSL_do_handshake(pointer)
        return self.outgoing.read()

    def received(self) -> bytes:
        """Return all data that has arrived, decrypted."""
        data = b""
        with contextlib.suppress(BlockingIOError):
            while chunk := self.raw.recv(65536):
                self.incoming.write(chunk)
        with contextlib.suppress(ssl.SSLWantReadError):
            while part := self.ssl.read(65536):
                data += part
        return data

    async def receive_until(self, enough: Callable[[bytes], bool]) -> bytes:
        """Receive until ``enough(data)`` is true, and return the data."""
        data = b""
        while not enough(data):
            await trio.lowlevel.wait_readable(self.raw)
            data += self.received()
        return data

    async def receive_to_end(self) -> tuple[bytes, bool]:
        """Return all data until EOF, and whether the Socket sent close_notify."""
        data = b""
        while True:
            try:
                part = self.ssl.read(65536)
            except ssl.SSLWantReadError:
                await trio.lowlevel.wait_readable(self.raw)
                chunk = self.raw.recv(65536)
                if not chunk:
                    self.raw.close()
                    return data, False
                self.incoming.write(chunk)
            else:
                if not part:
                    self.raw.shutdown(socket.SHUT_WR)
                    return data, True
                data += part

    async def wait_for_response(self) -> None:
        """Wait until the client has answered, so that OpenSSL allows another request."""
        while True:
            self.received()
            with contextlib.suppress(ssl.SSLError):  # if the request is still unanswered
                self.ssl.verify_client_post_handshake()
                return
            await trio.lowlevel.wait_readable(self.raw)


@contextlib.asynccontextmanager
async def post_handshake_pair(
    authority: Authority, wide_certificate: Certificate | None = None
) -> AsyncIterator[tuple[Socket, PostHandshakePeer]]:
    """Yield a TLS 1.3 client, and a server that can request the client's certificate at any time.

    If ``wide_certificate`` is given, the client responds with more than one record.
    """
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.certificate("example.org").load_into(server_context)
    server_context.load_verify_locations(cadata=authority.ca.decode())
    server_context.verify_mode = ssl.CERT_OPTIONAL
    server_context.post_handshake_auth = True
    client_context = raw_client_context(authority)
    client_context.post_handshake_auth = True
    if wide_certificate is not None:
        wide_certificate.load_into(client_context)
    sock, raw = raw_unix_pair()
    peer = PostHandshakePeer(raw, server_context, server_side=True)
    with raw:
        async with closing(sock):
            await handshake(sock, client_context, peer, server_hostname="example.org")
            raw.setblocking(False)
            # The smallest send buffer holds only part of a large message, so the send has to wait.
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            yield sock, peer


async def start_until_blocked(
    nursery: trio.Nursery, function: Callable[..., Awaitable[object]], *args: object
) -> None:
    """Start a task, and wait until it blocks."""
    nursery.start_soon(function, *args)
    await trio.testing.wait_all_tasks_blocked()
