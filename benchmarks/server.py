"""A peer's server in its own process, and the CPU time and memory that the process uses."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_PROJECT = Path(__file__).parents[1]


class ServerEnded(Exception):
    """The server exited before it accepted connections."""


class Server:
    """A running server. The server exits when this process exits.

    Args:
      arguments: the server's module and its arguments.
      core: the core that the server runs on.
      source: the ``PYTHONPATH`` of the server, or an empty string.
    """

    def __init__(self, arguments: list[str], core: int, source: str = "") -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, closed by stop()
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments, f"--core={core}", f"--parent={os.getpid()}"],
            cwd=_PROJECT,
            env=os.environ | ({"PYTHONPATH": source} if source else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._announced: bytes | None = None
        # The ID of the server's CPU clock, computed as clock_getcpuclockid(3) does (glibc,
        # sysdeps/unix/sysv/linux; CPUCLOCK_SCHED is 2). This clock counts nanoseconds, but
        # /proc/PID/stat counts only hundredths of a second.
        self._cpu_clock = (~self._process.pid << 3) | 2

    @property
    def pid(self) -> int:
        """The process ID."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the server accepts connections or exits."""
        if self._announced is None:
            assert self._process.stdout is not None
            self._announced = self._process.stdout.readline()

    def port(self) -> int:
        """Wait until the server accepts connections, and return its port."""
        self.wait_ready()
        if not self._announced:
            raise ServerEnded("the server did not start")
        return int(self._announced)

    def cpu_seconds(self) -> float:
        """Return the CPU time used so far, in user code and in the kernel.

        Waits until the server sleeps, for two reasons. First, the work after the server's last
        response must count. Second, while a process runs, other processes see its clock advance
        only at ticks (4 ms at 250 Hz; Linux, kernel/sched/cputime.c, thread_group_cputime).
        """
        while self._is_running():
            os.sched_yield()
        return time.clock_gettime(self._cpu_clock)

    def private_bytes(self) -> int:
        """Return the size of the server's private memory, which no other process shares."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        sizes = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
        return sum(
            int(sizes[each].split()[0]) * 1024 for each in ("Private_Clean", "Private_Dirty")
        )

    def _is_running(self) -> bool:
        stat = Path(f"/proc/{self._process.pid}/stat").read_bytes()
        return stat.rpartition(b")")[2].split()[0] == b"R"

    def stop(self) -> str:
        """Stop the server, and return the last line it wrote to stderr, if any."""
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        assert self._process.stdout is not None
        self._process.stdout.close()
        if self._stderr.closed:
            return ""
        with self._stderr:
            self._stderr.seek(0)
            lines = self._stderr.read().decode(errors="replace").splitlines()
        return next((line.strip() for line in reversed(lines) if line.strip()), "")
