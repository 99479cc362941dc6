"""A Unix socket's path: checked, bound, found stale or alive, and taken away again."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import sys
from collections.abc import Iterator

import trio

from ._address import quoted

# How long to wait for another program that is starting to listen in the same directory (seconds).
_LOCK_TIMEOUT = 10.0
_LOCK_RETRY = 0.01

# The longest path: sun_path has 108 bytes on Linux, 104 on BSD and macOS, one of which ends it.
_MAX_PATH = 107 if sys.platform == "linux" else 103


def unix_path(path: object) -> str | bytes:
    """Return a path that can be bound and connected to, or raise OSError that names it."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"a path is str, bytes or os.PathLike, not {quoted(path)}")
    name = os.fspath(path)
    raw = os.fsencode(name)
    if not raw:
        raise ValueError("the path of a Unix socket is empty")
    if b"\0" in raw[1:] and not raw.startswith(b"\0"):
        raise ValueError("the path of a Unix socket holds a NUL")
    if len(raw) > _MAX_PATH:
        text = f"the path of a Unix socket has at most {_MAX_PATH} bytes, not {len(raw)}"
        # It may be a key, given in the wrong place: then it is not quoted.
        if re.fullmatch(rb"[!-~]*", raw) and not re.search(rb"(?=[^/]{33})[^/]*[0-9]", raw):
            raise OSError(errno.ENAMETOOLONG, text, os.fsdecode(name))
        raise OSError(errno.ENAMETOOLONG, text)
    return name


def unix_socket(name: str | bytes, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a new Unix socket, for a path; OSError where the platform has none."""
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "there are no Unix sockets on this platform")
    try:
        return socket.socket(socket.AF_UNIX, kind)
    except OSError as exc:  # no descriptor is left, for instance
        raise OSError(exc.errno, exc.strerror, os.fsdecode(name)) from exc


async def listening_unix_socket(
    name: str | bytes, mode: int | None, backlog: int
) -> tuple[socket.socket, BoundPath | None]:
    """Listen on a path; return the socket, and the file that goes away with it, if it has one."""
    await trio.lowlevel.checkpoint()
    deadline = trio.current_time() + _LOCK_TIMEOUT
    while True:
        try:
            return listening_unix_socket_nowait(name, mode, backlog)
        except DirectoryLockedError as exc:
            if trio.current_time() >= deadline:
                raise OSError(errno.ETIMEDOUT, exc.strerror, exc.filename) from None
        await trio.sleep(_LOCK_RETRY)


def listening_unix_socket_nowait(
    name: str | bytes, mode: int | None, backlog: int
) -> tuple[socket.socket, BoundPath | None]:
    """Do the same at once, or raise DirectoryLockedError."""
    sock = unix_socket(name)
    try:
        if os.fsencode(name).startswith(b"\0"):
            if mode is not None:
                raise ValueError("an abstract name has no file, and so no mode")
            _bind(sock, name)
            sock.listen(backlog)
            return sock, None
        with _directory_lock(name):
            try:
                _bind(sock, name)
            except OSError as exc:
                if exc.errno != errno.EADDRINUSE or not _is_stale(name):
                    raise
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(name)
                _bind(sock, name)
            try:
                # Nobody can connect before listen(2).
                if mode is not None:
                    os.chmod(name, mode)
                path = BoundPath(name)
                sock.listen(backlog)
            except BaseException:
                os.unlink(name)
                raise
            return sock, path
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, name: str | bytes) -> None:
    try:
        sock.bind(name)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, os.fsdecode(name)) from exc


def _is_stale(name: str | bytes) -> bool:
    """Whether a path is a socket to which nobody listens any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(name).st_mode):
            return False
    except FileNotFoundError:  # its owner has removed it just now
        return True
    # Of another type than the listener is: so a listener that lives says EPROTOTYPE, and does not
    # find a connection in its queue from which nothing ever comes.
    with unix_socket(name, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(name) == errno.ECONNREFUSED


class DirectoryLockedError(BlockingIOError):
    """Another program is starting to listen in the same directory."""


@contextlib.contextmanager
def _directory_lock(name: str | bytes) -> Iterator[None]:
    """Keep other starters from a path between finding that it is stale and replacing it.

    The lock is on the directory: a lock file would stay behind, or be removed under a waiter.
    """
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        yield
        return
    import fcntl

    directory = os.path.dirname(os.fsencode(name)) or b"."
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as exc:
        raise OSError(exc.errno, exc.strerror, os.fsdecode(name)) from exc
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as exc:
            raise DirectoryLockedError(
                exc.errno, "another program keeps the directory locked", os.fsdecode(name)
            ) from None
        yield
    finally:
        os.close(descriptor)


class BoundPath:
    """The file of a Unix socket, known by its inode."""

    def __init__(self, name: str | bytes) -> None:
        self._path = os.path.abspath(name)
        self._identity = self._look()

    def _look(self) -> tuple[int, int] | None:
        try:
            status = os.lstat(self._path)
        except OSError:
            return None
        return (status.st_dev, status.st_ino)

    def remove(self) -> None:
        """Remove the file if it is still the same."""
        if self._identity is not None and self._look() == self._identity:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
