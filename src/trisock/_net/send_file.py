"""What ``Socket.send_file`` sends: the bytes of a file object, whichever kind it is.

Nobody who uses the same file changes what is sent, and no wait for a file holds up anything else:

- a regular file or a block device is read by offset, on a duplicate of its descriptor. So its
  position does not matter, and the file may be closed in the meantime;
- a pipe, a terminal or a socket is polled, on a duplicate too. A silent one costs no thread, and
  the wait can be cancelled at any time;
- of an ``io.BytesIO`` we take what it holds at the call;
- anything else (``gzip.GzipFile``, a class of the program's) is asked to seek and to read in one
  call in a worker thread, under a lock that all sends of this object share.
"""

from __future__ import annotations

import contextlib
import errno
import io
import math
import os
import select
import socket
import stat
import sys
import threading
import types
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import trio

from .tls_stream import TLSConnection
from .transport import Transport

# How many bytes are read at a time where the kernel does not send the file by itself.
FILE_CHUNK = 262_144

# How many threads read at the same time. Files have threads of their own, because the usual ones
# (``trio.to_thread``) also look up names, which may take minutes. Regular files do not share theirs
# with file objects of the program's, whose ``read`` may wait for anything.
_READERS = 40

# How long a cancelled send waits for the thread that is reading from the disk. Nearly always the
# thread is done by then, and the duplicate is closed before ``send_file`` ends. A disk that does
# not answer (NFS) takes longer; then the thread closes it.
_PATIENCE = 1.0

ResultT = TypeVar("ResultT")

_disk_readers: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("disk readers")
_object_readers: trio.lowlevel.RunVar[trio.CapacityLimiter] = trio.lowlevel.RunVar("object readers")


class Source:
    """What there is to send of a file object.

    Attributes:
      size: how many bytes a regular file had at the call; ``None`` where the end is not known.
      descriptor: what ``os.sendfile`` can read by offset; ``None`` if there is no such thing.
      takes: whether bytes that were read are gone from the file, as they are from a pipe.
    """

    takes: bool = False
    size: int | None = None
    descriptor: int | None = None

    async def begin(self) -> None:
        """Do what must be done before the first read and may have to wait."""

    async def wait_readable(self) -> bool:
        """Wait until ``read`` gives something. False if the end is known without a read."""
        return True

    async def read(self, offset: int, size: int) -> bytes | memoryview | None:
        """Return a piece; empty at the end, ``None`` if another reader was faster."""
        raise NotImplementedError  # pragma: no cover (each kind has its own)

    def has_shrunk(self) -> bool:
        """Whether the file is shorter than it was at the call."""
        return False

    async def close(self) -> None:
        """Close what this has opened, also when cancelled. Not a checkpoint."""


def open_source(file: Any) -> Source:
    """Take hold of a file object, without any wait: from here on nobody can exchange it."""
    if isinstance(file, io.BytesIO) and _is_builtin(file.read) and _is_builtin(file.getvalue):
        return _Memory(file.getvalue())  # which copies nothing, until somebody writes to the file
    raw = _raw_of(file)
    if raw is None:
        return _FileObject(file)
    return _open_descriptor(raw.fileno(), file)


def _raw_of(file: Any) -> io.FileIO | socket.SocketIO | None:
    """Return the raw file below a file object, if what that reads is what the descriptor gives.

    Not so for a ``GzipFile``, which has a descriptor, nor for a class that has its own ``read``.
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
        if type(getattr(raw, "_sock", None)) is not socket.socket:  # an SSLSocket decrypts
            return None
    else:
        return None
    read = getattr(file.read, "__wrapped__", file.read)  # tempfile wraps the methods of a file
    reader = getattr(read, "__self__", None)
    if _is_builtin(read) and (reader is raw or getattr(reader, "raw", None) is raw):
        return raw
    return None


def _is_builtin(method: object) -> bool:
    return isinstance(method, types.BuiltinMethodType)


async def send_file(
    source: Source,
    transport: Transport,
    tls: TLSConnection | None,
    offset: int,
    count: int | None,
    on_sent: Callable[[int], None],
) -> None:
    """Send a part of a file. Ends early where the file does. A full checkpoint.

    Calls ``on_sent`` with the size of each piece. Under TLS, a file that ended early leaves
    ``tls.unfinished`` set: no ``close_notify`` vouches for the part.
    """
    if source.takes and offset:
        raise OSError(errno.ESPIPE, os.strerror(errno.ESPIPE))
    left: float = math.inf
    if count is not None:
        left = count
    elif source.size is not None:
        left = max(0, source.size - offset)
    descriptor = source.descriptor if tls is None and left else None
    if descriptor is not None and await transport.send_file(descriptor, offset, int(left), on_sent):
        return
    layer = transport if tls is None else tls
    was_unfinished = tls is not None and tls.unfinished
    started = False
    try:
        while left:
            if source.takes:
                if not await source.wait_readable():
                    break
                if not started:
                    # What was taken from a pipe cannot be put back. So nothing is taken before it
                    # can be sent: until then, cancelling loses nothing.
                    transport.check_sending()
                    await layer.wait_writable()
            piece = await source.read(offset, int(min(FILE_CHUNK, left)))
            if piece is None:
                await trio.lowlevel.checkpoint()
                continue
            if not piece:
                break
            started = started or source.takes
            await layer.send([memoryview(piece)])
            started = True
            if tls is not None:
                tls.unfinished = True  # send has just put it back
            offset += len(piece)
            left -= len(piece)
            on_sent(len(piece))
        if not started:
            await layer.send(())  # raises what a send would, and is a checkpoint
    except BaseException:
        if started:  # the peer cannot know that the rest of the file will not come
            layer.cut_off()
        raise
    if tls is not None:
        whole = not left or (count is None and not source.has_shrunk())
        tls.unfinished = was_unfinished or not whole


# ---- the kinds of files ----


class _Memory(Source):
    def __init__(self, content: bytes) -> None:
        self._content = memoryview(content)
        self.size = len(content)

    async def read(self, offset: int, size: int) -> memoryview:
        return self._content[offset : offset + size]


class _FileObject(Source):
    """A file object of which nothing is known but its methods.

    Its position is everybody's. So each read seeks first, and both are one call in a thread, which
    no other send of the same object can interrupt.
    """

    # Those that are being sent from: how many sends, and what they lock. By identity, since an
    # object of the program's may be of a class that cannot be hashed. An entry keeps its number
    # from being given to another object: each send holds the object.
    _shared: ClassVar[dict[int, tuple[int, threading.Lock]]] = {}
    _guard: ClassVar[threading.Lock] = threading.Lock()

    def __init__(self, file: Any, size: int | None = None) -> None:
        self._file = file
        self.size = size
        seekable = getattr(file, "seekable", None)
        self.takes = not (hasattr(file, "seek") if seekable is None else seekable())
        with self._guard:
            users, self._lock = self._shared.get(id(file), (0, threading.Lock()))
            self._shared[id(file)] = users + 1, self._lock

    async def read(self, offset: int, size: int) -> Any:
        # Not abandoned when cancelled: a thread that went on would use the program's object when
        # the program does not expect it any more.
        return await _in_thread(_object_readers, self._read, offset, size)

    def _read(self, offset: int, size: int) -> Any:
        with self._lock:
            if not self.takes:
                self._file.seek(offset)
            data = self._file.read(size)
        if data is None:
            raise BlockingIOError(errno.EAGAIN, "the file has nothing to read at the moment")
        if len(data) > size:
            raise ValueError(
                f"the file's read returned {len(data)} bytes where {size} were asked for"
            )
        return data

    async def close(self) -> None:
        with self._guard:
            users, lock = self._shared[id(self._file)]
            if users == 1:
                del self._shared[id(self._file)]
            else:
                self._shared[id(self._file)] = users - 1, lock


async def _in_thread(
    readers: trio.lowlevel.RunVar[trio.CapacityLimiter],
    function: Callable[..., ResultT],
    *args: Any,
    abandon_on_cancel: bool = False,
) -> ResultT:
    try:
        limiter = readers.get()
    except LookupError:
        limiter = trio.CapacityLimiter(_READERS)
        readers.set(limiter)
    return await trio.to_thread.run_sync(
        function, *args, abandon_on_cancel=abandon_on_cancel, limiter=limiter
    )


if sys.platform == "win32":  # pragma: no cover (tests run on Linux)

    def _open_descriptor(descriptor: int, file: Any) -> Source:
        # There is no pread, and only sockets can be waited for.
        status = os.fstat(descriptor)
        return _FileObject(file, status.st_size if stat.S_ISREG(status.st_mode) else None)

else:

    def _open_descriptor(descriptor: int, file: Any) -> Source:
        duplicate = os.dup(descriptor)
        try:
            status = os.fstat(duplicate)
            if stat.S_ISREG(status.st_mode) or stat.S_ISBLK(status.st_mode):
                return _OnDisk(duplicate, status, file)
            return _Stream(duplicate, file if isinstance(file, io.BufferedReader) else None)
        except BaseException:
            os.close(duplicate)
            raise

    class _OnDisk(Source):
        """A regular file or a block device.

        Invariant: the duplicate is open until ``close``, and on while a thread reads from it.
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
            # Files in /proc are made when they are read, and say that their size is 0.
            if self._regular and status.st_size:
                self.size = status.st_size
                self.descriptor = self._duplicate

        async def begin(self) -> None:
            if self._flush is not None:
                await _in_thread(_disk_readers, self._flush)
                self._measure(os.fstat(self._duplicate))

        async def read(self, offset: int, size: int) -> bytes:
            if self.size is not None and offset >= self.size:
                return b""  # pread(2) refuses the highest offsets
            data = await _in_thread(_disk_readers, self._read, offset, size, abandon_on_cancel=True)
            if self._regular and self.size is None and os.fstat(self._duplicate).st_size:
                return b""  # it was empty at the call, and has grown since
            return data

        def _read(self, offset: int, size: int) -> bytes:
            with self._lock:
                if self._closed:  # given up before the thread began
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
            with trio.move_on_after(_PATIENCE) as scope:
                scope.shield = True
                await self._done.wait()

    class _Stream(Source):
        """A pipe, a terminal, a socket: what has no offsets and may be silent.

        Its descriptor may be shared with other programs, so it is not made non-blocking: that would
        change theirs. Each read follows a poll that has found something, with no await between
        them.
        """

        takes = True

        def __init__(self, duplicate: int, buffered: io.BufferedReader | None) -> None:
            self._duplicate = duplicate
            self._buffered = buffered  # None once its buffer is empty
            self._poll = select.poll()
            self._poll.register(duplicate, select.POLLIN)

        def _has_buffered(self) -> bool:
            """Whether Python has read ahead. Reads nothing."""
            if self._buffered is not None and not _peek(self._buffered):
                self._buffered = None
            return self._buffered is not None

        async def wait_readable(self) -> bool:
            while not self._has_buffered():
                if events := self._poll.poll(0):
                    # Only a hang-up: the end. (On a terminal a read would be an error then.)
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
            trio.lowlevel.notify_closing(self._duplicate)  # Trio must forget the number
            os.close(self._duplicate)

    def _peek(file: io.BufferedReader) -> bytes:
        """Return what a file has in its buffer, and do not fill it.

        ``peek`` reads from the raw file if the buffer is empty, and there is no other way to ask.
        So the raw file says for this moment that it would block.
        """
        attributes = vars(file.raw)
        attributes["readinto"] = lambda _: None
        try:
            return file.peek()
        finally:
            del attributes["readinto"]
