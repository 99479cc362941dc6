"""Records of TLS: what OpenSSL gets at a time, and how what is sent is cut and joined. No I/O."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

# The most that one record takes on the wire (RFC 5246, section 6.2.3), and its header.
_HEADER_SIZE = 5
_MAX_CIPHERTEXT = _HEADER_SIZE + 16384 + 2048

# How the header of a record with data begins.
_DATA_HEADER = b"\x17\x03\x03"

# How many records without data are decrypted before other tasks run. A key update costs some
# microseconds and 22 bytes, and an honest peer sends one at a time. (Go ends the connection after
# 16 in a row.)
MAX_EMPTY_RECORDS = 16

# How much goes into one system call: the ciphertext of a send does not exist all at once, however
# much is sent.
_SEND_SIZE = 65536


class IncomingCiphertext:
    """Ciphertext that was read from the kernel and that OpenSSL does not have yet.

    OpenSSL gets it by the record: what is written into a ``MemoryBIO`` at once sets the size that
    this keeps, and a read decrypts all records in there until one has data.

    Invariant: the next byte is the first of a record's header if ``_missing`` is 0 and ``_header``
    is empty. Else ``_header`` is the part of the header that was taken, or ``_missing`` the number
    of bytes that the record still has. A peer that does not speak TLS does no harm: OpenSSL gets
    the same bytes in the same order, only in other pieces.

    Attributes:
      pending: how many bytes there are.
    """

    __slots__ = ("_data", "_header", "_missing", "_start", "pending")

    def __init__(self) -> None:
        self._data = b""
        self._start = 0
        self._header = b""
        self._missing = 0
        self.pending = 0

    def write(self, data: bytes) -> None:
        """Add what was read from the kernel."""
        if self.pending:
            data = self._data[self._start :] + data
            self._start = 0
        self._data = data
        self.pending = len(data)

    def take(self) -> bytes | memoryview:
        """Take the oldest record, or the part of it that is here; ``b""`` if nothing is."""
        data, start, size = self._data, self._start, self._missing
        if not size:
            if self.pending < _HEADER_SIZE or self._header:
                size = self._take_header()
            else:
                size = _HEADER_SIZE + (data[start + 3] << 8) + data[start + 4]
        if size == self.pending:  # the hot path: one record has come (row tls-echo1)
            self._missing = self._start = self.pending = 0
            self._data = b""
            return memoryview(data)[start:] if start else data
        end = min(start + size, start + _MAX_CIPHERTEXT, len(data))
        self._missing = size - (end - start)
        return self._take_to(end)

    def _take_header(self) -> int:
        """Return how much to take where a header is split."""
        part = self._data[self._start : self._start + _HEADER_SIZE - len(self._header)]
        header = self._header + part
        if len(header) < _HEADER_SIZE:
            self._header = header
            return len(part)
        self._header = b""
        return len(part) + int.from_bytes(header[3:], "big")

    def take_many(self) -> tuple[bytes | memoryview, int]:
        """Take a few whole records, or a part of one, and return it and how many reads it is for.

        That is the number of records, 0 for a part of one that looks as data does, and else 1.
        """
        data, start = self._data, self._start
        end, count = start, 0
        if not self._missing and not self._header:
            size = len(data)
            while count < MAX_EMPTY_RECORDS and end + _HEADER_SIZE <= size:
                following = end + _HEADER_SIZE + (data[end + 3] << 8) + data[end + 4]
                if following - start > _MAX_CIPHERTEXT:
                    break
                if following > size:
                    if not count and data.startswith(_DATA_HEADER, start):
                        return self.take(), 0
                    break
                end = following
                count += 1
        if not count:
            return self.take(), 1
        return self._take_to(end), count

    def _take_to(self, end: int) -> bytes | memoryview:
        data, start = self._data, self._start
        if end == len(data):
            self._data = b""  # gives the memory back
            self._start = self.pending = 0
            return memoryview(data)[start:] if start else data
        self._start = end
        self.pending = len(data) - end
        return memoryview(data)[start:end]

    def take_all(self) -> bytes:
        """Take everything."""
        data = self._data[self._start :]
        self._data = b""
        self._start = self.pending = 0
        return data

    def restart(self, data: bytes) -> None:
        """Put ``data`` before everything else. A record starts there."""
        data += self.take_all()
        self._header, self._missing = b"", 0
        self.write(data)


def pieces(buffers: Sequence[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    """Give the same bytes with small buffers joined and large ones cut to ``_SEND_SIZE``."""
    if len(buffers) == 1 and 0 < len(buffers[0]) <= _SEND_SIZE:
        return buffers
    return _cut(buffers)


def _cut(buffers: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    parts: list[memoryview] = []
    size = 0
    for each in buffers:
        view = memoryview(each)
        for start in range(0, len(view), _SEND_SIZE):
            part = view[start : start + _SEND_SIZE]
            if size + len(part) > _SEND_SIZE:
                yield _joined(parts)
                parts, size = [], 0
            parts.append(part)
            size += len(part)
    if parts:
        yield _joined(parts)


def _joined(parts: list[memoryview]) -> bytes | memoryview:
    return parts[0] if len(parts) == 1 else b"".join(parts)
