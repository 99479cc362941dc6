"""A pseudo-terminal, for programs that check whether they run on a terminal."""

from __future__ import annotations

import contextlib
import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator

from helpers.deadline import DEADLINE

WIDTH = 80
TERM = "xterm-256color"


def open_terminal(width: int = WIDTH) -> tuple[int, int]:
    """Return the descriptors of both ends: the user's, and the program's."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, width, 0, 0))
    return master, slave


class PseudoTerminal:
    """A program on a pseudo-terminal, and its user, who types and reads.

    Attributes:
      slave: the program's end of the terminal. On a real terminal, the shell shares it.
      process: the program.
    """

    def __init__(self, *command: str, width: int = WIDTH, **environment: str) -> None:
        self._master, self.slave = open_terminal(width)
        self._shown = b""
        base = {
            key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS")
        }
        self.process = subprocess.Popen(
            command,
            stdin=self.slave,
            stdout=self.slave,
            stderr=self.slave,
            start_new_session=True,
            preexec_fn=self._take_terminal,
            env={**base, "TERM": TERM, **environment},
        )

    @staticmethod
    def _take_terminal() -> None:
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # so that Ctrl-C reaches the program

    def type(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def read_until(self, text: str) -> str:
        """Wait until the output contains the text. Return all output so far."""
        end = time.monotonic() + DEADLINE
        while text.encode() not in self._shown:
            ready, _, _ = select.select([self._master], [], [], end - time.monotonic())
            assert ready, f"{text!r} never came: {self._shown!r}"
            self._shown += os.read(self._master, 65536)
        return self.shown

    @property
    def shown(self) -> str:
        return self._shown.decode(errors="replace")

    def wait(self) -> int:
        """Wait until the program exits. Return its exit status."""
        end = time.monotonic() + DEADLINE
        while self.process.poll() is None:
            assert time.monotonic() < end, self._shown
            self._drain(0.02)
        self._drain(0)
        return self.process.returncode

    def _drain(self, seconds: float) -> None:
        while select.select([self._master], [], [], seconds)[0]:
            self._shown += os.read(self._master, 65536)
            seconds = 0

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self.slave)


@contextlib.contextmanager
def on_terminal(*command: str, width: int = WIDTH, **environment: str) -> Iterator[PseudoTerminal]:
    """Run a program on a pseudo-terminal during a block."""
    terminal = PseudoTerminal(*command, width=width, **environment)
    try:
        yield terminal
    finally:
        terminal.close()


def trisock(*arguments: object) -> tuple[str, ...]:
    """Return the command line of ``python -m trisock``."""
    return (sys.executable, "-m", "trisock", *map(str, arguments))
