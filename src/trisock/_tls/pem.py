"""The one reader of PEM (RFC 7468), for chains, keys and authorities.

OpenSSL, ``cryptography`` and ``ssl`` each read PEM in a way of their own, and differ in what they
take. So we read it once, and give them what was read: DER, or PEM that was written here.

- A block begins on a line of its own, or right behind the end of another one. Bytes that are not
  printable ASCII may come before it: a byte order mark, spaces. A block that is commented out is
  none: nobody wants to trust it.
- What lies outside the blocks does not matter, in whatever encoding it is. Nor do blocks that
  nobody asked for.
- A block of the right kind that is damaged is an error: it must not go missing silently.

No error quotes anything: it may be a key.
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
    """One block: its label, and all between its two markers, or ``None`` if it is damaged."""

    label: str
    body: bytes | None


def blocks(data: bytes) -> Iterator[Block]:
    """Give all blocks, also those that are damaged. The cost is linear."""
    begun: re.Match[bytes] | None = None
    end = 0  # of the last marker
    for marker in _MARKER.finditer(data):
        kind, label = marker.groups()
        if kind == b"END":
            if begun is not None:
                fits = label == begun[2]
                body = data[begun.end() : marker.start()] if fits else None
                yield Block(begun[2].decode(), body)
                begun = None
                end = marker.end()
        elif _begins_a_line(data, end, marker.start()):
            if begun is not None:
                yield Block(begun[2].decode(), None)
            begun = marker
            end = marker.end()
    if begun is not None:
        yield Block(begun[2].decode(), None)


def _begins_a_line(data: bytes, start: int, marker: int) -> bool:
    """Return whether nothing visible comes before a marker on its line, from ``start`` on."""
    for at in range(marker - 1, start - 1, -1):
        if data[at] in b"\r\n":
            break
        if 0x21 <= data[at] <= 0x7E:  # printable ASCII
            return False
    return True


def certificates(data: bytes) -> list[bytes]:
    """Return the certificates in DER, in order, each once. ``ValueError`` if there is none."""
    found: dict[bytes, None] = {}
    for block in blocks(data):
        if block.label in _CERTIFICATES:
            der = _decoded(block.body)
            if block.label == "TRUSTED CERTIFICATE":  # OpenSSL's own data follows
                der = der[: _der_size(der)]
            found[der] = None
    if not found:
        raise ValueError("there is no block of a certificate")
    return list(found)


def private_key(data: bytes) -> bytes:
    """Return the first private key, in PEM as OpenSSL wants it. ``ValueError`` if there is none."""
    for block in blocks(data):
        if block.label.endswith("PRIVATE KEY"):
            headers, body = _without_headers(block.body)
            return _written(block.label, headers, _decoded(body))
    raise ValueError("there is no block of a private key")


def written_certificates(ders: list[bytes]) -> bytes:
    """Return certificates in PEM."""
    return b"".join(_written("CERTIFICATE", b"", der) for der in ders)


def _without_headers(body: bytes | None) -> tuple[bytes, bytes | None]:
    """Split off the headers of an encrypted key (RFC 1421, section 4.6)."""
    if body is None or b":" not in body:
        return b"", body
    body = body.lstrip(b"\r\n\t ")
    end = _HEADERS_END.search(body)
    if end is None:
        raise ValueError("a block is damaged")
    lines = [line.strip() for line in _LINE_END.split(body[: end.start()])]
    return b"".join(line + b"\n" for line in lines if line) + b"\n", body[end.end() :]


def _decoded(body: bytes | None) -> bytes:
    if body is None:
        raise ValueError("a block is damaged: its BEGIN and END lines do not fit")
    try:
        content = base64.b64decode(b"".join(body.split()), validate=True)
    except ValueError:
        content = b""
    if not content:
        raise ValueError("a block is damaged: it is not base64")
    return content


def _written(label: str, headers: bytes, content: bytes) -> bytes:
    text = base64.b64encode(content)
    lines = [text[at : at + 64] for at in range(0, len(text), 64)]
    begin, end = (f"-----{each} {label}-----".encode() for each in ("BEGIN", "END"))
    return begin + b"\n" + headers + b"\n".join(lines) + b"\n" + end + b"\n"


def _der_size(der: bytes) -> int:
    """Return how long the first value of DER is, with its header (X.690, section 8.1)."""
    if len(der) < 2 or der[1] < 0x80:
        return 2 + der[1] if len(der) > 1 else len(der)
    count = der[1] & 0x7F
    return 2 + count + int.from_bytes(der[2 : 2 + count], "big")
