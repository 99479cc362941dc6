"""ClientHello messages, real and synthetic, with and without record headers."""

from __future__ import annotations

import contextlib
import ssl

import pytest


def records_of(wire: bytes) -> list[bytes]:
    """Split bytes into TLS records; the last one may be cut short."""
    records = []
    while wire:
        size = 5 + int.from_bytes(wire[3:5], "big")
        records.append(wire[:size])
        wire = wire[size:]
    return records


def hello_for(name: bytes) -> bytes:
    """Return a TLS 1.2 ClientHello with this name as SNI.

    In TLS 1.2, the server's certificates are not encrypted.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname="placeholder.example")
    with contextlib.suppress(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    old, new = name_extension(b"placeholder.example"), name_extension(name)
    start = hello.index(old)
    longer = len(new) - len(old)
    body = bytearray(hello[9:].replace(old, new))
    at = start - 9
    while True:  # search backwards for the total length of the extensions
        at -= 1
        if int.from_bytes(body[at : at + 2], "big") + longer == len(body) - at - 2:
            break
    body[at : at + 2] = (len(body) - at - 2).to_bytes(2, "big")
    message = hello[5:6] + len(body).to_bytes(3, "big") + body
    return hello[:3] + len(message).to_bytes(2, "big") + message


def in_records(message: bytes, size: int) -> bytes:
    """Split a handshake message into records of ``size`` bytes."""
    return b"".join(
        b"\x16\x03\x01" + len(part).to_bytes(2, "big") + part for part in split(message, size)
    )


def client_hello(name: str | None, *, largest_record: int = 16384) -> bytes:
    """Return the first flight of a real client."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    outgoing = ssl.MemoryBIO()
    client = context.wrap_bio(ssl.MemoryBIO(), outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    record = outgoing.read()
    return in_records(record[5:], largest_record)


def split(data: bytes, size: int) -> list[bytes]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def handshake_of(records: bytes) -> bytes:
    """Return the contents of records, without their headers."""
    return b"".join(record[5:] for record in records_of(records))


def name_extension(*names: bytes) -> bytes:
    """Return a server_name extension (RFC 6066, section 3)."""
    entries = b"".join(b"\0" + len(name).to_bytes(2, "big") + name for name in names)
    entries = len(entries).to_bytes(2, "big") + entries
    return b"\0\0" + len(entries).to_bytes(2, "big") + entries


def hello_with(extensions: bytes | None) -> bytes:
    body = b"\3\3" + bytes(32) + b"\0" + b"\0\2\x13\1" + b"\1\0"
    if extensions is not None:
        body += len(extensions).to_bytes(2, "big") + extensions
    return b"\1" + len(body).to_bytes(3, "big") + body
