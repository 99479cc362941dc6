"""Lines and LineBatches: the async iterators over the lines of a connection."""

from __future__ import annotations

from .._not_copyable import NotCopyable
from .batch_iterator import BatchIterator, NextBatch


class Lines(BatchIterator):
    """The async iterator that ``Socket.lines`` returns.

    Each line is consumed only when it is returned, so you can leave the loop at any time.
    """

    __slots__ = ()

    def batches(self) -> LineBatches:
        """Iterate over lists of lines: ``async for lines in sock.lines().batches():``.

        Each list has the lines that have arrived together: at least one, and at most 2048. This is
        faster than a loop over single lines, for programs that read millions of them. All lines of
        a list are consumed when the list is returned. The limits and the errors are those of
        ``Socket.lines``.

        If cancelled, it consumes nothing: the next read starts at the next line.
        """
        return LineBatches(self._next_batch)


class LineBatches(NotCopyable):
    """The async iterator that ``Lines.batches`` returns.

    All lines of a list are consumed when the list is returned.
    """

    __slots__ = ("_next_batch",)

    def __init__(self, next_batch: NextBatch) -> None:
        self._next_batch = next_batch

    def __aiter__(self) -> LineBatches:
        return self

    async def __anext__(self) -> list[bytes]:
        line, later = await self._next_batch()
        return [line, *later]
