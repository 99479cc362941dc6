"""A peer's server, in a process of its own, and what it has used so far."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path


class PeerFailed(Exception):
    """The server did not start, or has ended; the text says why."""


class Server:
    """A running server.

    Args:
      command: the module that is the server, and its arguments.
      core: the core that it runs on.
    """

    def __init__(self, command: list[str], core: int) -> None:
        self._errors = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *command, f"--core={core}", f"--parent={os.getpid()}"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )
        # The clock of another process: clock_getcpuclockid(3) makes its number in this way
        # (CPUCLOCK_SCHED, <linux/posix-timers.h>; glibc, sysdeps/unix/sysv/linux). It
        # counts nanoseconds, where /proc/PID/stat counts hundredths of a second.
        self._clock = (~self._process.pid << 3) | 2

    def port(self) -> int:
        """Wait until the server accepts connections, and return its port."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise PeerFailed(self.complaint())
        return int(line)

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used, in its own code and in the kernel's."""
        return time.clock_gettime(self._clock)

    def private_bytes(self) -> int:
        """Return how much memory it has for itself alone."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        sizes = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
        return sum(int(sizes[key].split()[0]) * 1024 for key in ("Private_Clean", "Private_Dirty"))

    def complaint(self) -> str:
        """Return the last line that it wrote to stderr."""
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "it just ended")

    def stop(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        self._errors.close()
