"""Show the multicast DNS questions and records that machines send on the local network.

    python examples/mdns_listener.py
    python examples/mdns_listener.py --interface eth0

Each line has the sender, and a question or a record (RFC 6762). For example, a phone asks for
speakers, or a printer tells its address. The example only listens. It shows how one socket joins
IPv4 and IPv6 groups, and shares its port with other programs. It also shows how to parse untrusted
data: names whose pointers form a loop, control characters, truncated datagrams.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Iterator

import trio

import trisock

GROUPS = ("224.0.0.251", "ff02::fb")
PORT = 5353
TYPES = {1: "A", 12: "PTR", 16: "TXT", 28: "AAAA", 33: "SRV", 47: "NSEC", 255: "ANY"}
MAX_ITEMS = 50  # items to show of a datagram; even a short datagram can claim 65,535


def printable(text: str) -> str:
    """Escape control characters, which could affect the terminal."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def read_name(message: bytes, position: int) -> tuple[str, int]:
    """Return the name at a position, and the position after it (RFC 1035, section 4.1.4).

    Raises ``ValueError`` or ``IndexError`` if the name is malformed.
    """
    labels: list[str] = []
    start, after = position, None
    while length := message[position]:
        if length >= 0xC0:
            target = (length & 0x3F) << 8 | message[position + 1]
            if target >= start:  # each pointer points further back, so there is no loop
                raise ValueError("a pointer that does not point back")
            after = after or position + 2
            position = start = target
        elif length > 63 or len(labels) > 127 or position + 1 + length > len(message):
            raise ValueError("a malformed label")
        else:
            labels.append(message[position + 1 : position + 1 + length].decode("utf-8", "replace"))
            position += 1 + length
    return ".".join(labels) or ".", after or position + 1


def items(message: bytes) -> Iterator[str]:
    """Describe each question and record of a message, up to the first malformed one."""
    try:
        _, _, questions, *records = struct.unpack_from("!6H", message)
        position = 12
        for number in range(min(questions + sum(records), MAX_ITEMS)):
            name, position = read_name(message, position)
            kind, _ = struct.unpack_from("!HH", message, position)
            verb = "asks for" if number < questions else "tells"
            yield f"{verb} {printable(name)} {TYPES.get(kind, kind)}"
            position += 4
            if number >= questions:
                (size,) = struct.unpack_from("!4xH", message, position)
                position += 6 + size
    except (ValueError, IndexError, struct.error):
        yield "says something malformed"


async def listen(udp: trisock.UDPSocket) -> None:
    async with udp:
        async for datagram in udp:
            for item in items(datagram.data):
                print(datagram.address, item, flush=True)


def join(udp: trisock.UDPSocket, interface: str | None) -> None:
    """Join the groups of both families. It is enough if one of them can be joined."""
    failures = []
    for group in GROUPS:
        try:
            udp.join_group(group, interface)
        except OSError as exc:
            failures.append(exc)
    if len(failures) == len(GROUPS):
        raise failures[0]


async def main(port: int, interface: str | None) -> None:
    async with trisock.open_service(grace=1) as service:
        udp = await service.open_udp(port, reuse_address=True)
        join(udp, interface)
        service.nursery.start_soon(listen, udp)
        print("listening on port", udp.getlocal().port, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=PORT)
    parser.add_argument("--interface", help="the interface to listen on, such as eth0")
    args = parser.parse_args()
    try:
        trio.run(main, args.port, args.interface)
    except OSError as exc:
        sys.exit(str(exc))
