"""The StartTLS operation of LDAP."""

from __future__ import annotations

from .conversation import (
    Exactly,
    Names,
    Negotiation,
    Part,
    Send,
    not_offered,
    refused,
    unexpected,
)

# An LDAPMessage with messageID 1: ExtendedRequest with StartTLS's name (RFC 4511, section 4.12).
_REQUEST = bytes.fromhex("301d 020101 7718 8016") + b"1.3.6.1.4.1.1466.20037"

_SEQUENCE, _INTEGER, _ENUMERATED, _EXTENDED_RESPONSE = 0x30, 0x02, 0x0A, 0x78

# The result codes of StartTLS (RFC 4511, section 4.14.2).
_SUCCESS, _PROTOCOL_ERROR = b"\x00", b"\x02"


def ldap_client(names: Names) -> Negotiation:
    """Ask for TLS by an ExtendedRequest (RFC 4511, section 4.14).

    The greeting is empty, because the server does not speak first.
    """
    yield Send(_REQUEST)
    message = yield from _message()
    number, (tag, response) = _elements(message, 2)
    if number != (_INTEGER, b"\x01") or tag != _EXTENDED_RESPONSE:
        raise unexpected(message)  # such as a notice of disconnection, with messageID 0
    ((code_tag, code),) = _elements(response, 1)
    if code_tag != _ENUMERATED:
        raise unexpected(message)
    if code == _PROTOCOL_ERROR:  # the server does not know the operation
        raise not_offered(message)
    if code != _SUCCESS:
        raise refused(message)
    return b""


def _message() -> Part[bytes]:
    """Return the content of an LDAPMessage, in BER (RFC 4511, section 5.1)."""
    header = yield Exactly(2)
    size = header[1]
    if header[0] != _SEQUENCE or size in (0x80, 0xFF):  # an indefinite length is not allowed
        raise unexpected(header)
    if size & 0x80:
        if size > 0x84:
            raise unexpected(header)
        size = int.from_bytes((yield Exactly(size & 0x7F)), "big")
    return (yield Exactly(size))


def _elements(data: bytes, count: int) -> list[tuple[int, bytes]]:
    """Return the tag and the content of the first ``count`` elements in ``data``."""
    elements: list[tuple[int, bytes]] = []
    rest = data
    while len(elements) < count:
        size, start = (rest[1], 2) if len(rest) >= 2 else (0, 2)
        if size & 0x80:
            start += size & 0x7F
            size = int.from_bytes(rest[2:start], "big")
        if len(rest) < start + size:
            raise unexpected(data)
        elements.append((rest[0], rest[start : start + size]))
        rest = rest[start + size :]
    return elements
