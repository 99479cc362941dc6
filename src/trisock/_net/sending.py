"""Sender: every way to send on a connection."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import BinaryIO

import trio

from .._arguments import Buffer, bytes_view
from .._errors import TLSError, unraised_copy
from .._text import message_without_peer, set_message
from .connection import Connection
from .frame_header import frame_header
from .send_file import check_arguments, open_source, send_file

# Consecutive sends are cheaper if not all of them are schedule points (benchmark row send). Between
# two schedule points, they may send _SEND_CREDIT bytes. Each send counts as at least _MIN_CREDIT
# bytes. So there is a schedule point at least once per 16 sends, and at least once per MiB.
_MIN_CREDIT = 65536
_SEND_CREDIT = 15 * _MIN_CREDIT


class Sender(trio.abc.SendStream):
    """The send methods of ``Socket``.

    This is a base class of ``Socket`` for the same reason as ``BufferedReceiver``, which sets the
    attribute ``_connection``.
    """

    __slots__ = ()

    _connection: Connection

    async def send(self, *buffers: Buffer) -> None:
        """Send all bytes of all buffers, in order, with as few system calls as possible.

        On a plain-text connection the buffers are not copied, so do not modify them before ``send``
        returns.

        Every call is a cancel point. The first ``send`` after a read is a schedule point, so other
        tasks run. Consecutive sends after it include a schedule point at least once per 16 calls,
        and at least once per MiB of data.

        Raises:
          trio.BrokenResourceError: the connection is broken (``TLSError`` is a subclass). Data
            that the peer sent earlier can still be read.
          TypeError: a buffer is not bytes, bytearray or memoryview. Nothing was sent.

        If cancelled before the first byte is sent, nothing changes. If cancelled later, an unknown
        part of the data was sent, and every later send fails (``BrokenResourceError``). Under TLS
        every later read also fails. Source: Pluto's ``socket.send``.
        """
        views: tuple[bytes | memoryview, ...]
        if len(buffers) == 1 and type(buffers[0]) is bytes:
            views = (buffers[0],)
        else:
            views = tuple(map(bytes_view, buffers))
        # This is the hot path (benchmark rows echo1 and send). It inlines this code:
        # ``async with connection.sending: await connection.send(views)``.
        connection = self._connection
        lock = connection.sending
        if lock.in_use:
            lock.check()
        credit = connection.send_credit
        if credit:
            credit -= max(_MIN_CREDIT, sum(map(len, views)))
        if credit <= 0 or connection.buffer.in_batch:
            schedule, connection.send_credit = True, _SEND_CREDIT
        else:
            schedule, connection.send_credit = False, credit
        lock.in_use = True
        try:
            if lock.locked:
                await lock.acquire()
            else:
                lock.locked = True
            try:
                await connection.layer.send(views, schedule=schedule)
            except trio.BrokenResourceError:
                connection.raise_pending_alert()
                raise
            finally:
                if lock.waiters:
                    lock.release()
                else:
                    lock.locked = False
        finally:
            lock.in_use = False

    async def send_frame(self, *buffers: Buffer, header: str | int = "!I") -> None:
        """Send one length-prefixed frame, whose body consists of all buffers.

        Args:
          buffers: the parts of the body.
          header: the format of the length in front of the body, as in ``frames``.

        Raises:
          ValueError: the body is too long for the header, or ``header`` is invalid. Nothing was
            sent.
          trio.BrokenResourceError, TypeError: as in ``send``.

        Cancellation has the same effect as in ``send``.
        """
        try:
            views = tuple(map(bytes_view, buffers))
        except TypeError as exc:
            if str not in map(type, buffers):
                raise
            raise TypeError(f"{exc} (pass the format of the header as header=)") from None
        await self.send(frame_header(header).pack(sum(map(len, views))), *views)

    async def send_all(self, data: Buffer) -> None:
        """Do the same as ``send(data)``, except that every call is a full checkpoint.

        This method implements ``trio.abc.SendStream``. Cancellation has the same effect as in
        ``send``.
        """
        self._connection.send_credit = 0
        await self.send(data)

    async def wait_send_all_might_not_block(self) -> None:
        """Wait until a send might not block. See ``trio.abc.SendStream``.

        If cancelled, nothing changes.
        """
        async with self._connection.sending:
            self._connection.check_open()
            await self._connection.layer.wait_writable()

    async def send_file(
        self,
        file: BinaryIO | io.IOBase,
        offset: int = 0,
        count: int | None = None,
        *,
        progress: Callable[[int], object] | None = None,
    ) -> int:
        """Send a file, or a part of it.

        On a plain-text connection the kernel sends a regular file (``os.sendfile``). Otherwise,
        worker threads read the regular file at explicit offsets. Either way, other code may
        meanwhile close the file or move its position. A pipe, a terminal or a socket is read when
        it has data. Any other file object is read piece by piece, with one seek and one read for
        each piece. Several ``send_file`` calls may share such an object, but no other code may use
        it at the same time.

        Args:
          file: a binary file object that is open for reading, or the result of ``trio.open_file``.
            The file's position is ignored, and ``send_file`` may change it.
          offset: where to start, in bytes.
          count: how many bytes to send. The default, ``None``, means all bytes: a regular file or
            an ``io.BytesIO`` is sent up to its size at the time of the call, and any other file up
            to EOF.
          progress: a function that is called after each piece, with the number of bytes sent so
            far.

        Returns: the number of bytes sent. If ``count`` is ``None`` and a regular file shrinks
        meanwhile, fewer bytes are sent than the file had at the time of the call.

        Raises:
          EOFError: the file ended before ``count`` bytes. The message says how many bytes were
            sent. The peer gets these bytes. Under TLS, a later ``close`` sends no ``close_notify``,
            because ``close_notify`` would claim that the data is complete.
          trio.BrokenResourceError: the connection is broken. The message says how many bytes were
            sent. If worker threads read the file, only complete pieces of 256 KiB are counted.
          OSError: the file cannot be read. If part of the file was sent, every later send fails.
          ValueError, TypeError: an argument is invalid, or ``file`` is not readable or not binary.

        Cancellation has the same effect as in ``send``. Bytes that were read from a pipe cannot be
        put back, so they count as sent. The first read from a pipe therefore waits until there is
        room to send. A wait for data from a pipe can be cancelled at any time. The ``read`` method
        of a file object (such as a ``gzip.GzipFile``) runs in a thread. A cancelled ``send_file``
        waits until ``read`` returns.

        ``os.sendfile`` is not used while SIGPIPE has its default action, because a peer that closes
        the connection could then kill the process.
        """
        file, offset = check_arguments(file, offset, count, progress)
        self._connection.check_open()
        sent = 0

        def on_sent(size: int) -> None:
            nonlocal sent
            sent += size
            if progress is not None:
                progress(sent)

        # ``with`` excludes the application's other senders, but not broadcasts. ``acquire`` also
        # excludes broadcasts. ``begin`` may wait for the disk, so we call ``acquire`` only after
        # ``begin``: a broadcast need not wait for the disk.
        with self._connection.sending:
            # Open the source before any await: during an await, the caller may close the file, and
            # another file may get its descriptor number.
            source = open_source(file)
            try:
                await source.begin()
                await self._connection.sending.acquire()
                try:
                    self._connection.check_open()
                    with trio.CancelScope() as scope:
                        self._connection.sending_file = scope
                        await send_file(
                            source,
                            self._connection.transport,
                            self._connection.tls,
                            offset,
                            count,
                            on_sent,
                        )
                finally:
                    self._connection.sending_file = None
                    self._connection.sending.release()
                if scope.cancelled_caught:
                    self._connection.check_open()
            except trio.BrokenResourceError as exc:
                raise self._connection.transport.remember_failure(
                    self._file_failure(exc, sent)
                ) from exc
            finally:
                await source.close()
        if count is not None and sent < count:
            peer = self._connection.peer
            raise EOFError(f"the file ended after {sent} of {count} bytes were sent to {peer}")
        return sent

    def _file_failure(self, exc: trio.BrokenResourceError, sent: int) -> trio.BrokenResourceError:
        try:
            self._connection.raise_pending_alert()
        except TLSError as alert:
            exc = alert
        after = f", after {sent} bytes of the file"
        without_peer = (message_without_peer(exc) or str(exc)) + after
        return set_message(unraised_copy(exc), str(exc) + after, without_peer=without_peer)

    async def send_eof(self) -> None:
        """Close the sending half (FIN). Reading still works. A second call changes nothing.

        Raises:
          NotImplementedError: under TLS, because ``trio.SSLStream`` has no half-closed state.
          trio.BrokenResourceError: the connection is broken, or an earlier send was cut short. (FIN
            would claim that the data is complete.)

        If cancelled, FIN may or may not have been sent.
        """
        async with self._connection.sending:
            self._connection.check_open()
            if self._connection.tls is not None:
                raise NotImplementedError(
                    f"{self._connection.transport} uses TLS, which has no half-closed state: "
                    "call close, or mark the end of your data in the protocol"
                )
            await self._connection.transport.send_eof()
