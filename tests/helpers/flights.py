"""A server's first flight, and the certificates in it."""

from __future__ import annotations

import trio

from helpers.client_hellos import records_of
from helpers.pairs import closing, raw_pair
from trisock import ServerTLS, TLSError


async def flight_for(role: ServerTLS, *pieces: bytes) -> tuple[bytes, Exception | None]:
    """Send pieces to a server, then close. Return the first flight and the error of the server."""
    sock, raw = raw_pair()
    failure: Exception | None = None

    def client() -> bytes:
        for piece in pieces:
            raw.sendall(piece)
        raw.settimeout(20)
        flight = b""
        # In TLS 1.2, the flight ends with ServerHelloDone.
        while not flight.endswith(b"\x0e\0\0\0"):
            chunk = raw.recv(65536)
            flight += chunk
            if not chunk:
                break
        raw.close()
        return flight

    flight = b""

    async def talk() -> None:
        nonlocal flight
        flight = await trio.to_thread.run_sync(client)

    async with closing(sock), trio.open_nursery() as nursery:
        nursery.start_soon(talk)
        try:
            await sock.starttls(role)
        except TLSError as exc:
            failure = exc
            await sock.close()
    return flight, failure


def certificate_in(flight: bytes) -> bytes | None:
    """Return the server's leaf certificate, or ``None`` if the flight has none."""
    return next(iter(certificates_in(flight)), None)


def certificates_in(flight: bytes) -> list[bytes]:
    """Return the certificates in a server's first flight (RFC 5246, section 7.4.2)."""
    messages = b"".join(record[5:] for record in records_of(flight) if record[0] == 22)
    while messages and messages[0] != 11:
        messages = messages[4 + int.from_bytes(messages[1:4], "big") :]
    rest = messages[7 : 7 + int.from_bytes(messages[4:7], "big")]
    found = []
    while rest:
        size = int.from_bytes(rest[:3], "big")
        found.append(rest[3 : 3 + size])
        rest = rest[3 + size :]
    return found
