"""ProxyHeader: a proxy sends it before any other data, to name the client. It does no I/O.

The specification of the PROXY protocol:
https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt
"""

from __future__ import annotations

import ipaddress
import os
import struct
from dataclasses import dataclass
from typing import Literal, TypeAlias

from .._address import Address, check_port, is_unix_address
from .._arguments import quoted
from . import proxy_tlvs
from .proxy_tlvs import ProxySSL, TLVs

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"

# The largest header of version 2 that we send or receive, in bytes. The specification has no limit
# except that of the 16-bit length field. HAProxy's headers have at most a few hundred bytes.
MAX_HEADER = 4096

# The fixed part of a version 2 header: the signature, the version and command, the family and
# protocol, and the length of the rest.
V2_HEAD = struct.Struct("!12sBBH")

# The byte for the version and the command: the upper four bits hold the version (2), and the lower
# four bits hold the command.
LOCAL, PROXY = 0x20, 0x21

# Families and protocols: unspecified; TCP and UDP over IPv4 and IPv6; streams and datagrams over
# Unix sockets. A header names the protocol between the client and the proxy.
UNSPEC, TCP4, UDP4, TCP6, UDP6, UNIX_STREAM, UNIX_DATAGRAM = 0, 0x11, 0x12, 0x21, 0x22, 0x31, 0x32

# The source and the destination in a header: two addresses, then two ports.
IPV4_ENDS = struct.Struct("!4s4sHH")
IPV6_ENDS = struct.Struct("!16s16sHH")
UNIX_ENDS = struct.Struct("!108s108s")

_UNIX_PATH_SIZE = 108

_CRC_SIZE = 7  # bytes of the TLV with the checksum

_IP: TypeAlias = "ipaddress.IPv4Address | ipaddress.IPv6Address"


@dataclass(frozen=True, kw_only=True)
class ProxyHeader:
    """A header of the PROXY protocol: the addresses of a connection that a proxy forwards.

    ``bind(trusted_proxies=...)`` receives headers, and ``connect(proxy_header=...)`` sends one.

    Attributes:
      version: 1 (a line of text) or 2 (binary).
      command: ``"PROXY"``, or ``"LOCAL"`` if the proxy itself has opened the connection, such as
        for a health check. Version 1 has no ``"LOCAL"``.
      source, destination: the client's address, and the address to which the client has connected.
        Both are ``None`` if the proxy does not know them (version 1: ``UNKNOWN``), and for
        ``"LOCAL"``. Version 1 has no Unix addresses. An IPv6 zone is not sent.
      tlvs: additional fields, as pairs of a type and a value, in the order of the header. Only
        version 2 has them. The ``tlvs`` of a received header include unknown fields, but not the
        checksum (type 3), which ``to_bytes`` computes. They are empty for a received ``"LOCAL"``
        header.

    If a type occurs twice in ``tlvs``, the properties return the first value.

    Raises TypeError or ValueError if the attributes do not make a valid header. Source: the PROXY
    protocol's specification.
    """

    version: Literal[1, 2] = 2
    command: Literal["PROXY", "LOCAL"] = "PROXY"
    source: Address | None = None
    destination: Address | None = None
    tlvs: TLVs = ()

    def __post_init__(self) -> None:
        if isinstance(self.version, bool) or self.version not in (1, 2):
            raise ValueError(f"version must be 1 or 2, not {quoted(self.version)}")
        if self.command not in ("PROXY", "LOCAL"):
            raise ValueError(f"command must be 'PROXY' or 'LOCAL', not {quoted(self.command)}")
        for name, end in (("source", self.source), ("destination", self.destination)):
            if end is not None:
                _check_address(name, end)
        if (self.source is None) != (self.destination is None):
            raise ValueError("source and destination go together: give both or neither")
        object.__setattr__(self, "tlvs", proxy_tlvs.check_tlvs(self.tlvs))
        proxy_tlvs.check_values(self.tlvs)
        if any(kind == proxy_tlvs.CRC32C for kind, _ in self.tlvs):
            raise ValueError("a TLV of type 3 is the checksum, which to_bytes computes")
        if self.command == "LOCAL" and self.source is not None:
            raise ValueError("a header with the command 'LOCAL' has no addresses")
        if self.version == 1:
            self._check_version_1()
        _, ends = self._ends()
        size = V2_HEAD.size + len(ends) + len(proxy_tlvs.join_tlvs(self.tlvs))
        if size > MAX_HEADER:
            raise ValueError(f"a header has at most {MAX_HEADER} bytes, not {size}")

    def _check_version_1(self) -> None:
        if self.command == "LOCAL":
            raise ValueError("version 1 has no command 'LOCAL': use version 2")
        if self.tlvs:
            raise ValueError("version 1 has no TLVs: use version 2")
        if self.source is not None and is_unix_address(self.source):
            raise ValueError("version 1 has no Unix addresses: use version 2, or no addresses")

    @property
    def alpn(self) -> bytes | None:
        """The protocol that ALPN has selected between the client and the proxy."""
        return proxy_tlvs.tlv_value(self.tlvs, proxy_tlvs.ALPN)

    @property
    def authority(self) -> str | None:
        """The host name that the client requested, such as by SNI. It is not verified."""
        return proxy_tlvs.tlv_text(self.tlvs, proxy_tlvs.AUTHORITY, "utf-8")

    @property
    def unique_id(self) -> bytes | None:
        """The proxy's unique ID for the connection, at most 128 bytes long."""
        return proxy_tlvs.tlv_value(self.tlvs, proxy_tlvs.UNIQUE_ID)

    @property
    def netns(self) -> str | None:
        """The name of the network namespace."""
        return proxy_tlvs.tlv_text(self.tlvs, proxy_tlvs.NETNS, "ascii")

    @property
    def ssl(self) -> ProxySSL | None:
        """What the proxy says about the client's TLS, or ``None`` if it says nothing."""
        value = proxy_tlvs.tlv_value(self.tlvs, proxy_tlvs.SSL)
        return None if value is None else proxy_tlvs.ssl_from_bytes(value)

    def to_bytes(self) -> bytes:
        """Return the header in its wire format.

        Version 2 ends with a checksum (CRC32c), unless the header has no room for it. A header that
        was received for a UDP client is sent as a header for a TCP client. (Likewise, a Unix
        datagram socket becomes a Unix stream socket.)
        """
        return self._line() if self.version == 1 else self._binary()

    def _line(self) -> bytes:
        if self.source is None or self.destination is None:
            return b"PROXY UNKNOWN\r\n"
        family, ends = self._ends()
        if family == TCP4:
            source, destination, *ports = IPV4_ENDS.unpack(ends)
            hosts = [".".join(map(str, each)) for each in (source, destination)]
        else:
            source, destination, *ports = IPV6_ENDS.unpack(ends)
            hosts = [each.hex(":", 2) for each in (source, destination)]
        protocol = "TCP4" if family == TCP4 else "TCP6"
        return " ".join(["PROXY", protocol, *hosts, *map(str, ports)]).encode() + b"\r\n"

    def _binary(self) -> bytes:
        family, ends = self._ends()
        rest = ends + proxy_tlvs.join_tlvs(self.tlvs)
        has_room = V2_HEAD.size + len(rest) + _CRC_SIZE <= MAX_HEADER
        size = len(rest) + (_CRC_SIZE if has_room else 0)
        command = LOCAL if self.command == "LOCAL" else PROXY
        header = V2_HEAD.pack(SIGNATURE, command, family, size) + rest
        if not has_room:
            return header
        # The checksum covers the whole header, with zeros in place of the checksum (section 2.2.3).
        zeros = proxy_tlvs.join_tlvs(((proxy_tlvs.CRC32C, bytes(4)),))
        return (header + zeros)[:-4] + proxy_tlvs.crc32c(header + zeros).to_bytes(4, "big")

    def _ends(self) -> tuple[int, bytes]:
        """Return the family and protocol, and the source and destination as bytes."""
        if self.source is None or self.destination is None:
            return UNSPEC, b""
        ends = (self.source, self.destination)
        if any(map(is_unix_address, ends)):
            if not all(map(is_unix_address, ends)):
                raise ValueError("source and destination must both be Unix addresses, or neither")
            return UNIX_STREAM, UNIX_ENDS.pack(*(os.fsencode(each.host) for each in ends))
        hosts = [_ip(each) for each in ends]
        ports = [each.port for each in ends]
        if all(each.version == 4 for each in hosts):
            return TCP4, IPV4_ENDS.pack(*(each.packed for each in hosts), *ports)
        return TCP6, IPV6_ENDS.pack(*map(_packed_ipv6, hosts), *ports)


def _check_address(name: str, address: object) -> None:
    if not isinstance(address, Address):
        raise TypeError(f"{name} must be an Address or None, not {quoted(address)}")
    if not isinstance(address.host, str):
        raise TypeError(f"the host of {name} must be a str, not {quoted(address.host)}")
    check_port(address.port, None)
    if is_unix_address(address):
        path = os.fsencode(address.host)
        if len(path) > _UNIX_PATH_SIZE or b"\0" in path[1:]:
            raise ValueError(f"{name} is not the address of a Unix socket")
        return
    try:
        _ip(address)
    except ValueError:
        raise ValueError(f"{name} must have an IP address, not {quoted(address.host)}") from None


def _ip(address: Address) -> _IP:
    return ipaddress.ip_address(address.host)


def _packed_ipv6(ip: _IP) -> bytes:
    """Return the 16 bytes of an IPv6 address. An IPv4 address is first mapped to IPv6."""
    return ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
