"""Parse PEM (RFC 7468): chains, keys and authorities. No other module parses PEM.

OpenSSL, ``cryptography`` and ``ssl`` each parse PEM in their own way, and accept different input.
So this module parses the input once, and the three libraries get only its result: DER, or PEM that
this module has written.

- A block begins on a line of its own, or right after the end of another block. Spaces, a byte order
  mark and other bytes that are not visible ASCII may precede the block on its line. A block that is
  commented out is ignored, because the user does not want to trust it.
- Anything outside the blocks is ignored, whatever its encoding. A block whose type the caller did
  not ask for is also ignored.
- A damaged block is an error if the caller asked for its type. Such a block must not be dropped
  silently.

No error quotes the input, which may be a key.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from dataclasses import dataclass

_MARKER = re.compile(rb"-----(BEGIN|END) ([A-Z0-9][A-Z0-9 ]{0,62})-----")
_LINE_END = re.compile(rb"[\r\n]")
_HEADERS_END = re.compile(rb"\r?\n[ \t]*\r?\n")

_CERTIFICATES = {"CERTIFICATE", "X509 CERTIFICATE", "TRUSTED CERTIFICATE"}


@dataclass(frozen=True)
class Block:
    """One block: its label, and the text between its markers (``None`` if the block is damaged)."""

    label: str
    body: bytes | None


def blocks(data: bytes) -> Iterator[Block]:
    """Yield all blocks, including damaged ones, in linear time."""
    begin: re.Match[bytes] | None = None
    end = 0  # the end of the previous marker
    for marker in _MARKER.finditer(data):
        kind, label = marker.groups()
        if kind == b"END":
            if begin is not None:
                matches = label == begin[2]
                body = data[begin.end() : marker.start()] if matches else None
                yield Block(begin[2].decode(), body)
                begin = None
                end = marker.end()
        elif _at_line_start(data, end, marker.start()):
            if begin is not None:
                yield Block(begin[2].decode(), None)
            begin = marker
            end = marker.end()
    if begin is not None:
        yield Block(begin[2].decode(), None)


def _at_line_start(data: bytes, start: int, marker: int) -> bool:
    """Return False if visible ASCII precedes the marker on its line, at ``start`` or later."""
    for at in range(marker - 1, start - 1, -1):
        if data[at] in b"\r\n":
            break
        if 0x21 <= data[at] <= 0x7E:  # visible ASCII
            return False
    return True


def certificates(data: bytes) -> list[bytes]:
    """Return the distinct certificates in DER, in order. Raises ``ValueError`` if there is none."""
    found: dict[bytes, None] = {}
    for block in blocks(data):
        if block.label in _CERTIFICATES:
            der = _decode(block.body)
            if block.label == "TRUSTED CERTIFICATE":  # OpenSSL's trust settings follow it
                der = der[: _der_size(der)]
            found[der] = None
    if not found:
        raise ValueError("there is no certificate block")
    return list(found)


def private_key(data: bytes) -> bytes:
    """Return the first private key, in PEM for OpenSSL. Raises ``ValueError`` if there is none."""
    for block in blocks(data):
        if block.label.endswith("PRIVATE KEY"):
            headers, body = _split_headers(block.body)
            return _encode(block.label, headers, _decode(body))
    raise ValueError("there is no private key block")


def encode_certificates(ders: list[bytes]) -> bytes:
    """Return certificates in PEM."""
    return b"".join(_encode("CERTIFICATE", b"", der) for der in ders)


def _split_headers(body: bytes | None) -> tuple[bytes, bytes | None]:
    """Split off the headers of an encrypted key (RFC 1421, section 4.6)."""
    if body is None or b":" not in body:
        return b"", body
    body = body.lstrip(b"\r\n\t ")
    end = _HEADERS_END.search(body)
    if end is None:
        raise ValueError("a block is damaged: its headers do not end with an empty line")
    lines = [line.strip() for line in _LINE_END.split(body[: end.start()])]
    return b"".join(line + b"\n" for line in lines if line) + b"\n", body[end.end() :]


def _decode(body: bytes | None) -> bytes:
    if body is None:
        raise ValueError("a block is damaged: its BEGIN and END lines do not match")
    try:
        content = base64.b64decode(b"".join(body.split()), validate=True)
    except ValueError:
        content = b""
    if not content:
        raise ValueError("a block is damaged: it is not base64")
    return content


def _encode(label: str, headers: bytes, content: bytes) -> bytes:
    text = base64.b64encode(content)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    begin, end = (f"-----{each} {label}-----".encode() for each in ("BEGIN", "END"))
    return begin + b"\n" + headers + b"\n".join(lines) + b"\n" + end + b"\n"


def _der_size(der: bytes) -> int:
    """Return the size of the first DER value, including its header (X.690, section 8.1)."""
    if len(der) < 2 or der[1] < 0x80:
        return 2 + der[1] if len(der) > 1 else len(der)
    count = der[1] & 0x7F
    return 2 + count + int.from_bytes(der[2 : 2 + count], "big")
