"""Third-party servers, each configured and started in its own directory.

The servers listen on loopback. They neither read the system's configuration nor write outside
their directory. At the end, the helpers stop all processes and delete all files of a server.
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
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.authority import rsa_certificate
from trisock import Certificate
from trisock.testing import Authority

# How long a server may take to start, and to stop, in seconds.
_PATIENCE = 30

# Below the ephemeral ports, which the system assigns to clients.
_PORTS = range(20_000, 30_000)

PASSWORD = "secret"  # the password of all users


# The program that each server fixture needs.
PROGRAMS = {
    "postfix": "postfix",
    "dovecot": "dovecot",
    "slapd": "slapd",
    "postgresql": "pg_ctlcluster",
    "mariadb": "mariadbd",
    "proftpd": "proftpd",
    "vsftpd": "vsftpd",
    "prosody": "prosody",
    "inspircd": "inspircd",
    "nnrpd": "/usr/lib/news/bin/nnrpd",
    "iksd": "iksd",
    "exim": "exim4",
    "cyrus": "cyrmaster",
}


@dataclass(frozen=True)
class RealServer:
    """A running server.

    Attributes:
      ports: the TCP ports, by protocol.
      directory: the directory of the server's files.
      log: the log file.
      process: the main process, which the tests started.
    """

    ports: dict[str, int]
    directory: Path
    log: Path
    process: subprocess.Popen[bytes]

    def child_called(self, word: str) -> int:
        """Return the PID of the only child process whose command line contains a word."""
        found = []
        for pid in _descendants(self.process.pid):
            with contextlib.suppress(OSError):  # if the process has exited in the meantime
                if word in Path(f"/proc/{pid}/cmdline").read_text():
                    found.append(pid)
        (pid,) = found
        return pid


# ---- a server's directory, ports and certificate ----


@contextlib.contextmanager
def temporary_directory() -> Iterator[Path]:
    """Make a directory that all users can read, because servers drop root's privileges.

    The directory's path is short, because the path of a Unix socket has at most 107 bytes.
    """
    with tempfile.TemporaryDirectory(prefix="trisock-") as name:
        directory = Path(name)
        directory.chmod(0o755)
        yield directory


@contextlib.contextmanager
def reserved_ports(*names: str) -> Iterator[dict[str, int]]:
    """Reserve free ports for a server, for the duration of a block.

    A bind without ``SO_REUSEADDR`` succeeds only if a port is free. After the bind, set the option,
    so that the server can bind the same port. (The server also sets the option.)
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
    """Write a certificate and its key to files. Only the owner can read the key's file."""
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
    rsa: bool = False,
    user: str | None = None,
) -> Iterator[tuple[Path, dict[str, int]]]:
    """Make a server's directory with server.pem, server.key and ca.pem. Reserve its ports."""
    with temporary_directory() as directory, reserved_ports(*ports) as numbers:
        issue = rsa_certificate if rsa else Authority.certificate
        certificate = issue(authority, "localhost", "127.0.0.1")
        write_certificate(certificate, directory, "server", user)
        (directory / "ca.pem").write_bytes(authority.ca)
        yield directory, numbers


def answers(port: int) -> bool:
    """Return whether a server listens on a port."""
    try:
        socket.create_connection(("127.0.0.1", port)).close()
    except ConnectionRefusedError:
        return False
    return True


@contextlib.contextmanager
def started(
    command: Sequence[str | Path],
    directory: Path,
    ports: dict[str, int],
    *,
    announced: bytes | None = None,
    user: str | None = None,
    stop: signal.Signals = signal.SIGTERM,
    env: dict[str, str] | None = None,
) -> Iterator[RealServer]:
    """Start a server, wait until it is ready, and stop all its processes at the end.

    Args:
      command: the command that starts the server in the foreground.
      directory: the server's directory. Its file "log" receives the log and output.
      ports: the TCP ports, by protocol.
      announced: wait until the log contains this message. By default, wait until all ports listen.
      user: the user that runs the server, if the tests run as root.
      stop: the signal that stops the server.
      env: the environment of the server. By default, it is the environment of the tests.
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
            env=env,
            start_new_session=True,  # Postfix kills its process group: keep the tests out of it
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
            if not select.select([other], [], [], _PATIENCE)[
                0
            ]:  # a pidfd becomes readable when the process exits
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
            # "1234 (name) S 1233 ...", where the name may contain any character
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found: set[int] = set()
    new = {pid}
    while new:
        new = {child for parent in new for child in children.get(parent, ())} - found
        found |= new
    return found
