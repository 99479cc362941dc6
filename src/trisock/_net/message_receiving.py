"""MessageReceiver: reads of whole messages, which are lines or length-prefixed frames."""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator

from .._arguments import Buffer, check_bool, delimiter_bytes, positive_int
from .frame_header import FrameHeader, frame_header
from .idle import while_idle
from .iterators import Frames, Lines, NextItems, NextList
from .receiving import BufferedReceiver


class MessageReceiver(BufferedReceiver):
    """The read methods of ``Socket`` for lines and frames."""

    __slots__ = ()

    def lines(
        self,
        *,
        delimiter: Buffer = b"\n",
        keep_ends: bool = False,
        max_bytes: int = 65536,
        idle: bool = False,
    ) -> Lines:
        r"""Iterate over lines: ``async for line in sock.lines():``.

        The iterator holds no bytes of its own: you can leave the loop at any time, and the next
        read starts at the next line. You can also continue with the same iterator after an error.
        Up to 2048 lines that arrived together are returned without checkpoints between them.

        Args:
          delimiter: the end of a line, such as ``b"\r\n"``.
          keep_ends: whether lines keep their delimiter.
          max_bytes: the maximum length of a line, in bytes, including the delimiter. It also limits
            the size of the buffer, as in ``recv_until``.
          idle: whether each wait for a line is inside ``Socket.idle()``. If so, the loop ends with
            ``ServerClosing`` when the server stops.

        Raises:
          IncompleteReadError: the stream ended in the middle of a line. The bytes of this line stay
            unread. They are not returned, because an incomplete command may look complete.
          LimitExceededError: a line is longer than ``max_bytes``.

        If cancelled, it consumes nothing: the next read starts at the next line.
        """
        wanted = delimiter_bytes(delimiter)
        limit = positive_int("max_bytes", max_bytes)
        next_lines: NextItems = functools.partial(self._next_lines, wanted, keep_ends, limit)
        next_list: NextList = functools.partial(self._next_list, wanted, keep_ends, limit)
        check_bool("idle", idle)
        if idle:
            next_lines = while_idle(self._connection, next_lines)
            next_list = while_idle(self._connection, next_list)
        return Lines(self._connection.reading, next_lines, next_list)

    async def _next_lines(
        self, delimiter: bytes, keep_ends: bool, max_bytes: int
    ) -> tuple[bytes, Iterator[bytes]]:
        """Wait for a line. Returns it, and an iterator over more lines that have arrived."""
        with self._connection.reading:
            line = await self._receive_line(delimiter, max_bytes, iterating=True)
            if line is not None:
                return (line if keep_ends else line[: -len(delimiter)]), iter(())
            end = await self._find(delimiter, max_bytes, iterating=True)
            lines = self._connection.buffer.take_lines(delimiter, keep_ends, max_bytes)
            self._reads_since_checkpoint += operator.length_hint(lines)
            for line in lines:
                return line, lines
            return self._take_line(delimiter, keep_ends, end), lines

    async def _next_list(self, delimiter: bytes, keep_ends: bool, max_bytes: int) -> list[bytes]:
        """Wait for a line. Returns a list of this line and more lines that have arrived."""
        with self._connection.reading:
            line = await self._receive_line(delimiter, max_bytes, iterating=True)
            if line is not None:
                return [line if keep_ends else line[: -len(delimiter)]]
            end = await self._find(delimiter, max_bytes, iterating=True)
            lines = self._connection.buffer.take_line_list(delimiter, keep_ends, max_bytes)
            self._reads_since_checkpoint += len(lines)
            return lines or [self._take_line(delimiter, keep_ends, end)]

    def _take_line(self, delimiter: bytes, keep_ends: bool, size: int) -> bytes:
        line = self._connection.buffer.take(size)
        return line if keep_ends else line[: -len(delimiter)]

    async def recv_frame(self, header: str | int = "!I", *, max_bytes: int = 1048576) -> bytes:
        """Return the body of the next length-prefixed frame.

        Args:
          header: the format of the length, as in ``frames``.
          max_bytes: the maximum length of the body, in bytes.

        Raises:
          IncompleteReadError: the stream ended before the end of the frame. ``at_boundary`` is True
            if it ended between two frames. ``partial`` begins with the header. ``expected`` is the
            size of the whole frame, or of the header if the header is incomplete too.
          LimitExceededError: the body is longer than ``max_bytes``. It is raised as soon as the
            header has arrived. The header stays unread. ``frame_length`` is the body's length.
          trio.BrokenResourceError: the connection is broken.
          ValueError, TypeError: an argument is invalid.

        If it fails or is cancelled, it consumes nothing.
        """
        format = frame_header(header)
        limit = positive_int("max_bytes", max_bytes)
        with self._connection.reading:
            return self._take_frame(format, await self._find_frame(format, limit))

    def frames(
        self, header: str | int = "!I", *, max_bytes: int = 1048576, idle: bool = False
    ) -> Frames:
        """Iterate over length-prefixed frames: ``async for body in sock.frames():``.

        The iterator holds no bytes of its own: you can leave the loop at any time, and the next
        read starts at the next frame. Up to 2048 frames that arrived together are returned without
        checkpoints between them.

        Args:
          header: the format of the length in front of each body: a ``struct`` format of one
            unsigned integer, such as ``"!I"`` or ``"<H"``, or the size of a big-endian integer in
            bytes (``3`` means 24 bits). A ``struct`` format begins with ``!``, ``>`` or ``<``. The
            length does not include the header itself.
          max_bytes: the maximum length of a body, in bytes. The buffer holds at most ``max_bytes``
            plus the header and the result of one more read.
          idle: as in ``lines``.

        Raises:
          IncompleteReadError: the stream ended inside a frame. The frame's bytes stay unread.
          LimitExceededError: a body is longer than ``max_bytes``. It is raised as soon as the
            header has arrived. The frame stays unread.

        If cancelled, it consumes nothing: the next read starts at the next frame.
        """
        next_batch: NextItems = functools.partial(
            self._next_frames, frame_header(header), positive_int("max_bytes", max_bytes)
        )
        check_bool("idle", idle)
        if idle:
            next_batch = while_idle(self._connection, next_batch)
        return Frames(self._connection.reading, next_batch)

    async def _next_frames(
        self, header: FrameHeader, max_bytes: int
    ) -> tuple[bytes, Iterator[bytes]]:
        """Wait for a frame. Returns its body, and an iterator over later bodies that arrived."""
        with self._connection.reading:
            size = await self._find_frame(header, max_bytes, iterating=True)
            batch = self._connection.buffer.take_frames(header, max_bytes)
            self._reads_since_checkpoint += operator.length_hint(batch)
            for body in batch:
                return body, batch
            return self._take_frame(header, size), batch  # the frame spans chunks

    async def _find_frame(
        self, header: FrameHeader, max_bytes: int, *, iterating: bool = False
    ) -> int:
        """Wait for a frame. Returns its size, including the header. Consumes nothing."""
        self._connection.check_open()
        waited = await self._buffer_at_least(header.size, iterating)
        length = header.length(self._connection.buffer.peek_bytes(header.size))
        if length <= max_bytes:
            waited |= await self._buffer_at_least(header.size + length)
        if not waited:
            await self._buffered_checkpoint()
        if length > max_bytes:
            raise self._limit_exceeded(max_bytes, frame_length=length)
        return header.size + length

    def _take_frame(self, header: FrameHeader, size: int) -> bytes:
        self._connection.buffer.drop(header.size)
        return self._connection.buffer.take(size - header.size)
