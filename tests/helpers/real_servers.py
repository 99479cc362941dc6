"""Servers of other projects, each configured and started in a directory of its own.

They listen on loopback, take nothing from the system's configuration and write nothing outside
their directory, and at the end none of their processes and none of their files is left.
"""

from __future__ import annotations

import contextlib
import errno
import os
import pwd
import random
import select
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trisock import Certificate

# A server that takes longer to start or to stop has failed.
_PATIENCE = 30

# Where no system looks for a port that nobody has named: below the ephemeral ones.
_PORTS = range(20_000, 30_000)

PASSWORD = "secret"  # everybody's


@dataclass(frozen=True)
class RealServer:
    """A server that is running.

    Attributes:
      ports: its TCP ports, by what is spoken there.
      directory: where its files are.
      log: what it has to say.
      process: its first process.
    """

    ports: dict[str, int]
    directory: Path
    log: Path
    process: subprocess.Popen[bytes]

    def child_called(self, word: str) -> int:
        """Return the one process of it that has a word in its command line."""
        found = []
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        (pid,) = found
        return pid


# ---- what all of them need ----


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a directory that other users can look into: servers give up root's rights.

    Its path is short: a Unix socket's may have 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="trisock-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@contextlib.contextmanager
def reserved_ports(*names: str) -> Iterator[dict[str, int]]:
    """Find free ports and keep everybody off them but a server, for as long as the context lasts.

    A port is bound without ``SO_REUSEADDR``, so it is nobody else's, and only then shared with
    those who have that option, as servers do.
    """
    with contextlib.ExitStack() as stack:
        yield {name: _reserve(stack.enter_context(socket.socket())) for name in names}


def _reserve(sock: socket.socket) -> int:
    while True:
        port = random.choice(_PORTS)
        try:
            sock.bind(("127.0.0.1", port))
        except OSError as exc:
            if exc.errno != errno.EADDRINUSE:
                raise
        else:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            return port


def write_certificate(
    certificate: Certificate, directory: Path, stem: str, user: str | None = None
) -> None:
    """Write a certificate and its key, which only its owner can read."""
    (directory / f"{stem}.pem").write_bytes(certificate._chain)
    key = directory / f"{stem}.key"
    key.touch(mode=0o600)
    key.write_bytes(certificate._private_key)
    if user is not None and os.geteuid() == 0:
        shutil.chown(key, user)


def answers(port: int) -> bool:
    """Whether somebody listens."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def started(
    command: list[str | Path],
    *,
    ports: dict[str, int],
    directory: Path,
    announced: bytes | None = None,
    user: str | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[RealServer]:
    """Start a server, wait until it is ready, and stop all of it at the end.

    Args:
      command: starts it in the foreground.
      directory: its own. It logs to the file "log" there; what it prints goes there, too.
      announced: what it logs when it serves; by default it does when all its ports answer.
      user: whom to run it as, if it is root who starts it.
      stop: the signal that tells it to stop.
    """
    log = directory / "log"

    def ready() -> bool:
        if announced is not None:
            return announced in log.read_bytes()
        return all(map(answers, ports.values()))

    with log.open("ab") as output:
        process = subprocess.Popen(
            list(map(str, command)),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,  # Postfix stops its whole process group
            **_identity(user),
        )
    try:
        deadline = time.monotonic() + _PATIENCE
        while not ready():
            if process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"{command[0]} did not start: {log.read_text()}")
            time.sleep(0.01)
        yield RealServer(ports, directory, log, process)
    finally:
        _stop(process, stop)


def _identity(user: str | None) -> dict[str, Any]:
    if user is None or os.geteuid() != 0:
        return {}
    entry = pwd.getpwnam(user)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}


def _stop(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    """Stop a server, and make sure that nothing of it goes on."""
    others = []
    for pid in _descendants(process.pid):
        with contextlib.suppress(ProcessLookupError):
            others.append(os.pidfd_open(pid))
    left = []
    try:
        process.send_signal(how)
        try:
            process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            left.append(process.pid)
            process.kill()
            process.wait()
        for other in others:
            if not select.select([other], [], [], _PATIENCE)[0]:  # readable once it has ended
                left.append(other)
                signal.pidfd_send_signal(other, signal.SIGKILL)
    finally:
        for other in others:
            os.close(other)
    if left:
        raise RuntimeError(f"{len(left)} processes of {process.args!r} had to be killed")


def _descendants(pid: int) -> set[int]:
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # "1234 (any name) S 1233 ...": the name may hold anything
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for parent in new for child in children.get(parent, ())} - found
        found |= new
    return found
