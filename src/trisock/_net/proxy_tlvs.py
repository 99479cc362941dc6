"""The TLVs (type, length, value) of a PROXY header of version 2. It does no I/O.

The section numbers in the comments refer to the specification:
https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TypeAlias

from .._arguments import quoted

TLVs: TypeAlias = "tuple[tuple[int, bytes], ...]"

ALPN = 0x01
AUTHORITY = 0x02
CRC32C = 0x03
UNIQUE_ID = 0x05
SSL = 0x20
SSL_VERSION = 0x21
SSL_CN = 0x22
SSL_CIPHER = 0x23
SSL_SIG_ALG = 0x24
SSL_KEY_ALG = 0x25
NETNS = 0x30

# What the specification requires of the values: a text encoding, or a maximum size in bytes.
_ENCODINGS = {AUTHORITY: "utf-8", NETNS: "ascii"}
_SSL_ENCODINGS = {
    SSL_VERSION: "ascii",
    SSL_CN: "utf-8",
    SSL_CIPHER: "ascii",
    SSL_SIG_ALG: "ascii",
    SSL_KEY_ALG: "ascii",
}
_MAX_UNIQUE_ID = 128

# The bits of ProxySSL.client: the client used TLS, and the client sent a certificate.
_CLIENT_SSL = 0x01
_CLIENT_CERTIFICATE = 0x02 | 0x04

_TLV_HEAD = struct.Struct("!BH")
_SSL_HEAD = struct.Struct("!BI")


@dataclass(frozen=True, kw_only=True)
class ProxySSL:
    """What a proxy says about its TLS connection with the client (section 2.2.6).

    Attributes:
      client: a bit field. 1: the client uses TLS. 2: the client has sent a certificate in this
        connection. 4: the client has sent a certificate in this TLS session.
      verify: the result of verifying the client's certificate. 0 means success, or that there was
        no certificate. ``verified`` distinguishes the two cases.
      tlvs: additional fields, as pairs of a type and a value.
    """

    client: int
    verify: int
    tlvs: TLVs = ()

    def __post_init__(self) -> None:
        _check_int("client", self.client, 0xFF)
        _check_int("verify", self.verify, 0xFFFFFFFF)
        object.__setattr__(self, "tlvs", check_tlvs(self.tlvs))
        for kind, value in self.tlvs:
            _check_text(kind, value, _SSL_ENCODINGS)

    @property
    def verified(self) -> bool:
        """Whether the client has sent a certificate, and the proxy has verified it."""
        return bool(self.client & _CLIENT_CERTIFICATE) and self.verify == 0

    @property
    def version(self) -> str | None:
        """The TLS version, such as ``"TLSv1.3"``."""
        return self._text(SSL_VERSION)

    @property
    def cn(self) -> str | None:
        """The common name in the client's certificate."""
        return self._text(SSL_CN)

    @property
    def cipher(self) -> str | None:
        """The cipher suite, such as ``"TLS_AES_256_GCM_SHA384"``."""
        return self._text(SSL_CIPHER)

    @property
    def sig_alg(self) -> str | None:
        """The algorithm that signed the proxy's certificate, such as ``"RSA-SHA256"``."""
        return self._text(SSL_SIG_ALG)

    @property
    def key_alg(self) -> str | None:
        """The kind of key in the proxy's certificate, such as ``"RSA2048"``."""
        return self._text(SSL_KEY_ALG)

    def _text(self, kind: int) -> str | None:
        return tlv_text(self.tlvs, kind, _SSL_ENCODINGS[kind])

    def to_bytes(self) -> bytes:
        """Return the value of a TLV of type ``0x20``."""
        return _SSL_HEAD.pack(self.client, self.verify) + join_tlvs(self.tlvs)


def ssl_from_bytes(value: bytes) -> ProxySSL:
    """Return the ``ProxySSL`` of a TLV's value. Raises ``ValueError`` if the value is invalid."""
    if len(value) < _SSL_HEAD.size:
        raise ValueError("a TLV of type 0x20 is too short")
    client, verify = _SSL_HEAD.unpack_from(value)
    return ProxySSL(client=client, verify=verify, tlvs=split_tlvs(value[_SSL_HEAD.size :]))


def split_tlvs(data: bytes) -> TLVs:
    """Split TLVs. Raises ``ValueError`` unless they end exactly where ``data`` ends."""
    found = []
    start = 0
    while start < len(data):
        value_start = start + _TLV_HEAD.size
        if value_start > len(data):
            raise ValueError("its last TLV is cut short")
        kind, size = _TLV_HEAD.unpack_from(data, start)
        start = value_start + size
        if start > len(data):
            raise ValueError(f"a TLV of type 0x{kind:02x} is longer than the header")
        found.append((kind, data[value_start:start]))
    return tuple(found)


def join_tlvs(tlvs: TLVs) -> bytes:
    """Return the bytes of TLVs."""
    return b"".join(_TLV_HEAD.pack(kind, len(value)) + value for kind, value in tlvs)


def check_tlvs(tlvs: object) -> TLVs:
    """Return TLVs as a tuple. Raises ``TypeError`` or ``ValueError`` if their form is invalid."""
    if not isinstance(tlvs, (tuple, list)):
        raise TypeError(f"tlvs must be a tuple of (type, bytes), not {quoted(tlvs)}")
    for each in tlvs:
        if not isinstance(each, tuple) or len(each) != 2 or not isinstance(each[1], bytes):
            raise TypeError(f"a TLV must be a tuple (type, bytes), not {quoted(each)}")
        _check_int("a TLV's type", each[0], 0xFF)
        if len(each[1]) > 0xFFFF:
            raise ValueError(f"a TLV has at most 65535 bytes, not {len(each[1])}")
    return tuple(tlvs)


def check_values(tlvs: TLVs) -> None:
    """Raise ``ValueError`` if a value violates the specification."""
    for kind, value in tlvs:
        _check_text(kind, value, _ENCODINGS)
        if kind == UNIQUE_ID and len(value) > _MAX_UNIQUE_ID:
            raise ValueError(f"a unique ID has at most {_MAX_UNIQUE_ID} bytes, not {len(value)}")
        if kind == SSL:
            ssl_from_bytes(value)


def tlv_value(tlvs: TLVs, kind: int) -> bytes | None:
    """Return the value of the first TLV of a type, or ``None`` if there is none."""
    return next((value for found, value in tlvs if found == kind), None)


def tlv_text(tlvs: TLVs, kind: int, encoding: str) -> str | None:
    """Return the text of the first TLV of a type, or ``None`` if there is none."""
    value = tlv_value(tlvs, kind)
    return None if value is None else value.decode(encoding)


def _check_text(kind: int, value: bytes, encodings: dict[int, str]) -> None:
    if kind in encodings:
        try:
            value.decode(encodings[kind])
        except UnicodeDecodeError:  # its message quotes the value
            raise ValueError(f"a TLV of type 0x{kind:02x} is not {encodings[kind]}") from None


def _check_int(name: str, value: object, limit: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, not {quoted(value)}")
    if not 0 <= value <= limit:
        raise ValueError(f"{name} must be in 0-{limit}, not {quoted(value)}")


def _crc_table() -> tuple[int, ...]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return tuple(table)


_CRC_TABLE = _crc_table()


def crc32c(data: bytes) -> int:
    """Return the CRC32c checksum of data (RFC 3720, appendix B.4)."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _CRC_TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ 0xFFFFFFFF
