"""DelimiterSearch: searches a queue of chunks, and remembers its progress. It does no I/O."""

from __future__ import annotations

import functools

# A chunk, and the offset of its first unread byte.
Entry = tuple[bytes, int]


def unread(entry: Entry) -> int:
    """Return the number of unread bytes."""
    chunk, start = entry
    return len(chunk) - start


def end_of_lines(
    chunk: bytes, start: int, stop: int, delimiter: bytes, max_bytes: int, max_lines: int
) -> int:
    """Return an offset, at most ``stop``, such that no line before it is longer than ``max_bytes``.

    The first line begins at ``start``. The length of a line includes its delimiter. The offset is
    ``stop`` if possible. It is smaller if a line is too long, or if there are at least
    ``max_lines`` lines before the offset.

    We search for the last delimiter in a window of ``max_bytes`` bytes, and then continue after
    this delimiter. So there are few searches if lines are much shorter than ``max_bytes``.
    """
    end = start
    # A delimiter may overlap itself, such as b"\n\n" in b"\n\n\n". The last match may then overlap
    # the delimiter that ends the line.
    window = max_bytes - (len(delimiter) - 1 if _overlaps_itself(delimiter) else 0)
    for _ in range(max_lines):
        if stop - end <= window:
            return stop
        last = chunk.rfind(delimiter, end, end + window)
        if last < 0:
            break
        end = last + len(delimiter)
    return end


@functools.lru_cache
def _overlaps_itself(delimiter: bytes) -> bool:
    """Return whether the delimiter begins and ends with the same bytes."""
    return any(delimiter.endswith(delimiter[:size]) for size in range(1, len(delimiter)))


class DelimiterSearch:
    """The progress of the search for one delimiter. ``ReceiveBuffer`` defines "position".

    Invariant: there is no delimiter between ``start`` and ``end``. The next byte to scan is at
    ``end``, in chunk ``chunk_number``. ``chunk_position`` is the position of that chunk's first
    unread byte. (If bytes of the chunk were consumed, ``ReceiveBuffer.find`` updates
    ``chunk_position``.) A delimiter may span ``end``, so ``tail`` holds the last bytes before
    ``end``, at most ``len(delimiter) - 1`` of them. Bytes of ``tail`` before ``start`` are ignored.

    Attributes:
      match_end: the end position of the first delimiter at or after ``start``. The delimiter
        ends in chunk ``chunk_number``. ``None`` if the delimiter has not been found.
    """

    __slots__ = (
        "chunk_number",
        "chunk_position",
        "delimiter",
        "end",
        "match_end",
        "start",
        "tail",
    )

    def __init__(self, delimiter: bytes, head: int, chunk_number: int) -> None:
        self.delimiter = delimiter
        self.restart(head, chunk_number)

    def restart(self, head: int, chunk_number: int) -> None:
        """Start over at the first unread byte, in the oldest chunk."""
        self.start = self.end = self.chunk_position = head
        self.chunk_number = chunk_number
        self.tail = b""
        self.match_end: int | None = None

    def scan(self, chunk: bytes, start: int, stop: int) -> int | None:
        """Scan the chunk up to ``stop``. Returns ``match_end`` if it finds a delimiter."""
        delimiter = self.delimiter
        end = self.end
        start -= self.chunk_position  # from here on, position + start = offset in the chunk
        offset = start + end
        limit = start + stop
        if limit > len(chunk):
            limit = len(chunk)
        overlap = len(delimiter) - 1
        tail = self.tail
        if tail:
            if len(tail) > end - self.start:  # part of the tail was consumed
                tail = tail[len(tail) - (end - self.start) :]
            seam = tail + chunk[offset : min(offset + overlap, limit)]
            index = seam.find(delimiter)
            if index >= 0:
                self.match_end = end - len(tail) + index + len(delimiter)
                return self.match_end
        index = chunk.find(delimiter, offset, limit)
        if index >= 0:
            self.match_end = index - start + len(delimiter)
            return self.match_end
        if overlap:
            self.tail = (tail + chunk[max(offset, limit - overlap) : limit])[-overlap:]
        self.end = limit - start
        if limit == len(chunk):
            self.chunk_number += 1
            self.chunk_position = self.end
        return None

    def keep_from(self, head: int) -> bool:
        """Forget the progress before ``head``, because bytes are being pushed back there.

        Returns False if no progress is left.
        """
        if self.match_end is not None and self.match_end - len(self.delimiter) < head:
            self.match_end = None  # part of the match was consumed
        if self.match_end is None and self.end <= head:
            return False
        self.start = max(self.start, head)
        self.end = max(self.end, head)
        self.chunk_position = max(self.chunk_position, head)
        return True

    def relocate(self, chunks: list[Entry], position: int, number: int) -> None:
        """Update ``chunk_number`` and ``chunk_position``, after coalescing has produced ``chunks``.

        ``position`` and ``number`` are those of the first chunk in ``chunks``.
        """
        for entry in chunks:
            if self.end < position + unread(entry):
                break
            position += unread(entry)
            number += 1
        self.chunk_number, self.chunk_position = number, position
