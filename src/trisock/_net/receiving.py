"""BufferedReceiver: every way to read from a connection.

All reads but ``skip_until`` keep one promise: a read that fails or is cancelled consumes nothing.
"""

from __future__ import annotations

import operator
from typing import Literal, overload

import trio

from .._arguments import Buffer, bytes_view, check_bool, delimiter_bytes, positive_int, quoted
from .._errors import (
    IncompleteReadError,
    LimitExceededError,
    new_incomplete_read_error,
    new_limit_exceeded_error,
)
from .connection import Connection
from .idle import receive_idle

# After this many reads from the receive buffer, a read lets other tasks run. A read from the buffer
# takes microseconds, so 64 reads do not delay other tasks noticeably. One pass through the
# scheduler per 64 reads costs little.
READS_PER_CHECKPOINT = 64


class BufferedReceiver(trio.abc.ReceiveStream):
    """The read methods of ``Socket``.

    This is a base class of ``Socket``, because delegating to an attribute would cost 90 ns per
    call.
    """

    __slots__ = ("__weakref__", "_connection", "_reads_since_checkpoint")

    _connection: Connection
    _reads_since_checkpoint: int

    def _set_up(self, connection: Connection) -> None:
        self._connection = connection
        self._reads_since_checkpoint = 0

    async def recv(self, max_bytes: int | None = None) -> bytes:
        """Return the oldest chunk of received data, or ``b""`` at the end of the stream.

        A chunk is the result of one read from the kernel or, under TLS, one record. Data that was
        pushed back with ``unrecv`` is also a chunk. Small chunks are coalesced when more than 256
        chunks are unread.

        Args:
          max_bytes: return at most this many bytes of the chunk. The rest becomes the next chunk.

        Raises:
          trio.BrokenResourceError: the connection is broken (``TLSError`` is a subclass).
          ValueError, TypeError: ``max_bytes`` is not a positive int.

        If cancelled, it consumes nothing. Source: Pluto's ``socket.recv``.
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
            buffer.commit_batch()
            if buffer.size:
                connection.check_open()
                await self._buffered_checkpoint()
                return buffer.take_chunk(max_bytes)
            idle = connection.idle
            if idle is None:
                chunk = await connection.layer.receive()
            else:
                chunk = await receive_idle(connection, idle)
            self._reads_since_checkpoint = 0
            connection.fresh_until = 0.0
            tls = connection.tls
            if max_bytes is None and (tls is None or not tls.engine.incoming.pending):
                return chunk  # the hot path bypasses the buffer
            connection.buffer_received(chunk)
            return buffer.take_chunk(max_bytes)
        finally:
            reading.in_use = False
            connection.send_credit = 0

    @overload
    async def peek(self, *, wait: Literal[True]) -> bytes: ...

    @overload
    async def peek(self, *, wait: bool = False) -> bytes | None: ...

    async def peek(self, *, wait: bool = False) -> bytes | None:
        """Return the chunk that ``recv`` would return next, without consuming it.

        If the receive buffer is empty, ``peek`` reads what has arrived in the kernel, and decrypts
        it under TLS. Without ``wait``, it returns ``None`` if nothing has arrived, and ``b""`` at
        the end of the stream. After an error that the peer caused, it returns ``None``, and the
        next ``recv`` raises the error.

        Args:
          wait: whether to wait until a chunk arrives or the stream ends. If so, ``peek`` raises the
            errors that ``recv`` would raise.

        If cancelled, it consumes nothing. Source: Pluto's ``socket.peek``.
        """
        check_bool("wait", wait)
        with self._connection.reading:
            self._connection.check_open()
            if self._connection.buffer:
                await self._buffered_checkpoint()
                return self._connection.buffer.peek_chunk()
            if wait:
                await self._receive()
                return self._connection.buffer.peek_chunk()
            await trio.lowlevel.checkpoint()
            self._connection.check_open()
            self._connection.send_credit = 0
            chunk = self._connection.receive_nowait()
            if chunk:
                self._connection.fresh_until = 0.0
                self._connection.buffer.append(chunk)
            return chunk

    def unrecv(self, data: Buffer) -> None:
        """Push data back to the front of the receive buffer, so that it is received next.

        Empty data changes nothing. Data may be pushed back even after EOF: the next reads return
        the data, and then EOF again. If ``starttls`` follows, the data becomes the start of the
        peer's TLS handshake.

        Args:
          data: bytes, bytearray or memoryview. ``unrecv`` copies the data.

        Raises:
          TypeError: ``data`` is not bytes, bytearray or memoryview.
          trio.BusyResourceError: another task is reading, so the position in the stream is unknown.

        Source: Pluto's ``socket.unrecv``.
        """
        view = bytes_view(data)
        self._connection.check_open()
        self._connection.reading.check()
        self._connection.buffer.push_front(bytes(view))

    async def recv_exactly(self, n: int) -> bytes:
        """Return exactly ``n`` bytes.

        Raises:
          IncompleteReadError: the stream ended before ``n`` bytes arrived. The bytes that did
            arrive stay unread.
          trio.BrokenResourceError: the connection is broken.
          ValueError, TypeError: ``n`` is negative or not an int.

        If cancelled, it consumes nothing: the next read starts at the same byte.
        """
        n = operator.index(n)
        if n < 0:
            raise ValueError(f"n must be 0 or more, not {quoted(n)}")
        with self._connection.reading:
            self._connection.check_open()
            if not await self._buffer_at_least(n):
                await self._buffered_checkpoint()
            return self._connection.buffer.take(n)

    async def recv_until(self, delimiter: Buffer, *, max_bytes: int = 65536) -> bytes:
        """Return everything up to and including the first delimiter.

        Args:
          delimiter: the bytes to search for. It must not be empty.
          max_bytes: how many bytes to search, including the delimiter. The buffer holds at most
            ``max_bytes`` plus the result of one more read (128 KiB; under TLS, the decrypted
            records of 128 KiB of ciphertext).

        Raises:
          LimitExceededError: there is no delimiter within ``max_bytes``.
          IncompleteReadError: the stream ended before the delimiter arrived. The error's
            ``expected`` is ``None``.
          trio.BrokenResourceError: the connection is broken.

        A call that fails or is cancelled consumes nothing.
        """
        wanted = delimiter_bytes(delimiter)
        limit = positive_int("max_bytes", max_bytes)
        with self._connection.reading:
            return await self._take_until(wanted, limit)

    async def recv_line(self, *, delimiter: Buffer = b"\n", max_bytes: int = 65536) -> bytes:
        r"""Return the next line without its delimiter.

        Args:
          delimiter: the end of a line, such as ``b"\r\n"``.
          max_bytes: the maximum length of the line, in bytes, including the delimiter. It also
            limits the size of the buffer, as in ``recv_until``.

        Raises:
          IncompleteReadError: the stream ended before the end of the line. ``at_boundary`` is True
            if it ended between two lines.
          LimitExceededError: the line is longer than ``max_bytes``.
          trio.BrokenResourceError: the connection is broken.

        If it fails or is cancelled, it consumes nothing.
        """
        wanted = delimiter_bytes(delimiter)
        limit = positive_int("max_bytes", max_bytes)
        with self._connection.reading:
            line = await self._take_until(wanted, limit)
        return line[: -len(wanted)]

    async def skip_until(self, delimiter: Buffer) -> int:
        """Drop all data up to and including the first delimiter, without a limit.

        Use it after ``LimitExceededError`` to continue with the next line. Data is dropped as it
        arrives, so the buffer holds at most the result of one read, as in ``recv_until``.

        Args:
          delimiter: the bytes to search for. It must not be empty.

        Returns: how many bytes were dropped, including the delimiter.

        Raises:
          IncompleteReadError: the stream ended before the delimiter arrived. The data that arrived
            was dropped, so ``partial`` is empty. ``at_boundary`` is True if no data had arrived.
          trio.BrokenResourceError: the connection is broken.

        Unlike the other reads, ``skip_until`` drops data while it waits: if it fails or is
        cancelled, the dropped data is lost. Until the end of the stream, it keeps the last bytes,
        which may be the start of the delimiter. So you can call ``skip_until`` again. The
        ``at_boundary`` of that call ignores data that earlier calls have dropped, so it may be True
        in the middle of a line.
        """
        wanted = delimiter_bytes(delimiter)
        dropped = 0
        with self._connection.reading:
            self._connection.check_open()
            buffer = self._connection.buffer
            if buffer:
                await self._buffered_checkpoint()
            while (end := buffer.find(wanted)) is None:
                before_delimiter = max(0, buffer.size - len(wanted) + 1)
                buffer.drop(before_delimiter)
                dropped += before_delimiter
                if not await self._receive():
                    dropped += buffer.size
                    buffer.drop(buffer.size)
                    raise self._connection.transport.remember_failure(
                        new_incomplete_read_error([], dropped, None, self._connection.peer)
                    )
            buffer.drop(end)
            return dropped + end

    async def _take_until(self, delimiter: bytes, max_bytes: int) -> bytes:
        """Wait for a delimiter. Take and return everything up to its end."""
        line = await self._receive_line(delimiter, max_bytes)
        if line is not None:
            return line
        return self._connection.buffer.take(await self._find(delimiter, max_bytes))

    async def _receive_line(
        self, delimiter: bytes, max_bytes: int, *, iterating: bool = False
    ) -> bytes | None:
        """If nothing is unread, receive a chunk. If it is exactly one line, take and return it.

        Otherwise buffer the chunk and return ``None``: the caller then uses ``_find``. A peer that
        waits for our answer to each line sends chunks of exactly one line. For such chunks, the
        buffer and its search would cost as much as the system calls (benchmark row line-echo).
        """
        connection = self._connection
        connection.check_open()
        connection.buffer.commit_batch()
        if connection.buffer.size:
            return None
        chunk = await self._receive_chunk()
        if not chunk:
            raise self._incomplete(None, iterating)
        if (
            chunk.endswith(delimiter)
            and chunk.find(delimiter) == len(chunk) - len(delimiter)
            and len(chunk) <= max_bytes
            and (connection.tls is None or not connection.tls.engine.incoming.pending)
        ):
            return chunk
        connection.buffer_received(chunk)
        return None

    async def _find(self, delimiter: bytes, max_bytes: int, *, iterating: bool = False) -> int:
        """Wait for a delimiter. Returns the number of bytes up to its end. Consumes nothing."""
        self._connection.check_open()
        buffer = self._connection.buffer
        waited = False
        while (end := buffer.find(delimiter, max_bytes)) is None and buffer.size < max_bytes:
            waited = True
            if not await self._receive():
                raise self._incomplete(None, iterating)
        if not waited:
            await self._buffered_checkpoint()
        if end is None:
            raise self._limit_exceeded(max_bytes)
        return end

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Do the same as ``recv``, except that every call is a full checkpoint.

        This method implements ``trio.abc.ReceiveStream``.

        If cancelled, it consumes nothing.
        """
        if max_bytes is not None:
            max_bytes = positive_int("max_bytes", max_bytes)
        with self._connection.reading:
            self._connection.check_open()
            if self._connection.buffer:
                self._connection.send_credit = 0
                await trio.lowlevel.checkpoint()
                self._connection.check_open()
            else:
                await self._receive()
            return self._connection.buffer.take_chunk(max_bytes)

    async def __anext__(self) -> bytes:
        """Return the next chunk: ``async for chunk in sock``. If cancelled, it consumes nothing."""
        chunk = await self.receive_some()
        if not chunk:
            raise StopAsyncIteration
        return chunk

    def _incomplete(
        self, expected: int | None, iterating: bool
    ) -> IncompleteReadError | StopAsyncIteration:
        """Return the error for the end of the stream, or the end of an iteration between items."""
        connection = self._connection
        if iterating and not connection.buffer.size:
            return StopAsyncIteration()
        entries, size = connection.buffer.entries(), connection.buffer.size
        failure = new_incomplete_read_error(entries, size, expected, connection.peer)
        return connection.transport.remember_failure(failure)

    def _limit_exceeded(
        self, max_bytes: int, frame_length: int | None = None
    ) -> LimitExceededError:
        # The caller must not keep the error in a variable: the error's traceback would refer to the
        # caller's frame, and the frame to the error.
        failure = new_limit_exceeded_error(
            max_bytes, self._connection.peer, frame_length=frame_length
        )
        return self._connection.transport.remember_failure(failure)

    async def _buffer_at_least(self, n: int, iterating: bool = False) -> bool:
        """Wait until ``n`` bytes are unread. Returns whether it had to wait. Consumes nothing."""
        buffer = self._connection.buffer
        buffer.commit_batch()
        if buffer.size >= n:
            return False
        while buffer.size < n:
            if not await self._receive():
                raise self._incomplete(n, iterating)
        return True

    async def _buffered_checkpoint(self) -> None:
        """Checkpoint before a read that is served from the buffer."""
        self._connection.send_credit = 0
        self._reads_since_checkpoint += 1
        if self._reads_since_checkpoint < READS_PER_CHECKPOINT:
            await trio.lowlevel.checkpoint_if_cancelled()
            return
        self._reads_since_checkpoint = 0
        await trio.lowlevel.checkpoint()
        self._connection.check_open()

    async def _receive(self) -> bool:
        """Wait for one more chunk and buffer it. Returns False at the end of the stream."""
        chunk = await self._receive_chunk()
        self._connection.buffer_received(chunk)
        return bool(chunk)

    async def _receive_chunk(self) -> bytes:
        """Wait for one more chunk and return it. The caller must buffer it or pass it on."""
        connection = self._connection
        if connection.idle is None:
            chunk = await connection.layer.receive()
        else:
            chunk = await receive_idle(connection, connection.idle)
        self._reads_since_checkpoint = 0  # receive is a full checkpoint
        connection.send_credit = 0
        connection.fresh_until = 0.0
        return chunk
