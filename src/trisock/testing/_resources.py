"""What a handler may leave behind: tasks and descriptors."""

from __future__ import annotations

import contextlib
import os

from .._text import printable
from ._watchdog import Watchdog

_MAX_NAMED = 5  # a message names at most this many descriptors


class Resources:
    """A snapshot of the tasks and descriptors that a handler may leave behind."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog
        self._tasks = set(watchdog.started_by_handlers)
        self._descriptors = _descriptors()

    def left(self) -> str:
        """Describe what was added since the snapshot, or return ``""``."""
        tasks = self._watchdog.started_by_handlers - self._tasks
        if tasks:
            return f"tasks running ({', '.join(sorted({task.name for task in tasks}))})"
        descriptors = _descriptors() - self._descriptors
        named = ", ".join(_target(number) for number, _, _ in sorted(descriptors)[:_MAX_NAMED])
        return f"descriptors open ({len(descriptors)}: {named})" if descriptors else ""


def _target(number: int) -> str:
    """Return the path, or the kind, of what a descriptor refers to."""
    with contextlib.suppress(OSError):
        return printable(os.readlink(f"/proc/self/fd/{number}"))
    return f"number {number}"  # pragma: no cover (tests run on Linux)


def _descriptors() -> set[tuple[int, int, int]]:
    """Return the numbers of the open descriptors, and what they refer to. Empty on Windows."""
    directory = "/proc/self/fd" if os.path.isdir("/proc/self/fd") else "/dev/fd"
    found = set()
    if os.path.isdir(directory):  # pragma: no branch (tests run on Linux)
        for name in os.listdir(directory):
            with contextlib.suppress(OSError):  # os.listdir has closed its descriptor
                status = os.fstat(int(name))
                found.add((int(name), status.st_dev, status.st_ino))
    return found
