"""parse_proxy_header: a strict parser of the PROXY protocol. It does no I/O.

The section numbers in the comments refer to the specification:
https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket

from .._address import Address, UnixAddress, address_from_sockaddr
from . import proxy_header as v2
from .proxy_header import MAX_HEADER, SIGNATURE, V2_HEAD, ProxyHeader
from .proxy_tlvs import CRC32C, TLVs, crc32c, split_tlvs

_MAX_LINE = 107  # bytes of a header of version 1, including its CRLF (section 2.1)

_LINE_START = b"PROXY "

# Fields are separated by exactly one space, and a port has no leading zeros (section 2.1). Any text
# after UNKNOWN is ignored.
_PORT = rb"(0|[1-9][0-9]{0,4})"
_HOST = rb"([0-9A-Fa-f:.]+)"
_TCP_LINE = re.compile(b" ".join([rb"PROXY TCP([46])", _HOST, _HOST, _PORT, _PORT]) + rb"\r\n")
_UNKNOWN_LINE = re.compile(rb"PROXY UNKNOWN(?: .*)?\r\n", re.DOTALL)

# The size in bytes of the two addresses (with ports), for each specified family and protocol.
_ENDS = {
    v2.UNSPEC: 0,
    v2.TCP4: v2.IPV4_ENDS.size,
    v2.UDP4: v2.IPV4_ENDS.size,
    v2.TCP6: v2.IPV6_ENDS.size,
    v2.UDP6: v2.IPV6_ENDS.size,
    v2.UNIX_STREAM: v2.UNIX_ENDS.size,
    v2.UNIX_DATAGRAM: v2.UNIX_ENDS.size,
}

_NO_HEADER = "it does not begin with a PROXY header"


def parse_proxy_header(data: bytes) -> tuple[ProxyHeader, int] | None:
    """Parse the header at the start of a connection.

    Returns: the header and its size in bytes, or ``None`` if more bytes are needed. The result is
    never ``None`` for ``MAX_HEADER`` bytes or more.

    Raises ``ValueError`` as soon as ``data`` cannot become a valid header. The message does not
    quote ``data``.
    """
    if SIGNATURE.startswith(data[: len(SIGNATURE)]):
        return _parse_binary(data)
    if _LINE_START.startswith(data[: len(_LINE_START)]):
        return _parse_line(data)
    raise ValueError(_NO_HEADER)


# ---- version 1 ----


def _parse_line(data: bytes) -> tuple[ProxyHeader, int] | None:
    size = data.find(b"\n", 0, _MAX_LINE) + 1
    if not size:
        if len(data) >= _MAX_LINE:
            raise ValueError(f"its PROXY header of version 1 is longer than {_MAX_LINE} bytes")
        return None
    line = data[:size]
    if _UNKNOWN_LINE.fullmatch(line):
        return ProxyHeader(version=1), size
    found = _TCP_LINE.fullmatch(line)
    if not found:
        raise ValueError("its PROXY header of version 1 is malformed")
    version, *hosts, source_port, destination_port = found.groups()
    source, destination = (_text_to_bytes(version, each.decode("ascii")) for each in hosts)
    if int(source_port) > 65535 or int(destination_port) > 65535:
        raise ValueError("its PROXY header has an invalid port")
    header = ProxyHeader(
        version=1,
        source=_ip_address(source, int(source_port)),
        destination=_ip_address(destination, int(destination_port)),
    )
    return header, size


def _text_to_bytes(version: bytes, host: str) -> bytes:
    try:
        if version == b"4":
            return ipaddress.IPv4Address(host).packed
        return ipaddress.IPv6Address(host).packed
    except ValueError:  # its message quotes the address
        raise ValueError("its PROXY header has an invalid address") from None


# ---- version 2 ----


def _parse_binary(data: bytes) -> tuple[ProxyHeader, int] | None:
    if len(data) > 12 and data[12] not in (v2.LOCAL, v2.PROXY):
        raise ValueError("its PROXY header has an unknown version or command")
    if len(data) > 13 and data[12] == v2.PROXY and data[13] not in _ENDS:
        raise ValueError("its PROXY header has an unknown address family or protocol")
    if len(data) < V2_HEAD.size:
        return None
    _, command, family, rest_size = V2_HEAD.unpack_from(data)
    size = V2_HEAD.size + rest_size
    if size > MAX_HEADER:
        raise ValueError(f"its PROXY header is longer than {MAX_HEADER} bytes")
    if command == v2.LOCAL:
        return _parse_local(data, family, size)
    tlvs_start = V2_HEAD.size + _ENDS[family]
    if tlvs_start > size:
        raise ValueError("its PROXY header is too short for its addresses")
    if len(data) < size:
        return None
    tlvs = split_tlvs(data[tlvs_start:size])
    _check_crc(data[:size], tlvs, tlvs_start)
    tlvs = tuple(each for each in tlvs if each[0] != CRC32C)
    source, destination = _addresses(family, data[V2_HEAD.size : tlvs_start])
    return ProxyHeader(source=source, destination=destination, tlvs=tlvs), size


def _parse_local(data: bytes, family: int, size: int) -> tuple[ProxyHeader, int] | None:
    """Parse a LOCAL header. Only its head and its checksum matter (sections 2.2 and 2.2.3).

    The family is ignored, so it may be unknown, or may not fit the size of the header.
    """
    if len(data) < size:
        return None
    tlvs_start = V2_HEAD.size + _ENDS.get(family, MAX_HEADER)
    try:
        tlvs = split_tlvs(data[tlvs_start:size])
    except ValueError:
        tlvs = ()
    _check_crc(data[:size], tlvs, tlvs_start)
    return ProxyHeader(command="LOCAL"), size


def _check_crc(header: bytes, tlvs: TLVs, tlvs_start: int) -> None:
    """Raise ``ValueError`` if the header has a checksum that is wrong (section 2.2.3)."""
    place = tlvs_start
    found = None
    for kind, value in tlvs:
        place += 3
        if kind == CRC32C:
            if len(value) != 4:
                raise ValueError("its PROXY header has a checksum that is not 4 bytes long")
            if found is not None:
                raise ValueError("its PROXY header has two checksums")
            found = int.from_bytes(value, "big")
            header = header[:place] + bytes(4) + header[place + 4 :]
        place += len(value)
    if found is not None and crc32c(header) != found:
        raise ValueError("its PROXY header has a wrong checksum")


def _addresses(family: int, data: bytes) -> tuple[Address, Address] | tuple[None, None]:
    if family == v2.UNSPEC:
        return None, None
    if family in (v2.UNIX_STREAM, v2.UNIX_DATAGRAM):
        source, destination = v2.UNIX_ENDS.unpack(data)
        return _unix_address(source), _unix_address(destination)
    ends = v2.IPV4_ENDS if family in (v2.TCP4, v2.UDP4) else v2.IPV6_ENDS
    source, destination, source_port, destination_port = ends.unpack(data)
    return _ip_address(source, source_port), _ip_address(destination, destination_port)


def _ip_address(packed: bytes, port: int) -> Address:
    """Return the same Address that a connection from this address would have."""
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    return address_from_sockaddr(family, (socket.inet_ntop(family, packed), port))


def _unix_address(field: bytes) -> UnixAddress:
    """Return the address in a ``sun_path``, which is padded with zeros (unix(7))."""
    is_abstract = field.startswith(b"\0")
    path = field.rstrip(b"\0") if is_abstract else field.partition(b"\0")[0]
    return UnixAddress(os.fsdecode(path), 0)
