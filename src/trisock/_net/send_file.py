"""How ``Socket.send_file`` reads from any kind of binary file object.

Several sends may share a file, and waiting for a file does not block other tasks. Each kind of file
needs its own way to ensure both:

- A regular file or block device is read by offset, through a duplicate of its descriptor. So the
  file's position does not matter, and the caller may close the file meanwhile.
- A pipe, terminal or socket is polled, also through a duplicate of its descriptor. The wait for
  data needs no thread and can be cancelled at any time.
- An ``io.BytesIO`` is sent with its contents at the time of the call.
- Any other object (``gzip.GzipFile``, a user-defined class) is read in a worker thread. Each call
  in the thread does a seek and a read, under a lock that all sends of the same object share.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import operator
import os
import select
import signal
import socket
import stat
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import trio

from .._arguments import quoted
from .syscalls import HAS_SENDFILE
from .tls_stream import SendState, TLSStream
from .transport import Transport

# How many bytes are read at a time when sendfile(2) is not used.
FILE_CHUNK = 262_144

# The errors that os.sendfile raises for a file or an offset that it does not support.
_SENDFILE_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EOVERFLOW}

# Maximum bytes per os.sendfile call. The call blocks while it reads the file, so a small count
# keeps the event loop's pauses short on a slow disk.
_SENDFILE_SIZE = 1024 * 1024

# How many threads may read at the same time, per limiter. We do not use Trio's default limiter,
# because its threads also resolve host names, which may take minutes. Regular files have one
# limiter and file objects have another, because an object's ``read`` may block for any length of
# time.
_MAX_READERS = 40

# How long (seconds) a cancelled send waits for a thread that is reading from the disk. The thread
# closes the duplicate descriptor after the read. The read is nearly always done within this time,
# so the duplicate is closed before ``send_file`` returns. A slow disk (NFS) may take longer.
_CLOSE_TIMEOUT = 1.0

ResultT = TypeVar("ResultT")

_disk_readers: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("disk readers")
_object_readers: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("object readers")


class Source:
    """The source of a send.

    Attributes:
      consumes: whether a read removes the bytes from the file, as with a pipe.
      size: the size of the file when ``send_file`` was called, or ``None`` if it is unknown.
      descriptor: a descriptor that ``os.sendfile`` can read by offset, or ``None``.
    """

    consumes: bool = False
    size: int | None = None
    descriptor: int | None = None

    async def begin(self) -> None:
        """Prepare for the first read. May wait."""

    async def wait_readable(self) -> bool:
        """Wait until ``read`` can return at once.

        Returns False if the file is known to be at EOF.
        """
        return True

    async def read(self, offset: int, size: int) -> bytes | memoryview | None:
        """Return a piece of the file. The piece is empty at EOF.

        Returns ``None`` if another reader got the data first.
        """
        raise NotImplementedError  # pragma: no cover (every subclass overrides it)

    def has_shrunk(self) -> bool:
        """Return whether the file is now shorter than when ``send_file`` was called."""
        return False

    async def close(self) -> None:
        """Close this source's duplicate descriptor, even if cancelled. Not a checkpoint."""


def open_source(file: Any) -> Source:
    """Return a source for a file object. Not async, so no other task can close the file first."""
    if isinstance(file, io.BytesIO) and _is_builtin(file.read) and _is_builtin(file.getvalue):
        return _InMemory(file.getvalue())  # the bytes are copied only if the file changes later
    raw = _raw_of(file)
    if raw is None:
        return _FileObject(file)
    return _open_descriptor(raw.fileno(), file)


def _raw_of(file: Any) -> io.FileIO | socket.SocketIO | None:
    """Return the raw file below ``file``, if its descriptor gives the same bytes as ``file.read``.

    Returns ``None`` if the bytes may differ: for example for a ``GzipFile`` (which decompresses the
    bytes of its descriptor), and for a class with its own ``read``.
    """
    raw = getattr(file, "raw", file)
    if isinstance(raw, io.FileIO):
        own = type(raw)
        if (own.read, own.readall, own.readinto) != (
            io.FileIO.read,
            io.FileIO.readall,
            io.FileIO.readinto,
        ):
            return None
    elif isinstance(raw, socket.SocketIO):
        if type(getattr(raw, "_sock", None)) is not socket.socket:  # SSLSocket decrypts
            return None
    else:
        return None
    read = getattr(file.read, "__wrapped__", file.read)  # tempfile wraps a file's methods
    reader = getattr(read, "__self__", None)
    if _is_builtin(read) and (reader is raw or getattr(reader, "raw", None) is raw):
        return raw
    return None


def _is_builtin(method: object) -> bool:
    return isinstance(method, types.BuiltinMethodType)


def check_arguments(file: Any, offset: int, count: int | None, progress: object) -> tuple[Any, int]:
    """Return the unwrapped file and the offset as an int, or raise TypeError or ValueError."""
    file = getattr(file, "wrapped", file)  # unwraps the result of trio.open_file
    if isinstance(file, io.TextIOBase) or not hasattr(file, "read"):
        raise TypeError(f"send_file needs a binary file object, not {type(file).__name__}")
    if not getattr(file, "readable", lambda: True)():
        raise ValueError("send_file needs a file that is open for reading")
    offset = operator.index(offset)
    for number in (offset, operator.index(count or 0)):
        if not 0 <= number < 2**63:
            raise ValueError(
                f"offset and count must be 0 or more, and less than 2**63, not {quoted(number)}"
            )
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function, not {quoted(progress)}")
    return file, offset


async def send_file(
    source: Source,
    transport: Transport,
    tls: TLSStream | None,
    offset: int,
    count: int | None,
    on_sent: Callable[[int], None],
) -> None:
    """Send part of a file. Stops early at EOF. A full checkpoint.

    Calls ``on_sent`` with the size of each piece. If the file is too short, ``tls.send_state``
    stays IN_MESSAGE, so that no ``close_notify`` claims that the file was complete.
    """
    if source.consumes and offset:
        why = f"{os.strerror(errno.ESPIPE)}: offset must be 0 for a file that cannot seek"
        raise OSError(errno.ESPIPE, why)
    left: float = math.inf
    if count is not None:
        left = count
    elif source.size is not None:
        left = max(0, source.size - offset)
    descriptor = source.descriptor if tls is None and left else None
    if descriptor is not None and await _sendfile(
        transport, descriptor, offset, int(left), on_sent
    ):
        return
    layer = transport if tls is None else tls
    before = SendState.READY if tls is None else tls.send_state
    started = False
    try:
        while left:
            if source.consumes:
                if not await source.wait_readable():
                    break
                if not started:
                    # Bytes that were read from a pipe cannot be put back. So wait for room to send
                    # before the first read: a cancellation of this wait loses no bytes.
                    transport.check_sending()
                    await layer.wait_writable()
            piece = await source.read(offset, int(min(FILE_CHUNK, left)))
            if piece is None:
                await trio.lowlevel.checkpoint()
                continue
            if not piece:
                break
            started = started or source.consumes
            await layer.send([memoryview(piece)])
            started = True
            if tls is not None:
                tls.enter(SendState.IN_MESSAGE)  # layer.send has reset the state
            offset += len(piece)
            left -= len(piece)
            on_sent(len(piece))
        if not started:
            await layer.send(())  # sends nothing, but checkpoints, and fails if a send would fail
    except BaseException:
        if started:  # the peer cannot tell that the rest of the file is missing
            layer.cut_short()
        raise
    if tls is not None:
        whole = not left or (count is None and not source.has_shrunk())
        tls.enter(before if whole else SendState.IN_MESSAGE)


async def _sendfile(
    transport: Transport, file: int, offset: int, count: int, on_sent: Callable[[int], None]
) -> bool:
    """Send part of a file with sendfile(2), without copying it. A full checkpoint.

    Returns False, and sends nothing, if the kernel cannot send this file. Calls ``on_sent`` with
    the size of each piece. Stops early at the file's EOF. Cancellation has the same effect as in
    ``Transport.send``.
    """
    await trio.lowlevel.checkpoint()
    transport.check_sending()
    if sys.platform == "win32" or not HAS_SENDFILE:
        return False
    if signal.getsignal(signal.SIGPIPE) is signal.SIG_DFL:
        return False  # sendfile(2) has no MSG_NOSIGNAL: SIGPIPE would kill the process
    started = False
    end = offset + count
    try:
        while offset < end:
            size = min(_SENDFILE_SIZE, end - offset)
            try:
                sent = os.sendfile(transport.descriptor(), file, offset, size)
            except BlockingIOError:
                await transport.wait_writable()
                continue
            except OSError as exc:
                if not started and exc.errno in _SENDFILE_UNSUPPORTED:
                    return False
                if exc.errno == errno.EIO:  # an error of the file, not of the connection
                    raise
                raise transport.sending_failed(exc) from exc
            if sent == 0:
                break
            started = True
            offset += sent
            on_sent(sent)
            await trio.lowlevel.checkpoint()
    except BaseException:
        if started:
            transport.cut_short()
        raise
    return True


# ---- kinds of files ----


class _InMemory(Source):
    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self.size = len(content)

    async def read(self, offset: int, size: int) -> memoryview:
        return self._content[offset : offset + size]


class _FileObject(Source):
    """A file object that we access only through its methods.

    Another send of the same object may move the object's position. So one thread call does both a
    seek and a read, under a lock that all sends of the object share.
    """

    # For each object that is being sent: the number of its sends, and the lock that they share. The
    # keys are ids, because some objects cannot be hashed. Each send holds a reference to its
    # object, so no other object can get the same id.
    _locks: ClassVar[dict[int, tuple[int, threading.Lock]]] = {}
    _locks_guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, file: Any, size: int | None = None) -> None:
        self._file = file
        self.size = size
        seekable = getattr(file, "seekable", None)
        self.consumes = not (hasattr(file, "seek") if seekable is None else seekable())
        with self._locks_guard:
            users, self._lock = self._locks.get(id(file), (0, threading.Lock()))
            self._locks[id(file)] = users + 1, self._lock

    async def read(self, offset: int, size: int) -> Any:
        # If cancelled, wait for the thread. An abandoned thread would use the user's object after
        # the send had ended.
        return await _in_thread(_object_readers, self._read, offset, size)

    def _read(self, offset: int, size: int) -> Any:
        with self._lock:
            if not self.consumes:
                self._file.seek(offset)
            data = self._file.read(size)
        if data is None:
            raise BlockingIOError(errno.EAGAIN, "the file has nothing to read at the moment")
        if len(data) > size:
            raise ValueError(
                f"the file's read returned {len(data)} bytes, more than the requested {size}"
            )
        return data

    async def close(self) -> None:
        with self._locks_guard:
            users, lock = self._locks[id(self._file)]
            if users == 1:
                del self._locks[id(self._file)]
            else:
                self._locks[id(self._file)] = users - 1, lock


async def _in_thread(
    readers: trio.lowlevel.RunVar[trio.CapacityLimiter],
    function: Callable[..., ResultT],
    *args: Any,
    abandon_on_cancel: bool = False,
) -> ResultT:
    try:
        limiter = readers.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_MAX_READERS)
        readers.set(limiter)
    return await trio.to_thread.run_sync(
        function, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter
    )


if sys.platform == "win32":  # pragma: no cover (tests run on Linux)

    def _open_descriptor(descriptor: int, file: Any) -> Source:
        # Windows has no pread, and Trio can wait only for sockets there.
        status = os.fstat(descriptor)
        return _FileObject(file, status.st_size if stat.S_ISREG(status.st_mode) else None)

else:

    def _open_descriptor(descriptor: int, file: Any) -> Source:
        duplicate = os.dup(descriptor)
        try:
            status = os.fstat(duplicate)
            if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                return _OnDisk(duplicate, status, file)
            return _Pollable(duplicate, file if isinstance(file, io.BufferedReader) else None)
        except BaseException:
            os.close(duplicate)
            raise

    class _OnDisk(Source):
        """A regular file or a block device.

        Invariant: the duplicate stays open until ``close`` is called. If a thread is reading at
        that moment, the duplicate stays open until the read ends.
        """

        def __init__(self, duplicate: int, status: os.stat_result, file: Any) -> None:
            self._duplicate = duplicate
            self._flush: Callable[[], object] | None = file.flush if file.writable() else None
            self._regular = stat.S_ISREG(status.st_mode)
            self._lock = threading.Lock()
            self._reading = self._closed = False
            self._token: trio.lowlevel.TrioToken | None = None
            self._done = trio.Event()
            self._measure(status)

        def _measure(self, status: os.stat_result) -> None:
            # Files in /proc are generated when read, and report a size of 0.
            if self._regular and status.st_size:
                self.size = status.st_size
                self.descriptor = self._duplicate

        async def begin(self) -> None:
            if self._flush is not None:
                await _in_thread(_disk_readers, self._flush)
                self._measure(os.fstat(self._duplicate))

        async def read(self, offset: int, size: int) -> bytes:
            if self.size is not None and offset >= self.size:
                return b""  # do not call pread(2), which fails at the highest offsets
            data = await _in_thread(_disk_readers, self._read, offset, size, abandon_on_cancel=True)
            if self._regular and self.size is None and os.fstat(self._duplicate).st_size:
                return b""  # the file was empty when send_file was called, and has grown since
            return data

        def _read(self, offset: int, size: int) -> bytes:
            with self._lock:
                if self._closed:  # the send was cancelled before this thread began
                    return b""
                self._reading = True
            try:
                return os.pread(self._duplicate, size, offset)
            finally:
                with self._lock:
                    self._reading = False
                    if self._closed:
                        os.close(self._duplicate)
                if self._token is not None:
                    with contextlib.suppress(trio.RunFinishedError):
                        self._token.run_sync_soon(self._done.set)

        def has_shrunk(self) -> bool:
            return self.size is not None and os.fstat(self._duplicate).st_size < self.size

        async def close(self) -> None:
            with self._lock:
                self._closed = True
                if not self._reading:
                    os.close(self._duplicate)
                    return
                self._token = trio.lowlevel.current_trio_token()
            with trio.move_on_after(_CLOSE_TIMEOUT) as scope:
                scope.shield = True
                await self._done.wait()

    class _Pollable(Source):
        """A pipe, terminal or socket. It has no offsets, and a read may have to wait for data.

        Other programs may share the open file. We do not make the file non-blocking, because that
        would affect these programs. Instead, each read follows a successful poll, with no await in
        between.
        """

        consumes = True

        def __init__(self, duplicate: int, buffered: io.BufferedReader | None) -> None:
            self._duplicate = duplicate
            self._buffered = buffered  # None once Python's buffer is empty
            self._poll = select.poll()
            self._poll.register(duplicate, select.POLLIN)

        def _has_buffered(self) -> bool:
            """Return whether Python's buffer has bytes. Does not read from the descriptor."""
            if self._buffered is not None and not _peek(self._buffered):
                self._buffered = None
            return self._buffered is not None

        async def wait_readable(self) -> bool:
            while not self._has_buffered():
                if events := self._poll.poll(0):
                    # POLLHUP alone means EOF. (A read from a terminal would then fail.)
                    return events[0][1] != select.POLLHUP
                await trio.lowlevel.wait_readable(self._duplicate)
            return True

        async def read(self, offset: int, size: int) -> bytes | None:
            if self._has_buffered():
                assert self._buffered is not None
                return self._buffered.read1(size)
            if self._poll.poll(0):
                with contextlib.suppress(BlockingIOError):
                    return os.read(self._duplicate, size)
            return None

        async def close(self) -> None:
            trio.lowlevel.notify_closing(self._duplicate)  # Trio must forget the descriptor
            os.close(self._duplicate)

    def _peek(file: io.BufferedReader) -> bytes:
        """Return the contents of a file's buffer without filling it.

        If the buffer is empty, ``BufferedReader.peek`` reads from the raw file, and no other method
        shows whether the buffer is empty. So during this call, the raw file reports that a read
        would block.
        """
        attributes = vars(file.raw)
        attributes["readinto"] = lambda _: None
        try:
            return file.peek()
        finally:
            del attributes["readinto"]
