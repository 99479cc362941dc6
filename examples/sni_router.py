"""A TLS router, which relays each connection to the backend for the requested server name (SNI).

The router has no key and decrypts nothing. Run it in front of two servers:

    python examples/https_server.py --port 8001 --cert one.pem --key one.key
    python examples/https_server.py --port 8002 --write-ca ca.pem
    python examples/sni_router.py --port 8443 \
        --route one.example=127.0.0.1:8001 --default 127.0.0.1:8002
    curl --cacert ca.pem https://localhost:8443/
    openssl s_client -connect 127.0.0.1:8443 -servername one.example
"""

from __future__ import annotations

import argparse
import logging
import re
from dataclasses import dataclass

import trio

import trisock

MAX_CLIENT_HELLO = 16 * 1024  # bytes; real ClientHellos have 200 to 2000
TIMEOUT = 10  # seconds to receive the ClientHello and connect to the backend
IDLE_TIMEOUT = 60  # seconds without a byte from either side

HANDSHAKE = 22  # a record type (RFC 8446, section 5.1)
CLIENT_HELLO = 1  # a handshake message type (RFC 8446, section 4)
SERVER_NAME = 0  # an extension type (RFC 6066, section 3)
HOST_NAME = 0  # a name type in that extension
UNRECOGNIZED_NAME = bytes.fromhex("15 0303 0002 02 70")  # a fatal alert (RFC 6066, section 3)

logger = logging.getLogger("sni_router")


# ---- the ClientHello ----


class Fields:
    """Reads the fields of a TLS structure. Raises ValueError if the structure ends too early."""

    def __init__(self, data: bytes | memoryview) -> None:
        self.left = memoryview(data)

    def take(self, size: int) -> memoryview:
        if size > len(self.left):
            raise ValueError("a field of the ClientHello is too long")
        field, self.left = self.left[:size], self.left[size:]
        return field

    def integer(self, size: int) -> int:
        return int.from_bytes(self.take(size), "big")

    def vector(self, size_of_length: int) -> Fields:
        return Fields(self.take(self.integer(size_of_length)))


def server_name(client_hello: bytes) -> str | None:
    """Return the requested server name (SNI) in lower case, or None if there is none.

    The argument is the handshake message without record headers. Raises ValueError if the message
    is malformed, or requests several names.
    """
    message = Fields(client_hello)
    if message.integer(1) != CLIENT_HELLO:
        raise ValueError("the handshake message is not a ClientHello")
    hello = message.vector(3)
    hello.take(2 + 32)  # legacy_version, random
    hello.vector(1)  # legacy_session_id
    hello.vector(2)  # cipher_suites
    hello.vector(1)  # legacy_compression_methods
    extensions = hello.vector(2) if hello.left else Fields(b"")
    if message.left or hello.left:
        raise ValueError("excess bytes after the ClientHello")
    names: list[memoryview] = []
    while extensions.left:
        extension_type, extension = extensions.integer(2), extensions.vector(2)
        if extension_type == SERVER_NAME:
            server_names = extension.vector(2)
            while server_names.left:
                name_type, name = server_names.integer(1), server_names.vector(2)
                if name_type == HOST_NAME:
                    names.append(name.left)
            if extension.left:
                raise ValueError("excess bytes after the server names of the ClientHello")
    if not names:
        return None
    # If there are several names, the backend might choose a different one than this router.
    if len(names) > 1 or not re.fullmatch(rb"[A-Za-z0-9._-]{1,255}", names[0]):
        raise ValueError("the ClientHello requests something other than one host name")
    return str(names[0], "ascii").lower()


async def peek_client_hello(sock: trisock.Socket) -> bytes:
    """Wait for the ClientHello and return it. The ClientHello's records stay unread.

    The ClientHello may span several records. Raises ValueError if the peer sends anything else.
    """
    records, message = bytearray(), bytearray()
    while len(message) < 4 or len(message) < 4 + int.from_bytes(message[1:4], "big"):
        try:
            header = await sock.recv_exactly(5)
            size = int.from_bytes(header[3:], "big")
            if header[0] != HANDSHAKE or header[1] != 3 or size == 0:
                raise ValueError("the client does not speak TLS")
            if len(records) + len(header) + size > MAX_CLIENT_HELLO:
                raise ValueError("the ClientHello is too long")
            fragment = await sock.recv_exactly(size)
        except trisock.IncompleteReadError:
            raise ValueError("the client left before its ClientHello was complete") from None
        records += header + fragment
        message += fragment
    sock.unrecv(records)
    return bytes(message)


# ---- routing ----

Address = tuple[str, int]


@dataclass
class Router:
    routes: dict[str, Address]
    default: Address | None

    async def handle(self, client: trisock.Socket) -> None:
        backend = None
        with trio.move_on_after(TIMEOUT):
            backend = await self.connect_for(client)
        if backend is not None:
            try:
                await trisock.relay(client, backend, idle_timeout=IDLE_TIMEOUT)
            except trio.BrokenResourceError as exc:
                logger.info("%s", exc)

    async def connect_for(self, client: trisock.Socket) -> trisock.Socket | None:
        """Connect to the backend for the name that the client requests. Return None on failure."""
        try:
            name = server_name(await peek_client_hello(client))
        except ValueError as exc:
            logger.info("%s: %s", client.getpeer(), exc)
            return None
        address = self.default if name is None else self.routes.get(name, self.default)
        if address is None:
            await client.send(UNRECOGNIZED_NAME)
            return None
        try:
            return await trisock.connect(*address)
        except OSError as exc:
            logger.warning("%s", exc)
            return None


async def serve(host: str, port: int, router: Router) -> None:
    async with trisock.open_service(grace=5) as service:
        server = await service.bind(port, router.handle, host=host, max_connections=400)
        print(f"listening on port {server.port}", flush=True)


def address(text: str) -> Address:
    host, _, port = text.rpartition(":")
    if not host or not 0 < int(port) < 65536:
        raise ValueError("expected HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def route(text: str) -> tuple[str, Address]:
    name, _, backend = text.partition("=")
    return name.lower(), address(backend)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8443, help="0 for any free port")
    parser.add_argument(
        "--route",
        type=route,
        action="append",
        default=[],
        metavar="NAME=HOST:PORT",
        help="the backend for this server name (repeat the option for more names)",
    )
    parser.add_argument(
        "--default",
        type=address,
        metavar="HOST:PORT",
        help="the backend for all other connections (default: refuse them)",
    )
    args = parser.parse_args()
    trio.run(serve, args.host, args.port, Router(dict(args.route), args.default))


if __name__ == "__main__":
    main()
