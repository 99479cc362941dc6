"""BufferedReceiver: every way to read from a connection.

All of them keep one promise: a read that failed or was cancelled has consumed nothing.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator

import trio

from .._arguments import Buffer, bytes_view, delimiter_bytes, positive_int, quoted
from .._errors import IncompleteReadError, LimitExceededError
from .connection import Connection
from .lines import Lines

# After this many reads in a row that were served from the receive buffer, the next one lets other
# tasks run. Small enough that nobody waits long (each such read takes microseconds), and large
# enough that the pass through the scheduler does not show.
READS_PER_CHECKPOINT = 64


class BufferedReceiver(trio.abc.ReceiveStream):
    """Reads from a Connection.

    A base class and not an object that ``Socket`` forwards to: that costs 90 ns a call.
    """

    __slots__ = ("_connection", "_reads_since_checkpoint")

    _connection: Connection
    _reads_since_checkpoint: int

    async def recv(self, max_bytes: int | None = None) -> bytes:
        """Return the oldest chunk of received data; ``b""`` at the end of the stream.

        A chunk is what one read of the connection gave or, under TLS, one record; pushed-back
        data is a chunk as well. Small chunks are joined when more than 256 are unread.

        Args:
          max_bytes: return at most so many bytes of the chunk; the rest stays the oldest.

        Raises:
          trio.BrokenResourceError: the connection broke (also ``TLSError``).
          ValueError, TypeError: ``max_bytes`` is not a positive int.

        Cancelled, it has consumed nothing. Source: Pluto's ``socket.recv``.
        """
        if max_bytes is not None:
            max_bytes = positive_int("max_bytes", max_bytes)
        connection = self._connection
        reading = connection.reading
        if reading.in_use:
            reading.check()
        reading.in_use = True
        try:
            buffer = connection.buffer
            if not buffer.size:  # the hot path: what arrives is not even buffered
                chunk = await connection.layer.receive()
                tls = connection.tls
                if max_bytes is None and (tls is None or not tls.arrived.pending):
                    return chunk
                connection.arrived(chunk)
            elif buffer:
                connection.check_open()
                await self._buffered_checkpoint()
            else:
                await self._receive()
            return buffer.take_chunk(max_bytes)
        finally:
            reading.in_use = False

    async def peek(self) -> bytes | None:
        """Return the chunk that ``recv`` would return next, without consuming it or waiting for it.

        Looks at what has arrived in the kernel, and decrypts it, too. Returns ``None`` if nothing
        has arrived and ``b""`` at the end of the stream. An error of the peer's is
        not raised (``None``); the next ``recv`` raises it.

        Cancelled, it has consumed nothing. Source: Pluto's ``socket.peek``.
        """
        with self._connection.reading:
            self._connection.check_open()
            if self._connection.buffer:
                await self._buffered_checkpoint()
                return self._connection.buffer.peek_chunk()
            await trio.lowlevel.checkpoint()
            self._connection.check_open()
            chunk = self._connection.receive_nowait()
            if chunk:
                self._connection.buffer.append(chunk)
            return chunk

    def unrecv(self, data: Buffer) -> None:
        """Push data to the front of the receive buffer: the last pushed is the first received.

        Empty data changes nothing. After the end of the stream pushed-back data is read first,
        then comes the end again. If ``starttls`` follows, the data is taken as the peer's TLS.

        Args:
          data: bytes; copied if it can change.

        Raises:
          TypeError: it is not bytes.
          trio.BusyResourceError: another task is reading: where its read ends is not known.

        Source: Pluto's ``socket.unrecv``.
        """
        view = bytes_view(data)
        self._connection.check_open()
        self._connection.reading.check()
        self._connection.buffer.push_front(bytes(view))

    async def recv_exactly(self, n: int) -> bytes:
        """Return exactly ``n`` bytes.

        Raises:
          IncompleteReadError: the stream ended before; the bytes that came stay to be read.
          trio.BrokenResourceError: the connection broke.
          ValueError, TypeError: ``n`` is not an int of 0 or more.

        Cancelled, it has consumed nothing: the next read starts where it did.
        """
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"n must be 0 or more, not {quoted(n)}")
        with self._connection.reading:
            self._connection.check_open()
            if len(self._connection.buffer) >= n:
                await self._buffered_checkpoint()
            while len(self._connection.buffer) < n:
                if not await self._receive():
                    raise self._incomplete(n)
            return self._connection.buffer.take(n)

    async def recv_until(self, delimiter: Buffer, *, max_bytes: int = 65536) -> bytes:
        """Return everything up to and including the first delimiter.

        Args:
          delimiter: what to look for; at least one byte.
          max_bytes: how many bytes are looked at, delimiter included. What is held is at most this
            and one read more (128 KiB; under TLS all records in it).

        Raises:
          LimitExceededError: the delimiter did not come within ``max_bytes``.
          IncompleteReadError: the stream ended before; ``expected`` is ``None``.
          trio.BrokenResourceError: the connection broke.

        After each of them, and cancelled, it has consumed nothing.
        """
        wanted = delimiter_bytes(delimiter)
        limit = positive_int("max_bytes", max_bytes)
        with self._connection.reading:
            return self._connection.buffer.take(await self._find(wanted, limit))

    async def _find(self, delimiter: bytes, max_bytes: int) -> int:
        """Wait until a delimiter has come and return where it ends. Takes nothing."""
        self._connection.check_open()
        buffer = self._connection.buffer
        waited = False
        while (end := buffer.find(delimiter, max_bytes)) is None and buffer.size < max_bytes:
            waited = True
            if not await self._receive():
                raise self._incomplete(None)
        if not waited:
            await self._buffered_checkpoint()
        if end is None:
            raise self._connection.transport.note(LimitExceededError(max_bytes))
        return end

    def lines(
        self, *, delimiter: Buffer = b"\n", keep_ends: bool = False, max_bytes: int = 65536
    ) -> Lines:
        r"""Iterate over lines: ``async for line in sock.lines():``.

        It holds no bytes itself: leave the loop whenever you like, the next read goes on there.

        Args:
          delimiter: what ends a line, such as ``b"\r\n"``.
          keep_ends: whether lines are given with their delimiter.
          max_bytes: the most that a line may have, delimiter included. What is held is at most
            this and one read more, as in ``recv_until``.

        Raises:
          IncompleteReadError: the stream ended in the middle of a line. A command
            that was cut off must not be taken for a whole one; its bytes stay to be read.
          LimitExceededError: a line is longer than ``max_bytes``.
        """
        next_batch = functools.partial(
            self._next_lines,
            delimiter_bytes(delimiter),
            keep_ends,
            positive_int("max_bytes", max_bytes),
        )
        return Lines(self._connection.reading, next_batch)

    async def _next_lines(
        self, delimiter: bytes, keep_ends: bool, max_bytes: int
    ) -> tuple[bytes, Iterator[bytes]]:
        """Return the next line, and those that can be taken after it without waiting."""
        with self._connection.reading:
            try:
                end = await self._find(delimiter, max_bytes)
            except IncompleteReadError:
                if self._connection.buffer.size:
                    raise
                raise StopAsyncIteration from None
            batch = self._connection.buffer.take_lines(delimiter, keep_ends, max_bytes)
            self._reads_since_checkpoint += operator.length_hint(batch)
            for line in batch:
                return line, batch
            line = self._connection.buffer.take(end)  # its end is in another chunk
            return line if keep_ends else line[: -len(delimiter)], batch

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Do the same as ``recv``, for ``trio.abc.ReceiveStream``: always a full checkpoint."""
        if max_bytes is not None:
            max_bytes = positive_int("max_bytes", max_bytes)
        with self._connection.reading:
            self._connection.check_open()
            if self._connection.buffer:
                await trio.lowlevel.checkpoint()
                self._connection.check_open()
            else:
                await self._receive()
            return self._connection.buffer.take_chunk(max_bytes)

    async def __anext__(self) -> bytes:
        chunk = await self.receive_some()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def _incomplete(self, expected: int | None) -> IncompleteReadError:
        entries = self._connection.buffer.entries()
        return self._connection.transport.note(
            IncompleteReadError._in_pieces(entries, self._connection.buffer.size, expected)
        )

    async def _buffered_checkpoint(self) -> None:
        """Checkpoint before a read that is served from the buffer."""
        self._reads_since_checkpoint += 1
        if self._reads_since_checkpoint < READS_PER_CHECKPOINT:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        self._reads_since_checkpoint = 0
        await trio.lowlevel.checkpoint()
        self._connection.check_open()

    async def _receive(self) -> bool:
        """Wait for one more chunk and buffer it; False at the end of the stream."""
        connection = self._connection
        chunk = await connection.layer.receive()
        connection.arrived(chunk)
        return bool(chunk)
