"""Random PROXY headers: valid ones, and mutated ones."""

from __future__ import annotations

import socket
import struct
from random import Random

from helpers.proxy_headers import LOCAL, PROXY, VALID, binary, tlv, with_crc

# Each mutation of a line replaces a part with one of these.
TOKENS = [
    b"", b" ", b"  ", b"\r", b"\n", b"\r\n", b"\0", b"\t", b"0", b"00", b"-1", b"+1", b"65535",
    b"65536", b"99999", b"256", b"1.2.3.4", b"01.2.3.4", b"1.2.3", b"::", b"::1", b":::",
    b"1::2::3", b"fe80::1%lo", b"::ffff:1.2.3.4", b"g::", b"TCP4", b"TCP6", b"TCP5", b"UDP4",
    b"UNKNOWN", b"PROXY", b"PROXY ", b"\xff", b"\xd9\xa1", b"x" * 100,
]  # fmt: skip

TLVS = [0, 1, 2, 3, 4, 5, 0x20, 0x21, 0x30, 0xE0, 0xEF, 0xFF]


def valid_header(random: Random) -> bytes:
    """Return a random header that is valid by the specification."""
    kind = random.randrange(10)
    if kind < 3:
        return random.choice(VALID)
    ports = random.randrange(65536), random.randrange(65536)
    version = random.choice([4, 6])
    hosts = [random.randbytes(4 if version == 4 else 16) for _ in range(2)]
    if random.random() < 0.3:
        hosts = [bytes(random.choice([0, each]) for each in host) for host in hosts]
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    if kind < 6:
        texts = [socket.inet_ntop(family, each) for each in hosts]
        line = f"PROXY TCP{version} {texts[0]} {texts[1]} {ports[0]} {ports[1]}\r\n"
        return (line if random.random() < 0.8 else line.upper()).encode()
    tlvs = b"".join(
        tlv(random.choice([1, 4, 0xE0, 0xE1, 0x77]), random.randbytes(random.randrange(40)))
        for _ in range(random.randrange(4))
    )
    if random.random() < 0.5:
        tlvs += tlv(random.choice([2, 5, 0x30]), b"text")
    ends = hosts[0] + hosts[1] + struct.pack("!HH", *ports)
    if random.random() < 0.2:
        header = binary(tlvs, command=LOCAL, family=0, ends=b"")
    else:
        header = binary(tlvs, family=0x11 if version == 4 else 0x21, ends=ends)
    return with_crc(header) if random.random() < 0.5 else header


def mutated(random: Random, data: bytes) -> bytes:
    """Return a header with one to three mutations. Most are malformed, but not all."""
    for _ in range(random.choice([1, 1, 1, 2, 3])):
        at = random.randrange(len(data) + 1)
        near = random.randrange(min(len(data), 20) + 1)
        kind = random.randrange(9)
        if kind == 0:  # flip bits
            data = data[:at] + bytes(each ^ random.randrange(256) for each in data[at : at + 1])
            data += b"" if random.random() < 0.5 else b"\r\n"
        elif kind == 1:
            data = data[:near] + random.randbytes(1) + data[near + 1 :]
        elif kind == 2:
            data = data[:at] + random.randbytes(1) + data[at + 1 :]
        elif kind == 3:
            data = data[:at]
        elif kind == 4:
            data = data[:at] + random.choice(TOKENS) + data[at:]
        elif kind == 5:
            data = data[:at] + data[at + random.randrange(1, 8) :]
        elif data[:1] == b"P":
            fields = data.split(b" ")
            fields[random.randrange(len(fields))] = random.choice(TOKENS)
            data = b" ".join(fields)
        elif kind == 6:  # another length
            size = random.choice([0, 1, 11, 12, 13, 35, 36, 37, 4080, 4081, 65535])
            data = data[:14] + struct.pack("!H", size) + data[16:]
        elif kind == 7:  # another version, command, family or protocol
            data = (
                data[:12] + random.choice([b"", bytes([PROXY])]) + random.randbytes(1) + data[14:]
            )
        else:  # another type or length of a TLV
            data = data[:at] + bytes([random.choice(TLVS), 0, random.randrange(8)]) + data[at + 3 :]
    return data


def mutants(random: Random, count: int) -> list[bytes]:
    return [mutated(random, valid_header(random)) for _ in range(count)]
