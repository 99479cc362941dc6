"""Socket activation: the listening sockets that systemd passes to a program (sd_listen_fds(3))."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from collections.abc import Iterator

from .._arguments import quoted

# The first descriptor that systemd passes (SD_LISTEN_FDS_START).
_FIRST = 3

# The name that sd_listen_fds(3) gives to a descriptor without a name.
_UNNAMED = "unknown"

_MAX_DIGITS = 20  # as in the largest 64-bit number
_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

# _passed: the name of each passed descriptor that was not taken yet, by the descriptor's number.
# _taken: the names of the descriptors that were taken. _pid: the ID of the process that got them.
_passed: dict[int, str] = {}
_taken: set[str] = set()
_pid = 0


@contextlib.contextmanager
def activated_sockets(name: str | None) -> Iterator[list[socket.socket]]:
    """Yield the sockets with this name, or all sockets that were not taken yet.

    If the block succeeds, the sockets count as taken. If it raises, they do not. Raises OSError if
    there are no such sockets, TypeError if the name is not a str, and ValueError if a descriptor is
    not a stream socket.
    """
    if name is not None and not isinstance(name, str):
        raise TypeError(f"name must be a str or None, not {quoted(name)}")
    _read_environment()
    found = [number for number, each in _passed.items() if name in (None, each)]
    if not found:
        named = "" if name is None else f" named {quoted(name)}"
        if name in _taken or (name is None and _taken):
            raise OSError(errno.ENOENT, f"the sockets{named} of systemd were taken already")
        others = f" (but {', '.join(map(quoted, _passed.values()))})" if _passed else _for_whom()
        message = f"systemd has passed no sockets{named} to this process{others}"
        raise OSError(errno.ENOENT, message)
    sockets: list[socket.socket] = []
    try:
        sockets.extend(map(_socket_of, found))
        yield sockets
    except BaseException:
        for sock in sockets:
            sock.detach()
        raise
    for number in found:
        _taken.add(_passed.pop(number))
    for variable in _VARIABLES:
        os.environ.pop(variable, None)


def _read_environment() -> None:
    global _passed, _taken, _pid
    if "LISTEN_FDS" in os.environ:
        _passed, _taken, _pid = _from_environment(), set(), os.getpid()
    elif _pid != os.getpid():  # after a fork, they belong to the parent process
        _passed, _taken = {}, set()


def _from_environment() -> dict[int, str]:
    """Return the descriptors that the environment assigns to this process, with their names."""
    if _number("LISTEN_PID") != os.getpid():
        return {}
    count = _number("LISTEN_FDS")
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    found = {}
    for number in range(_FIRST, _FIRST + count):
        try:
            os.set_inheritable(number, False)
        except OSError as exc:
            message = f"LISTEN_FDS is {count}, but the descriptor {number} is not open"
            raise OSError(exc.errno, message) from None
        index = number - _FIRST
        found[number] = (names[index] if index < len(names) else "") or _UNNAMED
    return found


def _for_whom() -> str:
    """Explain the common mistake: a shell script that starts the program without ``exec``."""
    pid, own = os.environ.get("LISTEN_PID"), str(os.getpid())
    return (
        "" if pid in (None, own) else f" (LISTEN_PID is {quoted(pid)}, and this process is {own})"
    )


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    # int() alone also accepts "1_0", and non-ASCII digits.
    if not (text.isascii() and text.isdigit() and len(text) <= _MAX_DIGITS):
        raise OSError(errno.EINVAL, f"{variable} is not a number: {quoted(text)}")
    return int(text)


def _socket_of(number: int) -> socket.socket:
    if not stat.S_ISSOCK(os.fstat(number).st_mode):
        raise ValueError(f"the descriptor {number} that systemd has passed is not a socket")
    sock = socket.socket(fileno=number)
    if sock.type == socket.SOCK_DGRAM:
        sock.detach()
        raise ValueError(
            f"the descriptor {number} that systemd has passed is a datagram socket: a Listener "
            "needs stream sockets (ListenStream=); datagrams are for open_udp"
        )
    return sock
