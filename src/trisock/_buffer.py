"""ReceiveBuffer: bytes that have arrived and were not consumed. It does no I/O.

What a Socket wants of it:

- add a chunk that arrived at the end; push a chunk back to the front;
- take the oldest chunk (or the front of it), exactly n bytes, or many lines at once;
- find the first delimiter, without consuming.

The plan: a queue of chunks as they came, of which the oldest may have been read in part, so each
entry carries the offset at which its unread part starts; nothing is moved or copied until it
is taken. The queue is two lists, the older half turned round, so that both of its ends are
the ends of lists: empty, it weighs a fifth of a ``deque``, and each connection has one.

What it costs, whatever the sizes:

- ``append``, ``push_front`` and ``take_chunk`` of a whole chunk: constant, nothing copied.
  Very small chunks are joined, many at a time and each once.
- ``take`` and ``take_chunk(max_bytes)``: the bytes taken are copied once.
- ``find``: it remembers how far it has looked and goes on there when more has been added, so a
  delimiter that is waited for costs one look at each byte, and a second one at the
  ``len(delimiter) - 1`` bytes on each side of a seam between two chunks. Taking from the
  front, or putting something there, starts the search anew.
- ``take_lines``: one look at, and two copies of, each byte of the lines taken; and of what it
  has looked at in vain, which is less than what was taken since it last did, plus ``_FIRST_PIECE``.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

# A chunk is an object, with more than 100 bytes around those in it. So that a peer cannot make us
# hold a hundred times what it sends, by sending it byte by byte, so many chunks in a row that are
# smaller than so many bytes are joined to one.
_JOINED_CHUNKS = 256
_SMALL_CHUNK = 256

# How much of a chunk take_lines splits at a time: little at first, for a program that reads
# something else after each line, and four times as much after each piece that was used up.
_FIRST_PIECE = 1024
_LARGEST_PIECE = 131072

# The most lines that take_lines takes at a time: so many are read without letting other tasks run.
LINES_AT_A_TIME = 2048


class ReceiveBuffer:
    """A queue of chunks that can be read by chunk, by count, by delimiter and by line.

    Invariant: the unread bytes are those of ``_older`` from its last entry to its first, then those
    of ``_newer`` in order. No entry is empty (``start < len(chunk)``) and ``size`` is the sum
    of their unread parts, both but for the lines that were given out by the iterator that
    ``take_lines`` has returned: ``settle`` takes those off. At most ``_JOINED_CHUNKS``
    small ones in a row were appended last.

    Attributes:
      size: how many bytes there are, more at most by the lines given out since they were split:
        zero is certain, ``len()`` is exact.
    """

    __slots__ = (
        "_line_end",
        "_lines",
        "_lines_left",
        "_lines_size",
        "_newer",
        "_older",
        "_piece",
        "_search",
        "_small_in_a_row",
        "size",
    )

    def __init__(self) -> None:
        self._older: list[tuple[bytes, int]] = []
        self._newer: list[tuple[bytes, int]] = []
        self.size = 0
        self._small_in_a_row = 0
        self._search: _Search | None = None
        self._lines: list[bytes] | None = None
        self._lines_left: Iterator[bytes] = iter(())
        self._lines_size = self._line_end = 0
        self._piece = _FIRST_PIECE

    def __len__(self) -> int:
        self.settle()
        return self.size

    # ---- bytes in ----

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
        self._newer.append((chunk, 0))
        self.size += len(chunk)

    def _join_small(self) -> None:
        """Make one of the small chunks at the end."""
        self.settle()
        before = self._count()
        small: list[bytes] = []
        while self._newer and len(small) < _JOINED_CHUNKS:
            chunk, start = self._newer.pop()
            small.append(chunk[start:])
        if small:
            self._newer.append((b"".join(reversed(small)), 0))
        search = self._search
        if search is not None and search.chunks_seen >= self._count():
            if search.chunks_seen == before:
                search.chunks_seen = self._count()
            else:  # it stood in the middle of what is one chunk now
                self._search = None

    def push_front(self, chunk: bytes) -> None:
        """Put a chunk before everything else. An empty one changes nothing."""
        if chunk:
            self.settle()
            self._older.append((chunk, 0))
            self.size += len(chunk)
            self._search = None

    # ---- bytes out ----

    def peek_chunk(self) -> bytes:
        """Return the unread part of the oldest chunk without taking it; ``b""`` when empty."""
        if not len(self):
            return b""
        chunk, start = self._oldest()
        if start:  # cut it once, so that peeking again costs nothing
            chunk = chunk[start:]
            self._older[-1] = (chunk, 0)
        return chunk

    def take_chunk(self, max_bytes: int | None = None) -> bytes:
        """Take the oldest chunk, at most ``max_bytes`` of it; ``b""`` when empty."""
        if not len(self):
            return b""
        self._search = None
        chunk, start = self._oldest()
        if max_bytes is not None and len(chunk) - start > max_bytes:
            self._older[-1] = (chunk, start + max_bytes)
            self.size -= max_bytes
            return chunk[start : start + max_bytes]
        self._older.pop()
        self.size -= len(chunk) - start
        return chunk[start:] if start else chunk

    def take(self, count: int) -> bytes:
        """Take exactly ``count`` bytes, which must be there."""
        assert count <= len(self), "more taken than there is"
        parts = []
        while count:
            part = self.take_chunk(count)
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peek_all(self) -> bytes:
        """Return everything without taking it."""
        self.settle()
        return b"".join(chunk[start:] for chunk, start in [*reversed(self._older), *self._newer])

    # ---- delimiters ----

    def find(self, delimiter: bytes) -> int | None:
        """Return the number of bytes up to and including the first delimiter, if it is there."""
        self.settle()
        search = self._search
        if search is None or search.delimiter != delimiter:
            search = self._search = _Search(delimiter)
        while search.chunks_seen < self._count():
            end = search.look_at(*self._chunk(search.chunks_seen))
            if end is not None:
                return end
        return None

    def take_lines(self, delimiter: bytes, keep_ends: bool, max_bytes: int) -> Iterator[bytes]:
        """Take lines off the front, where ``find`` has just found one, as the iterator goes.

        It gives as many lines as are whole in a piece of the oldest chunk, which may be none; each
        has at most ``max_bytes``, delimiter included. The lines that it has not given stay
        where they are: it is empty as soon as anything but ``append`` is asked of the buffer.
        """
        search = self._search
        assert search is not None, "find comes first"
        if search.chunks_seen and not self._join_two():
            return iter(())
        chunk, start = self._oldest()
        # No line in a piece of that size, delimiter included, is longer than max_bytes.
        size = min(self._piece, max_bytes)
        piece = chunk[start : start + size] if start or len(chunk) > size else chunk
        lines = piece.split(delimiter, LINES_AT_A_TIME)
        rest = lines.pop()  # what comes after the last delimiter
        if keep_ends:
            lines = [line + delimiter for line in lines]
        self._search = None
        self._lines = lines
        self._lines_left = iter(lines)
        self._lines_size = len(piece) - len(rest)
        self._line_end = 0 if keep_ends else len(delimiter)
        return self._lines_left

    def settle(self) -> None:
        """Take off the lines that were given out, and give out no more of those split."""
        lines = self._lines
        if lines is None:
            return
        left = operator.length_hint(self._lines_left)
        self._piece = _FIRST_PIECE if left else min(self._piece * 4, _LARGEST_PIECE)
        self._lines = None
        if left < len(lines):
            taken = self._lines_size
            if left:
                taken -= sum(map(len, lines[-left:])) + left * self._line_end
            chunk, start = self._oldest()
            self.size -= taken
            if start + taken < len(chunk):
                self._older[-1] = (chunk, start + taken)
            else:
                self._older.pop()
        lines.clear()  # this ends the iterator, whoever has it

    # ---- the queue ----

    def _oldest(self) -> tuple[bytes, int]:
        """Return the oldest entry, which is the last of ``_older``; there must be one."""
        if not self._older:
            self._newer.reverse()
            self._older, self._newer = self._newer, self._older
        return self._older[-1]

    def _join_two(self) -> bool:
        """Make one chunk of the two oldest, if a line of ``find``'s goes from one to the other.

        False if it goes further, or the second is large: that line is better taken alone.
        """
        assert self._search is not None
        second, second_start = self._chunk(1)
        if self._search.chunks_seen > 1 or len(second) > _LARGEST_PIECE:
            return False
        first, start = self._oldest()
        self._older.pop()
        self._oldest()  # the second
        self._older[-1] = (first[start:] + second[second_start:], 0)
        return True

    def _count(self) -> int:
        return len(self._older) + len(self._newer)

    def _chunk(self, index: int) -> tuple[bytes, int]:
        """Return an entry by its place in the queue, the oldest being 0."""
        older = len(self._older)
        return self._older[older - 1 - index] if index < older else self._newer[index - older]


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

    def look_at(self, chunk: bytes, start: int) -> int | None:
        """Look at the next chunk; return where the delimiter ends, if it does in there."""
        delimiter = self.delimiter
        overlap = len(delimiter) - 1
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
