"""Third-party servers, each configured and started in its own directory.

They listen on loopback, and neither read the system's configuration nor write outside their
directory. At the end all their processes are stopped and all their files are deleted.
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

import trustme

from helpers.authority import Authority
from trisock import Certificate

# Seconds to start, and to stop.
_PATIENCE = 30

# Below the ephemeral ports, which the system assigns.
_PORTS = range(20_000, 30_000)

PASSWORD = "secret"  # of all users


@dataclass(frozen=True)
class RealServer:
    """A running server.

    Attributes:
      ports: its TCP ports, by protocol.
      directory: contains its files.
      log: its log file.
      process: its first process.
    """

    ports: dict[str, int]
    directory: Path
    log: Path
    process: subprocess.Popen[bytes]

    def child_called(self, word: str) -> int:
        """Return the PID of its only process whose command line contains a word."""
        found = []
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):  # it has exited in the meantime
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        (pid,) = found
        return pid


# ---- a server's directory, ports and certificate ----


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a directory that other users can read: servers drop root's privileges.

    Its path is short: the path of a Unix socket has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="trisock-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@contextlib.contextmanager
def reserved_ports(*names: str) -> Iterator[dict[str, int]]:
    """Reserve free ports for a server, for the duration of a block.

    The bind without ``SO_REUSEADDR`` shows that a port is free. Then the option is set, so that a
    server, which sets it too, can bind the same port.
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
    """Write a certificate and its key. Only the owner can read the key."""
    (directory / f"{stem}.pem").write_bytes(certificate._chain)
    key = directory / f"{stem}.key"
    key.touch(mode=0o600)
    key.write_bytes(certificate._private_key)
    if user is not None and os.geteuid() == 0:
        shutil.chown(key, user)


@contextlib.contextmanager
def prepared(
    authority: Authority,
    *ports: str,
    key_type: trustme.KeyType = trustme.KeyType.ECDSA,
    user: str | None = None,
) -> Iterator[tuple[Path, dict[str, int]]]:
    """Make a server's directory, with server.pem, server.key and ca.pem, and reserve its ports."""
    with temporary_directory() as directory, reserved_ports(*ports) as numbers:
        certificate = authority.issue("localhost", "127.0.0.1", key_type=key_type)
        write_certificate(certificate, directory, "server", user)
        (directory / "ca.pem").write_bytes(authority.pem)
        yield directory, numbers


def answers(port: int) -> bool:
    """Whether a server listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def started(
    command: list[str | Path],
    directory: Path,
    ports: dict[str, int],
    *,
    announced: bytes | None = None,
    user: str | None = None,
    stop: signal.Signals = signal.SIGTERM,
) -> Iterator[RealServer]:
    """Start a server, wait until it is ready, and stop all its processes at the end.

    Args:
      command: starts it in the foreground.
      directory: its directory. Its log and its output go to the file "log" there.
      ports: its TCP ports, by protocol.
      announced: a log message that means ready. By default, it is ready when all ports accept.
      user: the user to run it as, if the tests run as root.
      stop: the signal that stops it.
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
    """Stop a server. If a process survives, kill it and raise RuntimeError."""
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
            if not select.select([other], [], [], _PATIENCE)[0]:  # readable once it has exited
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
            # "1234 (name) S 1233 ...": the name may contain anything
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for parent in new for child in children.get(parent, ())} - found
        found |= new
    return found
