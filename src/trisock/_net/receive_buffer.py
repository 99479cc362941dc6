"""ReceiveBuffer: bytes that have arrived and are unread. It does no I/O.

What a Socket wants of it:

- add a chunk that arrived at the end; push a chunk back to the front;
- take the oldest chunk (or the front of it), exactly n bytes, or many lines at once;
- find the first delimiter, without consuming.

The plan: a queue of chunks as they came. The oldest may be read in part, so each
entry carries the offset at which its unread part starts; nothing is moved or copied until it
is taken. The queue is two lists, the older half reversed, so that both of its ends are
the ends of lists: empty, it weighs a fifth of a ``deque``, and each connection has one.

What it costs, whatever the sizes:

- ``append``, ``push_front`` and ``take_chunk`` of a whole chunk: constant, nothing copied.
- Memory: at most twice the unread bytes, and a constant. Small chunks are joined, many at a time.
  A chunk that is mostly read is cut down to what is unread. For both each byte is copied a constant
  number of times.
- ``take`` and ``take_chunk(max_bytes)``: the bytes taken are copied once.
- ``find``: it looks at ``max_bytes`` bytes at most, and at each byte once, however often it is
  called, whatever is taken in between, and whatever the limits. It looks again only at the
  ``len(delimiter) - 1`` bytes on each side of a seam: where two chunks meet, where an earlier call
  stopped at its limit, and where something was pushed back. Another delimiter starts a new search.
- ``take_lines``: one look at, and two copies of, each byte of the lines taken. The rest of the
  piece that it splits is looked at as well. That is less than what was taken since it last did so,
  plus ``_FIRST_PIECE``.
- ``entries``: constant for each chunk, nothing copied.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator

# A chunk is an object, with more than 100 bytes around those in it. A peer that sends byte by byte
# must not make us hold a hundred times what it sends. So whenever this many entries have come to
# one end of the queue, the neighbours among them that are smaller than this are joined.
_LOOSE_CHUNKS = 256
_SMALL_CHUNK = 256

# A chunk that was read in part is cut down when more bytes are read than unread, by this many.
_MOST_READ_BYTES = 16384

# How much of a chunk take_lines splits at a time: little at first, for a program that reads
# something else after each line, and four times as much after each piece that was used up.
_FIRST_PIECE = 1024
_LARGEST_PIECE = 131072

# The most lines that take_lines takes at a time: this many are read without letting other tasks
# run.
LINES_AT_A_TIME = 2048

# A chunk, and where its unread part starts.
Entry = tuple[bytes, int]


# What an iterator over lines is when there are none: exhausted, so one is enough for all.
_NO_LINES: Iterator[bytes] = iter(())


class ReceiveBuffer:
    """A queue of chunks that can be read by chunk, by count, by delimiter and by line.

    Invariant: the unread bytes are those of ``_older`` from its last entry to its first, then those
    of ``_newer`` in order. No entry is empty (``start < len(chunk)``) and ``size`` is the sum
    of their unread parts, both but for the lines that were given out by the iterator that
    ``take_lines`` has returned: ``settle`` takes those off. The last ``_loose_older`` entries of
    ``_older``, and ``_loose_newer`` of ``_newer``, have come since small ones were last joined
    there: at most ``_LOOSE_CHUNKS``.

    Places in the stream are counted from its first byte, so they do not change when bytes are
    taken: the first unread byte is at ``_end - size``. In the same way chunks are numbered, and the
    oldest has the number ``_chunks_end - _count()``. What is pushed back counts backwards.

    Attributes:
      size: how many bytes there are, more at most by the lines given out since they were split:
        zero is certain, ``len()`` is exact.
    """

    __slots__ = (
        "_chunks_end",
        "_end",
        "_line_end",
        "_lines",
        "_lines_left",
        "_lines_size",
        "_loose_newer",
        "_loose_older",
        "_newer",
        "_older",
        "_piece",
        "_search",
        "size",
    )

    def __init__(self) -> None:
        self._older: list[Entry] = []
        self._newer: list[Entry] = []
        self._loose_older = self._loose_newer = 0
        self.size = self._end = self._chunks_end = 0
        self._search: _Search | None = None
        self._lines: list[bytes] | None = None
        self._lines_left = _NO_LINES
        self._lines_size = self._line_end = 0
        self._piece = _FIRST_PIECE

    def __len__(self) -> int:
        self.settle()
        return self.size

    # ---- bytes in ----

    def append(self, chunk: bytes) -> None:
        """Add a chunk that has arrived. An empty one changes nothing."""
        size = len(chunk)
        if not size:
            return
        if self._loose_newer == _LOOSE_CHUNKS:
            self._join_newer()
        self._newer.append((chunk, 0))
        self._loose_newer += 1
        self._chunks_end += 1
        self._end += size
        self.size += size

    def push_front(self, chunk: bytes) -> None:
        """Put a chunk before everything else. An empty one changes nothing."""
        if not chunk:
            return
        self.settle()
        front = self._end - self.size
        if self._older:
            oldest, start = self._older[-1]
            if start:
                self._loose_older = max(self._loose_older, 1)
                if 2 * start > len(oldest):  # it stays long, so hold only what is unread
                    self._older[-1] = (oldest[start:], 0)
        if self._loose_older == _LOOSE_CHUNKS:
            self._join_older(front)
        if self._search is not None and not self._search.is_kept_behind(front):
            self._search = None
        self._older.append((chunk, 0))
        self._loose_older += 1
        self.size += len(chunk)

    def _join_newer(self) -> None:
        """Join small chunks among the loose ones at the end."""
        loose = self._newer[-self._loose_newer :]
        joined = _join_small(loose)
        self._newer[-len(loose) :] = joined
        first = self._chunks_end - len(loose)
        self._chunks_end += len(joined) - len(loose)
        self._loose_newer = 1  # the last one may still grow
        if self._search is not None and self._search.chunk >= first:
            self._search.move_to(joined, self._end - sum(map(_unread, joined)), first)

    def _join_older(self, front: int) -> None:
        """Join small chunks among the loose ones at the front."""
        loose = self._older[: -self._loose_older - 1 : -1]
        joined = _join_small(loose)
        first = self._chunks_end - self._count()
        self._older[-len(loose) :] = reversed(joined)
        self._loose_older = 1
        if self._search is not None and self._search.chunk < first + len(loose):
            self._search.move_to(joined, front, self._chunks_end - self._count())

    # ---- bytes out ----

    def peek_chunk(self) -> bytes:
        """Return the unread part of the oldest chunk without taking it; ``b""`` when empty."""
        if not len(self):
            return b""
        chunk, start = self._oldest()
        if start:  # cut it once, so that peeking again costs nothing
            chunk = chunk[start:]
            self._older[-1] = (chunk, 0)
            self._loose_older = max(self._loose_older, 1)
        return chunk

    def take_chunk(self, max_bytes: int | None = None) -> bytes:
        """Take the oldest chunk, at most ``max_bytes`` of it; ``b""`` when empty."""
        if not len(self):
            return b""
        chunk, start = self._oldest()
        if max_bytes is not None and len(chunk) - start > max_bytes:
            self.size -= max_bytes
            self._read_up_to(chunk, start + max_bytes)
            return chunk[start : start + max_bytes]
        self.size -= len(chunk) - start
        self._pop_oldest()
        return chunk[start:] if start else chunk

    def take(self, count: int) -> bytes:
        """Take exactly ``count`` bytes, which must be there."""
        assert count <= len(self), "more taken than there is"
        if self._older:
            chunk, start = self._older[-1]
            if count < len(chunk) - start:  # most often it is a part of the oldest chunk
                self.size -= count
                self._read_up_to(chunk, start + count)
                return chunk[start : start + count]
        parts = []
        while count:
            part = self.take_chunk(count)
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def peek_all(self) -> bytes:
        """Return everything without taking it."""
        return b"".join(chunk[start:] for chunk, start in self.entries())

    def entries(self) -> list[Entry]:
        """Return what there is without taking or copying it, the oldest first."""
        self.settle()
        return [*reversed(self._older), *self._newer]

    # ---- delimiters ----

    def find(self, delimiter: bytes, max_bytes: int = sys.maxsize) -> int | None:
        """Return the number of bytes up to and including the first delimiter.

        ``None`` if it is not within the first ``max_bytes`` bytes.
        """
        if self._lines is not None:
            self.settle()
        front = self._end - self.size
        stop = front + max_bytes
        if stop > self._end:
            stop = self._end
        search = self._search
        oldest = self._chunks_end - len(self._older) - len(self._newer)
        if search is None or search.delimiter != delimiter:
            search = self._search = _Search(delimiter, front, oldest)
        elif search.start > front and not self._look_before(search, front, stop):
            search.restart(front, oldest)
        elif search.hit is not None and search.hit - len(delimiter) >= front:
            return search.hit - front if search.hit <= stop else None
        elif search.end <= front:
            search.restart(front, oldest)
        else:
            search.hit = None  # a part of it was taken
            search.start = front
        index = search.chunk - oldest
        while search.end < stop:
            if index:
                chunk, start = self._chunk(index)
            else:
                chunk, start = self._older[-1] if self._older else self._newer[0]
                search.chunk_at = front
            hit = search.look_at(chunk, start, stop)
            if hit is not None:
                return hit - front
            index += 1
        return None

    def _look_before(self, search: _Search, front: int, stop: int) -> bool:
        """Look at what was pushed back before what the search has seen.

        False if a delimiter is there, or if ``stop`` is: then a new search starts.
        """
        end = search.start + len(search.delimiter) - 1
        if end > stop:
            return False
        parts: list[bytes] = []
        left = end - front
        index = 0
        while left:
            chunk, start = self._chunk(index)
            parts.append(chunk[start : start + left])
            left -= len(parts[-1])
            index += 1
        if search.delimiter in b"".join(parts):
            return False
        search.start = front
        return True

    def take_lines(self, delimiter: bytes, keep_ends: bool, max_bytes: int) -> Iterator[bytes]:
        """Take lines off the front, where ``find`` has just found one, as the iterator goes.

        It gives as many lines as are whole in a piece of the oldest chunk, which may be none; each
        has at most ``max_bytes``, delimiter included. The lines that it has not given stay
        where they are: it is empty as soon as anything but ``append`` is asked of the buffer.
        """
        search = self._search
        assert search is not None, "find comes first"
        # How many chunks end before the delimiter does.
        index = search.chunk - (self._chunks_end - self._count())
        if index and not self._join_two(index):
            return iter(())
        chunk, start = self._oldest()
        # No line in a piece of that size, delimiter included, is longer than max_bytes.
        size = min(self._piece, max_bytes)
        piece = chunk[start : start + size] if start or len(chunk) > size else chunk
        lines = piece.split(delimiter, LINES_AT_A_TIME)
        rest = lines.pop()  # what comes after the last delimiter
        if keep_ends:
            lines = [line + delimiter for line in lines]
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
                self._read_up_to(chunk, start + taken)
            else:
                self._pop_oldest()
        lines.clear()  # this ends the iterator, whoever has it

    # ---- the queue ----

    def _oldest(self) -> Entry:
        """Return the oldest entry, which is the last of ``_older``; there must be one."""
        if not self._older:
            self._newer.reverse()
            self._older, self._newer = self._newer, self._older
            # The loose ones lie at the far end now. There is at most one group of these: the next
            # one comes when all of it is taken.
            self._loose_older = self._loose_newer = 0
        return self._older[-1]

    def _pop_oldest(self) -> None:
        self._older.pop()
        if self._loose_older:
            self._loose_older -= 1

    def _read_up_to(self, chunk: bytes, start: int) -> None:
        """Let the oldest chunk be unread from ``start`` on; do not hold much more than that."""
        if 2 * start > len(chunk) + _MOST_READ_BYTES:
            chunk, start = chunk[start:], 0
            self._loose_older = max(self._loose_older, 1)
        self._older[-1] = (chunk, start)

    def _join_two(self, index: int) -> bool:
        """Make one chunk of the two oldest, if a line of ``find``'s ends in the second.

        False if it ends later, or the second is large: that line is better taken alone.
        """
        second, second_start = self._chunk(1)
        if index > 1 or len(second) > _LARGEST_PIECE:
            return False
        first, start = self._oldest()
        self._pop_oldest()
        self._oldest()  # the second
        self._older[-1] = (first[start:] + second[second_start:], 0)
        return True

    def _count(self) -> int:
        return len(self._older) + len(self._newer)

    def _chunk(self, index: int) -> Entry:
        """Return an entry by its place in the queue, the oldest being 0."""
        older = len(self._older)
        return self._older[older - 1 - index] if index < older else self._newer[index - older]


class _Search:
    """How far the search for one delimiter has come. All places are counted as the buffer does.

    Invariant: no delimiter begins at ``start`` or later and ends at ``end`` or earlier. The byte at
    ``end`` is the next to look at. It is in the chunk with the number ``chunk``, the unread
    part of which began at ``chunk_at`` when it was first looked at. ``tail`` is the last of
    the bytes before ``end``, at most ``len(delimiter) - 1``: what may be the front of a
    delimiter that goes on there; only those from ``start`` on count.

    Attributes:
      hit: where the first delimiter at ``start`` or later ends, if that is known. It ends in the
        chunk with the number ``chunk``.
    """

    __slots__ = ("chunk", "chunk_at", "delimiter", "end", "hit", "start", "tail")

    def __init__(self, delimiter: bytes, front: int, chunk: int) -> None:
        self.delimiter = delimiter
        self.restart(front, chunk)

    def restart(self, front: int, chunk: int) -> None:
        """Begin at the first unread byte, in the oldest chunk."""
        self.start = self.end = self.chunk_at = front
        self.chunk = chunk
        self.tail = b""
        self.hit: int | None = None

    def look_at(self, chunk: bytes, start: int, stop: int) -> int | None:
        """Look at the chunk, up to ``stop``; return ``hit`` if the delimiter ends in there."""
        delimiter = self.delimiter
        end = self.end
        start -= self.chunk_at  # from places in the stream to places in the chunk
        offset = start + end
        limit = start + stop
        if limit > len(chunk):
            limit = len(chunk)
        overlap = len(delimiter) - 1
        tail = self.tail
        if tail:
            if len(tail) > end - self.start:  # some of it was taken since
                tail = tail[len(tail) - (end - self.start) :]
            seam = tail + chunk[offset : min(offset + overlap, limit)]
            at = seam.find(delimiter)
            if at >= 0:
                self.hit = end - len(tail) + at + len(delimiter)
                return self.hit
        at = chunk.find(delimiter, offset, limit)
        if at >= 0:
            self.hit = at - start + len(delimiter)
            return self.hit
        if overlap:
            self.tail = (tail + chunk[max(offset, limit - overlap) : limit])[-overlap:]
        self.end = limit - start
        if limit == len(chunk):
            self.chunk += 1
            self.chunk_at = self.end
        return None

    def is_kept_behind(self, front: int) -> bool:
        """Keep what is known although bytes are put before ``front``; False if it is nothing."""
        if self.hit is not None and self.hit - len(self.delimiter) < front:
            self.hit = None  # a part of it was taken
        if self.hit is None and self.end <= front:
            return False
        self.start = max(self.start, front)
        self.end = max(self.end, front)
        self.chunk_at = max(self.chunk_at, front)
        return True

    def move_to(self, chunks: list[Entry], at: int, number: int) -> None:
        """Find the chunk to look at among those that others were joined to."""
        for entry in chunks:
            if self.end < at + _unread(entry):
                break
            at += _unread(entry)
            number += 1
        self.chunk, self.chunk_at = number, at


def _unread(entry: Entry) -> int:
    chunk, start = entry
    return len(chunk) - start


def _join_small(entries: list[Entry]) -> list[Entry]:
    """Return the same bytes with small neighbours joined."""
    joined: list[Entry] = []
    small: list[bytes] = []
    for entry in entries:
        if _unread(entry) < _SMALL_CHUNK:
            small.append(entry[0][entry[1] :])
            continue
        if small:
            joined.append((b"".join(small), 0))
            small = []
        joined.append(entry)
    if small:
        joined.append((b"".join(small), 0))
    return joined
