"""ReceiveBuffer: bytes that have arrived and are unread. It does no I/O.

Its operations:

- append a chunk that has arrived; push a chunk back to the front;
- take the oldest chunk (or its first bytes), exactly n bytes, or many lines or frames at once;
- drop n bytes;
- find the first delimiter, without consuming anything.

The buffer is a queue of chunks, as they arrived. An entry of the queue is a chunk and the offset of
its first unread byte, because the oldest chunk may be partly read. Most bytes are not copied until
they are taken. The queue consists of two lists, ``_front`` in reverse order and ``_back``. So each
end of the queue is the end of a list, where it is cheap to add and remove entries. An empty
``deque`` would need five times the memory of two empty lists, and every connection has a buffer.

The cost of the operations, for any sizes:

- ``append`` and ``push_front`` run in constant time and copy nothing, apart from coalescing and
  trimming (see below). ``take_chunk`` has the same cost if it returns a whole chunk.
- The memory is at most twice the unread bytes, plus a constant. To keep this bound, runs of small
  chunks are coalesced, many at a time, and a chunk that is mostly read is trimmed. Coalescing and
  trimming copy each byte a constant number of times.
- ``take`` and ``take_chunk(max_bytes)`` copy only the bytes that they return, at most twice.
- ``find`` scans at most ``max_bytes`` bytes. Repeated calls scan each byte once, whatever their
  limits, and even if bytes are taken between the calls. Only the ``len(delimiter) - 1`` bytes on
  each side of a seam are scanned again. A seam is a position where two chunks meet, where an
  earlier call stopped at its limit, or where bytes were pushed back. A call with another delimiter
  starts a new search.
- ``take_lines`` scans each byte of a taken line at most twice, and copies it twice.
  ``take_frames`` copies each byte of a taken frame once. Both split one piece of a chunk at a time,
  so they may also scan and copy bytes that are not taken. The next piece then has at most
  ``_FIRST_SPLIT_SIZE`` bytes. ``take_line_list`` costs the same, but takes all lines of its piece.
- ``drop`` takes constant time per chunk. It copies only the rest of a chunk that is mostly read.
  ``peek_bytes`` copies only the bytes that it returns, at most twice.
- ``entries`` takes constant time per chunk and copies nothing.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterator

from .delimiter_search import DelimiterSearch, Entry, end_of_lines, unread
from .frame_header import FrameHeader

# Runs of small chunks are coalesced, to bound the overhead: an entry takes more than 100 bytes in
# addition to its content, and a peer may send byte by byte. When ``_MAX_UNCOALESCED`` entries have
# been added to one end of the queue, adjacent chunks of less than ``_SMALL_CHUNK`` unread bytes are
# joined.
_MAX_UNCOALESCED = 256
_SMALL_CHUNK = 256

# A chunk is trimmed when its read bytes outnumber its unread bytes by more than this number.
_MAX_CONSUMED_BYTES = 16384

# take_lines and take_frames split a piece of a chunk at a time. The size of a piece, in bytes, is
# small at first, because a program may switch to another kind of read after each item (a line or a
# frame). The size is multiplied by 4 whenever all items of a piece were taken.
_FIRST_SPLIT_SIZE = 1024
_MAX_SPLIT_SIZE = 131072

# An item counts as at least this many bytes of a piece. Otherwise the first piece could have 1024
# empty frames, which take 100 µs to split, and the program may take only one of them.
_MIN_ITEM_SIZE = 64

# Maximum number of items in a batch. Other tasks do not run while the program iterates over them.
ITEMS_AT_A_TIME = _MAX_SPLIT_SIZE // _MIN_ITEM_SIZE

# An exhausted iterator, shared by all buffers without a batch.
_NO_ITEMS: Iterator[bytes] = iter(())


class ReceiveBuffer:
    """A queue of chunks that can be read by chunk, count, delimiter, line and frame.

    Invariant: the unread bytes are those of ``_front``, from its last entry to its first, and then
    those of ``_back``, in order. No entry is empty (``start < len(chunk)``), and ``size`` is the
    sum of the entries' unread bytes. A batch consists of the items (lines or frames) for which
    ``take_lines`` or ``take_frames`` has returned an iterator. Items that the iterator has yielded
    count as unread until ``commit_batch`` consumes them. The last ``_uncoalesced_front`` entries of
    ``_front`` and the last ``_uncoalesced_back`` entries of ``_back`` may still be coalesced. Both
    numbers are at most ``_MAX_UNCOALESCED``.

    A position counts bytes from the start of the stream, so it does not change when bytes are
    taken. The position of the first unread byte is ``_stream_end - size``, and is called ``head``.
    Chunks are numbered in the same way: the number of the oldest chunk is
    ``_chunks_end - _count()``. Pushing a chunk back lowers ``head`` and the number of the oldest
    chunk.

    Attributes:
      size: the number of unread bytes. Until ``commit_batch`` is called, ``size`` also counts the
        items of the batch that have been yielded. ``len()`` never counts them. If ``size`` is 0,
        the buffer is empty.
    """

    __slots__ = (
        "_back",
        "_batch",
        "_batch_iterator",
        "_batch_size",
        "_chunks_end",
        "_front",
        "_item_overhead",
        "_search",
        "_split_size",
        "_stream_end",
        "_uncoalesced_back",
        "_uncoalesced_front",
        "size",
    )

    def __init__(self) -> None:
        self._front: list[Entry] = []
        self._back: list[Entry] = []
        self._uncoalesced_front = self._uncoalesced_back = 0
        self.size = self._stream_end = self._chunks_end = 0
        self._search: DelimiterSearch | None = None
        self._batch: list[bytes] | None = None
        self._batch_iterator = _NO_ITEMS
        self._batch_size = self._item_overhead = 0
        self._split_size = _FIRST_SPLIT_SIZE

    def __len__(self) -> int:
        return self.size if self._batch is None else self.size - self._yielded_size()

    # ---- bytes in ----

    def append(self, chunk: bytes) -> None:
        """Add a chunk at the end. An empty chunk changes nothing."""
        size = len(chunk)
        if not size:
            return
        if self._uncoalesced_back == _MAX_UNCOALESCED:
            self._coalesce_back()
        self._back.append((chunk, 0))
        self._uncoalesced_back += 1
        self._chunks_end += 1
        self._stream_end += size
        self.size += size

    def push_front(self, chunk: bytes) -> None:
        """Put a chunk in front of all others. An empty chunk changes nothing."""
        if not chunk:
            return
        self.commit_batch()
        head = self._stream_end - self.size
        if self._front:
            oldest, start = self._front[-1]
            if start:
                self._uncoalesced_front = max(self._uncoalesced_front, 1)
                if 2 * start > len(oldest):  # the chunk may stay for long: drop its read bytes
                    self._front[-1] = (oldest[start:], 0)
        if self._uncoalesced_front == _MAX_UNCOALESCED:
            self._coalesce_front(head)
        if self._search is not None and not self._search.keep_from(head):
            self._search = None
        self._front.append((chunk, 0))
        self._uncoalesced_front += 1
        self.size += len(chunk)

    def _coalesce_back(self) -> None:
        """Coalesce the last ``_uncoalesced_back`` entries of ``_back``."""
        entries = self._back[-self._uncoalesced_back :]
        coalesced = _coalesce_small(entries)
        self._back[-len(entries) :] = coalesced
        first = self._chunks_end - len(entries)
        self._chunks_end += len(coalesced) - len(entries)
        self._uncoalesced_back = 1  # the last entry may be coalesced with later ones
        if self._search is not None and self._search.chunk_number >= first:
            self._search.relocate(coalesced, self._stream_end - sum(map(unread, coalesced)), first)

    def _coalesce_front(self, head: int) -> None:
        """Coalesce the last ``_uncoalesced_front`` entries of ``_front``."""
        entries = self._front[: -self._uncoalesced_front - 1 : -1]
        coalesced = _coalesce_small(entries)
        first = self._chunks_end - self._count()
        self._front[-len(entries) :] = reversed(coalesced)
        self._uncoalesced_front = 1
        if self._search is not None and self._search.chunk_number < first + len(entries):
            self._search.relocate(coalesced, head, self._chunks_end - self._count())

    # ---- bytes out ----

    def peek_chunk(self) -> bytes:
        """Return the unread bytes of the oldest chunk, without taking them.

        Returns ``b""`` if the buffer is empty.
        """
        self.commit_batch()
        if not self.size:
            return b""
        chunk, start = self._oldest()
        if start:  # trim the chunk now, so that the next peek copies nothing
            chunk = chunk[start:]
            self._front[-1] = (chunk, 0)
            self._uncoalesced_front = max(self._uncoalesced_front, 1)
        return chunk

    def take_chunk(self, max_bytes: int | None = None) -> bytes:
        """Take the oldest chunk, or only its first ``max_bytes`` bytes if the chunk is longer.

        Returns ``b""`` if the buffer is empty.
        """
        self.commit_batch()
        if not self.size:
            return b""
        chunk, start = self._oldest()
        if max_bytes is not None and len(chunk) - start > max_bytes:
            self.size -= max_bytes
            self._consume_to(chunk, start + max_bytes)
            return chunk[start : start + max_bytes]
        self.size -= len(chunk) - start
        self._pop_oldest()
        return chunk[start:] if start else chunk

    def take(self, count: int) -> bytes:
        """Take exactly ``count`` bytes. The buffer must hold at least that many."""
        self.commit_batch()
        assert count <= self.size, "count exceeds the unread bytes"
        if self._front:
            chunk, start = self._front[-1]
            if count < len(chunk) - start:  # usually the oldest chunk is enough
                self.size -= count
                self._consume_to(chunk, start + count)
                return chunk[start : start + count]
        parts = []
        while count:
            part = self.take_chunk(count)
            parts.append(part)
            count -= len(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def drop(self, count: int) -> None:
        """Drop ``count`` bytes. The buffer must hold at least that many."""
        self.commit_batch()
        assert count <= self.size, "count exceeds the unread bytes"
        self.size -= count
        while count:
            chunk, start = self._oldest()
            if count < len(chunk) - start:
                self._consume_to(chunk, start + count)
                return
            count -= len(chunk) - start
            self._pop_oldest()

    def peek_bytes(self, count: int) -> bytes:
        """Return the first ``count`` bytes without taking them. The buffer must hold them."""
        self.commit_batch()
        chunk, start = self._oldest()
        if count <= len(chunk) - start:
            return chunk[start : start + count]
        parts = []
        index = 0
        while count:
            chunk, start = self._chunk(index)
            parts.append(chunk[start : start + count])
            count -= len(parts[-1])
            index += 1
        return b"".join(parts)

    def peek_all(self) -> bytes:
        """Return all unread bytes without taking them."""
        return b"".join(chunk[start:] for chunk, start in self.entries())

    def entries(self) -> list[Entry]:
        """Return all entries, the oldest first, without taking or copying them."""
        self.commit_batch()
        return [*reversed(self._front), *self._back]

    # ---- delimiters ----

    def find(self, delimiter: bytes, max_bytes: int = sys.maxsize) -> int | None:
        """Return the number of bytes up to the end of the first delimiter.

        Returns ``None`` if no delimiter ends within the first ``max_bytes`` bytes.
        """
        if self._batch is not None:
            self.commit_batch()
        head = self._stream_end - self.size
        stop = head + max_bytes
        if stop > self._stream_end:
            stop = self._stream_end
        search = self._search
        oldest = self._chunks_end - len(self._front) - len(self._back)
        if search is None or search.delimiter != delimiter:
            search = self._search = DelimiterSearch(delimiter, head, oldest)
        elif search.start > head and not self._scan_pushed_back(search, head, stop):
            search.restart(head, oldest)
        elif search.match_end is not None and search.match_end - len(delimiter) >= head:
            return search.match_end - head if search.match_end <= stop else None
        elif search.end <= head:
            search.restart(head, oldest)
        else:
            search.match_end = None  # part of the match was consumed
            search.start = head
        index = search.chunk_number - oldest
        while search.end < stop:
            if index:
                chunk, start = self._chunk(index)
            else:
                chunk, start = self._front[-1] if self._front else self._back[0]
                search.chunk_position = head
            match_end = search.scan(chunk, start, stop)
            if match_end is not None:
                return match_end - head
            index += 1
        return None

    def _scan_pushed_back(self, search: DelimiterSearch, head: int, stop: int) -> bool:
        """Scan the pushed-back bytes, which are in front of the bytes that were already scanned.

        Returns False if a delimiter begins in the pushed-back bytes, or if the scan would go past
        ``stop``. The caller then restarts the search.
        """
        end = search.start + len(search.delimiter) - 1
        if end > stop:
            return False
        parts: list[bytes] = []
        left = end - head
        index = 0
        while left:
            chunk, start = self._chunk(index)
            parts.append(chunk[start : start + left])
            left -= len(parts[-1])
            index += 1
        if search.delimiter in b"".join(parts):
            return False
        search.start = head
        return True

    def take_lines(self, delimiter: bytes, keep_ends: bool, max_bytes: int) -> Iterator[bytes]:
        """Return an iterator over the first lines. The iterator consumes each line that it yields.

        Call ``find`` first: it must have found the end of the first line. The iterator yields the
        lines that are complete in one piece of the oldest chunk. It stops before a line of more
        than ``max_bytes`` bytes (including the delimiter), and may yield nothing. Any operation
        except ``append`` and ``len`` ends the iterator. Lines that were not yielded remain unread.
        """
        lines, size = self._split_lines(delimiter, keep_ends, max_bytes, self._split_size)
        return self._begin_batch(lines, size, 0 if keep_ends else len(delimiter))

    def take_line_list(self, delimiter: bytes, keep_ends: bool, max_bytes: int) -> list[bytes]:
        """Take the lines of a large piece. Call ``find`` first, as for ``take_lines``."""
        lines, size = self._split_lines(delimiter, keep_ends, max_bytes, _MAX_SPLIT_SIZE)
        self.drop(size)
        return lines

    def _split_lines(
        self, delimiter: bytes, keep_ends: bool, max_bytes: int, split_size: int
    ) -> tuple[list[bytes], int]:
        """Split the lines off the first piece. Returns the lines and their size with delimiters."""
        search = self._search
        assert search is not None, "call find first"
        # The index, in the queue, of the chunk in which the first delimiter ends.
        index = search.chunk_number - (self._chunks_end - self._count())
        if index and not self._merge_oldest_two(index):
            return [], 0
        chunk, start = self._oldest()
        max_lines = split_size // _MIN_ITEM_SIZE
        stop = min(len(chunk), start + split_size)
        stop = end_of_lines(chunk, start, stop, delimiter, max_bytes, max_lines)
        piece = chunk[start:stop]  # a copy, unless it is the whole chunk
        lines = piece.split(delimiter, max_lines)
        rest = lines.pop()  # the bytes after the last delimiter
        size = len(piece) - len(rest)
        return ([line + delimiter for line in lines] if keep_ends else lines), size

    def take_frames(self, header: FrameHeader, max_bytes: int) -> Iterator[bytes]:
        """Return an iterator over the first frames' bodies. It consumes each frame that it yields.

        The iterator yields the frames that are complete in one piece of the oldest chunk, and stops
        before a body of more than ``max_bytes`` bytes. It may yield nothing. Any operation except
        ``append`` and ``len`` ends the iterator. The buffer must not be empty.
        """
        self.commit_batch()
        chunk, start = self._oldest()
        stop = min(len(chunk), start + self._split_size)
        max_frames = self._split_size // _MIN_ITEM_SIZE
        frames, end = header.split(chunk, start, stop, max_bytes, max_frames)
        return self._begin_batch(frames, end - start, header.size)

    # ---- batches ----

    @property
    def in_batch(self) -> bool:
        """Whether an iterator of ``take_lines`` or ``take_frames`` may still yield items."""
        return self._batch is not None

    def _begin_batch(self, items: list[bytes], size: int, overhead: int) -> Iterator[bytes]:
        """Begin a batch.

        ``size``: the number of bytes that all items take up in the buffer. ``overhead``: how many
        bytes an item takes up in the buffer beyond its own length, such as for a delimiter.
        """
        self._batch = items
        self._batch_iterator = iter(items)
        self._batch_size = size
        self._item_overhead = overhead
        return self._batch_iterator

    def commit_batch(self) -> None:
        """Consume the items of the batch that have been yielded, and end the batch's iterator."""
        items = self._batch
        if items is None:
            return
        taken = self._yielded_size()
        used = taken == self._batch_size
        self._split_size = min(self._split_size * 4, _MAX_SPLIT_SIZE) if used else _FIRST_SPLIT_SIZE
        self._batch = None
        if taken:
            chunk, start = self._oldest()
            self.size -= taken
            if start + taken < len(chunk):
                self._consume_to(chunk, start + taken)
            else:
                self._pop_oldest()
        items.clear()  # ends the iterator

    def _yielded_size(self) -> int:
        """Return how many bytes of the buffer belong to the items that have been yielded."""
        assert self._batch is not None
        left = operator.length_hint(self._batch_iterator)
        if not left:
            return self._batch_size
        rest = self._batch[-left:]
        return self._batch_size - sum(map(len, rest)) - left * self._item_overhead

    # ---- the queue ----

    def _oldest(self) -> Entry:
        """Return the oldest entry, after making it the last entry of ``_front`` if necessary.

        The queue must not be empty.
        """
        if not self._front:
            self._back.reverse()
            self._front, self._back = self._back, self._front
            # The uncoalesced entries of ``_back`` are now the first entries of ``_front``, so we
            # stop counting them. There are at most ``_MAX_UNCOALESCED`` of them, because the lists
            # are swapped again only when all of these entries have been taken.
            self._uncoalesced_front = self._uncoalesced_back = 0
        return self._front[-1]

    def _pop_oldest(self) -> None:
        self._front.pop()
        if self._uncoalesced_front:
            self._uncoalesced_front -= 1

    def _consume_to(self, chunk: bytes, start: int) -> None:
        """Set the offset of the oldest chunk's first unread byte.

        If the chunk is then mostly read, trim it.
        """
        if 2 * start > len(chunk) + _MAX_CONSUMED_BYTES:
            chunk, start = chunk[start:], 0
            self._uncoalesced_front = max(self._uncoalesced_front, 1)
        self._front[-1] = (chunk, start)

    def _merge_oldest_two(self, index: int) -> bool:
        """Merge the two oldest chunks if the first delimiter ends in the second chunk.

        ``index``: the index of the chunk in which the delimiter ends. Returns False if the
        delimiter ends in a later chunk, or if the second chunk is large. Then ``take_lines``
        cannot split off the line, and its caller must use ``take``.
        """
        second, second_start = self._chunk(1)
        if index > 1 or len(second) > _MAX_SPLIT_SIZE:
            return False
        first, start = self._oldest()
        self._pop_oldest()
        self._oldest()  # makes the second chunk the last entry of _front
        self._front[-1] = (first[start:] + second[second_start:], 0)
        return True

    def _count(self) -> int:
        return len(self._front) + len(self._back)

    def _chunk(self, index: int) -> Entry:
        """Return an entry by its index in the queue. The oldest entry has index 0."""
        front = len(self._front)
        return self._front[front - 1 - index] if index < front else self._back[index - front]


def _coalesce_small(entries: list[Entry]) -> list[Entry]:
    """Return entries with the same unread bytes, but with runs of small chunks coalesced."""
    coalesced: list[Entry] = []
    small: list[bytes] = []
    for entry in entries:
        if unread(entry) < _SMALL_CHUNK:
            small.append(entry[0][entry[1] :])
            continue
        if small:
            coalesced.append((b"".join(small), 0))
            small = []
        coalesced.append(entry)
    if small:
        coalesced.append((b"".join(small), 0))
    return coalesced
