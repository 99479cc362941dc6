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

# How systemd calls a descriptor without a name.
_UNNAMED = "unknown"

_VARIABLES = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES", "LISTEN_PIDFDID")

# The passed descriptors that were not taken yet, with their names, and the process that has them.
_passed: dict[int, str] = {}
_pid = 0


@contextlib.contextmanager
def activated_sockets(name: str | None) -> Iterator[list[socket.socket]]:
    """Yield the sockets of this name, or all that were not taken yet. The block takes them.

    If the block raises, nothing is taken. Raises OSError if there are none, and ValueError if a
    descriptor is not a stream socket.
    """
    _read_environment()
    found = [number for number, each in _passed.items() if name in (None, each)]
    if not found:
        named = "" if name is None else f" named {quoted(name)}"
        raise OSError(
            errno.ENOENT,
            f"systemd has passed no sockets{named} to this process, or they were taken already",
        )
    sockets: list[socket.socket] = []
    try:
        sockets.extend(map(_socket_of, found))
        yield sockets
    except BaseException:
        for sock in sockets:
            sock.detach()
        raise
    for number in found:
        del _passed[number]
    for variable in _VARIABLES:
        os.environ.pop(variable, None)


def _read_environment() -> None:
    global _passed, _pid
    if "LISTEN_FDS" in os.environ:
        _passed, _pid = _from_environment(), os.getpid()
    elif _pid != os.getpid():  # they belong to the process that has forked this one
        _passed = {}


def _from_environment() -> dict[int, str]:
    """Return the descriptors that the environment promises to this process, with their names."""
    try:
        if int(os.environ.get("LISTEN_PID", "")) != os.getpid():
            return {}
        count = int(os.environ["LISTEN_FDS"])
    except ValueError:
        raise OSError(errno.EINVAL, "LISTEN_PID and LISTEN_FDS are not numbers") from None
    names = os.environ.get("LISTEN_FDNAMES", "").split(":")
    names += [_UNNAMED] * (count - len(names))
    found = {_FIRST + index: names[index] or _UNNAMED for index in range(count)}
    for number in found:
        os.set_inheritable(number, False)
    return found


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
