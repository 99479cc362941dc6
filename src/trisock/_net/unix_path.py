"""Unix socket paths: check and bind them, replace stale ones, and remove them."""

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

# How long (seconds) to wait for another program that is replacing the same path.
_LOCK_TIMEOUT = 10.0
_LOCK_RETRY_SECONDS = 0.01

# Two programs may race to lock a file that the lock's previous holder has removed. The program that
# loses the race retries. If it loses this many times, somebody is probably tampering with the file.
_LOCK_TRIES = 100

# O_PATH opens a file without reading it. This needs no read permission and does not affect devices.
_O_PATH: int | None = getattr(os, "O_PATH", None)

# Windows lacks these flags, but does not need them: Python has no Unix sockets on Windows.
_O_NOFOLLOW: int = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_O_DIRECTORY: int = getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_O_NONBLOCK: int = getattr(os, "O_NONBLOCK", 0)

# If the caller sets a mode, the socket's file has this marker mode from bind(2) to chmod(2). Nobody
# can connect to a file with this mode. No socket in use has this mode, so this mode identifies our
# file.
_MARKER_MODE = stat.S_ISUID | stat.S_ISVTX

#: The start of the message if connecting to a path fails. The path is the error's ``filename``.
CANNOT_CONNECT = "cannot connect: "

# Maximum length of a path, in bytes. sun_path has 108 bytes on Linux, and 104 bytes on BSD and
# macOS, including the final NUL.
_MAX_PATH = 107 if sys.platform == "linux" else 103


def unix_path(path: object) -> str | bytes:
    """Check a path to bind or connect to, and return it. Raises OSError if it is too long."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise TypeError(f"a path must be str, bytes or os.PathLike, not {quoted(path)}")
    name = os.fspath(path)
    raw = None
    with contextlib.suppress(UnicodeEncodeError):  # that error would quote the whole path
        raw = os.fsencode(name)
    if raw is None:
        raise ValueError("the path of a Unix socket has characters that cannot be encoded")
    if not raw:
        raise ValueError("the path of a Unix socket is empty")
    if b"\0" in raw[1:] and not raw.startswith(b"\0"):
        raise ValueError("the path of a Unix socket contains a NUL")
    if len(raw) > _MAX_PATH:
        text = f"the path of a Unix socket must have at most {_MAX_PATH} bytes, not {len(raw)}"
        # Quote the path, unless it may be a private key that was passed by mistake.
        if re.fullmatch(rb"[!-~]*", raw) and not re.search(rb"(?=[^/]{33})[^/]*[0-9]", raw):
            raise OSError(errno.ENAMETOOLONG, text, os.fsdecode(name))
        raise OSError(errno.ENAMETOOLONG, text)
    return name


def unix_socket(name: str | bytes, kind: int = socket.SOCK_STREAM) -> socket.socket:
    """Return a new Unix socket for a path. Raises OSError if the platform has no Unix sockets."""
    if not hasattr(socket, "AF_UNIX"):
        raise OSError(errno.EAFNOSUPPORT, "there are no Unix sockets on this platform")
    try:
        return socket.socket(socket.AF_UNIX, kind)
    except OSError as exc:  # such as EMFILE
        raise OSError(exc.errno, exc.strerror, os.fsdecode(name)) from exc


async def listening_unix_socket(
    name: str | bytes, mode: int | None, backlog: int
) -> tuple[socket.socket, BoundPath | None]:
    """Listen on a path. Returns the socket, and its file (``None`` for an abstract name).

    Waits up to ``_LOCK_TIMEOUT`` for another program that is replacing the path.
    """
    await trio.lowlevel.checkpoint()
    deadline = trio.current_time() + _LOCK_TIMEOUT
    while True:
        try:
            return listening_unix_socket_nowait(name, mode, backlog)
        except PathLockedError as exc:
            if trio.current_time() >= deadline:
                raise OSError(errno.ETIMEDOUT, exc.strerror, exc.filename) from None
        await trio.sleep(_LOCK_RETRY_SECONDS)


def listening_unix_socket_nowait(
    name: str | bytes, mode: int | None, backlog: int
) -> tuple[socket.socket, BoundPath | None]:
    """Do what ``listening_unix_socket`` does, but raise PathLockedError instead of waiting."""
    if mode is not None:
        if not isinstance(mode, int) or isinstance(mode, bool):
            raise TypeError(f"mode must be an int or None, not a {type(mode).__name__}")
        if not 0 <= mode <= 0o777:  # -1 would give everybody access
            raise ValueError(f"mode must be from 0 to 0o777, not {quoted(mode)}")
    sock = unix_socket(name)
    try:
        if os.fsencode(name).startswith(b"\0"):
            if mode is not None:
                raise ValueError("an abstract name has no file, and therefore no mode")
            _bind(sock, name)
            sock.listen(backlog)
            return sock, None
        marked = mode is not None and _set_marker_mode(sock)
        try:
            _bind(sock, name)
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE or not _is_stale(name):
                raise
            # The lock is needed only until bind(2). A bound path is not stale, even before
            # listen(2).
            with _replace_lock(name):
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
        raise OSError(exc.errno, f"cannot listen: {exc.strerror}", os.fsdecode(name)) from exc


# ---- the file of a socket ----

Identity: TypeAlias = tuple[int, int]


def _identity(name: str | bytes, status: os.stat_result) -> Identity:
    if not stat.S_ISSOCK(status.st_mode):
        raise _replaced_error(name)
    return (status.st_dev, status.st_ino)


def _replaced_error(name: str | bytes) -> OSError:
    text = "cannot listen: another file has replaced the socket that was just bound"
    return OSError(errno.EEXIST, text, os.fsdecode(name))


def _set_marker_mode(sock: socket.socket) -> bool:
    """Make bind(2) create the file with the marker mode. Returns False if that is impossible."""
    if sys.platform != "linux":  # pragma: no cover (tests run on Linux)
        return False
    try:
        os.fchmod(sock.fileno(), _MARKER_MODE)
    except OSError:
        return False
    return True


def _euid() -> int:
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        return 0
    return os.geteuid()


def _set_mode(name: str | bytes, mode: int, marked: bool) -> BoundPath:
    """Set the mode of the newly bound socket. Raises OSError if another file has replaced it."""
    try:
        with _hold_inode(name) as descriptor:
            status = os.lstat(name) if descriptor is None else os.fstat(descriptor)
            if not _is_ours(status, marked):
                raise _replaced_error(name)
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
    """Return whether this file is the socket that we just bound.

    Anyone who may write to the directory can replace the file with another socket, even with one of
    our own that needs a different mode. Only the marker mode identifies the socket that we just
    bound.
    """
    if not stat.S_ISSOCK(status.st_mode) or status.st_uid != _euid() or status.st_nlink != 1:
        return False
    return not marked or stat.S_IMODE(status.st_mode) == _MARKER_MODE


def _chmod(path: BoundPath, descriptor: int | None, mode: int) -> None:
    if descriptor is not None:
        try:
            # fchmod(2) does not support O_PATH descriptors. So use /proc, as C libraries do.
            os.chmod(f"/proc/self/fd/{descriptor}", mode)
            return
        except FileNotFoundError:  # no /proc
            pass
    # The file can still be replaced between this check and chmod(2).
    path.check()
    if os.chmod in os.supports_follow_symlinks:
        os.chmod(path.name, mode, follow_symlinks=False)
    else:
        os.chmod(path.name, mode)


@contextlib.contextmanager
def _hold_inode(name: str | bytes) -> Iterator[int | None]:
    """Keep the file at a path open, so that its inode number is not reused meanwhile.

    Yields a descriptor, or None if the system cannot do this. Does not follow links.
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
    """The file of a Unix socket, identified by its inode.

    Only the process that bound the socket removes the file. A forked child has a copy of this
    object, but does not remove the file.
    """

    def __init__(self, name: str | bytes, identity: Identity) -> None:
        self.name = name
        self._path = os.path.abspath(os.fsencode(name))
        self._identity = identity
        self._pid = os.getpid()

    def check(self) -> None:
        """Raise OSError if another file has replaced this file."""
        if _identity(self.name, os.lstat(self.name)) != self._identity:
            raise _replaced_error(self.name)

    def remove(self) -> None:
        """Remove this file, unless another file has replaced it."""
        if os.getpid() == self._pid:
            with contextlib.suppress(OSError):
                _unlink(self._path, self._identity)


def _unlink(path: bytes, identity: Identity) -> None:
    """Remove the file at a path, if the file still has this identity."""
    directory, name = os.path.split(path)
    # Open the directory, so that the check and the removal happen in the same directory, even if
    # the directory's path changes meanwhile.
    descriptor = None
    if _O_PATH is not None:
        with contextlib.suppress(OSError):  # such as EMFILE
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
    """Return whether a path does not exist, or its file is a socket that is no longer open."""
    try:
        if not stat.S_ISSOCK(os.lstat(name).st_mode):
            return False
    except FileNotFoundError:  # its owner may have just removed it
        return True
    # The probe is a datagram socket, and a listener is a stream socket. So connecting to a bound
    # path fails with EPROTOTYPE, even before listen(2), and no empty connection enters the
    # listener's backlog.
    with unix_socket(name, socket.SOCK_DGRAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(name) == errno.ECONNREFUSED


def _remove_stale(name: str | bytes) -> None:
    """Remove a path if it is still stale."""
    with contextlib.suppress(FileNotFoundError), _hold_inode(name) as descriptor:
        status = os.lstat(name) if descriptor is None else os.fstat(descriptor)
        if _is_stale(name):
            try:
                _unlink(os.fsencode(name), (status.st_dev, status.st_ino))
            except OSError as exc:
                message = f"cannot listen: {exc.strerror}"
                raise OSError(exc.errno, message, os.fsdecode(name)) from exc


class PathLockedError(BlockingIOError):
    """Another program is replacing the same path."""


@contextlib.contextmanager
def _replace_lock(name: str | bytes) -> Iterator[None]:
    """Hold a lock while a stale path is removed and bound again.

    Anybody can lock a file or directory that they can read, so the lock is a file that only this
    user can open. Anyone who may write to the directory can replace the lock file with another
    file. In that case we continue without a lock. Two of this user's programs that start at the
    same moment may then both bind, but nobody can make us wait. The programs of different users
    have different lock files, so they do not wait for each other.
    """
    if sys.platform == "win32":  # pragma: no cover (tests run on Linux)
        yield
        return
    import fcntl

    directory, base = os.path.split(os.fsencode(name))
    path = os.path.join(directory, b".%s.%d.lock" % (base, _euid()))
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
            if status.st_nlink == 0:  # the previous holder has removed the file
                continue
            try:
                yield
            finally:
                # Unlink before unlocking. Programs that come later create a new file.
                with contextlib.suppress(OSError):
                    _unlink(path, (status.st_dev, status.st_ino))
            return
        finally:
            os.close(descriptor)
    raise PathLockedError(
        errno.EAGAIN,
        "cannot listen: another program is starting to listen on this path",
        os.fsdecode(name),
    )


def _open_lock(path: bytes) -> int | None:
    """Open or create the lock file. Returns None if this fails, or if the file is not ours."""
    flags = os.O_RDWR | os.O_CREAT | _O_NOFOLLOW | _O_NONBLOCK
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as exc:
        if exc.errno in (errno.EMFILE, errno.ENFILE):
            raise
        return None  # a link, a directory or another user's file; or we cannot create a file here
    status = os.fstat(descriptor)
    if (
        stat.S_ISREG(status.st_mode)
        and status.st_uid == _euid()
        and not stat.S_IMODE(status.st_mode) & 0o077
        and status.st_nlink <= 1
    ):
        return descriptor
    os.close(descriptor)
    return None
