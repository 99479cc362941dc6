"""ReceiveBuffer: bytes that have arrived and were not consumed. It does no I/O.

What a Socket wants of it:

- add a chunk that arrived at the end; push a chunk back to the front;
- take the oldest chunk (or the front of it), or exactly n bytes;
- find the first delimiter, without consuming;
- all of it at a cost that depends on the bytes taken, not on those kept.

The plan: a deque of chunks as they came. The front chunk may have been read in
part, so each entry carries the offset at which its unread part starts; nothing
is moved or copied until it is taken. A chunk pushed back goes in front of that
entry and leaves it alone.

The cost: adding, pushing back and taking a whole chunk is O(1), without a copy;
taking bytes is O(their number). Very small chunks are joined, many at a time and each once.
``find`` remembers how far it has looked and
goes on there when more has been added, so that a delimiter that is waited for
costs one look at each byte (and a second one at the ``len(delimiter) - 1``
bytes on each side of a seam between two chunks). Anything that changes the
front starts the search anew.
"""

from __future__ import annotations

from collections import deque

# A chunk is an object, with more than 100 bytes around those in it. So that a peer cannot make us
# hold a hundred times what it sends, by sending it byte by byte, so many chunks in a row that are
# smaller than so many bytes are joined to one.
_JOINED_CHUNKS = 256
_SMALL_CHUNK = 256


class ReceiveBuffer:
    """A queue of chunks that can be read by chunk, by count and by delimiter.

    Invariant: no entry is empty (``start < len(chunk)``), ``_size`` is the sum of their
    unread parts, and at most ``_JOINED_CHUNKS`` small ones in a row were appended last.
    """

    __slots__ = ("_chunks", "_search", "_size", "_small_in_a_row")

    def __init__(self) -> None:
        self._chunks: deque[tuple[bytes, int]] = deque()
        self._size = 0
        self._small_in_a_row = 0
        self._search: _Search | None = None

    def __len__(self) -> int:
        return self._size

    def append(self, chunk: bytes) -> None:
        """Add a chunk that has arrived. An empty one changes nothing."""
        if not chunk:
            return
        if len(chunk) >= _SMALL_CHUNK:
            self._small_in_a_row = 0
        elif self._small_in_a_row == _JOINED_CHUNKS:
            self._join_small()
            self._small_in_a_row = 1
        else:
            self._small_in_a_row += 1
        self._chunks.append((chunk, 0))
        self._size += len(chunk)

    def _join_small(self) -> None:
        """Make one of the small chunks at the end."""
        seen = self._search is not None and self._search.chunks_seen == len(self._chunks)
        small: list[bytes] = []
        while self._chunks and len(small) < _JOINED_CHUNKS:
            chunk, start = self._chunks[-1]
            if len(chunk) >= _SMALL_CHUNK:
                break
            self._chunks.pop()
            small.append(chunk[start:])
        if small:
            self._chunks.append((b"".join(reversed(small)), 0))
        if self._search is not None and self._search.chunks_seen >= len(self._chunks):
            if seen:
                self._search.chunks_seen = len(self._chunks)
            else:  # it stood in the middle of what is one chunk now
                self._search = None

    def push_front(self, chunk: bytes) -> None:
        """Put a chunk before everything else. An empty one changes nothing."""
        if chunk:
            self._chunks.appendleft((chunk, 0))
            self._size += len(chunk)
            self._search = None

    def peek_chunk(self) -> bytes:
        """Return the unread part of the oldest chunk without taking it; ``b""`` when empty."""
        if not self._chunks:
            return b""
        chunk, start = self._chunks[0]
        if start:  # cut it once, so that peeking again costs nothing
            chunk = chunk[start:]
            self._chunks[0] = (chunk, 0)
        return chunk

    def take_chunk(self, max_bytes: int | None = None) -> bytes:
        """Take the oldest chunk, at most ``max_bytes`` of it; ``b""`` when empty."""
        if not self._chunks:
            return b""
        self._search = None
        chunk, start = self._chunks[0]
        if max_bytes is not None and len(chunk) - start > max_bytes:
            self._chunks[0] = (chunk, start + max_bytes)
            self._size -= max_bytes
            return chunk[start : start + max_bytes]
        self._chunks.popleft()
        self._size -= len(chunk) - start
        return chunk[start:] if start else chunk

    def take(self, count: int) -> bytes:
        """Take exactly ``count`` bytes, which must be there."""
        assert count <= self._size, "more taken than there is"
        parts = []
        while count:
            part = self.take_chunk(count)
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peek_all(self) -> bytes:
        """Return everything without taking it."""
        return b"".join(chunk[start:] for chunk, start in self._chunks)

    def find(self, delimiter: bytes) -> int | None:
        """Return the number of bytes up to and including the first delimiter, if it is there."""
        search = self._search
        if search is None or search.delimiter != delimiter:
            search = self._search = _Search(delimiter)
        return search.resume(self._chunks)


class _Search:
    """How far the search for one delimiter has come.

    Invariant: there is no delimiter in the first ``position`` bytes, which are the
    first ``chunks_seen`` chunks; ``tail`` is the last of them, at most
    ``len(delimiter) - 1`` bytes: what may be the front of a delimiter split over a seam.
    """

    __slots__ = ("chunks_seen", "delimiter", "position", "tail")

    def __init__(self, delimiter: bytes) -> None:
        self.delimiter = delimiter
        self.chunks_seen = 0
        self.position = 0
        self.tail = b""

    def resume(self, chunks: deque[tuple[bytes, int]]) -> int | None:
        delimiter = self.delimiter
        overlap = len(delimiter) - 1
        while self.chunks_seen < len(chunks):
            chunk, start = chunks[self.chunks_seen]
            if self.tail:
                seam = self.tail + chunk[start : start + overlap]
                hit = seam.find(delimiter)
                if hit >= 0:
                    return self.position - len(self.tail) + hit + len(delimiter)
            hit = chunk.find(delimiter, start)
            if hit >= 0:
                return self.position + hit - start + len(delimiter)
            if overlap:
                self.tail = (self.tail + chunk[max(start, len(chunk) - overlap) :])[-overlap:]
            self.position += len(chunk) - start
            self.chunks_seen += 1
        return None
