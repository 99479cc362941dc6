"""A small DNS server for a few names, over UDP and TCP.

Run it, and ask it (dig is in Debian's package bind9-dnsutils):

    python examples/dns_responder.py --port 5300 www.example.test=192.0.2.1 www.example.test=::1
    dig @127.0.0.1 -p 5300 www.example.test AAAA

The example shows three things. Each answer comes from the address that the query was sent to. The
server is not an amplifier: anyone can forge the sender of a datagram, so an answer over UDP is
never longer than its query. A longer answer is truncated (TC), and the client asks again over TCP
(RFC 2181, section 9; RFC 7766). On a signal, both servers stop, but first they answer the queries
that have already arrived.
"""

from __future__ import annotations

import argparse
import contextlib
import ipaddress
import struct
import sys
from collections.abc import Sequence

import trio

import trisock

Records = dict[bytes, list[tuple[int, bytes]]]  # name in lower case -> type and data

A, AAAA, OPT, ANY = 1, 28, 41, 255  # types
IN = 1  # class
FORMERR, NXDOMAIN, NOTIMP, REFUSED, BADVERS = 1, 3, 4, 5, 16  # response codes
RESPONSE, AUTHORITATIVE, TRUNCATED, RECURSION_DESIRED = 0x8000, 0x0400, 0x0200, 0x0100  # flags
OPCODE = 0x7800  # four bits of the flags: 0 is a standard query

TTL = 60  # seconds for which an answer may be cached
MAX_QUERY = 4096  # bytes over TCP
TCP_SECONDS = 30  # for a whole connection


def parse_records(arguments: Sequence[str]) -> Records:
    """Return the records of arguments such as ``www.example.test=192.0.2.1``."""
    records: Records = {}
    for argument in arguments:
        name, _, text = argument.partition("=")
        labels = name.rstrip(".").lower().encode("ascii").split(b".")
        if not all(0 < len(label) < 64 for label in labels):
            raise ValueError(f"not NAME=ADDRESS: {argument!r}")
        wire = b"".join(bytes([len(label)]) + label for label in labels) + b"\0"
        address = ipaddress.ip_address(text)
        records.setdefault(wire, []).append((A if address.version == 4 else AAAA, address.packed))
    return records


def end_of_question(query: bytes) -> int:
    """Return where the only question of a query ends. Raises ``ValueError`` if it is malformed."""
    position = 12
    while length := query[position : position + 1]:
        position += 1 + length[0]
        if length == b"\0":
            if position - 12 <= 255 and position + 4 <= len(query):
                return position + 4
            break
        if length[0] > 63:  # a pointer: there is nothing to point to
            break
    raise ValueError("a malformed question")


def edns_version(rest: bytes) -> int | None:
    """Return the version in the OPT record after the question, or ``None`` if there is none."""
    if len(rest) >= 11 and rest[:3] == b"\0" + struct.pack("!H", OPT):  # RFC 6891, section 6.1.2
        return rest[6]
    return None


def answer(query: bytes, records: Records, limit: int) -> bytes | None:
    """Return the answer to a query, or ``None`` if the query gets no answer.

    If the answer has more than ``limit`` bytes, it is truncated. A truncated answer is never longer
    than the query.
    """
    if len(query) < 12:
        return None
    number, flags, questions, *_ = struct.unpack_from("!6H", query)
    if flags & RESPONSE:  # two servers must not answer each other forever
        return None
    flags &= OPCODE | RECURSION_DESIRED
    try:
        end = end_of_question(query)
        if questions != 1:
            raise ValueError("not one question")
    except ValueError:
        return _message(number, flags | FORMERR, b"", [], b"")
    question = query[12:end]
    version = edns_version(query[end:])
    found, code = _look_up(question, records)
    if flags & OPCODE:  # not a standard query
        found, code = [], NOTIMP
    elif version:  # RFC 6891, section 6.1.3
        found, code = [], BADVERS
    opt = b""
    if version is not None:
        opt = b"\0" + struct.pack("!HHBBHH", OPT, MAX_QUERY, code >> 4, 0, 0, 0)
    flags |= AUTHORITATIVE | code & 15
    whole = _message(number, flags, question, found, opt)
    if len(whole) <= limit:
        return whole
    return _message(number, flags | TRUNCATED, question, [], opt)


def _look_up(question: bytes, records: Records) -> tuple[list[bytes], int]:
    """Return the records that answer a question, and the response code."""
    name = question[:-4].lower()
    kind, cls = struct.unpack("!HH", question[-4:])
    if cls != IN:
        return [], REFUSED
    if name not in records:
        return [], NXDOMAIN
    found = [(own, data) for own, data in records[name] if kind in (own, ANY)]
    # 0xC00C points to the name in the question.
    return [struct.pack("!HHHIH", 0xC00C, own, IN, TTL, len(data)) + data for own, data in found], 0


def _message(number: int, flags: int, question: bytes, found: list[bytes], opt: bytes) -> bytes:
    head = struct.pack(
        "!6H", number, flags | RESPONSE, 1 if question else 0, len(found), 0, 1 if opt else 0
    )
    return b"".join([head, question, *found, opt])


class Responder:
    """Answers queries for the names of ``records``."""

    def __init__(self, records: Records) -> None:
        self.records = records

    async def serve_udp(self, udp: trisock.UDPSocket) -> None:
        async with udp:
            async for query in udp:
                response = answer(query.data, self.records, limit=len(query.data))
                if response is not None:
                    # The sender's address may be forged, and one that nobody can answer.
                    with contextlib.suppress(OSError):
                        await udp.send(response, query.address, source=query.destination)

    async def serve_tcp(self, sock: trisock.Socket) -> None:
        with trio.move_on_after(TCP_SECONDS):
            async for query in sock.frames("!H", max_bytes=MAX_QUERY, idle=True):
                response = answer(query, self.records, limit=65535)
                if response is None:
                    break
                await sock.send_frame(response, header="!H")


async def main(port: int, records: Records) -> None:
    responder = Responder(records)
    async with trisock.open_service(grace=5) as service:
        while True:
            udp = await trisock.open_udp(port)
            try:
                own_port = udp.getlocal().port
                await service.bind(own_port, responder.serve_tcp, max_connections=100)
                break
            except OSError:
                await udp.close()
                if port != 0:  # with port 0, try another free port
                    raise
        service.nursery.start_soon(responder.serve_udp, await service.open_udp(udp))
        print("listening on port", own_port, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=5300)
    parser.add_argument("records", nargs="*", metavar="NAME=ADDRESS")
    args = parser.parse_args()
    try:
        records = parse_records(args.records or ["www.example.test=192.0.2.1"])
    except ValueError as exc:
        parser.error(str(exc))
    try:
        trio.run(main, args.port, records)
    except OSError as exc:
        sys.exit(str(exc))
