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
from typing import TypeAlias

import trio

from .._arguments import quoted

# How long to wait for another program that is replacing the same path (seconds).
_LOCK_TIMEOUT = 10.0
_LOCK_RETRY = 0.01

# Of every two starters that find a lock file removed, one has made progress: more tries than this
# mean that somebody plays with the file.
_LOCK_TRIES = 100

# Opens an inode without reading it: no permission to read is needed, and devices are not touched.
_O_PATH: int | None = getattr(os, "O_PATH", None)

# Windows has none of these, and no Unix sockets in Python either.
_O_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_O_DIRECTORY: int = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_O_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)

# The mode that a socket's file has between bind(2) and chmod(2) where its mode is asked for: nobody
# can connect, and no socket that is in use looks like this. So the file can be recognized.
_MARK = stat.S_ISUID | stat.S_ISVTX

# The longest path: sun_path has 108 bytes on Linux, 104 on BSD and macOS, one of which ends it.
_MAX_PATH = 107 if sys.platform == "linux" else 103


def unix_path(path: object) -> str | bytes:
    """Return a path that can be bound and connected to, or raise OSError that names it."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"a path is str, bytes or os.PathLike, not {quoted(path)}")
    name = os.fspath(path)
    raw = None
    with contextlib.suppress(UnicodeEncodeError):  # which quotes the whole path
        raw = os.fsencode(name)
    if raw is None:
        raise ValueError("the path of a Unix socket has characters that cannot be encoded")
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
        except PathLockedError as exc:
            if trio.current_time() >= deadline:
                raise OSError(errno.ETIMEDOUT, exc.strerror, exc.filename) from None
        await trio.sleep(_LOCK_RETRY)


def listening_unix_socket_nowait(
    name: str | bytes, mode: int | None, backlog: int
) -> tuple[socket.socket, BoundPath | None]:
    """Do the same at once, or raise PathLockedError."""
    if mode is not None:
        if not isinstance(mode, int) or isinstance(mode, bool):
            raise TypeError(f"mode is an int or None, not a {type(mode).__name__}")
        if not 0 <= mode <= 0o777:  # -1 would let everybody in
            raise ValueError("mode is from 0 to 0o777")
    sock = unix_socket(name)
    try:
        if os.fsencode(name).startswith(b"\0"):
            if mode is not None:
                raise ValueError("an abstract name has no file, and so no mode")
            _bind(sock, name)
            sock.listen(backlog)
            return sock, None
        marked = mode is not None and _mark(sock)
        try:
            _bind(sock, name)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _is_stale(name):
                raise
            # The lock is needed no longer than until bind(2): from then on the path is not stale,
            # also before listen(2).
            with _replacing(name):
                _remove_stale(name)
                _bind(sock, name)
        # Nobody can connect before listen(2).
        if mode is None:
            path = BoundPath(name, _identity(name, os.lstat(name)))
        else:
            path = _set_mode(name, mode, marked)
        try:
            sock.listen(backlog)
        except BaseException:
            path.remove()
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


# ---- the file of a socket ----

Identity: TypeAlias = tuple[int, int]


def _identity(name: str | bytes, status: os.stat_result) -> Identity:
    if not stat.S_ISSOCK(status.st_mode):
        raise _swapped(name)
    return (status.st_dev, status.st_ino)


def _swapped(name: str | bytes) -> OSError:
    text = "somebody has put another file in the place of the socket just bound"
    return OSError(errno.EEXIST, text, os.fsdecode(name))


def _mark(sock: socket.socket) -> bool:
    """Make bind(2) give the file a mode of its own; False where the system does not do that."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        return False
    try:
        os.fchmod(sock.fileno(), _MARK)
    except OSError:
        return False
    return True


def _user() -> int:
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        return 0
    return os.geteuid()


def _set_mode(name: str | bytes, mode: int, marked: bool) -> BoundPath:
    """Set the mode of the socket just bound, and of nothing that has come in its place since."""
    try:
        with _inode(name) as descriptor:
            status = os.lstat(name) if descriptor is None else os.fstat(descriptor)
            if not _is_ours(status, marked):
                raise _swapped(name)
            path = BoundPath(name, _identity(name, status))
            _chmod(path, descriptor, mode)
            path.check()
    except BaseException:
        with contextlib.suppress(OSError):
            status = os.lstat(name)
            if _is_ours(status, marked):
                BoundPath(name, _identity(name, status)).remove()
        raise
    return path


def _is_ours(status: os.stat_result, marked: bool) -> bool:
    """Whether this is the socket just bound.

    Whoever may write to the directory can put another socket there, such as one of ours that is to
    have another mode. Without the mark this cannot be told.
    """
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != _user() or status.st_nlink != 1:
        return False
    return not marked or stat.S_IMODE(status.st_mode) == _MARK


def _chmod(path: BoundPath, descriptor: int | None, mode: int) -> None:
    if descriptor is not None:
        try:
            # fchmod(2) does not take an O_PATH descriptor; C libraries go this way, too.
            os.chmod(f"/proc/self/fd/{descriptor}", mode)
            return
        except FileNotFoundError:  # there is no /proc
            pass
    # Between this look and chmod(2) the path can still be swapped.
    path.check()
    if os.chmod in os.supports_follow_symlinks:
        os.chmod(path.name, mode, follow_symlinks=False)
    else:
        os.chmod(path.name, mode)


@contextlib.contextmanager
def _inode(name: str | bytes) -> Iterator[int | None]:
    """Hold what is at a path open, so that its inode number is not used again meanwhile.

    Gives a descriptor, or None where the system cannot do this. Follows no link.
    """
    if _O_PATH is None:
        yield None
        return
    descriptor = os.open(name, _O_PATH | _O_NOFOLLOW)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


class BoundPath:
    """The file of a Unix socket, known by its inode.

    Only the process that made it removes it: after a fork the child has a copy of this object.
    """

    def __init__(self, name: str | bytes, identity: Identity) -> None:
        self.name = name
        self._path = os.path.abspath(os.fsencode(name))
        self._identity = identity
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise OSError if the path is another's by now."""
        if _identity(self.name, os.lstat(self.name)) != self._identity:
            raise _swapped(self.name)

    def remove(self) -> None:
        """Remove the file if it is still the same."""
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                _unlink(self._path, self._identity)


def _unlink(path: bytes, identity: Identity) -> None:
    """Remove a path if it is still the same file."""
    directory, name = os.path.split(path)
    # Look and remove in one directory, whatever its path leads to meanwhile.
    descriptor = None
    if _O_PATH is not None:
        with contextlib.suppress(OSError):  # no descriptor is left
            descriptor = os.open(directory or b".", _O_PATH | _O_DIRECTORY)
    try:
        where = path if descriptor is None else name
        status = os.stat(where, dir_fd=descriptor, follow_symlinks=False)
        if (status.st_dev, status.st_ino) == identity:
            os.unlink(where, dir_fd=descriptor)
    finally:
        if descriptor is not None:
            os.close(descriptor)


# ---- stale paths ----


def _is_stale(name: str | bytes) -> bool:
    """Whether a path is a socket that no process has bound any more."""
    try:
        if not stat.S_ISSOCK(os.lstat(name).st_mode):
            return False
    except FileNotFoundError:  # its owner has removed it just now
        return True
    # Of another type than the listener is: so a listener that lives says EPROTOTYPE, also before
    # listen(2), and does not find a connection in its queue from which nothing ever comes.
    with unix_socket(name, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(name) == errno.ECONNREFUSED


def _remove_stale(name: str | bytes) -> None:
    """Remove a path if it is (still) stale."""
    with contextlib.suppress(FileNotFoundError), _inode(name) as descriptor:
        status = os.lstat(name) if descriptor is None else os.fstat(descriptor)
        if _is_stale(name):
            try:
                _unlink(os.fsencode(name), (status.st_dev, status.st_ino))
            except OSError as exc:
                raise OSError(exc.errno, exc.strerror, os.fsdecode(name)) from exc


class PathLockedError(BlockingIOError):
    """Another program is replacing the same path."""


@contextlib.contextmanager
def _replacing(name: str | bytes) -> Iterator[None]:
    """Keep other starters from a path between finding that it is stale and binding it.

    The lock is on a file that only this user can open: everybody can lock what he can read, such
    as a directory. Whoever may write to the directory can put another file there. This is then no
    lock of ours, and we go on without: two programs of ours that start in the same instant may
    then both win, but nobody keeps us waiting. Programs of different users do not lock each other
    out either.
    """
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        yield
        return
    import fcntl

    directory, base = os.path.split(os.fsencode(name))
    path = os.path.join(directory, b".%s.%d.lock" % (base, _user()))
    for _ in range(_LOCK_TRIES):
        descriptor = _open_lock(path)
        if descriptor is None:
            yield
            return
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                break
            status = os.fstat(descriptor)
            if status.st_nlink == 0:  # its last holder has removed it
                continue
            try:
                yield
            finally:
                # Before the lock is released: others open a new file from now on.
                with contextlib.suppress(OSError):
                    _unlink(path, (status.st_dev, status.st_ino))
            return
        finally:
            os.close(descriptor)
    raise PathLockedError(
        errno.EAGAIN, "another program is starting to listen there", os.fsdecode(name)
    )


def _open_lock(path: bytes) -> int | None:
    """Open the lock file, or return None if what is there is not ours."""
    flags = os.O_RDWR | os.O_CREAT | _O_NOFOLLOW | _O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None  # a link, a directory, another user's file; or no file can be made here
    status = os.fstat(descriptor)
    if (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == _user()
        and not stat.S_IMODE(status.st_mode) & 0o077
        and status.st_nlink <= 1
    ):
        return descriptor
    os.close(descriptor)
    return None
