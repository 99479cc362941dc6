"""TLS records, without I/O: split ciphertext for OpenSSL, and split or coalesce data to send."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

# The size of a record's header, and of the largest record on the wire (RFC 5246, section 6.2.3).
_HEADER_SIZE = 5
_MAX_CIPHERTEXT = _HEADER_SIZE + 16384 + 2048

# The start of an application data record's header.
_DATA_HEADER = b"\x17\x03\x03"

# At most this many empty records are decrypted before other tasks run. A key update also counts as
# empty. An empty record has 22 bytes on the wire, and decrypting it takes a few microseconds. An
# honest peer sends one at a time. (Go closes the connection after 16 such records in a row.)
MAX_EMPTY_RECORDS = 16

# The maximum number of bytes that are encrypted for one system call. This bounds the ciphertext in
# memory, however large the send is.
SEND_SIZE = 65536


class IncomingCiphertext:
    """Ciphertext that was read from the kernel but not passed to OpenSSL yet.

    OpenSSL gets only one or a few records at a time, for two reasons. A ``MemoryBIO`` never frees
    the memory that its largest write needed. And OpenSSL's read function decrypts any number of
    empty records in one call, until it finds data.

    Invariant: if ``_record_left`` is 0 and ``_header`` is empty, the next byte starts a record.
    Otherwise ``_header`` is the part of a split header that OpenSSL already has, or
    ``_record_left`` is the number of bytes that the current record still needs. If the peer does
    not speak TLS, the sizes are meaningless but harmless: OpenSSL still gets all bytes in order.

    Attributes:
      pending: the number of these bytes.
    """

    __slots__ = ("_data", "_header", "_record_left", "_start", "pending")

    def __init__(self) -> None:
        self._data = b""
        self._start = 0
        self._header = b""
        self._record_left = 0
        self.pending = 0

    def write(self, data: bytes) -> None:
        """Add ciphertext from the kernel."""
        if self.pending:
            data = self._data[self._start :] + data
            self._start = 0
        self._data = data
        self.pending = len(data)

    def take(self) -> bytes | memoryview:
        """Remove and return the oldest record, or the part of it that has arrived, if any."""
        data, start, size = self._data, self._start, self._record_left
        if not size:
            if self.pending < _HEADER_SIZE or self._header:
                size = self._take_header()
            else:
                size = _HEADER_SIZE + (data[start + 3] << 8) + data[start + 4]
        if size == self.pending:  # the hot path: exactly one record (row tls-echo1)
            self._record_left = self._start = self.pending = 0
            self._data = b""
            return memoryview(data)[start:] if start else data
        end = min(start + size, start + _MAX_CIPHERTEXT, len(data))
        self._record_left = size - (end - start)
        return self._take_to(end)

    def _take_header(self) -> int:
        """Complete a split header, if possible. Return how many bytes ``take`` should return."""
        part = self._data[self._start : self._start + _HEADER_SIZE - len(self._header)]
        header = self._header + part
        if len(header) < _HEADER_SIZE:
            self._header = header
            return len(part)
        self._header = b""
        return len(part) + int.from_bytes(header[3:], "big")

    def take_many(self) -> tuple[bytes | memoryview, int]:
        """Remove and return a few whole records, or part of one, and the number of reads they need.

        Each whole record needs one read. A partial record also needs one read, unless it looks like
        application data: then it needs none.
        """
        data, start = self._data, self._start
        end, count = start, 0
        if not self._record_left and not self._header:
            size = len(data)
            while count < MAX_EMPTY_RECORDS and end + _HEADER_SIZE <= size:
                record_end = end + _HEADER_SIZE + (data[end + 3] << 8) + data[end + 4]
                if record_end - start > _MAX_CIPHERTEXT:
                    break
                if record_end > size:
                    if not count and data.startswith(_DATA_HEADER, start):
                        return self.take(), 0
                    break
                end = record_end
                count += 1
        if not count:
            return self.take(), 1
        return self._take_to(end), count

    def _take_to(self, end: int) -> bytes | memoryview:
        data, start = self._data, self._start
        if end == len(data):
            self._data = b""  # releases the memory
            self._start = self.pending = 0
            return memoryview(data)[start:] if start else data
        self._start = end
        self.pending = len(data) - end
        return memoryview(data)[start:end]

    def take_all(self) -> bytes:
        """Remove and return all bytes."""
        data = self._data[self._start :]
        self._data = b""
        self._start = self.pending = 0
        return data

    def restart(self, data: bytes) -> None:
        """Put ``data`` before the pending bytes. The first byte of ``data`` starts a record."""
        data += self.take_all()
        self._header, self._record_left = b"", 0
        self.write(data)


def pieces(buffers: Sequence[bytes | memoryview]) -> Iterable[bytes | memoryview]:
    """Return the bytes of ``buffers``: small ones coalesced, large ones split at ``SEND_SIZE``."""
    if len(buffers) == 1 and 0 < len(buffers[0]) <= SEND_SIZE:
        return buffers
    return _split(buffers)


def _split(buffers: Sequence[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    parts: list[memoryview] = []
    size = 0
    for each in buffers:
        view = memoryview(each)
        for start in range(0, len(view), SEND_SIZE):
            part = view[start : start + SEND_SIZE]
            if size + len(part) > SEND_SIZE:
                yield _join(parts)
                parts, size = [], 0
            parts.append(part)
            size += len(part)
    if parts:
        yield _join(parts)


def _join(parts: list[memoryview]) -> bytes | memoryview:
    return parts[0] if len(parts) == 1 else b"".join(parts)
