"""A peer's server in a process of its own, and what that has used so far."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_PROJECT = Path(__file__).parents[1]


class ServerEnded(Exception):
    """The server has ended before it accepted connections."""


class Server:
    """A running server, which does not outlive this process.

    Args:
      arguments: the module that is the server, and its own arguments.
      core: the core that it runs on.
      source: a directory that comes first on its ``PYTHONPATH``, if there is one.
    """

    def __init__(self, arguments: list[str], core: int, source: str = "") -> None:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115, for as long as the server
        self._process = subprocess.Popen(
            [sys.executable, "-m", *arguments, f"--core={core}", f"--parent={os.getpid()}"],
            cwd=_PROJECT,
            env=os.environ | ({"PYTHONPATH": source} if source else {}),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
        )
        self._announced: bytes | None = None
        # The clock of another process; clock_getcpuclockid(3) makes its number in this way (glibc,
        # sysdeps/unix/sysv/linux; CPUCLOCK_SCHED is 2). It counts nanoseconds, where
        # /proc/PID/stat counts hundredths of a second.
        self._cpu_clock = (~self._process.pid << 3) | 2

    @property
    def pid(self) -> int:
        """The number of its process."""
        return self._process.pid

    def wait_ready(self) -> None:
        """Wait until the server accepts connections, or has ended."""
        if self._announced is None:
            assert self._process.stdout is not None
            self._announced = self._process.stdout.readline()

    def port(self) -> int:
        """Return its port, as soon as it accepts connections."""
        self.wait_ready()
        if not self._announced:
            raise ServerEnded("the server did not start")
        return int(self._announced)

    def cpu_seconds(self) -> float:
        """Return the CPU time that it has used, in its own code and in the kernel's.

        Waits until it has nothing to do: what it does behind its last answer is part of the work,
        and while a process runs, others see its clock stand still from one tick to the next (4 ms
        at 250 Hz; Linux, kernel/sched/cputime.c, thread_group_cputime).
        """
        while self._is_running():
            os.sched_yield()
        return time.clock_gettime(self._cpu_clock)

    def private_bytes(self) -> int:
        """Return how much memory it has that no other process shares."""
        rollup = Path(f"/proc/{self._process.pid}/smaps_rollup").read_text()
        sizes = dict(line.split(":", 1) for line in rollup.splitlines()[1:])
        return sum(
            int(sizes[each].split()[0]) * 1024 for each in ("Private_Clean", "Private_Dirty")
        )

    def _is_running(self) -> bool:
        stat = Path(f"/proc/{self._process.pid}/stat").read_bytes()
        return stat.rpartition(b")")[2].split()[0] == b"R"

    def stop(self) -> str:
        """End it, and return the last line that it has written to stderr, if any."""
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
